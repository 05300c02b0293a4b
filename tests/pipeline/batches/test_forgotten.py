"""Batches never have images that were forgotten after the shards and the neighbor lists were made."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.batches.batches import Batches
from pipeline.batches.forgotten import ForgottenRows
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.datasets.metadata import metadata
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.files import load_neighbors
from pipeline.neighbors.neighbors import Neighbors
from pipeline.stages.driver import run_stage
from pipeline.takedowns.hidden_rows import Tombstones
from pipeline.takedowns.takedowns import hide_rows


@pytest.mark.parametrize("stored", [False, True])
def test_a_forgotten_image_is_no_image_and_no_neighbor_of_any_batch(copied: Dataset, stored: bool) -> None:
    run_stage(Neighbors(copied, copied, NeighborsConfig(k=3, method="exact", vectors=stored)), overwrite=True)
    before = Batches(copied, copied, k=3, global_batch=8, seed=5)
    forgotten = [40, 41, 71]
    hide_rows(copied, forgotten, 0)
    after = Batches(copied, copied, k=3, global_batch=8, seed=5)
    ids, vectors, seen = np.concatenate(load_neighbors(copied, copied)), Embeddings(copied).all(), set()
    for step in range(9):  # an epoch
        old, new = before.at(step), after.at(step)
        kept = ~np.isin(old["rows"], forgotten)
        seen.update(old["rows"][~kept].tolist())
        np.testing.assert_array_equal(new["rows"][kept], old["rows"][kept])
        np.testing.assert_array_equal(new["image"][kept], old["image"][kept])
        assert not np.isin(new["rows"], forgotten).any()
        assert (new["rows"][~kept] // 30 == old["rows"][~kept] // 30).all()  # the same shard
        expected = np.where(np.isin(ids[new["rows"], :3], forgotten)[..., None], 0, vectors[ids[new["rows"], :3]])
        np.testing.assert_array_equal(new["neighbors"], expected)
    assert seen == set(forgotten) and np.isin(ids[:, :3], forgotten).any()


@pytest.mark.parametrize("stored", [False, True])
def test_a_row_that_was_hidden_after_its_lists_is_no_neighbor(copied: Dataset, tmp_path: Path, stored: bool) -> None:
    run_stage(Neighbors(copied, copied, NeighborsConfig(k=3, method="exact", vectors=stored)), overwrite=True)
    ids, vectors = np.concatenate(load_neighbors(copied, copied)), Embeddings(copied).all()
    hidden = np.unique(ids[:, 0])[[0, 3, -1]]
    keys = [row["key"] for record in copied.manifest("shards")["items"] for row in metadata(copied, record, ["key"])]
    (tmp_path / "keys.txt").write_text("\n".join(keys[row] for row in hidden))
    run_stage(Tombstones(copied, str(tmp_path / "keys.txt")))
    batch = Batches(copied, copied, k=3, global_batch=72, seed=5).at(0)
    assert len(set(batch["rows"])) == 72  # images are still trained on
    gone = np.isin(ids[batch["rows"], :3], hidden)
    expected = np.where(gone[..., None], 0, vectors[ids[batch["rows"], :3]])
    np.testing.assert_array_equal(batch["neighbors"], expected)
    assert gone.any()
    # The same command finds the lists as they are. Lists that are made now have other rows in these places.
    run_stage(Neighbors(copied, copied, NeighborsConfig(k=3, method="exact", vectors=stored)))
    run_stage(Neighbors(copied, copied, NeighborsConfig(k=3, method="exact", vectors=stored)), overwrite=True)
    assert not np.isin(np.concatenate(load_neighbors(copied, copied)), hidden).any()
    assert Batches(copied, copied, k=3, global_batch=72, seed=5).at(0)["neighbors"].any(-1).all()


def test_without_a_visible_row_in_its_shard_the_next_row_of_the_dataset_is_taken(copied: Dataset) -> None:
    offsets = np.array([0, 30, 60, 72])
    hide_rows(copied, [5, 29, *range(60, 72)], 0)
    rows = ForgottenRows(copied, offsets).replace(np.array([5, 29, 60, 71, 6]))
    np.testing.assert_array_equal(rows, [6, 0, 0, 0, 6])


def test_a_dataset_without_a_visible_row_is_refused(copied: Dataset) -> None:
    hide_rows(copied, list(range(72)), 0)
    with pytest.raises(ValueError, match=r"all 72 rows of drawn are forgotten.*\nhint: "):
        Batches(copied, copied, k=3, global_batch=8, seed=5)
