"""Settings of the neighbor search, and its plan of memory."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from pipeline.bounds import check_bounds
from pipeline.storage.sizes import parse_size

_BASE = 800 << 20  # what a worker has in memory before it searches: torch (470 MB with CUDA's), faiss, pyarrow, Ray
_LEAST = 64 << 20  # for blocks, whatever the budget
ALL_ROWS_FROM_LISTS = 4  # where one list of so many is looked into, to compare all rows takes no longer
SPARE_CANDIDATES = 12  # candidates beyond k that are mostly enough
MOST_WORKERS = 64  # so many can work at once, however many shards are searched together


@dataclass(frozen=True)
class NeighborsConfig:
    """Which neighbors are kept."""

    k: Annotated[int, Ge(1)] = 20
    """Neighbors of each sample."""
    method: Literal["index", "exact"] = "index"
    """index: among the rows in the lists of the index that are nearest; exact: among all rows. An index without
    lists gives candidates (HNSW), or all rows are compared, which is no slower (Flat, SQ, PQ)."""
    candidates: Annotated[int, Ge(0)] = 0
    """Candidates that are ranked for each sample; 0 means 4 k + 20."""
    probes: Annotated[int, Ge(0)] = 0
    """Lists that are looked into for each sample; 0 means as many as the index was tuned to. Where that is a quarter
    of them or more, all rows are compared."""
    copy_similarity: Annotated[float, Gt(0)] = 0.98
    """Rows at least so similar (cosine) count as copies of the sample."""
    copy_bits: Annotated[int, Interval(ge=-1, le=64)] = -1
    """Rows whose perceptual hash differs in no more bits of 64 count as copies too; -1: hashes do not matter."""
    vectors: bool = False
    """Write the neighbors' vectors beside their ids, so that training reads them in one piece."""
    checked: Annotated[int, Ge(0)] = 200
    """Samples of all whose neighbors are compared with the exact ones, to measure the recall."""
    at_once: Annotated[int, Ge(0)] = 0
    """Shards whose samples are searched together, so that the database is read once for all of them; 0: as many as
    `max_memory` has room for, as long as 64 workers have something to do."""
    where: str = ""
    """Only rows of the database for which this is true are neighbors, as in "aesthetic > 5 and nsfw < 0.2": a row
    filter over metadata and scores."""
    max_memory: str = "1Gi"
    """A worker may take so many bytes; blocks are planned from it."""

    def __post_init__(self) -> None:
        check_bounds("neighbors", self)
        parse_size(self.max_memory, "neighbors.max_memory")

    @property
    def block_bytes(self) -> int:
        """What is left for blocks of vectors and products."""
        return max(_LEAST, (parse_size(self.max_memory, "neighbors.max_memory") - _BASE) // 2)

    @property
    def wanted(self) -> int:
        """Candidates of a sample, at most."""
        return max(self.k + 1, self.candidates or 4 * self.k + 20)

    def shards_at_once(self, shards: int, samples: int, dim: int, *, lists: bool) -> int:
        """How many of so many shards, with so many samples in all, are one item; `lists`: they are searched by list."""
        if self.at_once:
            return self.at_once
        from pipeline.neighbors.by_list import bytes_per_query
        # By list few have all candidates in memory: those whose first ones were mostly copies.
        each = 4 * dim + bytes_per_query(min(self.wanted, self.k + SPARE_CANDIDATES) if lists else self.wanted)
        return max(1, min(self.block_bytes * shards // max(1, samples * each), -(-shards // MOST_WORKERS)))
