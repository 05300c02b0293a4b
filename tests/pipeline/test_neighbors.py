import numpy as np
import pytest

from pipeline import neighbors, stage, storage
from pipeline.dataset import Dataset, Embeddings
from pipeline.index import Index, IndexConfig
from pipeline.neighbors import Neighbors, NeighborsConfig
from tests.pipeline import made


def found(dataset: Dataset, database: Dataset, **options) -> tuple[np.ndarray, np.ndarray, dict]:
    """Ids (N, k), scores (N, k) and the manifest of the neighbours of a dataset."""
    manifest = stage.run(Neighbors(dataset, database, NeighborsConfig(**options)))
    scores = [np.load(dataset.fetch(f"neighbors/{database.label}", entry)) for record in manifest["items"]
              for entry in record["files"] if entry["name"].endswith("scores.npy")]
    return np.concatenate(neighbors.load(dataset, database)), np.concatenate(scores), manifest


def brute_force(queries: np.ndarray, stored: np.ndarray, k: int, excluded: np.ndarray) -> np.ndarray:
    """Scores (N, k) of the k best rows that are not `excluded` (N, M), -inf for none."""
    scores = np.where(excluded, -np.inf, queries @ stored.T)
    scores = np.pad(scores, ((0, 0), (0, k)), constant_values=-np.inf)
    return -np.sort(-scores, axis=1)[:, :k]


def indexed(database: Dataset, **options) -> Dataset:
    stage.run(Index(database, IndexConfig(**options)))
    return database


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """Four shards of different lengths, with twelve rows of zeros."""
    vectors = made.clustered(900, 16)
    vectors[100:112] = 0
    return indexed(made.given(tmp_path_factory.mktemp("root"), "database",
                              [vectors[:300], vectors[300:310], vectors[310:700], vectors[700:]]), key="Flat")


@pytest.fixture(scope="module")
def dataset(database):
    """Two shards of other vectors in the same root."""
    vectors = made.clustered(150, 16, seed=1)
    return made.given(database.root, "dataset", [vectors[:40], vectors[40:]])


@pytest.mark.parametrize("method", ["exact", "index"])
@pytest.mark.parametrize("itself", [True, False])
def test_neighbours_are_those_of_brute_force(database, dataset, itself, method, tmp_path):
    own = database if itself else dataset
    target = Dataset(str(tmp_path / "root"), own.name)
    import shutil
    shutil.copytree(database.root, target.root, ignore=shutil.ignore_patterns("neighbors"))
    base = Dataset(target.root, database.name)
    ids, scores, manifest = found(target, base, k=7, method=method, copy_similarity=2.0)
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
        one = indexed(made.given(tmp_path / name, "x", [made.clustered(200, 16), made.clustered(90, 16, seed=2)]),
                      key="Flat")
        ids, scores, manifest = found(one, one, k=5, method=method)
        results.append((ids, scores))
        manifests.append(stage.timeless(manifest))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-6)
    assert manifests[1] == manifests[2] and manifests[0] == manifests[3]


@pytest.mark.parametrize("method", ["exact", "index"])
def test_copies_are_left_out_and_others_move_up(tmp_path, method):
    """Row 0 has 40 near copies, and 40 rows with the same picture in very different places."""
    rng = np.random.default_rng(0)
    vectors = made.clustered(300, 16)
    near = vectors[:1] + 0.01 * rng.normal(size=(40, 16))
    vectors[1:41] = near / np.linalg.norm(near, axis=1, keepdims=True)
    hashes = [storage.short_hash(str(row)).ljust(64, "0") for row in range(300)]
    for row in range(200, 240):
        hashes[row] = hashes[0]
    database = indexed(made.given(tmp_path, "x", [vectors[:150], vectors[150:]], hashes), key="Flat")
    ids, scores, _ = found(database, database, k=10, method=method, candidates=11)
    stored = Embeddings(database).all().astype(np.float32)
    same = np.array(hashes)[:, None] == np.array(hashes)
    excluded = same | (stored @ stored.T >= 0.98) | np.eye(300, dtype=bool)
    np.testing.assert_allclose(scores, brute_force(stored, stored, 10, excluded), atol=1e-5)
    assert (ids >= 0).all() and not np.isin(ids[0], [*range(41), *range(200, 240)]).any()
    assert scores.max() < 0.98


