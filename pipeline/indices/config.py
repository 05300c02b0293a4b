"""Settings of the index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Interval

from pipeline.bounds import check_bounds
from pipeline.formats.sizes import parse_size

BLOCK = 1 << 16  # rows in float32 at a time
LISTS = "knn.ivfdata"  # inverted lists that are not in knn.index
TRAINING_SETTINGS = frozenset({"key", "train_points", "part_memory"})  # that an index made elsewhere does not use
SIZES = ("max_memory", "part_memory", "merge_memory")  # settings that are sizes
EXACT = 100  # neighbors of a query that are found exactly, to measure recall@1, @10 and @100
FLAT_GAIN = 0.01  # less recall than this, gained by four times the effort, is not worth it


@dataclass(frozen=True)
class IndexConfig:
    """How large an index may be, and how its quality is measured."""

    max_memory: str = "4Gi"
    """Largest size of the index: bytes, or a number with K, M, G, T (powers of 1000) or Ki, Mi, Gi, Ti (of 1024)."""
    bytes_per_vector: Annotated[int, Ge(0)] = 0
    """Largest size for each vector, plus 64K for the index. It holds together with max_memory. 0: no such limit."""
    key: str = ""
    """A faiss factory string instead of a choice."""
    queries: Annotated[int, Ge(0)] = 1000
    """Rows kept out of training as queries for the recall, a tenth of all at most."""
    target_recall: Annotated[float, Interval(ge=0, le=1)] = 0.95
    """Use the smallest search effort (nprobe, efSearch) that reaches this recall@10. Use less effort if
    four times as much gains less than 0.01."""
    min_recall: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """An index with less recall@10 is not sealed."""
    train_points: Annotated[int, Ge(1)] = 1_000_000
    """Rows sampled to train the quantizer."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the held-out rows and the training sample."""
    part_memory: str = "512Mi"
    """If the vectors (as float32) are larger than this, all workers build the index in parts of this size."""
    merge_memory: str = "4Gi"
    """Inverted lists larger than this are merged on disk, into a file that searches map into memory."""
    max_drift: Annotated[float, Gt(0)] = 1.5
    """With --extend: largest quantization error of the added vectors, as a multiple of the error of held-out vectors
    at training. An index beyond it is not sealed."""

    min_self_hit: Annotated[float, Interval(ge=0, le=1)] = 0.9
    """With --adopt: a search for the vector of a row must find the row among ten results, for this share of the sampled
    rows. Each shard must reach half of it."""

    def __post_init__(self) -> None:
        check_bounds("index", self)
        for name in SIZES:
            parse_size(getattr(self, name), f"index.{name}")

    def rows_of_a_part(self, dim: int) -> int:
        """Vectors of so many numbers that one part may have."""
        return max(1, parse_size(self.part_memory, "index.part_memory") // (4 * dim))
