"""Choose the index type for a number of vectors and a size."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator

from pipeline.formats.sizes import parse_size
from pipeline.indices.config import IndexConfig
from pipeline.indices.faiss_door import faiss

_ALLOWANCE = 64 << 10


def check_possible(count: int, dim: int, config: IndexConfig) -> None:
    """ValueError if the settings cannot give an index of `count` vectors. It checks all that needs no training."""
    if config.key:
        try:
            faiss.index_factory(dim, config.key)
        except RuntimeError:
            raise ValueError(f"faiss knows no index {config.key} of vectors of {dim} numbers\n"
                             f"hint: --key as in IVF4096_HNSW32,PQ64x8 or SQ8, or none for a choice") from None
        lists = re.search(r"IVF(\d+)", config.key)
        if lists and int(lists[1]) > count - min(config.queries, count // 10):
            raise ValueError(f"{config.key} has more lists than there are vectors to train them on, of {count}\n"
                             f"hint: another --key, or none for a choice")
    elif count:
        budget = budget_bytes(count, config)
        smallest = min(estimated_bytes(key, count, dim) for key in factory_keys(count, dim, budget, config))
        if smallest > budget:
            raise no_room_error(count, dim, budget, smallest, config)


def choose_key(count: int, dim: int, config: IndexConfig) -> str:
    """The kind of an index of so many vectors that is filled in parts; ValueError if none fits the budget."""
    budget = budget_bytes(count, config)
    # Graphs over all rows cannot be put together from parts.
    keys = [key for key in factory_keys(count, dim, budget, config) if not key.startswith("HNSW")]
    if config.key and not keys:
        raise ValueError(f"{config.key} cannot be filled in parts\nhint: a larger --part-memory builds it in one "
                         f"worker")
    sizes = {key: estimated_bytes(key, count, dim) for key in keys}
    for key, size in sizes.items():
        if size <= budget:
            return key
    raise no_room_error(count, dim, budget, min(sizes.values()), config)


def check_budget(index: faiss.Index, size: int, config: IndexConfig) -> None:
    """ValueError if an index of `size` bytes is larger than its budget."""
    if size > (budget := budget_bytes(index.ntotal, config)):
        raise no_room_error(index.ntotal, index.d, budget, size, config)


def no_room_error(count: int, dim: int, budget: int, smallest: int, config: IndexConfig) -> ValueError:
    """The error for a budget that no index fits, with the smallest size that is possible."""
    flag = (f"--bytes-per-vector {-(-max(1, smallest - _ALLOWANCE) // count)}"
            if budget < parse_size(config.max_memory, "index.max_memory")
            else f"--max-memory {-(-smallest // 1024)}Ki")
    return ValueError(f"no index of {count} vectors of {dim} fits {budget} bytes\n"
                      f"hint: the smallest possible has about {smallest} bytes: {flag}")


def budget_bytes(count: int, config: IndexConfig) -> int:
    """Bytes that an index of `count` vectors may have."""
    each = config.bytes_per_vector * count + _ALLOWANCE if config.bytes_per_vector else 1 << 62
    return min(parse_size(config.max_memory, "index.max_memory"), each)


@contextlib.contextmanager
def _hint_if_missing() -> Iterator[None]:
    """Around an import of autofaiss, which `pip install .` does not install: ValueError with the command that does."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("autofaiss", "embedding_reader"):
            raise
        raise _no_autofaiss(str(error)) from error


def _no_autofaiss(reason: str) -> ValueError:
    return ValueError(f"autofaiss, which chooses the kind of index, cannot be imported: {reason}\n"
                      f"hint: pip install --no-deps autofaiss==2.18.0 embedding-reader==1.8.1")


def check_autofaiss() -> None:
    """ValueError with the command that installs autofaiss, if it is missing. Loads nothing."""
    for name in ("autofaiss", "embedding_reader"):
        if importlib.util.find_spec(name) is None:
            raise _no_autofaiss(f"No module named '{name}'")


def factory_keys(count: int, dim: int, budget: int, config: IndexConfig) -> list[str]:
    """Factory strings from the best to the smallest: autofaiss's choice, then ever shorter codes."""
    if config.key:
        return [config.key]
    with _hint_if_missing():
        from autofaiss.external.optimize import get_optimal_index_keys_v2
    # It ignores the budget below 10,000 vectors and returns nothing for impossible ones.
    chosen = list(get_optimal_index_keys_v2(count, dim, f"{max(1, budget >> 10)}K") or [])
    ladder = ["Flat", "SQfp16", "SQ8", "SQ6", "SQ4"]
    # For few vectors the codebooks of 8 bits are larger than the codes.
    ladder += [f"PQ{dim // step}x{bits}" for bits, least in ((8, 1000), (4, 100)) for step in (2, 4, 8, 16, 32)
               if dim % step == 0 and count >= least]
    return list(dict.fromkeys([*chosen, *ladder]))


def estimated_bytes(key: str, count: int, dim: int) -> int:
    """About how large an index of this kind will be."""
    if match := re.fullmatch(r"Flat|SQfp16|SQ(\d)|PQ(\d+)x(\d+)", key):
        if match[2]:
            return count * -(-int(match[2]) * int(match[3]) // 8) + 4 * dim * (1 << int(match[3])) + 200
        bits = {"Flat": 32, "SQfp16": 16}.get(key) or int(match[1])
        return count * -(-dim * bits // 8) + (8 * dim if match[1] else 0) + 200
    with _hint_if_missing():
        from autofaiss.external.metadata import IndexMetadata
    return int(IndexMetadata(key, count, dim).estimated_index_size_in_bytes())
