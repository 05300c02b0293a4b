"""Settings of the demo's images."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from pipeline.bounds import check_bounds


@dataclass(frozen=True)
class DemoCorpusConfig:
    """Which corpus, and how large its images are."""

    corpus: Literal["emoji", "drawn"] = "emoji"
    """emoji: real ones, fetched with npm; drawn: shapes drawn by the program."""
    size: Annotated[int, Ge(1)] = 64
    """Width and height in pixels."""
    subjects: Annotated[int, Ge(1)] = 300
    """Subjects of the drawn corpus, each in six styles."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the drawn corpus."""
    pictures_per_item: Annotated[int, Ge(1)] = 600
    """Images made by one worker at a time."""

    def __post_init__(self) -> None:
        check_bounds("pictures", self)
