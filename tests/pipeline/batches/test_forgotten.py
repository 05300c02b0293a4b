"""Batches never have images that were forgotten after the shards and the neighbor lists were made."""

import numpy as np
import pytest

from pipeline.batches.batches import Batches
from pipeline.batches.forgotten import ForgottenRows
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.datasets.takedowns import hide_rows
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.files import load_neighbors
from pipeline.neighbors.neighbors import Neighbors
from pipeline.stages.driver import run_stage


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


def test_without_a_visible_row_in_its_shard_the_next_row_of_the_dataset_is_taken(copied: Dataset) -> None:
    offsets = np.array([0, 30, 60, 72])
    hide_rows(copied, [5, 29, *range(60, 72)], 0)
    rows = ForgottenRows(copied, offsets).replace(np.array([5, 29, 60, 71, 6]))
    np.testing.assert_array_equal(rows, [6, 0, 0, 0, 6])


def test_a_dataset_without_a_visible_row_is_refused(copied: Dataset) -> None:
    hide_rows(copied, list(range(72)), 0)
    with pytest.raises(ValueError, match=r"all 72 rows of drawn are forgotten.*\nhint: "):
        Batches(copied, copied, k=3, global_batch=8, seed=5)
