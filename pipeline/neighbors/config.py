"""Settings of the neighbor search, and its plan of memory."""

import logging
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from pipeline.bounds import check_bounds
from pipeline.formats.sizes import parse_size

_log = logging.getLogger(__name__)
_BASE = 800 << 20  # what a worker has in memory before it searches: torch (470 MB with CUDA's), faiss, pyarrow, Ray
_LEAST = 64 << 20  # for blocks, whatever the budget
ALL_ROWS_FROM_LISTS = 4  # if a search reads one list of so many, comparing all rows is as fast
SPARE_CANDIDATES = 12  # candidates beyond k; most queries need no more
MOST_WORKERS = 64  # shards are searched together only as far as so many workers stay busy


@dataclass(frozen=True)
class NeighborsConfig:
    """Settings of the neighbor search."""

    k: Annotated[int, Ge(1)] = 20
    """Neighbors of each sample."""
    method: Literal["index", "exact"] = "index"
    """index: search the nearest lists of the index. exact: search all rows. HNSW has no lists and gives candidates.
    For Flat, SQ and PQ all rows are compared, which is as fast."""
    candidates: Annotated[int, Ge(0)] = 0
    """Candidates that are ranked for each sample; 0 means 4 k + 20."""
    probes: Annotated[int, Ge(0)] = 0
    """Lists to search for each sample. 0: the number that the index was tuned to. If it is a quarter of all lists or
    more, all rows are compared."""
    copy_similarity: Annotated[float, Gt(0)] = 0.98
    """Rows with at least this cosine similarity count as copies of the sample."""
    copy_bits: Annotated[int, Interval(ge=-1, le=64)] = -1
    """Rows whose perceptual hashes differ in at most this many of 64 bits also count as copies. -1: ignore hashes."""
    vectors: bool = False
    """Write the neighbors' vectors beside their ids, so that training reads them in one piece."""
    checked: Annotated[int, Ge(0)] = 200
    """Samples whose neighbors are compared with the exact ones, to measure the recall."""
    at_once: Annotated[int, Ge(0)] = 0
    """Shards that are searched together, so that the database is read once for all of them. 0: as many as fit
    `max_memory`, but no more than keeps 64 workers busy."""
    where: str = ""
    """Row filter of the database, over metadata and scores: "aesthetic > 5 and nsfw < 0.2". Only rows that match can be
    neighbors."""
    max_memory: str = "1Gi"
    """Memory limit of a worker. The size of blocks follows from it."""

    def __post_init__(self) -> None:
        check_bounds("neighbors", self)
        parse_size(self.max_memory, "neighbors.max_memory")

    @property
    def block_bytes(self) -> int:
        """Bytes for blocks of vectors and products."""
        return max(_LEAST, (parse_size(self.max_memory, "neighbors.max_memory") - _BASE) // 2)

    @property
    def wanted(self) -> int:
        """Largest number of candidates of a sample."""
        return max(self.k + 1, self.candidates or 4 * self.k + 20)

    def warn_if_few(self, visible: int, database: str) -> None:
        """A warning if so few rows of the database pass `where` that samples have fewer than k neighbors."""
        if visible < self.k:
            _log.warning("%s leaves %d rows of %s, and k is %d: missing neighbors are -1\n"
                         "hint: --k %d, or a filter that more rows pass", self.where, visible,
                         database, self.k, max(1, visible - 1))

    def shards_at_once(self, shards: int, samples: int, dim: int, *, lists: bool) -> int:
        """Shards of one item, for `shards` shards with `samples` samples in all. lists: the search is by list."""
        if self.at_once:
            return self.at_once
        from pipeline.neighbors.by_list import bytes_per_query
        # A search by list keeps all candidates only for the few queries with many copies.
        each = 4 * dim + bytes_per_query(min(self.wanted, self.k + SPARE_CANDIDATES) if lists else self.wanted)
        return max(1, min(self.block_bytes * shards // max(1, samples * each), -(-shards // MOST_WORKERS)))
