"""Names of adopted vectors: whole keys, folders, recurring keys; no row gets the vector of another image."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.embeddings.clip_retrieval import AdoptEmbeddings, Export
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.media import tars
from pipeline.shards.adopt import Adopt
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from tests.pipeline.synthetic import encoded, noise

CONFIG = EmbedConfig(batch_size=4)
KEYS = (["0", "1", "2"], ["0", "1", "2"], ["cats/0", "cats/1", "dogs/0", "./1", "./3", "4"])
"""The keys of three tars: two number their images alike, one has folders and names that begin with `./`."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Adopted tars with `KEYS`, their embeddings, and these in clip-retrieval's layout."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "tars").mkdir()
    for number, keys in enumerate(KEYS):
        tars.write(folder / "tars" / f"{number}.tar", (
            {"__key__": key, "png": encoded(noise(32, 32, 10 * number + place), "PNG")}
            for place, key in enumerate(keys)))
    dataset = Dataset.parse(str(folder / "root"), "names")
    for stage in (Adopt(dataset, ShardConfig(source=(str(folder / "tars"),))), Embed(dataset, CONFIG),
                  Export(dataset, CONFIG)):
        run_stage(stage)
    return dataset


@pytest.fixture
def place(exported: Dataset, tmp_path: Path) -> tuple[Dataset, Path]:
    """The dataset without embeddings, and a copy of what was exported."""
    root = tmp_path / "root"
    shutil.copytree(exported.root, root)
    dataset = Dataset(str(root), exported.name)
    theirs = Path(shutil.move(dataset.folder("clip-retrieval"), tmp_path / "theirs"))
    shutil.rmtree(dataset.folder("embeddings"))
    return dataset, theirs


def rewrite(folder: Path, change: Callable[[pa.Table, np.ndarray], tuple[pa.Table, np.ndarray]]) -> None:
    """Change metadata and vectors of an exported folder."""
    for path in sorted((folder / "metadata").iterdir()):
        vectors = folder / "img_emb" / path.name.replace("metadata", "img_emb").replace("parquet", "npy")
        table, array = change(pq.read_table(path), np.load(vectors))
        pq.write_table(table, path)
        np.save(vectors, array)


def check_adopted(dataset: Dataset, folder: Path, expected: Dataset) -> None:
    run_stage(AdoptEmbeddings(dataset, CONFIG, str(folder)))
    adopted, own = (Embeddings(version).all().astype(np.float32) for version in (dataset, expected))
    assert (adopted * own).sum(1).min() > 0.999
    # So these numbers distinguish the images.
    assert np.sort(own @ own.T, axis=1)[:, -2].max() < 0.998


def test_an_export_with_any_keys_is_adopted_back(place, exported):
    check_adopted(*place, exported)


def test_repeated_keys_match_their_vectors_without_hashes_in_any_order(place, exported):
    dataset, folder = place
    rewrite(folder, lambda table, vectors: (table.select(["image_path"])[::-1], vectors[::-1]))
    check_adopted(dataset, folder, exported)


def test_of_several_vectors_with_one_hash_the_image_chooses(place, exported):
    dataset, folder = place

    def add_wrong_vectors(table: pa.Table, vectors: np.ndarray) -> tuple[pa.Table, np.ndarray]:
        return pa.concat_tables([table, table]), np.concatenate([np.roll(vectors, 1, 0), vectors])

    rewrite(folder, add_wrong_vectors)
    check_adopted(dataset, folder, exported)


def test_paths_of_files_find_their_keys(place, exported):
    def change(table: pa.Table, vectors: np.ndarray) -> tuple[pa.Table, np.ndarray]:
        names = [f"/home/some one/images/{name.removeprefix('./')}.x.jpeg" for name in table["image_path"].to_pylist()]
        return pa.table({"image_path": pa.array(names).dictionary_encode()}), vectors

    rewrite(place[1], change)
    check_adopted(*place, exported)


@pytest.mark.parametrize(("shard", "row", "hashes"), [(0, 1, False), (1, 2, False), (2, 3, True)])
def test_the_vector_of_another_image_is_refused_by_shard_row_and_cosine(place, shard, row, hashes):
    dataset, folder = place
    path = sorted((folder / "img_emb").iterdir())[shard]
    vectors = np.load(path)
    vectors[row] = vectors[row - 1]
    np.save(path, vectors)
    if not hashes:
        rewrite(folder, lambda table, vectors: (table.select(["image_path"]), vectors))
    key = KEYS[shard][row]
    with pytest.raises(StageFailed, match=f"shard 00000{shard}: row {row}, {key}: expected a cosine of at least 0.99 "
                                          r".* got 0\.\d+"):
        run_stage(AdoptEmbeddings(dataset, CONFIG, str(folder)))


@pytest.mark.parametrize(("cells", "fault"), [
    ([1, 2, 3, 4, 5, 6], "expected text, got int64"), ([None] * 6, "expected text, got null"),
    (["a", None, "c", "d", "e", "f"], "expected 6 names, got 5, the others are null"),
    ([["a"]] * 6, "expected text, got list<element: string>")])
def test_metadata_that_does_not_name_images_is_refused(place, cells, fault):
    dataset, folder = place
    path = sorted((folder / "metadata").iterdir())[2]
    pq.write_table(pa.table({"image_path": cells}), path)
    with pytest.raises(StageFailed) as error:
        run_stage(AdoptEmbeddings(dataset, CONFIG, str(folder)))
    assert f"{path.name}: the column image_path" in str(error.value) and fault in str(error.value)
    assert "hint: the folder metadata/" in str(error.value)
