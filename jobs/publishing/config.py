"""Settings of `rebuild` and `gc`."""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds
from pipeline.versions.config import GatesConfig


@dataclass(frozen=True)
class RebuildConfig:
    """How a version is made from the version before."""

    rewrite: Annotated[float, Interval(ge=0, le=1)] = 0.25
    """A shard that lost a larger share of its rows is written again. In other shards, searches hide the lost rows."""
    retrain: Annotated[float, Interval(ge=0, le=1)] = 0.3
    """Train the index again if a larger share of the images was added or removed, or if --max-drift is exceeded."""
    thorough: bool = False
    """Read every file of the source, even if its size and time, or its ETag, are unchanged."""
    full: bool = False
    """Reuse nothing from the last version."""
    embed_captions: bool = False
    """Also embed the captions, in text_embeddings/. This is the default if the last version has them."""
    allow_encoder: bool = False
    """Publish even if the last version, or a run that uses the dataset, has another encoder."""
    scores: tuple[str, ...] = ()
    """Score each version with these heads, NAME=HEAD each, as `score --head` does."""
    hide: str = ""
    """Hide rows from searches: a row filter over metadata and scores, such as "nsfw > 0.5"."""
    gates: GatesConfig = field(default_factory=GatesConfig)

    def __post_init__(self) -> None:
        check_bounds("rebuild", self)


@dataclass(frozen=True)
class GcConfig:
    """Which versions `gc` keeps."""

    keep: Annotated[int, Ge(0)] = 3
    """Number of newest published versions to keep, besides those that are in use."""
    lease: Annotated[float, Ge(0)] = 24.0
    """Hours to keep a version after another one replaced it, or after work on it ended. Readers may still use it."""
    verify: bool = False
    """Read all files of the versions, as `verify` does. A damaged version does not count among the newest."""

    def __post_init__(self) -> None:
        check_bounds("gc", self)
