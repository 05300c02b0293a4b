import json
import shutil

import faiss
import numpy as np
import pytest

from jobs.cli.main import main
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.indices.config import LISTS, IndexConfig
from pipeline.indices.extend import Extension, compare_rows
from pipeline.indices.faiss_door import open_index
from pipeline.indices.fill import fill
from pipeline.indices.index import Index, build_index, build_whole
from pipeline.indices.searcher import Searcher, count_misnumbered_rows, open_dataset_index
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.neighbors import Neighbors
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import changed_inputs
from pipeline.stages.plan import clear_folder
from pipeline.stages.types import StageFailed
from pipeline.takedowns import hidden_rows
from pipeline.versions import verify
from tests.pipeline import synthetic

KINDS = ["Flat", "SQ8", "PQ8x4", "IVF16,Flat", "IVF16,SQ8", "OPQ8_32,IVF16,PQ8x4", "OPQ8_32,PQ8x4"]


@pytest.fixture(scope="module")
def vectors():
    return synthetic.clustered(1_500, 32)


def bytes_of(index) -> bytes:
    if hasattr(inner_index := faiss.downcast_index(getattr(index, "index", index)), "nprobe"):
        inner_index.nprobe = 1
    return faiss.serialize_index(index).tobytes()


def versions(root, vectors) -> tuple[Dataset, Dataset]:
    """A base of four shards. A version without one of them, without some rows of another, and with two new ones."""
    shards = np.array_split(vectors, 6)
    base = synthetic.vector_dataset(root, "x", shards[:4])
    return base, synthetic.vector_dataset(root, "x@v2", [
        shards[4], shards[3], shards[0], np.delete(shards[1], [3, 5, 40], 0), shards[5]])


@pytest.mark.parametrize("key", KINDS)
def test_an_extended_index_is_the_trained_one_filled_with_the_rows_of_the_new_version(tmp_path, vectors, key):
    base, following = versions(tmp_path, vectors)
    run_stage(Index(base, IndexConfig(key=key)))
    info = run_stage(Extension(following, base, IndexConfig(max_drift=9)))["info"]
    filled = open_dataset_index(base)
    filled.reset()
    fill(filled, Embeddings(following).all().astype(np.float32))
    assert bytes_of(open_dataset_index(following)) == bytes_of(filled)
    assert (info["kept"], info["added"], info["removed"]) == (250 * 3 - 3, 500, 250 + 3)
    assert info["key"] == key and info["recall_at_10"] > 0.2 and info["extends"] == "x"
    searcher = Searcher(following)
    ids, scores = searcher.search(Embeddings(following).rows(np.arange(0, 1247, 13)).astype(np.float32), 1)
    assert (ids[:, 0] == np.arange(0, 1247, 13)).mean() > 0.9 and (scores > 0.99).mean() > 0.9
    assert list(verify.find_faults(following.root, following.path("index"))) == []


def test_an_extension_can_be_extended_and_its_base_removed(tmp_path, vectors):
    base, following = versions(tmp_path, vectors)
    run_stage(Index(base, IndexConfig(key="IVF16,SQ8")))
    run_stage(Extension(following, base, IndexConfig(max_drift=9)))
    third = synthetic.vector_dataset(tmp_path, "x@v3", np.array_split(vectors, 6))
    info = run_stage(Extension(third, following, IndexConfig(max_drift=9)))["info"]
    assert info["kept"] == 250 * 5 - 3 and info["added"] == 250 + 3 and info["removed"] == 0
    filled = open_dataset_index(base)
    filled.reset()
    fill(filled, vectors)
    assert bytes_of(open_dataset_index(third)) == bytes_of(filled)
    storage.remove_tree(base.folder("index"))
    assert changed_inputs(third.root, third.manifest("index")) == []
    assert changed_inputs(third.root, following.manifest("index")) == []


