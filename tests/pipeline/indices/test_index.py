import contextlib
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.formats.sizes import parse_size
from pipeline.indices import faiss_door, train, tune
from pipeline.indices import fill as fill_of_index
from pipeline.indices.config import IndexConfig
from pipeline.indices.faiss_door import scan_in_blocks
from pipeline.indices.fill import fill, fill_by_lists
from pipeline.indices.index import Index, build_index, build_whole
from pipeline.indices.searcher import IndexLists, Searcher
from pipeline.indices.train import _codebooks, train_index, train_rotation
from pipeline.indices.tune import RecallQueries, recall_error
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from pipeline.stages.types import StageFailed
from tests.pipeline import synthetic

ROOT = Path(__file__).parents[3]


def bytes_of(built_index) -> bytes:
    return faiss.serialize_index(built_index).tobytes()


@pytest.fixture(scope="module")
def many():
    return synthetic.clustered(10_500, 16, clusters=100)


@pytest.fixture(scope="module")
def few():
    return synthetic.clustered(2_000, 32)


@pytest.mark.parametrize("text", ["", "four", "4X", "-1G", "4G5", "1e9", "4i", "4Bi"])
def test_an_invalid_size_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="must be a size\nhint"):
        Index(Dataset(str(tmp_path), "x"), IndexConfig(max_memory=text))


@pytest.mark.parametrize("budget", ["1Gi", "300Ki", "100Ki", "70Ki", "40Ki", "20Ki"])
def test_an_index_below_ten_thousand_vectors_obeys_its_budget(few, budget):
    built, infos, info, _ = build_whole(few, IndexConfig(max_memory=budget))
    assert len(bytes_of(built)) == info["bytes"] == infos["size in bytes"] <= info["budget"]
    assert info["budget"] == parse_size(budget, "budget")
    assert built.ntotal == infos["nb vectors"] == 2_000 and built.d == infos["vectors dimension"] == 32
    assert infos["index_key"] == info["key"] and infos["compression ratio"] == round(2_000 * 128 / info["bytes"], 4)


@pytest.mark.parametrize("budget", ["1Gi", "1Mi", pytest.param("300Ki", marks=pytest.mark.slow), "100Ki"])
def test_an_index_above_ten_thousand_vectors_obeys_its_budget(many, budget):
    built, _, info, _ = build_whole(many, IndexConfig(max_memory=budget))
    assert len(bytes_of(built)) == info["bytes"] <= parse_size(budget, "budget")
    assert built.ntotal == 10_500


def test_autofaiss_chooses_the_kind_above_ten_thousand_vectors(many):
    from autofaiss.external.optimize import get_optimal_index_keys_v2
    for budget in ("1G", "1M"):  # autofaiss reads M as 2**20
        _, _, info, _ = build_whole(many, IndexConfig(max_memory=f"{budget}i"))
        assert info["key"] in get_optimal_index_keys_v2(10_500, 16, budget)


def test_a_budget_per_vector_is_a_budget_like_any_other(many):
    _, _, whole, _ = build_whole(many, IndexConfig(max_memory=str(10_500 * 100 + (64 << 10))))
    _, _, each, _ = build_whole(many, IndexConfig(bytes_per_vector=100))
    assert each == whole and each["bytes"] <= 10_500 * 100 + (64 << 10)


@pytest.mark.parametrize("config", [IndexConfig(max_memory="1Ki"), IndexConfig(max_memory="1Ki", key="SQ8")])
@pytest.mark.parametrize("count", [50, 600, 2_000])
def test_an_impossible_budget_names_the_least_that_works(few, config, count):
    with pytest.raises(ValueError, match="hint: the smallest possible has about") as caught:
        build_whole(few[:count], config)
    value = re.search(r"--max-memory (\w+)$", str(caught.value))[1]
    _, _, info, _ = build_whole(few[:count], IndexConfig(key=config.key, max_memory=value))
    assert info["bytes"] <= parse_size(value, "value") < 1.2 * info["bytes"] + max(1024, count)


