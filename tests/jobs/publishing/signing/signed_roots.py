"""Rebuild with a key, and forge publications without one."""

from pathlib import Path
from typing import Any

import pytest

from jobs.publishing.check_published import check_published
from jobs.publishing.rebuild import Rebuild
from pipeline import storage
from pipeline.releases import signatures
from tests.jobs.publishing.published_art import NAME, make_rebuild, pointer, published_dataset


def signing_rebuild(place: Path, private: Path, **options: bool) -> Rebuild:
    plain = make_rebuild(place / "root", place / "source")
    return Rebuild(plain.root, plain.name, plain.shard, plain.embed, plain.index, plain.config,
                   signatures.publishing_keys(str(private), **options))


def history(place: Path, sequence: int) -> Path:
    return place / "root" / "published" / NAME / f"{sequence:06d}.json"


def forge(place: Path, document: dict[str, Any]) -> None:
    """Put a pointer in place, and into the history, as an attacker would who knows all but the key."""
    pointer(place).write_bytes(storage.json_bytes(document))
    history(place, document["sequence"]).write_bytes(storage.json_bytes(document))


def refuses(place: Path, reason: str) -> None:
    """Every reader and every check refuses the dataset for this reason."""
    with pytest.raises(ValueError, match=reason):
        published_dataset(place / "root")
    faults = check_published(str(place / "root"))[1]
    assert any(reason in fault["fault"] for fault in faults), faults