def test_queries_of_an_extended_index_were_not_trained_on(tmp_path, vectors):
    base, following = versions(tmp_path, vectors)
    run_stage(Index(base, IndexConfig(key="SQ8")))
    info = run_stage(Extension(following, base, IndexConfig(max_drift=9)))["info"]
    assert info["recall_queries"] == 1247 // 10
    held_rows = {name: np.load(storage.local_path(storage.join(dataset.folder("index"), "held.npy")))
                 for name, dataset in (("base", base), ("following", following))}
    assert len(held_rows["base"]) == 100
    rows, change = Embeddings(following), compare_rows(following, base)
    held_of_base = held_rows["following"][~np.isin(held_rows["following"], change.added)]
    assert set(held_of_base) == set(change.find(held_rows["base"])) and len(held_of_base) > 30
    assert np.isin(held_rows["following"], change.added).sum() == len(held_rows["following"]) - len(held_of_base) > 30
    in_base = [(Embeddings(base).rows(np.arange(len(vectors) * 4 // 6)) == row).all(1).nonzero()[0][0]
               for row in rows.rows(held_of_base)]
    assert set(in_base) <= set(held_rows["base"])


def test_recall_is_measured_after_every_shard_was_written_again(tmp_path, vectors):
    """Vectors keep their place among the held-out rows. If all of these are gone, others are queries."""
    first = synthetic.vector_dataset(tmp_path, "x", [vectors[:200]])
    run_stage(Index(first, IndexConfig(key="SQ8")))
    held = np.load(storage.local_path(storage.join(first.folder("index"), "held.npy")))
    second = synthetic.vector_dataset(tmp_path, "x@v2", [np.delete(vectors[:200], held[:3], 0)])
    assert run_stage(Extension(second, first, IndexConfig()))["info"]["recall_queries"] == len(held) - 3
    third = synthetic.vector_dataset(tmp_path, "x@v3", [np.delete(vectors[:200], held, 0)])
    fourth = synthetic.vector_dataset(tmp_path, "x@v4", [np.delete(vectors[:200], [*held, 199], 0)])
    for dataset, base in ((third, second), (fourth, third)):
        info = run_stage(Extension(dataset, base, IndexConfig()))["info"]
        assert info["recall_queries"] > 10 and info["recall_at_10"] > 0.9


def test_equal_rows_are_counted_as_often_as_they_occur(tmp_path, vectors):
    base = synthetic.vector_dataset(tmp_path, "x", [np.repeat(vectors[:3], 2, 0), vectors[10:20]])
    following = synthetic.vector_dataset(tmp_path, "x@v2", [np.repeat(vectors[:3], 3, 0), vectors[10:20],
                                                             vectors[10:20]])
    change = compare_rows(following, base)
    assert change.kept == 6 + 10 and change.removed == 0 and len(change.added) == 3 + 10


def test_a_graph_index_is_extended_only_at_its_end(tmp_path, vectors):
    base = synthetic.vector_dataset(tmp_path, "x", [vectors[:500], vectors[500:900]])
    run_stage(Index(base, IndexConfig(key="HNSW15")))
    grown = synthetic.vector_dataset(tmp_path, "x@v2", [vectors[:500], vectors[500:900], vectors[900:1100]])
    info = run_stage(Extension(grown, base, IndexConfig()))["info"]
    assert info["added"] == 200 and info["drift"] == 1.0 and info["recall_at_10"] > 0.9
    ids = Searcher(grown).search(vectors[900:1100], 1)[0][:, 0]
    assert (ids == np.arange(900, 1100)).mean() > 0.95
    shrunk = synthetic.vector_dataset(tmp_path, "x@v3", [vectors[500:900], vectors[900:1100]])
    with pytest.raises(StageFailed, match=r"cannot remove rows or renumber them; .*\nhint: "):
        run_stage(Extension(shrunk, base, IndexConfig()))


@pytest.mark.parametrize("key", ["PQ8x4", "IVF16,Flat", "OPQ8_32,IVF16,PQ8x4"])
def test_vectors_that_drifted_are_refused_until_max_drift_allows_them(tmp_path, vectors, key):
    others = synthetic.clustered(400, 32, clusters=400, seed=5, spread=3.0)
    base = synthetic.vector_dataset(tmp_path, "x", [vectors])
    run_stage(Index(base, IndexConfig(key=key)))
    alike = synthetic.vector_dataset(tmp_path, "x@v2", [vectors, synthetic.clustered(1_900, 32)[1_500:]])
    assert 0.5 < run_stage(Extension(alike, base, IndexConfig()))["info"]["drift"] < 1.5
    drifted = synthetic.vector_dataset(tmp_path, "x@v3", [vectors, others])
    with pytest.raises(StageFailed, match=r"quantization error of its training: expected at most 1\.5 \(--max"):
        run_stage(Extension(drifted, base, IndexConfig()))
    assert not drifted.is_sealed("index")
    assert run_stage(Extension(drifted, base, IndexConfig(max_drift=100)))["info"]["drift"] > 1.5


def test_an_extended_index_obeys_its_budget(tmp_path, vectors):
    base, following = versions(tmp_path, vectors)
    run_stage(Index(base, IndexConfig(key="SQ8")))
    with pytest.raises(StageFailed, match="fits 20480 bytes"):
        run_stage(Extension(following, base, IndexConfig(max_memory="20Ki")))


@pytest.mark.parametrize("key", ["IVF16,SQ8", "OPQ8_32,IVF16,PQ8x4"])
def test_lists_merged_on_disk_are_those_merged_in_memory(tmp_path, vectors, key, capfd):
    answers = {}
    for name, bound in (("memory", "4Gi"), ("disk", "10Ki")):
        dataset = synthetic.vector_dataset(tmp_path / name, "x", np.array_split(vectors, 6))
        config = IndexConfig(key=key, part_memory="20Ki", merge_memory=bound)
        info = build_index(Index(dataset, config), run_stage)["info"]
        assert info["parts"] > 2
        folder = storage.local_path(dataset.folder("index"))
        assert (folder / LISTS).exists() == (name == "disk")
        assert info["bytes"] == sum((folder / file).stat().st_size for file in ("knn.index", LISTS)
                                    if (folder / file).exists())
        assert list(verify.find_faults(dataset.root, dataset.path("index"))) == []
        searcher = Searcher(dataset)
        answers[name] = (*searcher.index.search(vectors[:200], 10), info["recall"])
    for answer_in_memory, answer_on_disk in zip(answers["memory"], answers["disk"], strict=True):
        np.testing.assert_equal(answer_in_memory, answer_on_disk)
    # In a cache its files have other names and no folder in common.
    shutil.copy(folder / "knn.index", tmp_path / "0a1b")
    (tmp_path / "c").mkdir()
    shutil.copy(folder / LISTS, tmp_path / "c" / "2c3d")
    (tmp_path / "c" / "2c3d").chmod(0o400)
    on_disk = open_index(tmp_path / "0a1b", tmp_path / "c" / "2c3d")
    assert (on_disk.search(vectors[:200], 10)[1] == answers["disk"][1]).all()
    # It also opens from another folder, and an index made from it is on disk like it.
    moved = tmp_path / "moved"
    (tmp_path / "disk").rename(moved)
    base = Dataset(str(moved), "x")
    assert (Searcher(base).index.search(vectors[:200], 10)[1] == answers["disk"][1]).all()
    following = synthetic.vector_dataset(moved, "x@v2",
                                         [*np.array_split(vectors, 6)[1:], synthetic.clustered(1_700, 32)[1_500:]])
    extended = {}
    for bound in ("10Ki", "4Gi"):
        manifest = build_index(Extension(following, base, IndexConfig(merge_memory=bound)), run_stage, overwrite=True)
        assert storage.exists(storage.join(following.folder("index"), LISTS)) == (bound == "10Ki")
        extended[bound] = (*Searcher(following).index.search(vectors[:200], 10), manifest["info"]["recall"])
    for answer_on_disk, answer_in_memory in zip(*extended.values(), strict=True):
        np.testing.assert_equal(answer_on_disk, answer_in_memory)
    assert capfd.readouterr().out == ""


def test_lists_on_disk_come_from_a_store_too(tmp_path, s3, vectors):
    answers = []
    for root in (tmp_path, s3):
        dataset = synthetic.vector_dataset(root, "x", np.array_split(vectors, 4))
        build_index(Index(dataset, IndexConfig(key="IVF16,SQ8", part_memory="60Ki", merge_memory="10Ki")), run_stage)
        following = synthetic.vector_dataset(root, "x@v2", np.array_split(vectors, 4)[1:])
        run_stage(Extension(following, dataset, IndexConfig(merge_memory="10Ki")))
        answers.append([Searcher(version).search(vectors[:100], 5) for version in (dataset, following)])
        answers[-1].append([version.manifest("index")["items"][0]["files"] for version in (dataset, following)])
    np.testing.assert_equal(answers[0], answers[1])
    assert LISTS in str(answers[0][-1])


@pytest.mark.parametrize("merge_memory", ["10Ki", "4Gi"])
@pytest.mark.parametrize("sizes", [(900, 500), (500, 900), (400, 400, 37), (300, 37, 400, 263)])
def test_parts_of_unequal_size_are_merged_with_the_right_rows(tmp_path, vectors, sizes, merge_memory):
    count = sum(sizes)
    dataset = synthetic.vector_dataset(tmp_path, "x", np.split(vectors[:count], np.cumsum(sizes)[:-1]))
    config = IndexConfig(key="IVF16,SQ8", part_memory="10Ki", merge_memory=merge_memory, target_recall=1.0)
    build_index(Index(dataset, config), run_stage)
    manifest = dataset.manifest("index")
    assert manifest["info"]["parts"] > 1 and manifest["info"]["recall_at_10"] > 0.95
    searcher = Searcher(dataset)
    assert count_misnumbered_rows(searcher.index) == 0
    searcher.index.nprobe = 16
    assert (searcher.index.search(vectors[:count], 1)[1][:, 0] == np.arange(count)).mean() > 0.98
    assert list(verify.find_faults(dataset.root, dataset.path("index"))) == []


def test_an_index_with_repeated_or_unknown_rows_is_not_sealed(tmp_path, vectors, monkeypatch):
    dataset = synthetic.vector_dataset(tmp_path, "x", np.array_split(vectors[:600], 3))
    index, _, _, _ = build_whole(vectors[:600], IndexConfig(key="IVF8,Flat"))
    assert count_misnumbered_rows(index) == 0
    number = next(number for number in range(8) if index.invlists.list_size(number) > 1)
    faiss.rev_swig_ptr(index.invlists.get_ids(number), 2)[:] = 599_000, 599_001
    assert count_misnumbered_rows(index) == 4  # two ids without a row, and two rows without an id
    monkeypatch.setattr("pipeline.indices.index.build_whole", lambda *_: (index, {}, {"recall_at_10": 1.0}, {}))
    with pytest.raises(StageFailed, match="not in it exactly once"):
        run_stage(Index(dataset, IndexConfig(key="IVF8,Flat")))


def test_lists_that_are_missing_or_cut_are_named(tmp_path, vectors):
    dataset = synthetic.vector_dataset(tmp_path, "x", np.array_split(vectors, 6))
    build_index(Index(dataset, IndexConfig(key="IVF16,SQ8", part_memory="20Ki", merge_memory="10Ki")), run_stage)
    path = storage.local_path(dataset.folder("index")) / LISTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="is not the file its manifest describes"):
        Searcher(dataset)
    path.write_bytes(b"x" + whole[1:])
    assert "sha256" in next(verify.find_faults(dataset.root, dataset.path("index")))["fault"]


@pytest.mark.parametrize("key", [*KINDS, "HNSW15"])
def test_rows_with_tombstones_are_never_found(tmp_path, vectors, key):
    dataset = synthetic.vector_dataset(tmp_path, "x", [vectors[:700], vectors[700:1100]])
    run_stage(Index(dataset, IndexConfig(key=key, target_recall=1.0)))
    hidden_ids = np.arange(0, 1100, 4)
    keys = [f"{row // 700:03d}-{row - 700 * (row // 700):05d}" for row in hidden_ids]
    (tmp_path / "keys.txt").write_text("\n".join([*keys, "nobody"]) + "\n")
    assert (Searcher(dataset).search(vectors[hidden_ids], 1)[0][:, 0] == hidden_ids).mean() > 0.9
    manifest = run_stage(hidden_rows.Tombstones(dataset, str(tmp_path / "keys.txt")))
    assert manifest["totals"]["samples"] == len(hidden_ids)
    assert manifest["totals"]["skipped"] == {"not in this dataset": 1}
    ids, scores = Searcher(dataset).search(vectors[hidden_ids], 5)
    assert not np.isin(ids, hidden_ids).any() and (ids >= 0).mean() > 0.99
    products = vectors[hidden_ids] @ vectors[:1100].T
    products[:, hidden_ids] = -np.inf
    assert np.isclose(scores, -np.sort(-products, 1)[:, :5], atol=1e-3).mean() > 0.9


@pytest.mark.parametrize("method", ["index", "exact"])
def test_rows_with_tombstones_are_no_neighbors(tmp_path, vectors, method):
    dataset = synthetic.vector_dataset(tmp_path, "x", [vectors[:600]])
    run_stage(Index(dataset, IndexConfig(key="IVF16,SQ8")))
    (tmp_path / "keys.txt").write_text("".join(f"000-{row:05d}\n" for row in range(0, 600, 2)))
    run_stage(hidden_rows.Tombstones(dataset, str(tmp_path / "keys.txt")))
    run_stage(Neighbors(dataset, dataset, NeighborsConfig(k=20, method=method)))
    ids = np.load(storage.local_path(dataset.folder("neighbors/x")) / "000000.ids.npy")
    assert (ids[ids >= 0] % 2 == 1).all() and (ids >= 0).mean() > 0.99


def test_tombstones_of_other_shards_are_refused(tmp_path, vectors):
    dataset = synthetic.vector_dataset(tmp_path, "x", [vectors[:300]])
    run_stage(Index(dataset, IndexConfig()))
    (tmp_path / "keys.txt").write_text("000-00001\n")
    run_stage(hidden_rows.Tombstones(dataset, str(tmp_path / "keys.txt")))
    clear_folder(synthetic.FixedStage(dataset, "shards", "shard", {}))
    clear_folder(synthetic.FixedStage(dataset, "embeddings", "embed", {}))
    synthetic.vector_dataset(tmp_path, "x", [vectors[:300]], hashes=["0" * 64] * 300)
    with pytest.raises(ValueError, match=r"tombstones is stale: shards changed since\nhint: .*--tombstone"):
        hidden_rows.read_hidden_rows(dataset)
    for text, reason in (("", "names no key"), (None, "there is no file")):
        (tmp_path / "keys.txt").unlink()
        if text is not None:
            (tmp_path / "keys.txt").write_text(text)
        with pytest.raises(ValueError, match=f"{reason}.*\nhint"):
            run_stage(hidden_rows.Tombstones(dataset, str(tmp_path / "keys.txt")))
        (tmp_path / "keys.txt").touch()


def test_the_command_line_extends_and_sets_tombstones(tmp_path, vectors, capsys):
    _, following = versions(tmp_path, vectors)
    root = ["--local", "--root", str(tmp_path)]
    assert main(["index", "x", "--key", "IVF16,SQ8", *root]) == 0
    assert main(["index", "x@v2", "--extend", "x", "--max-drift", "0.0001", *root]) == 1
    assert "expected at most 0.0001 (--max-drift)\nhint: train it again" in capsys.readouterr().err
    assert main(["index", "x@v2", "--extend", "x@v1", "--max-drift", "9", *root]) == 0
    assert json.loads(capsys.readouterr().out)["extends"] == "x"
    assert main(["index", "x", "--extend", "x", *root]) == 2
    assert "cannot be extended by itself\nhint" in capsys.readouterr().err
    (tmp_path / "keys.txt").write_text("000-0001\nnope\n")
    assert main(["index", "x@v2", "--tombstone", str(tmp_path / "keys.txt"), *root]) == 2
    assert "has none of the keys in" in capsys.readouterr().err
    (tmp_path / "keys.txt").write_text("000-00001\n")
    assert main(["index", "x@v2", "--tombstone", str(tmp_path / "keys.txt"), *root]) == 0
    assert Searcher(following).hidden.tolist() == [1]
    assert main(["status", "--root", str(tmp_path)]) == 0
    assert "datasets/x/v2/tombstones" in capsys.readouterr().out