def test_a_budget_per_vector_that_is_too_small_names_the_least():
    vectors = synthetic.clustered(300, 4096)
    with pytest.raises(ValueError, match="hint: the smallest possible has about") as caught:
        build_whole(vectors, IndexConfig(bytes_per_vector=1))
    value = int(re.search(r"--bytes-per-vector (\d+)$", str(caught.value))[1])
    assert build_whole(vectors, IndexConfig(bytes_per_vector=value))[2]["bytes"] <= 300 * value + (64 << 10)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_handful_of_vectors_fits_a_budget_per_vector(few, count):
    assert build_whole(few[:count], IndexConfig(bytes_per_vector=288))[2]["recall_at_10"] is None


@pytest.mark.parametrize(("key", "floor"), [("Flat", 1.0), ("SQ8", 0.9), ("PQ8x8np", 0.1), ("IVF32,Flat", 0.9),
                                            ("HNSW15", 0.9)])
def test_recall_is_that_of_queries_that_were_not_trained_on(few, key, floor):
    config = IndexConfig(key=key, queries=150)
    built, _, info, _ = build_whole(few, config)
    assert info["recall_queries"] == 150 and info["recall_rows"] == 2000
    # A second measurement: another index of the same kind and setting, trained without these rows.
    held = np.random.default_rng((0, 17)).choice(2_000, 150, replace=False)
    kept = np.setdiff1d(np.arange(2_000), held)
    other = faiss.index_factory(32, key, faiss.METRIC_INNER_PRODUCT)
    other.train(few[kept])
    other.add(few)
    if info["parameter"]:
        faiss.ParameterSpace().set_index_parameters(other, info["parameter"])
    neighbors = [[row for row in rows if row != own][:10] for rows, own in zip(other.search(few[held], 11)[1].tolist(),
                                                                               held, strict=True)]
    products = few[held] @ few.T
    products[np.arange(150), held] = -np.inf
    exact = np.argsort(-products, axis=1, kind="stable")[:, :10]
    recall = np.mean([len(set(a) & set(b)) for a, b in zip(neighbors, exact.tolist(), strict=True)]) / 10
    assert info["recall_at_10"] == pytest.approx(recall, abs=0.02) and recall >= floor
    assert built.ntotal == 2_000


def test_tuning_takes_the_least_effort_that_reaches_the_target(few):
    efforts = {}
    for target in (0.5, 0.99):
        built, _, info, _ = build_whole(few, IndexConfig(key="IVF64,Flat", target_recall=target))
        assert info["recall_at_10"] >= target
        assert info["parameter"] == f"nprobe={built.nprobe}"
        efforts[target] = built.nprobe
    assert efforts[0.5] < efforts[0.99]


@pytest.mark.parametrize("key", ["", "Flat", "SQ8", "HNSW15", "IVF32,Flat"])
def test_ids_are_global_rows(few, key):
    built, _, _, _ = build_whole(few, IndexConfig(key=key, target_recall=1.0))
    ids = built.search(few, 1)[1][:, 0]
    assert (ids == np.arange(len(few))).mean() > 0.99


def test_training_takes_a_sample_of_all_not_the_first_rows(few):
    """The first rows may be all of one kind. A quantizer that is trained only on them would be bad for the others."""
    one_kind = np.concatenate([np.repeat(few[:1], 1_000, axis=0), few[1_000:]])
    built, _, _, _ = build_whole(one_kind, IndexConfig(key="SQ8", train_points=200, queries=0))
    error = np.abs(built.reconstruct_n(0, 2_000) - one_kind).max()
    assert error < 0.3


def test_the_final_fill_uses_the_trained_index(few):
    built, _, _, _ = build_whole(few, IndexConfig(key="PQ8x8"))
    assert built.is_trained and built.ntotal == 2_000
    approximate = built.reconstruct_n(0, 2_000)
    assert (approximate * few).sum(1).mean() > 0.8


@pytest.mark.parametrize("count", [1, 2, 9, 10, 50, 99, 100, 101, 999])
@pytest.mark.parametrize("budget", ["4Gi", "auto"])
def test_tiny_databases_work(few, count, budget):
    limit = "4Gi" if budget == "4Gi" else str(count * 40 + 3_000)
    built, _, info, _ = build_whole(few[:count], IndexConfig(max_memory=limit))
    assert built.ntotal == count
    assert set(built.search(few[:count], count)[1][:, 0].tolist()) <= set(range(count))
    assert info["recall_queries"] == count // 10


