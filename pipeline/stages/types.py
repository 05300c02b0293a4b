"""The objects that a stage, its workers and its driver exchange."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

current_item: ContextVar[tuple[str, str, str] | None] = ContextVar("current_item", default=None)
"""(folder below the root, stage, item) of the item in work, for the log."""


NO_ROW_REASONS = frozenset({"tar_cut"})
"""Reasons in the ledger that stand for an unknown number of rows, so they are no rows themselves."""


EMPTY_ROW_REASONS = frozenset({"undecodable", "no_direction", "not_adopted", "no_vector", "not_finite", "unreadable"})
"""Reasons of rows that are kept for their place, and have no image, vector or score."""


def count_row_failures(skipped: Mapping[str, int]) -> int:
    """The number of rows that were left out, of counts by reason."""
    return sum(count for reason, count in skipped.items() if reason not in NO_ROW_REASONS)


@dataclass(frozen=True)
class Item:
    """One unit of work: an id and the names of its inputs, never data."""

    id: str
    inputs: dict[str, Any] = field(default_factory=dict)
    carries: tuple[tuple[str, bytes], ...] = field(default=(), compare=False)
    """Small files that go beside the plan before the item is planned, as (name, bytes); not kept in it."""


@dataclass(frozen=True)
class Claim:
    """The facts of a plan that concern all items. Workers get it with the stage and do not read the plan."""

    fingerprint: str
    inputs: dict[str, Any]
    """Name -> {"path", "digest"}, as in `Stage.inputs`."""
    stamp: str
    """`storage.stamp` of plan.json."""


@dataclass(frozen=True)
class Entry:
    """A line of the ledger: what was wrong with the sample `key`, and whether it was kept all the same."""

    key: str
    reason: str
    detail: str = ""
    kept: bool = False


def is_ledger(name: str) -> bool:
    """Whether a file of a manifest is a ledger, in this folder or in the one that it was taken over from."""
    return name.split("/")[-2:-1] == ["ledger"]


@dataclass
class Output:
    """The output of `process`: local files by their names in the stage folder, and counts."""

    samples: int = 0
    files: dict[str, Path] = field(default_factory=dict)
    ledger: list[Entry] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    run_files: dict[str, bytes] = field(default_factory=dict)
    """Files that differ from run to run (times): put in place, and not part of the content."""
    earlier_skipped: dict[str, int] = field(default_factory=dict)
    """Skipped rows of earlier tries at the same rows. This output replaces their counts."""
    counts: tuple[dict[str, int], dict[str, int]] | None = None
    """(skipped, noted) of a ledger that is among the files already."""
    times: dict[str, Any] = field(default_factory=dict)
    """Seconds by what they were spent with, and what else is known of the run and not part of the content."""
    external_files: list[dict[str, Any]] = field(default_factory=list)
    """Descriptions (name, bytes, sha256) of files that stay in their place. Their names are whole URLs."""


@dataclass
class Outcome:
    """The result of an item: its record, or the error of its last try."""

    item: Item
    record: dict[str, Any] | None = None
    error: str = ""
    trace: str = ""
    full: bool = False
    """Whether a disk was full, so that other items would fail too."""


@dataclass(frozen=True)
class Retired:
    """A worker that its runner gave up, and why; part of progress.json and of a manifest's `run`."""

    host: str
    node: str
    """The cluster's id of the node."""
    card: str
    """Name, UUID and CUDA_VISIBLE_DEVICES of its GPU; empty without one."""
    reason: str
    items: int
    """How many items failed on it."""
    replaced: bool
    """Whether a new worker may start in its place."""
    time: float
    """Unix time."""


class PlanReplaced(ValueError):
    """Another command planned the folder again, or emptied it, while this one worked on it."""


class StageFailed(RuntimeError):
    """Some items failed for good; the rest is done and recorded, the stage is not sealed."""
