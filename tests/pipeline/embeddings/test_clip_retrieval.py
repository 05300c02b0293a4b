"""clip-retrieval's layout: an export is read back, and vectors of other images are refused."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings
from pipeline.datasets.metadata import metadata
from pipeline.embeddings.clip_retrieval import AdoptEmbeddings, Export
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import EmbedCaptions
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from pipeline.takedowns.hidden_rows import Tombstones
from pipeline.takedowns.takedowns import hide_rows
from pipeline.versions import verify

CONFIG = EmbedConfig(batch_size=16)


@pytest.fixture
def exported(copied: Dataset) -> Path:
    """A copy of the dataset without embeddings, and a folder with its embeddings in clip-retrieval's layout."""
    run_stage(EmbedCaptions(copied, CONFIG))
    run_stage(Export(copied, CONFIG))
    moved = shutil.move(copied.folder("clip-retrieval"), Path(copied.root).parent / "theirs")
    shutil.rmtree(copied.folder("embeddings"))
    return Path(moved)


def test_the_layout_is_clip_retrievals(copied, built):
    run_stage(EmbedCaptions(copied, CONFIG))
    manifest = run_stage(Export(copied, CONFIG))
    folder = Path(copied.folder("clip-retrieval"))
    kinds = {kind: sorted((folder / kind).iterdir()) for kind in ("img_emb", "text_emb", "metadata")}
    assert {len(files) for files in kinds.values()} == {3} and manifest["totals"]["samples"] == 72
    for images, texts, metadata_path, record in zip(*kinds.values(), built.manifest("shards")["items"], strict=True):
        vectors, table = np.load(images), pq.read_table(metadata_path)
        assert vectors.dtype == np.float16 and len(vectors) == len(np.load(texts)) == table.num_rows
        rows = metadata(built, record)
        assert table["image_path"].to_pylist() == [row["key"] for row in rows]
        assert table["caption"].to_pylist() == [row["caption"] for row in rows]
    np.testing.assert_array_equal(np.concatenate([np.load(path) for path in kinds["img_emb"]]), Embeddings(built).all())
    assert list(verify.find_faults(copied.root, copied.path("clip-retrieval"))) == []


def test_an_export_is_adopted_in_any_order(copied, built, exported):
    """Files in another order and rows in another order, as other tools may have written them."""
    everything = np.concatenate([np.load(path) for path in sorted((exported / "img_emb").iterdir())])
    names = [name for path in sorted((exported / "metadata").iterdir())
             for name in pq.read_table(path)["image_path"].to_pylist()]
    order = np.random.default_rng(0).permutation(len(names))
    shutil.rmtree(exported)
    (exported / "img_emb").mkdir(parents=True)
    (exported / "metadata").mkdir()
    import pyarrow as pa
    np.save(exported / "img_emb/img_emb_0.npy", 3 * everything[order].astype(np.float32))  # of any length
    pq.write_table(pa.table({"image_path": [f"some/folder/{names[row]}.jpg" for row in order]}),
                   exported / "metadata/metadata_0.parquet")
    run_stage(AdoptEmbeddings(copied, CONFIG, str(exported)))
    adopted, expected = Embeddings(copied).all().astype(np.float32), Embeddings(built).all().astype(np.float32)
    assert np.abs(adopted - expected).max() < 1e-3
    assert copied.manifest("embeddings")["info"]["encoder"] == built.manifest("embeddings")["info"]["encoder"]
    assert list(verify.find_faults(copied.root, copied.path("embeddings"))) == []


def test_rows_that_are_missing_are_marked_and_counted(copied, exported):
    path = sorted((exported / "img_emb").iterdir())[1]
    metadata_path = exported / "metadata" / path.name.replace("img_emb_", "metadata_").replace(".npy", ".parquet")
    np.save(path, np.load(path)[3:])
    pq.write_table(pq.read_table(metadata_path).slice(3), metadata_path)
    sealed = run_stage(AdoptEmbeddings(copied, CONFIG, str(exported)))
    assert sealed["totals"]["noted"] == {"not_adopted": 3} and sealed["totals"]["samples"] == 72
    assert np.flatnonzero(~Embeddings(copied).all().any(1)).tolist() == [30, 31, 32]


def test_vectors_of_other_images_are_refused(copied, exported):
    for path in (exported / "img_emb").iterdir():
        np.save(path, np.roll(np.load(path), 1, axis=0))
    with pytest.raises(StageFailed, match=r"do not fit shard .* of tiny-clip-64"):
        run_stage(AdoptEmbeddings(copied, CONFIG, str(exported)))


