"""Indices of other programs: sealed if a search finds the rows of the dataset, and refused with a reason otherwise."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from jobs.cli.main import main
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.indices.adopt import AdoptIndex
from pipeline.indices.config import LISTS, IndexConfig
from pipeline.indices.extend import Extension
from pipeline.indices.faiss_door import list_transforms
from pipeline.indices.fill import merge_on_disk, remove_rows
from pipeline.indices.searcher import Searcher, search_kind
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from pipeline.versions import verify
from tests.pipeline import synthetic

VECTORS = synthetic.clustered(1_500, 32)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return synthetic.vector_dataset(tmp_path / "root", "x", np.array_split(VECTORS, 5))


def write_foreign(folder: Path, key: str, vectors: np.ndarray = VECTORS, metric: int = faiss.METRIC_INNER_PRODUCT
                  ) -> Path:
    """An index file of another program."""
    index = faiss.index_factory(vectors.shape[1], key, metric)
    if key.startswith("OPQ"):
        transform: Any = list_transforms(index)[0]
        transform.niter = 2  # saves half a minute
    index.train(vectors)
    index.add_with_ids(vectors, np.arange(len(vectors))) if key.startswith("IDMap") else index.add(vectors)
    faiss.write_index(index, str(folder / "theirs.index"))
    return folder / "theirs.index"


def adopt(dataset: Dataset, file: Path) -> dict[str, Any]:
    return run_stage(AdoptIndex(dataset, IndexConfig(), str(file)))


@pytest.mark.parametrize(("key", "kind"), [
    ("Flat", "scan"), ("SQ8", "scan"), ("PQ16x4", "scan"), ("HNSW16", "graph"), ("IVF16,Flat", "lists"),
    ("OPQ16_32,IVF16,PQ16x4fs", "lists"), ("IVF16,PQ16x4", "lists"), ("PCAR24,SQ8", "scan"), ("IDMap,Flat", "scan"),
    ("IVF16_HNSW8,SQ8", "lists")])
def test_an_index_of_the_same_rows_is_sealed_and_searched(tmp_path, dataset, key, kind):
    info = adopt(dataset, write_foreign(tmp_path, key))["info"]
    assert info["key"] == key.removeprefix("IDMap,").replace("R24", "24") and info["adopted"] == "theirs.index"
    assert info["self_hit"] >= 0.9 and info["self_hit_rows"] == 5 * 16 and info["recall_at_10"] > 0.4
    assert search_kind(dataset) == kind
    ids = Searcher(dataset).search(VECTORS[::100], 5)[0]
    assert (ids[:, 0] == np.arange(0, 1_500, 100)).mean() > 0.9
    assert list(verify.find_faults(dataset.root, dataset.path("index"))) == []


def test_lists_in_a_separate_file_are_adopted_too(tmp_path, dataset):
    file = write_foreign(tmp_path, "IVF16,SQ8")
    whole, empty = faiss.read_index(str(file)), remove_rows(faiss.read_index(str(file)))
    merge_on_disk(empty, [whole], tmp_path / LISTS, shift=False)
    faiss.write_index(empty, str(file))
    before = (tmp_path / LISTS).read_bytes()
    adopt(dataset, file)
    assert (Path(dataset.folder("index")) / LISTS).exists() and (tmp_path / LISTS).read_bytes() == before
    (tmp_path / LISTS).unlink()
    assert (Searcher(dataset).search(VECTORS[:9], 1)[0][:, 0] == np.arange(9)).all()


def test_an_adopted_index_is_extended_like_any_other(tmp_path, dataset):
    adopt(dataset, write_foreign(tmp_path, "IVF16,SQ8"))
    following = synthetic.vector_dataset(tmp_path / "root", "x@v2", np.array_split(VECTORS[:1_200], 4))
    assert run_stage(Extension(following, dataset, IndexConfig()))["info"]["key"] == "IVF16,SQ8"


def swapped(first: int, second: int) -> np.ndarray:
    """The vectors with two rows swapped."""
    vectors = VECTORS.copy()
    vectors[[first, second]] = vectors[[second, first]]
    return vectors


def spoiled(row: int, value: float) -> np.ndarray:
    vectors = VECTORS.copy()
    vectors[row] = value
    return vectors


def moved(shards: int) -> np.ndarray:
    """The vectors with those of the first `shards` shards in another order."""
    vectors = VECTORS.copy()
    vectors[:300 * shards] = vectors[:300 * shards][::-1]
    return vectors


@pytest.mark.parametrize(("key", "vectors", "metric", "fault"), [
    ("Flat", VECTORS[:, :24], 0, "vectors of another length: expected 32 numbers, got 24"),
    ("IVF16,Flat", VECTORS[:-1], 0, "another number of vectors: expected 1500, one for each row, got 1499"),
    ("Flat", VECTORS, 1, "another metric: expected the inner product, got L2"),
    ("IVF16,Flat", VECTORS, 1, "another metric: expected the inner product, got L2"),
    ("SQ8", moved(5), 0, "other rows: a search for 80 sampled rows must find each among 10 results: expected a share "
                         "of at least 0.9, got 0."),
    ("IVF16,Flat", np.roll(VECTORS, 1, 0), 0, "expected a share of at least 1, got 0."),
    ("Flat", moved(1), 0, "other vectors: expected the vector of each row, got others for 300 of 1500 rows"),
    ("Flat", swapped(3, 1400), 0, "got others for 2 of 1500 rows, the first is row 3"),
    ("Flat", 3 * VECTORS, 0, "other vectors: expected the vector of each row, got others for 1500 of 1500 rows"),
    ("IVF16,Flat", 1.1 * VECTORS, 0, "expected a score of 1.000 where a row finds itself, got 1.100, the median"),
    ("SQ8", 3 * VECTORS, 0, "expected a score of 1.000 where a row finds itself, got 3.0"),
    ("HNSW16", swapped(3, 1400), 0, "got others for 2 of 1500 rows, the first is row 3"),
    *((key, spoiled(9, value), 0, "got others for 1 of 1500 rows, the first is row 9")
      for key, value in (("Flat", np.nan), ("Flat", np.inf), ("HNSW16", np.nan), ("Flat", 0))),
    ("IVF16,PQ8x4,RFlat", VECTORS, 0, "kind: expected inverted lists, a graph (HNSW), or codes of all rows, got "
                                      "IndexRefineFlat")])
def test_an_index_of_anything_else_is_refused_with_both_values(tmp_path, dataset, key, vectors, metric, fault):
    file = write_foreign(tmp_path, key, np.ascontiguousarray(vectors),
                         faiss.METRIC_L2 if metric else faiss.METRIC_INNER_PRODUCT)
    with pytest.raises(StageFailed) as error:
        adopt(dataset, file)
    assert fault in str(error.value) and "hint: " in str(error.value)
    assert not dataset.is_sealed("index")


def test_one_shard_in_another_order_is_refused(tmp_path):
    """With 20 shards the share of all is 0.95."""
    dataset = synthetic.vector_dataset(tmp_path / "root", "x", np.array_split(VECTORS, 20))
    vectors = VECTORS.copy()
    vectors[75:150] = vectors[75:150][::-1]
    fault = r"sampled rows of shard 000001 must .* at least 0.45, got 0\.\d+; row \d+ gives"
    with pytest.raises(StageFailed, match=fault):
        adopt(dataset, write_foreign(tmp_path, "SQ8", vectors))


def test_ids_other_than_global_rows_are_refused(tmp_path, dataset):
    index = faiss.IndexIDMap(faiss.IndexFlatIP(32))
    index.add_with_ids(VECTORS, np.arange(1_500) + 7)
    faiss.write_index(index, str(tmp_path / "mapped"))
    with pytest.raises(StageFailed, match="expected 0 for vector 0, got 7"):
        adopt(dataset, tmp_path / "mapped")
    index = faiss.index_factory(32, "IVF16,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(VECTORS)
    index.add_with_ids(VECTORS, np.arange(1_500) + 7)
    faiss.write_index(index, str(tmp_path / "shifted"))
    with pytest.raises(StageFailed, match="each row from 0 to 1499 once, got 14 rows that are missing"):
        run_stage(AdoptIndex(dataset, IndexConfig(), str(tmp_path / "shifted")), overwrite=True)


def test_files_that_are_no_index_are_named(tmp_path, dataset, capsys):
    (tmp_path / "words").write_bytes(b"these are no vectors" * 9)
    with pytest.raises(StageFailed, match="words cannot be read: expected an index that faiss"):
        adopt(dataset, tmp_path / "words")
    arguments = ["index", "x", "--root", dataset.root, "--local", "--adopt", str(tmp_path / "nothing")]
    assert main(arguments) == 2 and "there is no file" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "words"), "--extend", "x@v2"]) == 2
    assert "--extend and --adopt: expected one of them" in capsys.readouterr().err


def test_the_command_line_takes_an_index_from_a_bucket(tmp_path, dataset, s3, capsys):
    url = storage.join(s3, "theirs/knn.index")
    storage.put_file(write_foreign(tmp_path, "IVF16,Flat"), url)
    assert main(["index", "x", "--root", dataset.root, "--local", "--adopt", url]) == 0
    assert dataset.manifest("index")["info"]["adopted"] == "knn.index" and len(Embeddings(dataset)) == 1_500