def test_no_vectors_are_refused():
    with pytest.raises(ValueError, match="no vectors"):
        build_whole(np.empty((0, 32), np.float32), IndexConfig())


def test_a_key_that_faiss_cannot_build_is_refused(few):
    for key in ("NoSuchKind", "IVF4096,Flat", "PQ7x8"):
        with pytest.raises(ValueError, match="faiss cannot build") as caught:
            build_whole(few, IndexConfig(key=key))
        assert "hint:" in str(caught.value)


@pytest.mark.parametrize("key", ["Flat", "SQ8", "PQ8x8", "IVF32,SQ8", "OPQ2_8,IVF16,PQ2x4", "HNSW15",
                                 "IVF400_HNSW8,PQ8x4", "OPQ2_8,IVF200_HNSW8,PQ2x4",
                                 "OPQ1_32,IVF16,PQ1x8", "IVF16,RaBitQ"])
def test_equal_vectors_give_equal_bytes_with_any_number_of_threads(few, key):
    seen = set()
    for number in (1, 2, 2, 3):
        faiss.omp_set_num_threads(number)
        seen.add(bytes_of(build_whole(few, IndexConfig(key=key))[0]))
        assert faiss.omp_get_max_threads() == number
    assert len(seen) == 1


def test_rows_of_zeros_are_no_queries_and_never_found(tmp_path, few):
    vectors = few[:500].copy()
    vectors[::3] = 0
    database = synthetic.vector_dataset(tmp_path, "x", [vectors])
    manifest = run_stage(Index(database, IndexConfig()))
    assert manifest["info"]["recall_at_10"] == 1.0
    ids, scores = Searcher(database).search(-vectors[1:2], 400)
    assert (ids[0] % 3 != 0)[ids[0] >= 0].all() and (ids[0] < 0).sum() == 400 - 333
    assert np.isneginf(scores[ids < 0]).all()


