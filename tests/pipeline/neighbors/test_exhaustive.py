import numpy as np
import pytest

from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.hardware import devices
from pipeline.neighbors import exhaustive, rank
from pipeline.neighbors.by_list import search_by_list
from pipeline.neighbors.rank import Candidates, Copies, NeighborQueries
from tests.pipeline import synthetic

MEMORY = 64 << 20


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> tuple[Embeddings, np.ndarray]:
    """Seven shards of unequal lengths, with rows of zeros, and all vectors (3000, 24) float32."""
    vectors = synthetic.clustered(3000, 24)
    vectors[500:540] = 0
    dataset: Dataset = synthetic.vector_dataset(tmp_path_factory.mktemp("root"), "x",
                                                np.split(vectors, [1, 33, 33, 700, 2000, 2999]))
    return Embeddings(dataset), vectors


def queries_of(vectors: np.ndarray) -> NeighborQueries:
    numbers = np.arange(len(vectors), dtype=np.uint64)[:, None] + np.uint64(1 << 40)
    return NeighborQueries(vectors, np.full(len(vectors), -1), numbers)


def no_copies(count: int) -> Copies:
    return Copies(np.arange(count, dtype=np.uint64)[:, None], 2.0)


def exact_scores(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    scores = np.where(vectors.any(1), queries @ vectors.T, -np.inf)
    return -np.sort(-scores, axis=1)[:, :k]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rows", [32, 96, 100_000])
def test_exhaustive_search_errs_at_most_by_its_stated_bound(database, monkeypatch, dtype, rows):
    import torch
    embeddings, vectors = database
    monkeypatch.setattr(exhaustive, "search_device", lambda: (torch.device("cpu"), getattr(torch, dtype)))
    monkeypatch.setattr(exhaustive, "BlockSizes", lambda *_: type("Of", (), {"rows": rows, "queries": 17}))
    queries = synthetic.clustered(70, 24, seed=3)
    candidates = exhaustive.search_exhaustively(queries, embeddings, 12, MEMORY)
    products = queries @ vectors.T
    assert (np.diff(candidates.scores) <= 0).all() and all(len(set(row)) == 12 for row in candidates.ids.tolist())
    assert vectors[candidates.ids].any(-1).all()
    candidate_products = np.take_along_axis(products, candidates.ids, 1)
    assert abs(candidate_products - candidates.scores).max() < candidates.off
    other_products = products.copy()
    np.put_along_axis(other_products, candidates.ids, -np.inf, 1)
    assert (other_products.max(1) <= candidates.beyond).all()
    ranked_scores = rank.rank_candidates(candidates, queries_of(queries), embeddings, no_copies(3000), 3)[1]
    np.testing.assert_allclose(ranked_scores[:, 0], exact_scores(queries, vectors, 1)[:, 0], atol=1e-5)


@pytest.mark.parametrize("pairs", [70 * 64, 32 * 20])
def test_a_search_that_does_not_fit_the_device_is_done_in_smaller_blocks(pairs, database, monkeypatch):
    import torch
    embeddings, _ = database
    monkeypatch.setattr(exhaustive, "search_device", lambda: (torch.device("cpu"), torch.float32))
    queries = synthetic.clustered(70, 24, seed=3)
    in_whole_blocks = exhaustive.search_exhaustively(queries, embeddings, 12, MEMORY)
    assert exhaustive.halved_batches() == {}
    matrix_product = torch.mm

    def limited(left_matrix, right_matrix):
        if left_matrix.shape[0] * right_matrix.shape[1] > pairs:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return matrix_product(left_matrix, right_matrix)

    monkeypatch.setattr(torch, "mm", limited)
    monkeypatch.setattr(exhaustive, "blocks_fit", devices.BatchFit("block (in bytes)"))
    monkeypatch.setattr(exhaustive, "queries_fit", devices.BatchFit("number of queries"))
    in_smaller_blocks = exhaustive.search_exhaustively(queries, embeddings, 12, MEMORY)
    np.testing.assert_allclose(in_smaller_blocks.scores, in_whole_blocks.scores, atol=1e-5)
    for expected, ranked in zip(*(rank.rank_candidates(candidates, queries_of(queries), embeddings, no_copies(3000), 5)
                                  for candidates in (in_whole_blocks, in_smaller_blocks)), strict=True):
        np.testing.assert_array_equal(expected, ranked)
    assert "block (in bytes) from " in exhaustive.halved_batches()[devices.HALVED]
    assert ("number of queries from 70 to 17" in exhaustive.halved_batches()[devices.HALVED]) == (pairs < 32 * 70)
    monkeypatch.setattr(torch, "mm", lambda *_: limited(torch.empty(1 << 12, 1), torch.empty(1, 1 << 12)))
    with pytest.raises(devices.OutOfDeviceMemory, match=r"number of queries of 1 does not fit(.|\n)*hint: "):
        exhaustive.search_exhaustively(queries, embeddings, 12, MEMORY)


def test_every_row_of_a_small_database_is_found(tmp_path):
    vectors = synthetic.clustered(5, 24)
    embeddings = Embeddings(synthetic.vector_dataset(tmp_path, "x", [vectors]))
    candidates = exhaustive.search_exhaustively(vectors, embeddings, 9, MEMORY)
    assert (np.sort(candidates.ids, 1) == [-1] * 4 + [0, 1, 2, 3, 4]).all() and np.isneginf(candidates.beyond).all()


def test_lists_are_read_twice_and_give_their_best_rows(database):
    _, vectors = database
    queries = synthetic.clustered(40, 24, seed=4)
    rng = np.random.default_rng(0)
    list_of_row = rng.integers(11, size=len(vectors))
    list_of_row[list_of_row == 7] = 8  # one list is empty
    probes = np.stack([rng.permutation(11)[:3] for _ in queries])
    probes[0, 2] = -1
    read_lists = []

    def lists(numbers):
        for number in numbers:
            read_lists.append(int(number))
            rows = np.flatnonzero(list_of_row == number)
            yield int(number), rows, vectors[rows]

    candidates = search_by_list(queries, probes, lists, 6)
    nearest, others = (set(columns[columns >= 0].tolist()) for columns in (probes[:, :2], probes[:, 2:]))
    assert read_lists == sorted(nearest) + sorted(others)
    for query, query_probes, ids, scores in zip(queries, probes, candidates.ids, candidates.scores, strict=True):
        probed_rows = np.flatnonzero(np.isin(list_of_row, query_probes))
        best_rows = probed_rows[np.argsort(-(vectors[probed_rows] @ query), kind="stable")][:6]
        np.testing.assert_allclose(scores, vectors[best_rows] @ query, atol=1e-5)
        np.testing.assert_allclose(vectors[ids] @ query, scores, atol=1e-5)


@pytest.mark.parametrize("off", [1e-5, 0.05, np.inf])
def test_ranking_is_exact_and_leaves_out_copies_with_rough_products(database, off):
    embeddings, vectors = database
    queries = synthetic.clustered(30, 24, seed=5)
    products = np.where(vectors.any(1), queries @ vectors.T, -np.inf)
    order = np.argsort(-products, axis=1)[:, :400]
    scores = np.take_along_axis(products, order, 1)
    noise = np.random.default_rng(1).uniform(-0.9, 0.9, scores.shape) * (0 if np.isinf(off) else off)
    rough_scores = (scores + noise).astype(np.float32)
    rough_order = np.argsort(-rough_scores, axis=1)
    candidates = Candidates(np.take_along_axis(order, rough_order, 1), np.take_along_axis(rough_scores, rough_order, 1),
                            off)
    copies = no_copies(3000)
    copies.similarity = 0.9
    neighbor_queries = queries_of(queries)
    neighbor_queries.own[3] = order[3, 0]
    neighbor_queries.labels[4] = copies.labels[order[4, 1]]
    ids, ranked_scores = rank.rank_candidates(candidates, neighbor_queries, embeddings, copies, 10)
    allowed_products = products.copy()
    allowed_products[allowed_products >= 0.9] = -np.inf
    allowed_products[3, order[3, 0]] = allowed_products[4, order[4, 1]] = -np.inf
    np.testing.assert_allclose(ranked_scores, -np.sort(-allowed_products, axis=1)[:, :10], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(products, ids, 1), ranked_scores, atol=1e-5)
    masked_ids, masked_scores = rank.search_all_rows(neighbor_queries, embeddings, copies, 10, MEMORY)
    np.testing.assert_array_equal(masked_ids, ids)
    np.testing.assert_array_equal(masked_scores, ranked_scores)


def test_perceptual_hashes_are_copies_up_to_the_set_distance():
    hashes = np.array([0, 0b1, 0b111, 1 << 63 | 0b11, (1 << 64) - 1], np.uint64)
    queries = NeighborQueries(np.ones((1, 2), np.float32), np.array([-1]), np.array([[9]], np.uint64),
                              np.zeros(1, np.uint64))
    copies = Copies(np.arange(5, dtype=np.uint64)[:, None], 2.0, hashes, 3)
    assert copies.among(np.arange(5), queries, np.zeros(5, int)).tolist() == [True, True, True, True, False]
    copies.bits = 0
    assert copies.among(np.arange(5), queries, np.zeros(5, int)).tolist() == [True] + [False] * 4


def test_a_product_does_not_depend_on_the_other_queries(database):
    embeddings, _ = database
    queries = synthetic.clustered(64, 24, seed=6)
    ids, which = np.arange(0, 2500, 5), np.arange(500) % 64
    together = rank.exact_products(embeddings, ids, queries, which)
    alone = [rank.exact_products(embeddings, ids[place:place + 1], queries, which[place:place + 1])[0]
             for place in range(0, 500, 7)]
    np.testing.assert_array_equal(together[::7], alone)


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds(database):
    embeddings, vectors = database
    queries = synthetic.clustered(70, 24, seed=3)
    assert exhaustive.search_device()[0].type == "cuda"
    candidates = exhaustive.search_exhaustively(queries, embeddings, 40, MEMORY)
    np.testing.assert_allclose(rank.rank_candidates(candidates, queries_of(queries), embeddings, no_copies(3000), 9)[1],
                               exact_scores(queries, vectors, 9), atol=1e-5)


def test_rows_at_the_threshold_of_copies_do_not_displace_others(tmp_path):
    """Thirty equal rows have exactly the score from which on a row is a copy; other rows are farther."""
    vectors = synthetic.clustered(80, 24, clusters=1)
    vectors[10:40] = vectors[10]
    embeddings = Embeddings(synthetic.vector_dataset(tmp_path, "x", [vectors]))
    queries = queries_of(vectors[:1])
    copies = no_copies(80)
    products = rank.exact_products(embeddings, np.arange(80), queries.vectors, np.zeros(80, int))
    copies.similarity = float(products[10])
    _, scores = rank.search_all_rows(queries, embeddings, copies, 5, MEMORY)
    np.testing.assert_array_equal(scores[0], -np.sort(-products[products < products[10]])[:5])
