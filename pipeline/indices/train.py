"""Train rotations, codebooks and inverted lists."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.indices.config import IndexConfig
from pipeline.indices.faiss_door import (
    apply_transforms,
    count_gpus,
    faiss,
    inner_index,
    list_transforms,
    map_blocks,
    nearest_lists,
    scan_in_blocks,
    use_one_thread,
    use_safe_threads,
)
from pipeline.indices.fill import fill

_ROWS_OF_A_LIST = 64
_ROWS_OF_CODEBOOKS = 1 << 16
_ROWS_OF_A_ROTATION, _TURNS = 1 << 15, 100
_STEADY, _STEPS = 1e-3, 26  # 1.5 to the 26th is more than 22 thousand: what is a thousandth becomes one


def training_rows(key: str, config: IndexConfig) -> int:
    """How many rows an index of this kind is trained on, at most."""
    match = re.search(r"IVF(\d+)", key)
    # More rows for each list take longer, and find hardly anything more; codebooks of 8 bits want 256 times as many.
    return min(config.train_points, max(_ROWS_OF_A_LIST * int(match[1]), _ROWS_OF_CODEBOOKS)) if match else \
        config.train_points


def train_index(key: str, sample: np.ndarray, dim: int) -> faiss.Index:
    """An empty index of this kind that was trained on `sample` (N, D), float32 or float16; ValueError if it cannot be.

    Each step of the way sees the sample as the steps before leave it, in blocks: it is in memory once, as float32.
    """
    try:
        index = faiss.index_factory(dim, key, faiss.METRIC_INNER_PRODUCT)
        inner = inner_index(index)
        if hasattr(inner, "do_polysemous_training"):
            # Orders the codes for a search that is not done here, at two seconds for each byte of a code.
            inner.do_polysemous_training = False
        for transform in list_transforms(index):
            _train_transform(transform, sample)
            sample = apply_transforms(transform, sample)
        sample = np.ascontiguousarray(sample, np.float32)
        _train_inner(inner, sample)
        index.is_trained = True
    except RuntimeError as error:
        raise ValueError(f"faiss cannot build {key} from {len(sample)} vectors of {dim}: {storage.first_line(error)}"
                         f"\nhint: another --key, or none") from error
    return index


def _train_transform(transform: faiss.VectorTransform, sample: np.ndarray) -> None:
    if isinstance(transform, faiss.OPQMatrix):
        rows = np.asarray(sample[::max(1, len(sample) // _ROWS_OF_A_ROTATION)], np.float32)
        faiss.copy_array_to_vector(train_rotation(rows, transform.d_out, transform.M).reshape(-1), transform.A)
        transform.is_trained = transform.is_orthonormal = True
    elif not transform.is_trained:
        with use_one_thread():
            transform.train(np.ascontiguousarray(sample, np.float32))


def train_rotation(rows: np.ndarray, width: int, parts: int) -> np.ndarray:
    """The rotation (width, D) float32 that minimizes the error of product quantization of rows (N, D) float32.

    Optimized product quantization (OPQ): Ge et al. 2013, non-parametric. faiss.OPQMatrix learns the codebooks from
    scratch in each iteration. This function continues from the codebooks of the iteration before. With 20,000 vectors
    of 64 numbers, 100 iterations took a third of the time and left two thirds of the error.
    """
    rows = np.ascontiguousarray(rows - rows.mean(0))
    upright = np.ascontiguousarray(rows.T)
    start = faiss.RandomRotationMatrix(rows.shape[1], width)
    with use_one_thread():
        start.init(17)
    matrix = np.ascontiguousarray(faiss.vector_to_array(start.A).reshape(width, -1).T)
    codebooks, nearest = None, np.empty((parts, len(rows)), np.int64)
    for turn in range(_TURNS):
        turned = _product(rows, matrix)
        how = faiss.ClusteringParameters()
        how.niter, how.max_points_per_centroid = 1 if turn else 10, 1 << 30
        codebooks = _codebooks(turned, parts, 256, how, codebooks, nearest)
        wanted = _product(upright, np.hstack([codebooks[part][nearest[part]] for part in range(parts)]))
        # Directions that the rows do not have stay as they are.
        matrix = _orthonormal(wanted / max(_length(wanted), 1e-20) + _STEADY * matrix)
    return np.ascontiguousarray(matrix.T)


def _codebooks(rows: np.ndarray, parts: int, size: int, how: faiss.ClusteringParameters,
               start: np.ndarray | None = None, nearest: np.ndarray | None = None) -> np.ndarray:
    """`size` centroids of each part of `rows` (N, D), (parts, size, D / parts), refined from those at the `start`.

    `nearest` (parts, N) takes which centroid is nearest to each row. The result is that of faiss.ProductQuantizer, but
    each part has one thread. Threads that share a part wait for each other at every step, which takes many times as
    long when other programs use the same cores.
    """
    width = rows.shape[1] // parts
    centroids = np.empty((parts, size, width), np.float32)

    def cluster(block: slice) -> None:
        for part in range(parts)[block]:
            columns = np.ascontiguousarray(rows[:, part * width:(part + 1) * width])
            clustering, index = faiss.Clustering(width, size, how), faiss.IndexFlatL2(width)
            if start is not None:
                faiss.copy_array_to_vector(start[part].reshape(-1), clustering.centroids)
            clustering.train(columns, index)
            centroids[part] = faiss.vector_to_array(clustering.centroids).reshape(size, width)
            if nearest is not None:
                nearest[part] = index.search(columns, 1)[1][:, 0]

    with scan_in_blocks():
        map_blocks(cluster, parts, 1)
    return centroids


def _orthonormal(matrix: np.ndarray) -> np.ndarray:
    """The nearest matrix with orthonormal rows or columns, whichever are fewer, by Newton and Schulz.

    numpy's singular values come out otherwise in the last bits with another number of threads, faiss's products do not.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    matrix = matrix if wide else matrix.T
    matrix = np.ascontiguousarray(matrix / max(1.0, _length(matrix)), np.float32)
    for _ in range(_STEPS):
        matrix = 1.5 * matrix - 0.5 * _product(_product(matrix, np.ascontiguousarray(matrix.T)), matrix)
    return np.ascontiguousarray(matrix if wide else matrix.T)