def test_a_file_that_was_cut_short_is_named(copied, exported):
    path = sorted((exported / "img_emb").iterdir())[1]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(StageFailed, match=f"{path.name} is no whole .npy file"):
        run_stage(AdoptEmbeddings(copied, CONFIG, str(exported)))


def test_metadata_without_names_or_cut_short_is_named(copied, exported):
    path = sorted((exported / "metadata").iterdir())[1]
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["image_path"]), path)
    with pytest.raises(StageFailed, match=f"{path.name} is no parquet with a column image_path"):
        run_stage(AdoptEmbeddings(copied, CONFIG, str(exported)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StageFailed, match=f"{path.name} is no parquet with a column image_path"):
        run_stage(AdoptEmbeddings(copied, CONFIG, str(exported)), overwrite=True)
    path.unlink()
    with pytest.raises(ValueError, match=rf"has no metadata beside it: there is no \S+{path.name}"):
        run_stage(AdoptEmbeddings(copied, CONFIG, str(exported)), overwrite=True)


def test_vectors_in_another_order_are_refused_even_if_the_first_match(copied, exported):
    for path in (exported / "img_emb").iterdir():
        vectors = np.load(path)
        np.save(path, np.concatenate([vectors[:4], vectors[4:][::-1]]))
    with pytest.raises(StageFailed, match=r"do not fit shard .* of tiny-clip-64"):
        run_stage(AdoptEmbeddings(copied, CONFIG, str(exported)))


def test_inconsistent_folders_are_refused(copied, exported, tmp_path):
    with pytest.raises(ValueError, match="has no img_emb"):
        run_stage(AdoptEmbeddings(copied, CONFIG, str(tmp_path)))
    path, last = (sorted((exported / "img_emb").iterdir())[place] for place in (0, -1))
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(ValueError, match=r"metadata/metadata_.* has no vectors beside it"):
        run_stage(AdoptEmbeddings(copied, CONFIG, str(exported)))
    last.write_bytes(content)
    np.save(path, np.load(path)[1:])
    with pytest.raises(StageFailed, match="29 rows, its metadata 30"):
        run_stage(AdoptEmbeddings(copied, CONFIG, str(exported)))


def test_rows_without_a_vector_are_left_out_of_the_export(copied):
    record = copied.manifest("embeddings")["items"][0]
    manifest = storage.read_json(storage.join(copied.folder("embeddings"), "manifest.json"))
    entry = file_of(manifest["items"][0], ".npy")
    path = storage.local_path(storage.join(copied.folder("embeddings"), entry["name"]))
    vectors = np.load(path)
    vectors[4] = 0
    np.save(path, vectors)
    entry |= storage.describe_file(entry["name"], path)
    storage.put_json(manifest, storage.join(copied.folder("embeddings"), "manifest.json"))
    sealed = run_stage(Export(copied, CONFIG))
    assert sealed["totals"]["skipped"] == {"undecodable": 1} and sealed["totals"]["samples"] == 71
    kept = pq.read_table(Path(copied.folder("clip-retrieval")) / f"metadata/metadata_{record['id']}.parquet")
    assert kept.num_rows == 29


def test_hidden_rows_are_left_out_of_the_export(copied: Dataset, tmp_path: Path) -> None:
    """Forgotten rows and tombstones; vectors, texts and metadata stay aligned. A later one makes the export stale."""
    run_stage(EmbedCaptions(copied, CONFIG))
    keys = [row["key"] for record in copied.manifest("shards")["items"] for row in metadata(copied, record, ["key"])]
    (tmp_path / "keys.txt").write_text(keys[31])
    run_stage(Tombstones(copied, str(tmp_path / "keys.txt")))
    hide_rows(copied, [2, 71], 0)
    sealed = run_stage(Export(copied, CONFIG))
    assert sealed["totals"]["skipped"] == {"hidden": 3} and sealed["totals"]["samples"] == 69
    folder = Path(copied.folder("clip-retrieval"))
    names = [name for path in sorted((folder / "metadata").iterdir())
             for name in pq.read_table(path)["image_path"].to_pylist()]
    assert names == [key for row, key in enumerate(keys) if row not in (2, 31, 71)]
    for kind, stage in (("img_emb", "embeddings"), ("text_emb", "text_embeddings")):
        exported = np.concatenate([np.load(path) for path in sorted((folder / kind).iterdir())])
        np.testing.assert_array_equal(exported, np.delete(Embeddings(copied, stage).all(), [2, 31, 71], 0))
    hide_rows(copied, [40], 0)
    with pytest.raises(ValueError, match=r"has changed: forgotten\nhint: .* rm \S+/clip-retrieval .*; then .* embed"):
        run_stage(Export(copied, CONFIG))
