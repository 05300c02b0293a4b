"""Settings of the publication checks."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds


@dataclass(frozen=True)
class GatesConfig:
    """Limits that a version must keep to be published."""

    min_recall: Annotated[float, Interval(ge=0, le=1)] = 0.8
    """Least recall@10 of the index: held-out queries, compared with exact search."""
    max_lost: Annotated[float, Interval(ge=0, le=1)] = 0.3
    """Largest share of the published images that are missing from the new version. Forgotten images do not count."""
    max_failed: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """Largest share of the images of the source that could not be downloaded or decoded."""
    min_overlap: Annotated[float, Interval(ge=0, le=1)] = 0.7
    """Least share of search results that stay the same: the ten nearest images of the queries, compared with the
    published version."""
    only_licenses: str = ""
    """Licenses (SPDX, as in --licenses) that all images must have. Default: those of --licenses."""
    gate_where: str = ""
    """Row filter over metadata and scores for `min_share`, such as "aesthetic > 4.5"."""
    min_share: Annotated[float, Interval(ge=0, le=1)] = 0.9
    """Least share of the rows that searches can find for which `gate_where` is true."""
    queries: str = ""
    """Text file with a query on each line. Default: captions of the first published version, always the same ones."""
    query_count: Annotated[int, Ge(0)] = 64
    """Number of captions that become queries if no file is given."""

    def __post_init__(self) -> None:
        check_bounds("rebuild.gates", self)
        if self.only_licenses:
            from pipeline.rows.licenses import Licenses  # the list of SPDX, needed only with this gate
            Licenses(self.only_licenses)
