import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.stages import records
from pipeline.stages.driver import run_stage
from pipeline.versions import verify
from tests.pipeline import synthetic

STAGES = ("shards", "embeddings", "index", "neighbors/drawn")


def faults(dataset) -> dict[str, str]:
    """Every fault of every stage by path."""
    return {fault["path"].removeprefix("datasets/drawn/v1/"): fault["fault"]
            for name in STAGES for fault in verify.find_faults(dataset.root, dataset.path(name))}


def path(dataset, name: str) -> Path:
    return storage.local_path(dataset.folder(name))


def test_a_healthy_root_has_no_faults(built):
    assert faults(built) == {}


@pytest.mark.parametrize("name", ["shards/000001.tar", "shards/000001.parquet", "embeddings/000002.npy",
                                  "index/knn.index", "index/index_infos.json", "neighbors/drawn/000000.ids.npy",
                                  "neighbors/drawn/000000.scores.npy"])
def test_a_flipped_bit_a_cut_end_and_a_lost_file_are_named(copied, name):
    whole = path(copied, name).read_bytes()
    for position in (0, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path(copied, name).write_bytes(flipped)
        assert "sha256" in faults(copied)[name]
    path(copied, name).write_bytes(whole[:-1])
    assert "bytes" in faults(copied)[name]
    path(copied, name).unlink()
    assert faults(copied)[name] == "is missing"
    path(copied, name).write_bytes(whole)
    assert faults(copied) == {}


def test_two_swapped_files_are_both_named(copied):
    for name, other_name in [("shards/000000.tar", "shards/000001.tar"),
                             ("embeddings/000000.npy", "embeddings/000001.npy"),
                             ("neighbors/drawn/000000.ids.npy", "neighbors/drawn/000001.ids.npy")]:
        first, second = path(copied, name).read_bytes(), path(copied, other_name).read_bytes()
        path(copied, name).write_bytes(second)
        path(copied, other_name).write_bytes(first)
        assert {name, other_name} <= set(faults(copied))


def rewrite_file(dataset, folder: str, name: str, data: bytes | None) -> None:
    """Put `data` in a file and adapt manifest and record, as a careful attacker would."""
    manifest = storage.read_json(storage.join(dataset.folder(folder), "manifest.json"))
    if data is not None:
        path(dataset, f"{folder}/{name}").write_bytes(data)
    for record in manifest["items"]:
        for entry in record["files"]:
            if entry["name"] == name:
                entry |= storage.describe_file(name, path(dataset, f"{folder}/{name}"))
        storage.put_json(record, storage.join(dataset.folder(folder), "records", f"{record['id']}.json"))
    manifest["totals"] = records.totals(manifest["items"])
    manifest["content"] = records.content(manifest["fingerprint"], manifest["files"], manifest["items"])
    storage.put_json(manifest, storage.join(dataset.folder(folder), "manifest.json"))


def test_misaligned_rows_are_named_even_with_matching_hashes(copied):
    vectors = np.load(path(copied, "embeddings/000001.npy"))
    rewrite_file(copied, "embeddings", "000001.npy", synthetic.npy(vectors[:-1]))
    assert faults(copied)["embeddings/000001.npy"] == "has 29 rows, its shard 30 samples"
    rewrite_file(copied, "embeddings", "000001.npy", synthetic.npy(vectors * np.float16(1.5)))
    assert "not of unit length" in faults(copied)["embeddings/000001.npy"]
    rewrite_file(copied, "embeddings", "000001.npy", synthetic.npy(np.full_like(vectors, np.nan)))
    assert "not of unit length" in faults(copied)["embeddings/000001.npy"]
    rewrite_file(copied, "embeddings", "000001.npy", b"no array")
    assert "cannot be read" in faults(copied)["embeddings/000001"]


def test_misaligned_neighbors_are_named_even_with_matching_hashes(copied):
    ids = np.load(path(copied, "neighbors/drawn/000000.ids.npy"))
    scores = np.load(path(copied, "neighbors/drawn/000000.scores.npy"))
    rewrite_file(copied, "neighbors/drawn", "000000.scores.npy", synthetic.npy(scores[:, ::-1]))
    assert "nearest first" in faults(copied)["neighbors/drawn/000000.scores.npy"]
    rewrite_file(copied, "neighbors/drawn", "000000.scores.npy", synthetic.npy(scores))
    rewrite_file(copied, "neighbors/drawn", "000000.ids.npy", synthetic.npy(np.where(ids == ids[0, 0], 72, ids)))
    assert "beyond the 72 rows" in faults(copied)["neighbors/drawn/000000.ids.npy"]
    rewrite_file(copied, "neighbors/drawn", "000000.ids.npy", synthetic.npy(ids[1:]))
    assert "neighbors/drawn/000000.ids.npy" in faults(copied)


def test_a_tar_cut_between_members_is_named_even_with_matching_hashes(copied):
    tar_path = path(copied, "shards/000000.tar")
    with tarfile.open(tar_path) as tar:
        cut = tar.getmembers()[-3].offset
    rewrite_file(copied, "shards", "000000.tar", tar_path.read_bytes()[:cut])
    assert "29 samples" in faults(copied)["shards/000000.tar"]


def test_samples_in_another_order_than_their_metadata_are_named(copied):
    from pipeline.media import tars
    samples = [{key: value for key, value in sample.items() if key != "__url__"}
               for sample in tars.read(path(copied, "shards/000000.tar"))]
    samples[3]["png"], samples[4]["png"] = samples[4]["png"], samples[3]["png"]
    tars.write(path(copied, "shards/000000.tar"), samples)
    rewrite_file(copied, "shards", "000000.tar", None)
    assert "another" in faults(copied)["shards/000000.tar"]


@pytest.mark.parametrize("edit", [
    lambda manifest: manifest["items"][0].update(samples=7), lambda manifest: manifest["items"].pop(),
    lambda manifest: manifest["totals"].update(samples=1), lambda manifest: manifest.update(content="0" * 64),
    lambda manifest: manifest["items"][0]["files"].pop(), lambda manifest: manifest.update(fingerprint="0" * 64),
    lambda manifest: manifest["section"].update(precision="fp16"), lambda manifest: manifest.pop("content"),
    lambda manifest: manifest.pop("totals"), lambda manifest: manifest["items"][0].update(skipped={"odd": 1}),
    lambda manifest: manifest["inputs"]["shards"].update(digest="0" * 64), lambda manifest: manifest.clear(),
])
def test_an_edited_manifest_is_named(copied, edit):
    address = storage.join(copied.folder("embeddings"), "manifest.json")
    manifest = storage.read_json(address)
    edit(manifest)
    storage.put_json(manifest, address)
    assert any(name.startswith("embeddings/") and ("manifest" in name or "record" in name) for name in faults(copied))


@pytest.mark.parametrize("spoil", [
    lambda file: file.unlink(), lambda file: file.write_text("{"), lambda file: file.write_text("[]"),
    lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"samples": 1})),
])
def test_an_edited_record_is_named(copied, spoil):
    spoil(path(copied, "embeddings/records/000001.json"))
    assert list(faults(copied)) == ["embeddings/records/000001.json"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", '{"items": 3}'])
def test_an_invalid_manifest_is_named(copied, text):
    file = path(copied, "embeddings/manifest.json")
    file.unlink() if text is None else file.write_text(text)
    assert "cannot be read" in faults(copied)["embeddings/manifest.json"]


def test_an_index_of_other_embeddings_is_named(copied, tmp_path):
    other = synthetic.vector_dataset(tmp_path / "other", "x", [synthetic.clustered(50, 256)])
    from pipeline.indices.config import IndexConfig
    from pipeline.indices.index import Index
    run_stage(Index(other, IndexConfig()))
    shutil.copy(path(other, "index/knn.index"), path(copied, "index/knn.index"))
    rewrite_file(copied, "index", "knn.index", None)
    assert "has 50 rows" in faults(copied)["index/knn.index"]


def test_faults_on_an_object_store_are_named_too(copied, s3):
    for name, data in synthetic.files_below(Path(copied.root)).items():
        storage.put_bytes(data, storage.join(s3, name))
    remote = type(copied)(s3, copied.name, copied.version)
    assert faults(remote) == {}
    storage.put_bytes(b"\0" * path(copied, "embeddings/000001.npy").stat().st_size,
                      storage.join(remote.folder("embeddings"), "000001.npy"))
    storage.remove(storage.join(remote.folder("shards"), "000000.parquet"))
    assert set(faults(remote)) == {"embeddings/000001.npy", "shards/000000.parquet"}
