"""Settings of `rebuild` and `gc`."""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds
from pipeline.versions.config import GatesConfig


@dataclass(frozen=True)
class RebuildConfig:
    """How a version is made from the last one."""

    rewrite: Annotated[float, Interval(ge=0, le=1)] = 0.25
    """A shard of which a larger share is gone is written again without it; of others searches leave it out."""
    retrain: Annotated[float, Interval(ge=0, le=1)] = 0.3
    """The index is trained anew where a larger share of the pictures came or went, or where --max-drift is passed."""
    thorough: bool = False
    """Read every file of the source, even those that look as they did (size and time, or ETag)."""
    full: bool = False
    """Take nothing from the last version."""
    embed_captions: bool = False
    """Embed the captions too, in text_embeddings/; so it is done anyway if the last version has them."""
    allow_encoder: bool = False
    """Publish even if the encoder is another than that of the last version or of runs that draw from it."""
    scores: tuple[str, ...] = ()
    """Score each version with these heads, NAME=HEAD each, as `score --head` does."""
    hide: str = ""
    """Searches leave out the rows for which this is true, as in "nsfw > 0.5": a row filter over metadata and scores."""
    gates: GatesConfig = field(default_factory=GatesConfig)

    def __post_init__(self) -> None:
        check_bounds("rebuild", self)


@dataclass(frozen=True)
class GcConfig:
    """Which versions stay."""

    keep: Annotated[int, Ge(0)] = 3
    """Published versions that stay beside those that must: the newest."""
    lease: Annotated[float, Ge(0)] = 24.0
    """Hours that a version stays after it ceased to be the published one, or after work on it ended: readers keep the
    version that they began with."""

    def __post_init__(self) -> None:
        check_bounds("gc", self)
