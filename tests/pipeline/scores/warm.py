"""A function that scores samples, for tests."""

import numpy as np

from pipeline.scores.heads import ScoredShard


def score(shard: ScoredShard) -> np.ndarray:
    """The first number of each vector."""
    return shard.vectors[:, 0]


def score_too_few(shard: ScoredShard) -> np.ndarray:
    """No score for the last sample."""
    return shard.vectors[:-1, 0]


def score_twice(shard: ScoredShard) -> dict[str, np.ndarray]:
    """Two columns; the first is NaN for negative vectors."""
    first = shard.vectors[:, 0]
    return {"root": np.sqrt(np.where(first < 0, np.nan, first)), "letters": np.array([len(key) for key in shard.keys])}
