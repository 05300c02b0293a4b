"""Rows that were forgotten after their shards or neighbor lists were made: no batch has them."""

import numpy as np

from pipeline.datasets.dataset import Dataset
from pipeline.takedowns.takedowns import read_forgotten_rows


class ForgottenRows:
    """The forgotten rows of a dataset, ascending, and the row that takes the place of each.

    That is the next row of the same shard, so that each batch keeps its size and its other rows. Without any left in
    the shard it is the next row of the dataset. ValueError if every row was forgotten.
    """

    def __init__(self, dataset: Dataset, offsets: np.ndarray) -> None:
        self.rows = read_forgotten_rows(dataset)
        visible = np.setdiff1d(np.arange(offsets[-1]), self.rows) if len(self.rows) else self.rows
        if len(self.rows) and not len(visible):
            raise ValueError(f"all {offsets[-1]} rows of {dataset.label} are forgotten, so none is left to train on\n"
                             f"hint: python -m jobs ls, which lists other datasets")
        self._substitutes = np.array([_next_visible(row, visible, offsets) for row in self.rows.tolist()], np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def replace(self, rows: np.ndarray) -> np.ndarray:
        """The global rows of a batch, (B,) int64, with others in the place of forgotten ones."""
        forgotten = np.isin(rows, self.rows)
        if not forgotten.any():
            return rows
        places = np.searchsorted(self.rows, rows[forgotten])
        replaced = rows.copy()
        replaced[forgotten] = self._substitutes[places]
        return replaced


def _next_visible(row: int, visible: np.ndarray, offsets: np.ndarray) -> int:
    shard = int(np.searchsorted(offsets, row, side="right")) - 1
    here = visible[np.searchsorted(visible, offsets[shard]):np.searchsorted(visible, offsets[shard + 1])]
    among = here if len(here) else visible
    return int(among[np.searchsorted(among, row) % len(among)])
