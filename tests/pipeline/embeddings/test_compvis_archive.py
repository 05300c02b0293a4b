"""Retrieval databases of CompVis: each vector is matched with its patch, and other vectors are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.datasets.metadata import metadata
from pipeline.embeddings.clip_retrieval import AdoptEmbeddings
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.stages.plan import clear_folder
from pipeline.stages.types import StageFailed
from pipeline.versions import verify
from tests.pipeline.media.sample_images import photo

CONFIG = EmbedConfig(batch_size=16)
PICTURES = 9


def rows_of(dataset: Dataset) -> list[dict[str, Any]]:
    return [row for record in dataset.manifest("shards")["items"] for row in metadata(dataset, record)]


def archived(folder: Path, vectors: np.ndarray, ids: np.ndarray, coords: np.ndarray, parts: int = 3) -> Path:
    """A database in several files, compressed, as CompVis's builder names and saves them."""
    folder.mkdir()
    for part, rows in enumerate(np.array_split(np.arange(len(vectors)), parts), 1):
        np.savez_compressed(folder / f"{len(rows)}x{vectors.shape[1]}-part_{part}.npz", embedding=vectors[rows],
                            img_id=ids[rows], patch_coords=coords[rows])
    return folder


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for number in range(PICTURES):
        Image.fromarray(np.asarray(photo(120, 100 + number, number))).save(folder / f"pic{number:02d}.png")
    return folder


def sharded(root: Path, source: Path, patches: int) -> Dataset:
    dataset = Dataset.parse(str(root), "x")
    run_stage(Shard(dataset, ShardConfig(source=str(source), samples_per_shard=4, image_size=48, format="png",
                                         patches=patches, patch_side=96)))
    return dataset


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, list[dict[str, Any]]]:
    """A folder of images; the vectors of the two patches of each, and their metadata."""
    folder = tmp_path_factory.mktemp("patched")
    dataset = sharded(folder / "root", pictures(folder / "pictures"), 2)
    run_stage(Embed(dataset, CONFIG))
    return folder / "pictures", Embeddings(dataset).all(), rows_of(dataset)


def coordinates(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([[row["patch_left"], row["patch_top"], row["patch_left"] + 48, row["patch_top"] + 48]
                     for row in rows])


NAMES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "row": lambda row: row["source_row"], "file": lambda row: row["url"].rpartition("/")[2],
    "stem": lambda row: row["url"].rpartition("/")[2].removesuffix(".png"), "key": lambda row: row["key"]}


@pytest.mark.parametrize("name", ["row", "file", "stem"])
def test_each_vector_is_matched_with_its_patch(name: str, patched: Any, tmp_path: Path) -> None:
    source, vectors, rows = patched
    order = np.random.default_rng(0).permutation(len(rows))  # an archive has any order
    ids = np.array([NAMES[name](row) for row in rows])
    folder = archived(tmp_path / "theirs", 7 * vectors[order].astype(np.float32), ids[order], coordinates(rows)[order])
    dataset = sharded(tmp_path / "root", source, 2)
    manifest = run_stage(AdoptEmbeddings(dataset, CONFIG, str(folder)))
    adopted = Embeddings(dataset).all().astype(np.float32)
    assert np.abs(adopted - vectors.astype(np.float32)).max() < 1e-3 and not manifest["totals"]["noted"]
    # The comparison distinguishes patches of one image.
    assert np.abs(adopted[0] - vectors[1].astype(np.float32)).max() > 1e-2
    assert manifest["section"]["adopted"] == "compvis"
    assert list(verify.find_faults(dataset.root, dataset.path("embeddings"))) == []


@pytest.mark.parametrize("name", ["row", "key", "file"])
def test_uncropped_images_are_matched_too(name: str, tmp_path: Path) -> None:
    dataset = sharded(tmp_path / "root", pictures(tmp_path / "pictures"), 0)
    run_stage(Embed(dataset, CONFIG))
    vectors, rows = Embeddings(dataset).all(), rows_of(dataset)
    ids = np.array([NAMES[name](row) for row in rows])
    whole = np.tile([0, 0, 48, 48], (len(rows), 1))
    # One image is not in it.
    folder = archived(tmp_path / "theirs", vectors[1:], ids[1:], whole[1:])
    clear_folder(Embed(dataset, CONFIG))
    manifest = run_stage(AdoptEmbeddings(dataset, CONFIG, str(folder)))
    adopted = Embeddings(dataset).all()
    assert manifest["totals"]["noted"] == {"not_adopted": 1} and not adopted[0].any()
    assert np.abs(adopted[1:].astype(np.float32) - vectors[1:].astype(np.float32)).max() < 1e-3


def test_a_database_in_a_store_is_adopted(patched: Any, s3: str, tmp_path: Path) -> None:
    source, vectors, rows = patched
    ids = np.array([row["source_row"] for row in rows])
    for path in archived(tmp_path / "theirs", vectors, ids, coordinates(rows)).iterdir():
        storage.put_bytes(path.read_bytes(), f"{s3}/theirs/{path.name}")
    dataset = sharded(tmp_path / "root", source, 2)
    run_stage(AdoptEmbeddings(dataset, CONFIG, f"{s3}/theirs"))
    assert np.abs(Embeddings(dataset).all().astype(np.float32) - vectors.astype(np.float32)).max() < 1e-3


