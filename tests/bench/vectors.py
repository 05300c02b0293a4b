"""Vectors that are distributed like embeddings of images, from a seed."""

import numpy as np


def clustered(count: int, dim: int, clusters: int, seed: int) -> np.ndarray:
    """Unit vectors (count, dim) float32 around centers that are the same for all seeds; clusters differ in size.

    Centres and spread lie in 64 directions, with a little noise in all, for the embeddings of images have fewer
    degrees of freedom than numbers. The twenty nearest of a million have cosines of about 0.9.
    """
    rng = np.random.default_rng((1, dim))
    free = min(64, dim)
    basis = np.linalg.qr(rng.standard_normal((dim, free)))[0].T.astype(np.float32)
    centres = rng.standard_normal((clusters, free), np.float32)
    shares = rng.pareto(1.5, clusters) + 0.2
    rng = np.random.default_rng((2, seed))
    inner = centres[rng.choice(clusters, count, p=shares / shares.sum())]
    inner += 0.4 * rng.standard_normal((count, free), np.float32)
    vectors = inner @ basis + 0.05 * rng.standard_normal((count, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
