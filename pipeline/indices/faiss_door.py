"""The only file that imports faiss: threads, GPUs, reading and writing of indices.

From 1.14.2 on, the wheels of faiss multiply matrices with all threads of OpenMP. How a product is divided among the
threads changes its last bits. So each block is computed by one thread, and the blocks do not depend on the number of
threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline.hardware import devices
from pipeline.indices.config import LISTS
from pipeline.stages.types import StageFailed

if TYPE_CHECKING:
    import faiss
else:
    class _Faiss:
        """faiss, once it is needed: every command reads the settings in this file, few want its 35 MB."""

        def __getattr__(self, name: str) -> Any:
            import faiss
            return getattr(faiss, name)

    faiss = _Faiss()
untyped_faiss: Any = faiss
"""The same module, for the names that its type stubs lack or describe wrongly."""
ROWS_OF_A_THREAD, QUERIES_OF_A_THREAD = 1 << 13, 1 << 8
_PRODUCTS_FROM = 16  # numbers in a part of a code from which faiss finds its centroid by matrix products


def apply_transforms(transform: faiss.VectorTransform, sample: np.ndarray) -> np.ndarray:
    """Transform vectors in blocks: (N, D) -> (N, d_out) float32, equal for any number of threads."""
    out = np.empty((len(sample), transform.d_out), np.float32)

    def apply(block: slice) -> None:
        out[block] = transform.apply(np.ascontiguousarray(sample[block], np.float32))

    map_blocks(apply, len(sample), ROWS_OF_A_THREAD)
    return out


def transform_before_lists(index: faiss.Index, vectors: np.ndarray) -> np.ndarray:
    """Vectors as the part of `index` behind its transforms takes them, contiguous float32."""
    for transform in list_transforms(index):
        vectors = apply_transforms(transform, vectors)
    return np.ascontiguousarray(vectors, np.float32)


def search_in_blocks(search: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], queries: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids (Q, k) of queries (Q, D), the same with any number of threads."""
    queries = np.ascontiguousarray(queries, np.float32)
    # faiss would take a block of so few queries one by one, though all of them together are many.
    with scan_in_blocks() if len(queries) > QUERIES_OF_A_THREAD else contextlib.nullcontext():
        results = map_blocks(lambda block: search(queries[block]), len(queries), QUERIES_OF_A_THREAD)
    if not results:
        return search(queries)
    scores, ids = zip(*results, strict=True)
    return np.concatenate(scores), np.concatenate(ids)


@contextlib.contextmanager
def use_safe_threads(inner: faiss.Index) -> Iterator[None]:
    """Let an index make codes with all threads if these do not depend on the number of threads, else with one."""
    if isinstance(inner, faiss.IndexPQ | faiss.IndexIVFPQ):
        safe = inner.pq.dsub < _PRODUCTS_FROM
    else:
        safe = isinstance(inner, faiss.IndexFlat | faiss.IndexScalarQuantizer | faiss.IndexIVFFlat |
                          faiss.IndexIVFScalarQuantizer | faiss.IndexIVFRaBitQ)
    with contextlib.nullcontext() if safe else use_one_thread():
        yield


def nearest_lists(quantizer: faiss.Index, vectors: np.ndarray) -> np.ndarray:
    """The nearest list of each of (N, D) float32 vectors, (N,) int64."""
    lists = map_blocks(lambda block: quantizer.search(vectors[block], 1)[1][:, 0], len(vectors), ROWS_OF_A_THREAD)
    return np.concatenate([np.empty(0, np.int64), *lists])


@cache
def gpu_resources() -> Any:
    """The memory of faiss for intermediate results on the GPU. faiss allocates it here and keeps it."""
    return faiss.StandardGpuResources()


def count_gpus() -> int:
    """How many GPUs faiss uses in this process. Raises DeviceUnavailable if one was reserved and faiss sees none."""
    if not is_gpu_build() or devices.reserved_device() == "cpu":
        return 0
    count = faiss.get_num_gpus()
    if not count and devices.reserved_device() == "cuda":
        raise devices.DeviceUnavailable("a GPU was reserved and faiss sees none\nhint: nvidia-smi and "
                                        "CUDA_VISIBLE_DEVICES on this node; --gpus 0 computes on the CPU")
    return count


def is_gpu_build() -> bool:
    """Whether the installed faiss is the one for GPUs."""
    return hasattr(faiss, "StandardGpuResources")


def copy_to_gpus(centres: faiss.Index) -> faiss.Index:
    """A copy of an index on all GPUs that faiss sees."""
    return faiss.index_cpu_to_all_gpus(centres)


