"""faiss and OpenMP: results that do not depend on the number of threads, and clustering that is not slow.

From 1.14.2 on, the wheels of faiss multiply matrices with all threads of OpenMP. How a product is divided among them
changes its last bits, and with them codes and lists of equal vectors.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

_Result = TypeVar("_Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """One OpenMP thread for what faiss does in this block. Other Python threads keep theirs."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def map_blocks(function: Callable[[slice], _Result], rows: int, size: int) -> list[_Result]:
    """`function` of each block of at most `size` rows, in order.

    Blocks are the same with any number of threads, and each is computed by one, so the results are too.
    """
    import faiss

    def compute(block: slice) -> _Result:
        with one_thread():
            return function(block)

    blocks = [slice(start, min(rows, start + size)) for start in range(0, rows, size)]
    threads = min(faiss.omp_get_max_threads(), len(blocks))
    if threads <= 1:
        return [compute(block) for block in blocks]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(compute, blocks))


@contextmanager
def blocked_scans() -> Iterator[None]:
    """Comparisons with all rows go by blocks of queries in this block, however few numbers the queries have.

    From 1.14.2 on, faiss compares query by query where all queries together have fewer than 128,000 numbers. With the
    few numbers of a part of a code that takes 11 times as long.
    """
    import faiss

    threshold = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 1
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = threshold
