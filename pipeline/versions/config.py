"""Settings of the publication checks."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds


@dataclass(frozen=True)
class GatesConfig:
    """Limits that a version must keep to be published."""

    min_recall: Annotated[float, Interval(ge=0, le=1)] = 0.8
    """Least recall@10 of the index, queries held out against exact search."""
    max_lost: Annotated[float, Interval(ge=0, le=1)] = 0.3
    """Largest share of the published images that are missing from the new version. Forgotten images do not count."""
    max_failed: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """Largest share of the source's images that could not be fetched or decoded."""
    min_overlap: Annotated[float, Interval(ge=0, le=1)] = 0.7
    """Least share of the ten nearest images of the queries that the published version gives too."""
    only_licenses: str = ""
    """Licenses (SPDX, as in --licenses) that all images must have; by default those of --licenses."""
    gate_where: str = ""
    """A row filter over metadata and scores, as in "aesthetic > 4.5", for `min_share`."""
    min_share: Annotated[float, Interval(ge=0, le=1)] = 0.9
    """Least share of the rows that searches can find for which `gate_where` is true."""
    queries: str = ""
    """Text file of the queries, one a line; by default captions of the first published version, which stay the same."""
    query_count: Annotated[int, Ge(0)] = 64
    """How many captions are taken, where no file is given."""

    def __post_init__(self) -> None:
        check_bounds("rebuild.gates", self)
        if self.only_licenses:
            from pipeline.rows.licenses import Licenses  # the list of SPDX, needed only with this gate
            Licenses(self.only_licenses)