@contextlib.contextmanager
def send_stdout_to_stderr() -> Iterator[None]:
    """faiss tells on stdout, below Python, of each change of a file's size; stdout is for data."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)


def map_index(path: Path) -> faiss.Index:
    """An index whose lists are read from its file as they are looked at; what has no lists is in memory."""
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)


def write_index(index: faiss.Index, folder: Path) -> dict[str, Path]:
    """Write an index into `folder`; its files by name. Lists that are on disk are in that folder, as LISTS."""
    faiss.write_index(index, str(folder / "knn.index"))
    return {name: folder / name for name in ("knn.index", LISTS) if (folder / name).exists()}


class UnreadableIndex(StageFailed):
    """An index file that the installed faiss cannot read."""


def open_index(path: Path, lists: Path | None = None, flags: int = 0) -> faiss.Index:
    """The index in the file `path`, whose lists may be in another file, wherever that is by now.

    RuntimeError or MemoryError if the installed faiss cannot read it.
    """
    if lists is None:
        return faiss.read_index(str(path), flags)
    # faiss can look beside the index too, but then says so on stdout; and in a cache the file has another name.
    data, stored_name, new_name = path.read_bytes(), *(struct.pack("<Q", len(name)) + name for name in (
        LISTS.encode(), str(lists.absolute()).encode()))
    start = data.rfind(stored_name)
    if start < 0:
        raise RuntimeError(f"it does not name {LISTS}")
    return faiss.deserialize_index(np.frombuffer(data[:start] + new_name + data[start + len(stored_name):], np.uint8),
                                   faiss.IO_FLAG_READ_ONLY)


class ForeignIndex(ValueError):
    """An index file of others that cannot be used."""


def open_foreign_index(path: Path, name: str) -> faiss.Index:
    """The index in a file that others wrote, called `name`; lists in another file are read beside it, not changed."""
    try:
        with send_stdout_to_stderr():
            return faiss.read_index(str(path), untyped_faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY)
    except (RuntimeError, MemoryError) as error:
        raise ForeignIndex(f"{name} cannot be read: expected an index that faiss {faiss.__version__} knows, got "
                           f"{str(error).rsplit(': ', 1)[-1]}\nhint: a file of faiss.write_index, like the knn.index "
                           f"of autofaiss; inverted lists in a file of their own must be next to it, on a local disk"
                           ) from error


def without_identity_map(index: faiss.Index, name: str) -> faiss.Index:
    """A copy of the index inside a map of ids (IDMap) that numbers rows in order; ForeignIndex for another map."""
    if not isinstance(index, untyped_faiss.IndexIDMap | untyped_faiss.IndexIDMap2):
        return index
    ids = faiss.vector_to_array(untyped_faiss.downcast_index(index).id_map)
    if len(wrong := np.flatnonzero(ids != np.arange(len(ids)))):
        raise ForeignIndex(f"{name} gives its vectors other ids than their global rows: expected {wrong[0]} for vector "
                           f"{wrong[0]}, got {ids[wrong[0]]}\nhint: add the vectors in order and without ids")
    # A copy: the map owns what is in it, and to take that away from it damages memory (faiss 1.15).
    return faiss.clone_index(index.index)


def lists_are_on_disk(index: faiss.Index) -> bool:
    """Whether the inverted lists of an index are in a file of their own."""
    inner = inner_index(index)
    return isinstance(inner, faiss.IndexIVF) and isinstance(
        untyped_faiss.downcast_InvertedLists(inner.invlists), faiss.OnDiskInvertedLists)


def factory_key(index: faiss.Index) -> str:
    """The factory string of an index, with the names of classes for what faiss cannot tell.

    A file has OPQ as a linear transform, without the number of its parts: this is that of the codes then.
    """
    from faiss.contrib.factory_tools import reverse_index_factory
    inner, parts = inner_index(index), []
    for transform in list_transforms(index):
        kind = type(transform).__name__.removesuffix("Matrix")
        parts.append(f"OPQ{inner.pq.M}_{transform.d_out}" if kind == "LinearTransform" and hasattr(inner, "pq")
                     else f"{kind}{transform.d_out}")
    try:
        parts.append(str(reverse_index_factory(inner)))
    except (NotImplementedError, AttributeError, KeyError):
        parts += [f"IVF{inner.nlist}"] if isinstance(inner, faiss.IndexIVF) else []
        parts.append(type(inner).__name__.removeprefix("Index"))
    return ",".join(parts)


def list_transforms(index: faiss.Index) -> list[faiss.VectorTransform]:
    """The transforms that an index applies to vectors first, in order."""
    if not isinstance(index, faiss.IndexPreTransform):
        return []
    chain: Any = index.chain  # a C++ vector, not the list of the type stubs
    return [faiss.downcast_VectorTransform(chain.at(number)) for number in range(chain.size())]


def inner_index(index: faiss.Index) -> faiss.Index:
    """The index behind the transforms, as its precise class."""
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def inner_ivf(index: faiss.Index) -> faiss.IndexIVF:
    """The index behind the transforms of an index that is known to have inverted lists."""
    inner = inner_index(index)
    assert isinstance(inner, faiss.IndexIVF)
    return inner


def inverted_lists(inner: faiss.IndexIVF) -> faiss.InvertedLists:
    """The inverted lists of an index."""
    assert inner.invlists is not None  # only an index whose lists were taken away has none
    return inner.invlists


_Result = TypeVar("_Result")


@contextmanager
def use_one_thread() -> Iterator[None]:
    """One OpenMP thread for what faiss does in this block. Other Python threads keep theirs."""
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
    def compute(block: slice) -> _Result:
        with use_one_thread():
            return function(block)

    blocks = [slice(start, min(rows, start + size)) for start in range(0, rows, size)]
    threads = min(faiss.omp_get_max_threads(), len(blocks))
    if threads <= 1:
        return [compute(block) for block in blocks]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(compute, blocks))


@contextmanager
def scan_in_blocks() -> Iterator[None]:
    """Comparisons with all rows go by blocks of queries in this block, however few numbers the queries have.

    From 1.14.2 on, faiss compares query by query where all queries together have fewer than 128,000 numbers. With the
    few numbers of a part of a code that takes 11 times as long.
    """
    threshold = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 1
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = threshold