def test_the_stage_gives_the_same_bytes_twice(tmp_path, few):
    manifests = []
    for name in ("one", "other"):
        database = synthetic.vector_dataset(tmp_path / name, "x", [few[:700], few[700:]])
        manifests.append(without_run_facts(run_stage(Index(database, IndexConfig()))))
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("budget", ["4Gi", "80Ki"])
def test_search_gives_exact_products_nearest_first(tmp_path, few, budget):
    database = synthetic.vector_dataset(tmp_path, "x", [few[:700], few[700:1900]])
    run_stage(Index(database, IndexConfig(max_memory=budget)))
    searcher, queries = Searcher(database), few[1900:]
    ids, scores = searcher.search(queries, 5)
    stored = Embeddings(database).all().astype(np.float32)
    np.testing.assert_allclose(scores, (stored[ids] * queries[:, None]).sum(-1), atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    exact = np.sort(queries @ stored.T, axis=1)[:, :-6:-1]
    assert np.isclose(scores, exact, atol=1e-5).mean() > 0.95


def test_an_index_of_other_embeddings_is_refused(tmp_path, few):
    database = synthetic.vector_dataset(tmp_path, "x", [few[:300]])
    run_stage(Index(database, IndexConfig()))
    other = synthetic.vector_dataset(tmp_path / "other", "x", [few[:200]])
    import shutil
    shutil.copytree(database.folder("index"), other.folder("index"))
    with pytest.raises(ValueError, match="has 300 rows, its embeddings 200\nhint"):
        Searcher(other)


def test_an_index_in_parts_is_the_index_in_one(tmp_path, few):
    """With equal training and rows, the merged results of the parts are those of one index."""
    dataset = synthetic.vector_dataset(tmp_path, "x", np.array_split(few, 7))
    key = "IVF16,SQ8"
    whole = Index(dataset, IndexConfig(key=key, target_recall=0.99))
    assert whole.before() == []
    parts = Index(dataset, IndexConfig(key=key, target_recall=0.99, part_memory="30Ki"))
    manifest = build_index(parts, run_stage)
    about = manifest["info"]
    assert about["parts"] > 2 and about["recall_at_10"] > 0.9 and about["recall"]["image"].keys() == {"1", "10", "100"}
    assert not storage.exists(storage.join(dataset.folder("index-parts"), "plan.json"))
    searcher = Searcher(dataset)
    ids, scores = searcher.search(few[:50], 5)
    assert (ids[:, 0] == np.arange(50)).mean() > 0.95 and (scores[:, :-1] >= scores[:, 1:]).all()
    first = storage.read_bytes(storage.join(dataset.folder("index"), "knn.index"))
    build_index(parts, run_stage, overwrite=True)
    assert storage.read_bytes(storage.join(dataset.folder("index"), "knn.index")) == first
    # Its exact neighbors are those of all rows, wherever the parts end.
    queries = RecallQueries("image", few[:20], np.arange(20))
    for start in range(0, len(few), 333):
        queries.look(few[start:start + 333], start)
    products = few[:20] @ few.T
    products[np.arange(20), np.arange(20)] = -np.inf
    np.testing.assert_allclose(queries.scores[:, :10], -np.sort(-products, 1)[:, :10], atol=1e-5)


def test_an_index_below_the_required_recall_is_not_sealed(tmp_path, few):
    dataset = synthetic.vector_dataset(tmp_path, "x", np.array_split(few, 3))
    config = IndexConfig(key="PQ4x4", min_recall=0.9)
    with pytest.raises(StageFailed, match=r"recall@10 is 0\.\d+, --min-recall asks for 0\.9\nhint: "):
        run_stage(Index(dataset, config))
    assert not storage.exists(storage.join(dataset.folder("index"), "manifest.json"))
    run_stage(Index(dataset, replace(config, min_recall=0.0)))


def test_kinds_that_cannot_be_filled_in_parts_are_refused_for_parts(tmp_path, few):
    dataset = synthetic.vector_dataset(tmp_path, "x", np.array_split(few, 3))
    with pytest.raises(StageFailed, match="HNSW15 cannot be filled in parts"):
        build_index(Index(dataset, IndexConfig(key="HNSW15", part_memory="100Ki")), run_stage)


@pytest.mark.slow
def test_the_rotation_is_as_good_as_that_of_faiss(few):
    error = {}
    for width in (32, 48, 16):
        theirs = faiss.OPQMatrix(32, 8, width)
        theirs.train(few)
        ours = train_rotation(few, width, 8)
        short = min(32, width)
        product = ours @ ours.T if width <= 32 else ours.T @ ours
        np.testing.assert_allclose(product, np.eye(short), atol=1e-4)
        for who, rows in (("faiss", theirs.apply(few)), ("ours", few @ ours.T)):
            codebooks = faiss.ProductQuantizer(width, 8, 8)
            codebooks.train(rows)
            lost = ((few - few.mean(0)) ** 2).sum() - ((rows - rows.mean(0)) ** 2).sum() if width < 32 else 0.0
            error[who] = float(((codebooks.decode(codebooks.compute_codes(rows)) - rows) ** 2).sum() + lost)
        assert error["ours"] < 1.03 * error["faiss"]


def test_the_rotation_is_the_same_with_any_number_of_threads(tmp_path):
    script = ("import numpy as np; from pipeline.indices import train; train._TURNS = 3;"
              "rows = np.random.default_rng(0).normal(size=(2000, 256)).astype(np.float32);"
              "np.save('{}', train.train_rotation(rows, 320, 64))")
    seen = set()
    for number in (1, 2, 3):
        path = tmp_path / f"{number}.npy"
        settings = os.environ | {"OPENBLAS_NUM_THREADS": str(number), "OMP_NUM_THREADS": str(number)}
        subprocess.run([sys.executable, "-c", script.format(path)], check=True, env=settings, cwd=ROOT)
        seen.add(path.read_bytes())
    assert len(seen) == 1


@pytest.mark.parametrize("key", ["SQ6", "PQ8x8", "PQ2x4", "PCA16,SQ8", "IVF32,Flat", "IVF32,SQ4", "IVF32,PQ8x8",
                                 "IVF32,PQ8x4fs", "IVF32,RQ2x4", "RR32,IVF32,RaBitQ"])
def test_training_and_filling_give_the_bytes_of_faiss_with_one_thread(few, key):
    ours = train_index(key, few, 32)
    faiss.omp_set_num_threads(3)
    fill(ours, few)
    faiss.omp_set_num_threads(1)
    theirs = faiss.index_factory(32, key, faiss.METRIC_INNER_PRODUCT)
    inner = faiss.downcast_index(theirs.index) if isinstance(theirs, faiss.IndexPreTransform) else theirs
    if hasattr(inner, "do_polysemous_training"):
        inner.do_polysemous_training = False
    with scan_in_blocks():
        theirs.train(few)
    theirs.add(few)
    assert bytes_of(ours) == bytes_of(theirs)


def test_searches_give_the_same_bits_with_any_number_of_threads(tmp_path):
    """faiss alone gives other last bits here, because it multiplies matrices with several threads."""
    vectors = synthetic.clustered(5_000, 256)
    database = synthetic.vector_dataset(tmp_path, "x", [vectors])
    run_stage(Index(database, IndexConfig(key="OPQ8_32,IVF32,PQ8x8")))
    searcher, lists = Searcher(database), IndexLists(database)
    seen = set()
    for threads in (1, 2, 3):
        faiss.omp_set_num_threads(threads)
        queries = RecallQueries("image", vectors[:600], np.arange(600))
        queries.look(vectors, 0)
        arrays = [queries.scores, searcher.candidates(vectors[:600], 50), lists.nearest(vectors, 8)]
        figures = [recall_error(searcher.index, vectors), queries.recall(searcher.index)]
        seen.add((*(array.tobytes() for array in arrays), str(figures)))
    assert len(seen) == 1


@pytest.mark.skipif(faiss.cvar.distance_compute_blas_threshold < 1000, reason="this faiss has no such threshold")
def test_codebooks_of_short_parts_are_not_found_query_by_query(monkeypatch):
    """faiss does so for short vectors. An index of ten thousand images then takes eleven times as long."""
    rows, seconds = synthetic.clustered(8_000, 12), []
    for scans in (faiss_door.scan_in_blocks, contextlib.nullcontext):
        monkeypatch.setattr(train, "scan_in_blocks", scans)
        begin = time.process_time()
        _codebooks(rows, 4, 256, faiss.ClusteringParameters())
        seconds.append(time.process_time() - begin)
    assert 3 * seconds[0] < seconds[1]


@pytest.mark.gpu
@pytest.mark.skipif(not faiss_door.count_gpus(), reason="faiss without a GPU")
@pytest.mark.parametrize("key", ["IVF32,SQ8", "OPQ8_32,IVF32_HNSW8,PQ8x8"])
def test_a_gpu_finds_what_the_cpu_finds(few, key, monkeypatch):
    queries = {}
    recall = {}
    for where in ("gpu", "cpu"):
        if where == "cpu":
            for module in (faiss_door, fill_of_index, train, tune):
                monkeypatch.setattr(module, "gpus", lambda: 0)
        recall[where] = build_whole(few, IndexConfig(key=key, target_recall=1.0))[2]["recall_at_10"]
        queries[where] = RecallQueries("image", few[:50], np.arange(50))
        queries[where].look(few, 0)
    assert recall["gpu"] == pytest.approx(recall["cpu"], abs=0.03)
    assert (queries["gpu"].ids[:, :10] == queries["cpu"].ids[:, :10]).mean() > 0.99
    np.testing.assert_allclose(queries["gpu"].scores, queries["cpu"].scores, atol=1e-4)


@pytest.mark.parametrize("key", ["IVF32,SQ8", "OPQ8_32,IVF16,PQ8x4"])
def test_filling_list_by_list_gives_the_index_of_one_fill(few, key):
    index = train_index(key, few, 32)
    copied_index = faiss.clone_index(index)
    fill(index, few)
    fill_by_lists(copied_index, few, place=lambda centres: centres)
    assert bytes_of(index) == bytes_of(copied_index)
