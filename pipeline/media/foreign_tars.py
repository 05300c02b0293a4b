"""Read tars that other tools wrote, and refuse or report what is damaged in them."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.media.tar_members import LONGEST_NAME, DamagedTar, Member, list_members

MOST_NAMED = 10_000
"""The ledger names so many members of one tar, and counts the others."""
_LONGEST_SHOWN = 1000
MOST_SAMPLE_BYTES, MOST_SAMPLE_MEMBERS = 1 << 30, 1000
MOST_JSON_BYTES = 16 << 20
"""JSON may take a hundred times its bytes of memory as objects."""


@dataclass
class TarFaults:
    """What is wrong with a tar as a whole, or with members that no sample is made of."""

    members: list[tuple[str, str, str]] = field(default_factory=list)
    """(member, reason, detail) of the first `MOST_NAMED`"""
    unnamed: Counter[str] = field(default_factory=Counter)
    """How many members more, by reason."""
    cut: str = ""
    """Why the tar is taken for cut off, "" if it ends as a tar does."""

    def add(self, name: str, reason: str, detail: str) -> None:
        """Report a member."""
        if len(self.members) < MOST_NAMED:
            self.members.append((name if len(name) < _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}...", reason, detail))
        else:
            self.unnamed[reason] += 1

    def remarks(self, tar_name: str) -> list[tuple[str, str, str]]:
        """(key, reason, detail) of everything that is wrong, for the ledger."""
        unnamed = [(tar_name, reason, f"{count} members more") for reason, count in sorted(self.unnamed.items())]
        return [*self.members, *unnamed, *([(tar_name, "tar_cut", self.cut)] if self.cut else [])]


def read_foreign_tar(source: Path | BinaryIO, faults: TarFaults) -> Iterator[dict[str, Any]]:
    """The samples of a tar that others wrote, a path or an open file; what is wrong is added to `faults`.

    Nothing is unpacked to the disk. Members with paths that lead outside, links and devices are refused all the same,
    because another program may unpack the tar later. If a tar is cut off, its last sample is given only if it seems
    to be complete.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(source, "rb")) if isinstance(source, Path) else source
        length = stream.seek(0, os.SEEK_END)
        current: dict[str, Any] = {}
        current_bytes = 0
        before: set[str] = set()  # what the last whole sample has

        def read_at(offset: int, size: int) -> bytes:
            stream.seek(offset)
            return stream.read(size)

        try:
            for member in list_members(read_at, length):
                if (refusal := _refusal_reason(member)):
                    faults.add(member.name, *refusal)
                    continue
                parts = KEY_AND_SUFFIX.match(member.name)
                if member.kind == "folder" or parts is None or META_MEMBER.match(member.name):
                    continue
                key, suffix = parts.groups()
                if current and current["__key__"] != key:
                    yield current
                    current, before, current_bytes = {}, set(current), 0
                # Before it is read: memory is asked for what the header says, and it may say anything.
                if member.offset + member.size > length:
                    faults.cut = f"in the middle of {member.name}"
                    return
                suffix = suffix.lower()
                if suffix in current:
                    faults.add(member.name, "repeated_member", "its sample has one of that kind")
                elif member.size > (MOST_JSON_BYTES if suffix == "json" else MOST_SAMPLE_BYTES - current_bytes):
                    faults.add(member.name, "too_large", f"{member.size} bytes")
                elif len(current) > MOST_SAMPLE_MEMBERS:
                    faults.add(member.name, "too_large", f"its sample has more than {MOST_SAMPLE_MEMBERS} members")
                else:
                    current["__key__"] = key
                    current[suffix] = read_at(member.offset, member.size)
                    current_bytes += member.size
        except DamagedTar as damage:
            faults.cut = str(damage)
        if current and not (faults.cut and before - set(current)):
            yield current


META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset passes these over
KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as webdataset divides names


def _refusal_reason(member: Member) -> tuple[str, str] | None:
    """The reason and detail for which a member is not taken, None if it is."""
    if member.kind == "overlong":
        return "unsafe_member", f"its name has more than {LONGEST_NAME} bytes"
    parts = member.name.split("/")
    if parts[0] == "" or ".." in parts:
        return "unsafe_member", "its path leads outside"
    if member.kind == "folder":
        return None
    if member.kind != "file":
        return "unsafe_member", "neither file nor folder" if member.kind == "other" else "a file with holes"
    if parts[-1].startswith(".") and len(parts) > 1:
        # webdataset takes "folder/" for the key of "folder/.name.jpg", and makes a sample of it.
        return "hidden_member", "a hidden file in a folder"
    return None
