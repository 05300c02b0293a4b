"""The neighbors stage agrees with brute force, by exact search and by index."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.batches.batches import Batches
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings
from pipeline.indices.config import IndexConfig
from pipeline.indices.index import Index
from pipeline.indices.searcher import IndexLists
from pipeline.neighbors import neighbors
from pipeline.neighbors.by_list import bytes_per_query
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.files import load_neighbors, why_recall_is_unknown
from pipeline.neighbors.neighbors import Neighbors
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from pipeline.stages.plan import prepare
from pipeline.stages.types import StageFailed
from pipeline.stages.worker import process_and_commit
from pipeline.versions import verify
from tests.pipeline import synthetic
from tests.pipeline.neighbors.neighbor_runs import brute_force, find_neighbors, index_database


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """Four shards of different lengths, with twelve rows of zeros."""
    vectors = synthetic.clustered(900, 16)
    vectors[100:112] = 0
    shards = [vectors[:300], vectors[300:310], vectors[310:700], vectors[700:]]
    return index_database(synthetic.vector_dataset(tmp_path_factory.mktemp("root"), "database", shards), key="Flat")


@pytest.fixture(scope="module")
def dataset(database):
    """Two shards of other vectors in the same root."""
    vectors = synthetic.clustered(150, 16, seed=1)
    return synthetic.vector_dataset(database.root, "dataset", [vectors[:40], vectors[40:]])


@pytest.mark.parametrize("method", ["exact", "index"])
@pytest.mark.parametrize("itself", [True, False])
def test_neighbors_are_those_of_brute_force(database, dataset, itself, method, tmp_path):
    own = database if itself else dataset
    target = Dataset(str(tmp_path / "root"), own.name)
    shutil.copytree(database.root, target.root, ignore=shutil.ignore_patterns("neighbors"))
    base = Dataset(target.root, database.name)
    ids, scores, manifest = find_neighbors(target, base, k=7, method=method, copy_similarity=2.0)
    stored = Embeddings(base).all().astype(np.float32)
    queries = Embeddings(target).all().astype(np.float32)
    excluded = np.broadcast_to(~stored.any(1), (len(queries), len(stored)))
    if itself:
        excluded = excluded | np.eye(len(stored), dtype=bool)
    expected = brute_force(queries, stored, 7, excluded)
    expected[~queries.any(1)] = -np.inf
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    real = ids >= 0
    np.testing.assert_allclose((stored[ids] * queries[:, None]).sum(-1)[real], scores[real], atol=1e-5)
    assert np.isneginf(scores[~real]).all() and (~queries[~real.all(1)].any(1)).all()
    assert manifest["info"]["missing"] == (~real).sum() == (12 * 7 if itself else 0)
    assert ids.dtype == np.int64 and scores.dtype == np.float32
    assert not np.isin(ids, np.arange(100, 112)).any()
    if itself:
        assert (ids != np.arange(len(ids))[:, None]).all()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in ids)


def test_exact_and_flat_index_agree_and_two_runs_are_the_same(tmp_path):
    results, manifests = [], []
    for name, method in (("one", "exact"), ("two", "index"), ("three", "index"), ("four", "exact")):
        database = index_database(synthetic.vector_dataset(tmp_path / name, "x", [synthetic.clustered(200, 16),
                                                                                  synthetic.clustered(90, 16, seed=2)]),
                                  key="Flat")
        ids, scores, manifest = find_neighbors(database, database, k=5, method=method)
        results.append((ids, scores))
        manifests.append(without_run_facts(manifest))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-6)
    assert manifests[1] == manifests[2] and manifests[0] == manifests[3]


@pytest.mark.parametrize("method", ["exact", "index"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_database_smaller_than_k_is_padded(tmp_path, method, count):
    database = index_database(synthetic.vector_dataset(tmp_path, "x", [synthetic.clustered(count, 16, clusters=9)]))
    ids, scores, manifest = find_neighbors(database, database, k=5, method=method)
    assert ids.shape == scores.shape == (count, 5)
    assert (ids[:, :count - 1] >= 0).all() and (ids[:, count - 1:] == -1).all()
    assert np.isneginf(scores[:, count - 1:]).all() and manifest["info"]["missing"] == count * (6 - count)


def test_an_index_of_few_lists_does_not_leave_gaps(tmp_path):
    """An index that searches one list of three cannot give all rows as candidates."""
    database = index_database(synthetic.vector_dataset(tmp_path, "x", [synthetic.clustered(300, 16, clusters=40)]),
                              key="IVF30,Flat", target_recall=0.0)
    ids, _, manifest = find_neighbors(database, database, k=100, copy_similarity=2.0)
    assert (ids >= 0).all() and manifest["info"]["missing"] == 0


def test_ids_from_a_compressed_index_have_exact_scores(tmp_path):
    database = index_database(synthetic.vector_dataset(tmp_path, "x", [synthetic.clustered(1500, 16)]), key="PQ8x4")
    ids, scores, _ = find_neighbors(database, database, k=5)
    stored = Embeddings(database).all().astype(np.float32)
    np.testing.assert_allclose(scores, (stored[ids] * stored[:, None]).sum(-1), atol=1e-5)
    expected = brute_force(stored, stored, 5, np.eye(len(stored), dtype=bool) | (stored @ stored.T >= 0.98))
    assert np.isclose(scores, expected, atol=1e-5).mean() > 0.7


def test_different_encoders_are_refused_and_named(tmp_path):
    dataset = synthetic.vector_dataset(tmp_path, "one", [synthetic.clustered(9, 16)])
    database = synthetic.vector_dataset(tmp_path, "other", [synthetic.clustered(9, 16)],
                                        encoder=synthetic.ENCODER | {"weights_sha256": "11"})
    with pytest.raises(ValueError, match=r'they differ in weights_sha256 \("00" / "11"\)\nhint'):
        find_neighbors(dataset, database, method="exact")


def test_a_database_without_an_index_is_refused_with_the_command(tmp_path):
    dataset = synthetic.vector_dataset(tmp_path, "one", [synthetic.clustered(9, 16)])
    with pytest.raises(ValueError, match=r"index is not sealed.*\nhint: python -m jobs index one --root"):
        find_neighbors(dataset, dataset)


def test_empty_shards_are_empty_lists(tmp_path):
    vectors = synthetic.clustered(20, 16)
    shards = [vectors[:0], vectors[:12], vectors[:0], vectors[12:]]
    database = index_database(synthetic.vector_dataset(tmp_path, "x", shards))
    for method in ("index", "exact"):
        if method == "exact":
            database = synthetic.vector_dataset(tmp_path / "exact", "x", shards)
        find_neighbors(database, database, k=3, method=method)
        assert [shard.shape for shard in load_neighbors(database, database)] == [(0, 3), (12, 3), (0, 3), (8, 3)]


def test_a_rebuilt_index_is_opened_again(tmp_path):
    vectors = synthetic.clustered(400, 16)
    database = index_database(synthetic.vector_dataset(tmp_path, "x", [vectors]), key="IVF30,Flat", target_recall=0.0)
    ids_of_poor_index = find_neighbors(database, database, k=3, candidates=4)[0].copy()
    run_stage(Index(database, IndexConfig(key="Flat")), overwrite=True)
    manifest = run_stage(Neighbors(database, database, NeighborsConfig(k=3, candidates=4)), overwrite=True)
    ids = load_neighbors(database, database)[0]
    assert manifest["inputs"]["index"]["digest"] == database.manifest("index")["content"]
    stored = Embeddings(database).all().astype(np.float32)
    expected = brute_force(stored, stored, 3, np.eye(400, dtype=bool) | (stored @ stored.T >= 0.98))
    assert np.isclose((stored[ids] * stored[:, None]).sum(-1), expected, atol=1e-5).mean() > 0.95
    assert (ids_of_poor_index != ids).any()


def test_other_settings_are_refused(database, dataset):
    find_neighbors(dataset, database, k=4)
    with pytest.raises(ValueError, match=r"section\.k: there 4, now 5"):
        find_neighbors(dataset, database, k=5)
    with pytest.raises(ValueError, match="at least 1"):
        NeighborsConfig(k=0)


def test_vectors_are_written_if_configured_and_batches_read_them(copied):
    expected = Batches(copied, copied, k=3, global_batch=8, seed=0).at(2)["neighbors"]
    config = NeighborsConfig(k=4, vectors=True)
    run_stage(Neighbors(copied, copied, config), overwrite=True)
    vectors = load_neighbors(copied, copied, ".vectors.npy")
    ids = np.concatenate(load_neighbors(copied, copied))
    assert np.concatenate(vectors).dtype == np.float16
    np.testing.assert_array_equal(np.concatenate(vectors), Embeddings(copied).rows(ids))
    batches = Batches(copied, copied, k=3, global_batch=8, seed=0)
    assert batches.vectors is None
    np.testing.assert_array_equal(batches.at(2)["neighbors"], expected)
    assert list(verify.find_faults(copied.root, copied.path(f"neighbors/{copied.label}"))) == []


def test_the_manifest_has_the_use_and_distance_of_rows(database, dataset, tmp_path):
    shutil.copytree(database.root, tmp_path / "root", ignore=shutil.ignore_patterns("neighbors"))
    dataset, database = (Dataset(str(tmp_path / "root"), original.name) for original in (dataset, database))
    ids, scores, manifest = find_neighbors(dataset, database, k=6)
    info = manifest["info"]
    usage = np.load(dataset.fetch("neighbors/database", file_of(manifest, "usage.npy")))
    np.testing.assert_array_equal(usage, np.bincount(ids[ids >= 0], minlength=900))
    assert info["never_used"] == (usage == 0).sum() >= 12 and info["most_used"] == usage.max()
    assert info["rows"] == 900 and sum(info["scores"]) == (ids >= 0).sum()
    bins = np.clip((scores[ids >= 0] + 1) * 50, 0, 99).astype(int)
    assert abs(np.bincount(bins, minlength=100) - info["scores"]).sum() <= 4  # on the bounds
    # Nothing is compared: the search itself is exact.
    assert (info["recall"], info["recall_pairs"], info["exact"]) == (None, 0, True)
    assert why_recall_is_unknown(info) == why_recall_is_unknown({"recall": 1.0, "recall_pairs": 0}) == "exact search"


def test_recall_is_measured_against_exact_search(tmp_path):
    """One list of thirty finds some neighbors; all lists find all."""
    dataset = synthetic.vector_dataset(tmp_path, "x", np.split(synthetic.clustered(3000, 16, clusters=400), 6))
    database = index_database(dataset, key="IVF64,Flat", target_recall=0.0)
    ids, _, manifest = find_neighbors(database, database, k=10, checked=300)
    stored = Embeddings(database).all().astype(np.float32)
    excluded = np.eye(3000, dtype=bool) | (stored @ stored.T >= 0.98)
    order = np.argsort(np.where(excluded, 2, -stored @ stored.T), axis=1)[:, :10]
    recall = np.mean([len(np.intersect1d(row, exact_row)) / 10 for row, exact_row in zip(ids, order, strict=True)])
    assert 0.2 < recall < 0.95 and abs(manifest["info"]["recall"] - recall) < 0.05
    assert manifest["info"]["recall_pairs"] == 3000
    manifest = run_stage(Neighbors(database, database, NeighborsConfig(k=10, probes=8, checked=300)), overwrite=True)
    assert manifest["info"]["recall"] > recall
    manifest = run_stage(Neighbors(database, database, NeighborsConfig(k=10, probes=64, checked=300)), overwrite=True)
    assert manifest["info"]["recall"] == 1.0


@pytest.mark.parametrize("method", ["exact", "index"])
def test_records_have_the_seconds_of_each_part(tmp_path, method):
    vectors = synthetic.clustered(900, 16)
    database = index_database(synthetic.vector_dataset(tmp_path, "x", np.split(vectors, 3)), key="IVF30,Flat")
    _, _, manifest = find_neighbors(database, database, k=5, method=method, probes=2, at_once=1)
    times = [record["run"]["times"] for record in manifest["items"]]
    parts = {"read", "products", "choose", "settle", "check", "cpu"}
    # A worker keeps its open index.
    assert [set(record_times) for record_times in times] == [parts | {"open"}, parts, parts]
    for record_times, record in zip(times, manifest["items"], strict=True):
        seconds_of_parts = sum(seconds for name, seconds in record_times.items() if name != "cpu")
        assert 0 < seconds_of_parts <= record["run"]["seconds"] + 0.01


@pytest.mark.parametrize("method", ["exact", "index"])
def test_shards_searched_together_give_the_results_of_single_searches(tmp_path, method):
    vectors = synthetic.clustered(2000, 16, clusters=300)
    database = index_database(synthetic.vector_dataset(tmp_path, "x", np.split(vectors, [300, 310, 700, 1500])),
                              key="IVF64,Flat", target_recall=0.0)
    config = NeighborsConfig(k=6, method=method, probes=4, vectors=True, checked=90)
    runs = []
    for at_once in (1, 2, 3, 100):
        manifest = run_stage(Neighbors(database, database, replace(config, at_once=at_once)), overwrite=True)
        folder = Path(database.folder("neighbors/x"))
        runs.append(({path.name: path.read_bytes() for path in folder.glob("*.npy")}, manifest["info"]))
        assert len(manifest["items"]) == -(-5 // at_once) and len(runs[-1][0]) == 3 * 5 + 1
        assert list(verify.find_faults(database.root, database.path("neighbors/x"))) == []
        assert [len(shard) for shard in load_neighbors(database, database)] == [300, 10, 390, 800, 500]
    assert all(run == runs[0] for run in runs)


def test_memory_and_work_bound_the_shards_searched_together():
    config = NeighborsConfig(max_memory="1Gi")
    for lists, candidates in ((False, 100), (True, 32)):
        shards = config.shards_at_once(10_000, 10_000_000, 512, lists=lists)
        query_bytes = 4 * 512 + bytes_per_query(candidates)
        assert shards > 1 and shards * 1000 * query_bytes <= config.block_bytes < (shards + 1) * 1000 * query_bytes
        assert config.shards_at_once(64, 640_000, 512, lists=lists) == 1
        assert config.shards_at_once(100, 1000, 512, lists=lists) == 2
        assert NeighborsConfig(at_once=7).shards_at_once(10, 10, 512, lists=lists) == 7
    for similarity in (float("nan"), 0.0, -1.0):
        with pytest.raises(ValueError, match=r"copy_similarity = .*: must be above 0"):
            NeighborsConfig(copy_similarity=similarity)


def test_vectors_are_written_list_by_list_over_any_leftovers(tmp_path, monkeypatch):
    vectors = synthetic.clustered(1000, 16)
    vectors[50:60] = 0
    dataset = synthetic.vector_dataset(tmp_path, "x", np.split(vectors, [300, 310, 700]))
    database = index_database(dataset, key="IVF16,SQ8")
    monkeypatch.setattr(neighbors, "_LAID", 8 << 10)  # several files, and several blocks
    lists, embeddings = IndexLists(database), Embeddings(database)
    folder = tmp_path / "laid"
    folder.mkdir()
    neighbors._write_in_list_order(folder, embeddings, lists)
    ids, ends = np.fromfile(folder / "ids", np.int64), np.load(folder / "ends.npy")
    written_vectors = np.fromfile(folder / "vectors", np.float16).reshape(-1, 16)
    assert sorted(ids) == sorted(set(range(1000)) - set(range(50, 60)))
    np.testing.assert_array_equal(written_vectors, embeddings.rows(ids))
    for number in range(16):
        list_ids = ids[ends[number]:ends[number + 1]]
        assert list_ids.tolist() == sorted(set(lists.ids(number).tolist()) - set(range(50, 60)))
    assert {path.name for path in folder.iterdir()} == {"vectors", "ids", "ends.npy"}


def test_a_database_rebuilt_after_the_plan_is_refused(tmp_path):
    dataset = synthetic.vector_dataset(tmp_path, "x", [synthetic.clustered(30, 16)])
    stage = Neighbors(dataset, dataset, NeighborsConfig(k=2, method="exact"))
    items = prepare(stage)
    vectors = synthetic.clustered(30, 16, seed=8).astype(np.float16)
    run_stage(synthetic.FixedStage(dataset, "embeddings", "embed", {
        "000000": (30, {"000000.npy": synthetic.npy(vectors)})}, {"encoder": synthetic.ENCODER}), overwrite=True)
    with pytest.raises(ValueError, match=r"database, embeddings changed since .*/neighbors/x was planned: .*\nhint: "):
        process_and_commit(stage, items[0])


def test_vectors_that_are_not_finite_are_refused(tmp_path):
    vectors = synthetic.clustered(30, 16)
    vectors[7, 3] = np.nan
    dataset = synthetic.vector_dataset(tmp_path, "x", [vectors])
    with pytest.raises(StageFailed, match="not finite"):
        find_neighbors(dataset, dataset, method="exact")


@pytest.mark.parametrize("options", [{"checked": -1}, {"probes": -1}, {"copy_bits": -2}, {"max_memory": "much"}])
def test_senseless_settings_are_refused(options):
    with pytest.raises(ValueError):
        NeighborsConfig(**options)
