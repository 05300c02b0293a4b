"""Read the neighbor lists of a dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.datasets.dataset import Dataset
from pipeline.formats.arrays import map_array


def neighbor_files(items: Sequence[dict[str, Any]], suffix: str) -> list[dict[str, Any]]:
    """The files of some records or of a manifest whose names end so, in the order of the shards."""
    return [entry for record in items for entry in record["files"] if entry["name"].endswith(suffix)]


def load_neighbors(dataset: Dataset, database: Dataset, suffix: str = ".ids.npy") -> list[np.ndarray]:
    """The ids of a sealed neighbor list, shard by shard, each (N_i, k) int64, memory-mapped; or other files of it."""
    name = f"neighbors/{database.label}"
    return [dataset.open_file(name, entry, map_array)
            for entry in neighbor_files(dataset.manifest(name)["items"], suffix)]


def has_vectors(dataset: Dataset, database: Dataset) -> bool:
    """Whether a sealed neighbor list has the neighbors' vectors too."""
    return bool(neighbor_files(dataset.manifest(f"neighbors/{database.label}")["items"], ".vectors.npy"))


def why_recall_is_unknown(info: Mapping[str, Any]) -> str:
    """Why a sealed neighbor list has no recall; empty if its neighbors were compared with the exact ones.

    `info`: that of the manifest. Lists of older versions have the recall 1 for an exact search.
    """
    if info["recall_pairs"]:
        return ""
    return "exact search" if info.get("exact", info["recall"] is not None) else "no image was compared"