def test_copies_in_another_database_are_left_out_too(tmp_path):
    vectors = made.clustered(60, 16)
    hashes = [storage.short_hash(str(row)).ljust(64, "0") for row in range(60)]
    one = made.given(tmp_path, "one", [vectors[:20]], hashes[:20])
    other = made.given(tmp_path, "other", [np.roll(vectors, 16 // 2, axis=1)], hashes)
    ids, _, _ = found(one, other, k=59, method="exact", copy_similarity=2.0)
    assert all(row not in ids[row] and set(ids[row]) == set(range(60)) - {row} for row in range(20))


@pytest.mark.parametrize("method", ["exact", "index"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_database_smaller_than_k_is_padded(tmp_path, method, count):
    database = indexed(made.given(tmp_path, "x", [made.clustered(count, 16, clusters=9)]))
    ids, scores, manifest = found(database, database, k=5, method=method)
    assert ids.shape == scores.shape == (count, 5)
    assert (ids[:, :count - 1] >= 0).all() and (ids[:, count - 1:] == -1).all()
    assert np.isneginf(scores[:, count - 1:]).all() and manifest["info"]["missing"] == count * (6 - count)


def test_an_index_of_few_lists_does_not_leave_gaps(tmp_path):
    """Looking into one list of three, an index cannot give as many candidates as there are rows."""
    database = indexed(made.given(tmp_path, "x", [made.clustered(300, 16, clusters=40)]), key="IVF30,Flat",
                       target_recall=0.0)
    ids, _, manifest = found(database, database, k=100, copy_similarity=2.0)
    assert (ids >= 0).all() and manifest["info"]["missing"] == 0


def test_ids_from_a_compressed_index_have_exact_scores(tmp_path):
    database = indexed(made.given(tmp_path, "x", [made.clustered(1500, 16)]), key="PQ8x4")
    ids, scores, _ = found(database, database, k=5)
    stored = Embeddings(database).all().astype(np.float32)
    np.testing.assert_allclose(scores, (stored[ids] * stored[:, None]).sum(-1), atol=1e-5)
    expected = brute_force(stored, stored, 5, np.eye(len(stored), dtype=bool) | (stored @ stored.T >= 0.98))
    assert np.isclose(scores, expected, atol=1e-5).mean() > 0.7


def test_different_encoders_are_refused_and_named(tmp_path):
    one = made.given(tmp_path, "one", [made.clustered(9, 16)])
    other = made.given(tmp_path, "other", [made.clustered(9, 16)], encoder=made.ENCODER | {"weights_sha256": "11"})
    with pytest.raises(ValueError, match=r'they differ in weights_sha256 \("00" / "11"\)\nhint'):
        found(one, other, method="exact")


def test_a_database_without_an_index_is_refused_with_the_command(tmp_path):
    one = made.given(tmp_path, "one", [made.clustered(9, 16)])
    with pytest.raises(ValueError, match=r"index is not sealed.*\nhint: python -m jobs index one --root"):
        found(one, one)


def test_empty_shards_are_empty_lists(tmp_path):
    vectors = made.clustered(20, 16)
    one = indexed(made.given(tmp_path, "x", [vectors[:0], vectors[:12], vectors[:0], vectors[12:]]))
    for method in ("index", "exact"):
        if method == "exact":
            one = made.given(tmp_path / "exact", "x", [vectors[:0], vectors[:12], vectors[:0], vectors[12:]])
        found(one, one, k=3, method=method)
        assert [part.shape for part in neighbors.load(one, one)] == [(0, 3), (12, 3), (0, 3), (8, 3)]


def test_a_rebuilt_index_is_opened_anew(tmp_path):
    vectors = made.clustered(400, 16)
    database = indexed(made.given(tmp_path, "x", [vectors]), key="IVF30,Flat", target_recall=0.0)
    poor = found(database, database, k=3, candidates=4)[0].copy()
    stage.run(Index(database, IndexConfig(key="Flat")), rebuild=True)
    manifest = stage.run(Neighbors(database, database, NeighborsConfig(k=3, candidates=4)), rebuild=True)
    again = neighbors.load(database, database)[0]
    assert manifest["inputs"]["index"]["digest"] == database.manifest("index")["content"]
    stored = Embeddings(database).all().astype(np.float32)
    expected = brute_force(stored, stored, 3, np.eye(400, dtype=bool) | (stored @ stored.T >= 0.98))
    assert np.isclose((stored[again] * stored[:, None]).sum(-1), expected, atol=1e-5).mean() > 0.95
    assert (poor != again).any()


def test_other_settings_are_refused(database, dataset):
    found(dataset, database, k=4)
    with pytest.raises(ValueError, match=r"section\.k: there 4, now 5"):
        found(dataset, database, k=5)
    with pytest.raises(ValueError, match="at least 1"):
        NeighborsConfig(k=0)
