"""Row filters over scores: neighbors, hidden rows and gates, without packing again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cli.main import main
from jobs.publishing.rebuild import GatesFailed
from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings
from pipeline.indices.config import IndexConfig
from pipeline.indices.index import Index
from pipeline.indices.searcher import Searcher
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.neighbors import Neighbors
from pipeline.scores.config import ScoreConfig
from pipeline.scores.score import Score
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from pipeline.takedowns import hidden_rows
from pipeline.versions import verify
from pipeline.versions.config import GatesConfig
from tests.jobs.publishing.published_art import published_dataset, rebuild
from tests.pipeline import synthetic

WARMTH = "warmth=tests.pipeline.scores.warm:score"
VECTORS = synthetic.clustered(900, 16)
FEW = float(np.sort(VECTORS[:, 0])[-60])
"""A score that 60 rows reach."""


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset = synthetic.vector_dataset(tmp_path / "root", "x", np.array_split(VECTORS, 3))
    run_stage(Score(dataset, WARMTH, ScoreConfig()))
    return dataset


def neighbor_ids(dataset: Dataset, **settings: Any) -> np.ndarray:
    manifest = run_stage(Neighbors(dataset, dataset, NeighborsConfig(**settings)), overwrite=True)
    return np.concatenate([np.load(dataset.fetch("neighbors/x", file_of(record, ".ids.npy")))
                           for record in manifest["items"]])


def test_a_filter_with_fewer_rows_than_neighbors_is_named(dataset, caplog):
    run_stage(Index(dataset, IndexConfig(key="SQ8")))
    limit = np.sort(VECTORS[:, 0])[-5]
    ids = neighbor_ids(dataset, k=6, where=f"warmth >= {limit}")
    assert (ids[:, -1] == -1).all() and (ids[:, 3] >= 0).all()
    assert "leaves 5 rows" in caplog.text and "k is 6" in caplog.text and "hint: --k 4" in caplog.text


@pytest.mark.parametrize(("key", "method"), [("IVF16,SQ8", "index"), ("HNSW15", "index"), ("SQ8", "index"),
                                             ("SQ8", "exact")])
def test_only_rows_that_pass_are_neighbors(dataset, key, method):
    run_stage(Index(dataset, IndexConfig(key=key, target_recall=0.9)))
    where = f"warmth >= {FEW}"
    ids = neighbor_ids(dataset, k=10, where=where, method=method)
    passing = VECTORS[:, 0] >= FEW
    products = VECTORS @ VECTORS.T
    products[:, ~passing] = -np.inf
    np.fill_diagonal(products, -np.inf)
    expected = np.argsort(-products, axis=1)[:, :10]
    assert passing.sum() == 60 and (ids >= 0).all() and passing[ids].all()
    agreed = [len(np.intersect1d(row, own)) for row, own in zip(ids, expected, strict=True)]
    assert np.mean(agreed) > (9.9 if key == "SQ8" else 7)
    assert dataset.manifest("neighbors/x")["info"]["visible"] == 60
    assert list(verify.find_faults(dataset.root, dataset.path("neighbors/x"))) == []


def test_a_filter_is_part_of_the_fingerprint_only_if_there_is_one(dataset):
    run_stage(Index(dataset, IndexConfig()))
    plain = Neighbors(dataset, dataset, NeighborsConfig())
    assert "where" not in plain.section() and "database_scores/warmth" not in plain.inputs()
    run_stage(plain)
    with pytest.raises(ValueError, match="where"):
        run_stage(Neighbors(dataset, dataset, NeighborsConfig(where="warmth > 0")))
    run_stage(Neighbors(dataset, dataset, NeighborsConfig(where="warmth > 0")), overwrite=True)
    # Other scores make the neighbors stale.
    run_stage(Score(dataset, "warmth=tests.pipeline.scores.warm:score_twice", ScoreConfig()), overwrite=True)
    assert "is stale: database_scores/warmth changed since" in str(list(
        verify.find_faults(dataset.root, dataset.path("neighbors/x"), quick=True)))


def test_filters_that_find_nothing_are_refused(dataset):
    run_stage(Index(dataset, IndexConfig()))
    with pytest.raises(StageFailed, match="warmth > 2 leaves nothing of x to be a neighbor"):
        run_stage(Neighbors(dataset, dataset, NeighborsConfig(where="warmth > 2")))
    with pytest.raises(ValueError, match="names nsfw, and x has no such column"):
        run_stage(Neighbors(dataset, dataset, NeighborsConfig(where="nsfw > 2")), overwrite=True)


def test_hidden_rows_are_found_by_no_search(tmp_path, dataset, capsys):
    run_stage(Index(dataset, IndexConfig()))
    (tmp_path / "keys").write_text("000-00001\n")
    arguments = ["index", "x", "--root", dataset.root, "--local", "--hide", f"warmth < {FEW}"]
    assert main(arguments) == 0
    hidden = np.flatnonzero(VECTORS[:, 0] < FEW)
    assert (hidden_rows.read_hidden_rows(dataset) == hidden).all()
    ids = Searcher(dataset).search(VECTORS, 10)[0]
    assert not np.isin(ids, hidden).any() and (ids >= 0).all()
    assert main([*arguments, "--tombstone", str(tmp_path / "keys"), "--overwrite"]) == 0
    assert (hidden_rows.read_hidden_rows(dataset) == np.union1d(hidden, [1])).all()
    assert main(["index", "x", "--root", dataset.root, "--local", "--hide", "warmth > 2", "--overwrite"]) == 0
    assert len(hidden_rows.read_hidden_rows(dataset)) == 0
    assert main([*arguments, "--extend", "y"]) == 2
    assert "--hide and --extend: expected one of them" in capsys.readouterr().err


def test_rebuild_scores_hides_and_filters_without_packing_again(tmp_path):
    source = synthetic.drawings(tmp_path / "source")
    gates = {"queries": "", "query_count": 4, "min_overlap": 0.0}
    rebuild(tmp_path / "root", source, gates=GatesConfig(**gates))
    first = published_dataset(tmp_path / "root")
    warmth = Embeddings(first).all()[:, 0].astype(np.float32)
    middle = float(np.median(warmth))
    settings = {"scores": (WARMTH,), "hide": f"warmth < {middle}"}
    with pytest.raises(GatesFailed, match=r"share where warmth > 2: 0.0000, at least 0.5"):
        rebuild(tmp_path / "root", source, **settings, gates=GatesConfig(
            **gates, gate_where="warmth > 2", min_share=0.5))
    assert published_dataset(tmp_path / "root").version == "v1"
    summary = rebuild(tmp_path / "root", source, **settings, gates=GatesConfig(
        **gates, gate_where=f"warmth >= {middle}", min_share=1.0))
    assert summary["kept"] == 72 and summary["embedded"] == 0 and summary["published"] == "v2"
    second = published_dataset(tmp_path / "root")
    assert not list(Path(second.folder("shards")).glob("*.tar"))
    assert (hidden_rows.read_hidden_rows(second) == np.flatnonzero(warmth < np.float32(middle))).all()
    assert rebuild(tmp_path / "root", source, **settings, gates=GatesConfig(**gates))["unchanged"]
    assert main(["verify", "--root", str(tmp_path / "root")]) == 0
    assert storage.exists(storage.join(second.folder("scores/warmth"), "manifest.json"))
