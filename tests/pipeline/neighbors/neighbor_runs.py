"""Neighbors by the stage and by brute force."""

import numpy as np

from pipeline.datasets.dataset import Dataset
from pipeline.indices.config import IndexConfig
from pipeline.indices.index import Index
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.files import load_neighbors
from pipeline.neighbors.neighbors import Neighbors
from pipeline.stages.driver import run_stage


def find_neighbors(dataset: Dataset, database: Dataset, **options) -> tuple[np.ndarray, np.ndarray, dict]:
    """Ids (N, k), scores (N, k) and the manifest of the neighbors of a dataset."""
    manifest = run_stage(Neighbors(dataset, database, NeighborsConfig(**options)))
    scores = [np.load(dataset.fetch(f"neighbors/{database.label}", entry)) for record in manifest["items"]
              for entry in record["files"] if entry["name"].endswith("scores.npy")]
    return np.concatenate(load_neighbors(dataset, database)), np.concatenate(scores), manifest


def brute_force(queries: np.ndarray, stored: np.ndarray, k: int, excluded: np.ndarray) -> np.ndarray:
    """Scores (N, k) of the k best rows that are not `excluded` (N, M), -inf for none."""
    scores = np.where(excluded, -np.inf, queries @ stored.T)
    scores = np.pad(scores, ((0, 0), (0, k)), constant_values=-np.inf)
    return -np.sort(-scores, axis=1)[:, :k]


def index_database(database: Dataset, **options) -> Dataset:
    run_stage(Index(database, IndexConfig(**options)))
    return database