def refused(dataset: Dataset, folder: Path) -> str:
    with pytest.raises((StageFailed, ValueError)) as caught:
        run_stage(AdoptEmbeddings(dataset, CONFIG, str(folder)))
    assert "\nhint: " in str(caught.value)
    assert not dataset.is_sealed("embeddings")
    return str(caught.value)


def test_patches_that_were_cut_elsewhere_are_refused(patched: Any, tmp_path: Path) -> None:
    source, vectors, rows = patched
    coords, ids = coordinates(rows), np.array([row["source_row"] for row in rows])
    coords[5, [0, 2]] += 1
    text = refused(sharded(tmp_path / "root", source, 2), archived(tmp_path / "theirs", vectors, ids, coords))
    assert "has 2 patches of the image 2: expected one at " in text and "short side of the image 96" in text


def test_patches_of_uncropped_images_are_refused(patched: Any, tmp_path: Path) -> None:
    source, vectors, rows = patched
    ids = np.array([row["source_row"] for row in rows])
    text = refused(sharded(tmp_path / "root", source, 0),
                   archived(tmp_path / "theirs", vectors, ids, coordinates(rows)))
    assert "2 patches of the image 0" in text and "is no patch" in text


def test_vectors_of_other_or_missing_images_are_refused(patched: Any, tmp_path: Path) -> None:
    source, vectors, rows = patched
    ids, dataset = np.array([row["source_row"] for row in rows]), sharded(tmp_path / "root", source, 2)
    text = refused(dataset, archived(tmp_path / "turned", np.roll(vectors, 2, 0), ids, coordinates(rows)))
    assert "do not fit shard" in text and "the vector of tiny-clip-64" in text
    clear_folder(Embed(dataset, CONFIG))
    text = refused(dataset, archived(tmp_path / "others", vectors, ids + 1000, coordinates(rows)))
    assert "none of the 18 samples has a vector" in text
    clear_folder(Embed(dataset, CONFIG))
    text = refused(dataset, archived(tmp_path / "narrow", vectors[:, :64], ids, coordinates(rows)))
    assert "vectors of 64 numbers, tiny-clip-64 makes 256" in text


def test_invalid_vectors_are_counted(patched: Any, tmp_path: Path) -> None:
    source, vectors, rows = patched
    spoiled, ids = vectors.astype(np.float32), np.array([row["source_row"] for row in rows])
    spoiled[0], spoiled[3, 7], spoiled[17] = 0, np.nan, np.inf
    dataset = sharded(tmp_path / "root", source, 2)
    manifest = run_stage(AdoptEmbeddings(dataset, CONFIG, str(archived(tmp_path / "theirs", spoiled, ids,
                                                                       coordinates(rows)))))
    assert manifest["totals"]["noted"] == {"not_finite": 3}
    assert np.flatnonzero(~Embeddings(dataset).all().any(1)).tolist() == [0, 3, 17]


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(("name", "change", "message"), [
    ("4x256-part_1.npz", {"img_id": None}, "it has no img_id"),
    ("4x256-part_1.npz", {"img_id": "objects"}, "only unpickling reads"),
    ("5x256-part_1.npz", {}, r"shape \(4, 256\), its name says \(5, 256\)"),
    ("4x512-part_1.npz", {}, r"shape \(4, 256\), its name says \(4, 512\)"),
    ("4x256-part_1.npz", {"patch_coords": np.zeros((4, 2), int)}, r"patch_coords \(4, 2\), wanted are"),
    ("4x256-part_1.npz", {"patch_coords": np.full((4, 4), 0.5)}, "wanted are whole numbers"),
    ("4x256-part_1.npz", {"img_id": np.zeros(4)}, "wanted are numbers or text"),
    ("4x256-part_1.npz", {"img_id": np.zeros(3, int)}, "wanted are numbers or text"),
    ("4x256-part_1.npz", "cut", "cannot be read"),
    ("4x256-part_2.npz", "mixed", "some files of .* have numbers as img_id, others text"),
])
def test_archives_that_are_damaged_or_hostile_are_refused(name: str, change: Any, message: str, copied: Dataset,
                                                          tmp_path: Path) -> None:
    clear_folder(Embed(copied, CONFIG))
    (tmp_path / "theirs").mkdir()
    arrays = {"embedding": np.ones((4, 256), np.float32), "img_id": np.arange(4),
              "patch_coords": np.zeros((4, 4), int)}
    if change == "mixed":
        np.savez(tmp_path / "theirs" / "4x256-part_1.npz", **arrays)
        arrays["img_id"] = arrays["img_id"].astype(str)
    elif isinstance(change, dict):
        trap = np.array([Trap(tmp_path / "sprung"), 1, 2, 3], object)
        arrays |= {key: trap if isinstance(value, str) else value for key, value in change.items() if value is not None}
        arrays = {key: value for key, value in arrays.items() if change.get(key, 0) is not None}
    path = tmp_path / "theirs" / name
    np.savez(path, **arrays)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(StageFailed, match=message) as caught:
        run_stage(AdoptEmbeddings(copied, CONFIG, str(tmp_path / "theirs")))
    assert "\nhint: " in str(caught.value)
    assert not (tmp_path / "sprung").exists()