def _length(matrix: np.ndarray) -> float:
    return float(np.sqrt(np.square(matrix).sum()))  # numpy.linalg.norm depends on the number of threads too


def _product(left_matrix: np.ndarray, right_matrix: np.ndarray) -> np.ndarray:
    """(N, K) by (K, M) float32, the same bits with any number of threads."""
    transform = faiss.LinearTransform(right_matrix.shape[0], right_matrix.shape[1], False)
    faiss.copy_array_to_vector(np.ascontiguousarray(right_matrix.T).reshape(-1), transform.A)
    transform.is_trained = True
    return apply_transforms(transform, left_matrix)


def _train_inner(inner: faiss.Index, sample: np.ndarray) -> None:
    """Train an index without transforms on `sample` (N, D) float32: its lists, then its codes."""
    if not isinstance(inner, faiss.IndexIVF):
        _train_codes(inner, sample, lambda: inner.train(sample))
        return
    with use_one_thread():
        _train_lists(inner, sample)
    limit = inner.train_encoder_num_vectors()
    rows = sample if limit <= 0 else np.ascontiguousarray(sample[::max(1, -(-len(sample) // limit))])
    lists = None
    if inner.by_residual:
        lists = nearest_lists(inner.quantizer, rows)
        rows = rows - inner.quantizer.reconstruct_n(0, inner.nlist)[lists]
    _train_codes(inner, rows, lambda: inner.train_encoder(len(rows), faiss.swig_ptr(rows),
                                                          None if lists is None else faiss.swig_ptr(lists)))
    inner.is_trained = True


def _train_codes(inner: faiss.Index, rows: np.ndarray, otherwise: Callable[[], None]) -> None:
    """Train the codes of an index on `rows` (N, D) float32: its codebooks here, anything else by `otherwise`."""
    if isinstance(inner, faiss.IndexPQ | faiss.IndexIVFPQ):
        quantizer = inner.pq
        codebooks = _codebooks(rows, quantizer.M, quantizer.ksub, quantizer.cp)
        faiss.copy_array_to_vector(codebooks.reshape(-1), quantizer.centroids)
        inner.is_trained = True
        return
    with use_safe_threads(inner):
        otherwise()


def _train_lists(inner: faiss.IndexIVF, sample: np.ndarray) -> None:
    """Find the centers of the lists: on a GPU where there is one; where they stand in a graph, fill it with one thread.

    faiss does the rest of them itself, with the same clustering.
    """
    quantizer = faiss.downcast_index(inner.quantizer)
    if not isinstance(quantizer, faiss.IndexHNSW) and not count_gpus():
        train_quantizer: Any = inner  # the type stubs lack the base class Level1Quantizer
        train_quantizer.train_q1(len(sample), faiss.swig_ptr(sample), False, inner.metric_type)
        return
    clustering = faiss.Clustering(inner.d, inner.nlist, inner.cp)
    assigner = faiss.IndexFlatL2(inner.d)
    clustering.train(sample, faiss.index_cpu_to_all_gpus(assigner) if count_gpus() else assigner)
    fill(quantizer, faiss.vector_to_array(clustering.centroids).reshape(inner.nlist, inner.d))
