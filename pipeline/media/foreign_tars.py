"""Read tars that other tools wrote, and refuse or report what is damaged in them."""

import contextlib
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO


@dataclass
class TarFaults:
    """What is wrong with a tar as a whole, or with members that no sample is made of."""

    members: list[tuple[str, str, str]] = field(default_factory=list)
    """(member, reason, detail)"""
    cut: str = ""
    """Why the tar is taken for cut off, "" if it ends as a tar does."""


def read_foreign_tar(source: Path | BinaryIO, faults: TarFaults) -> Iterator[dict[str, Any]]:
    """The samples of a tar that others wrote, a path or an open file; what is wrong is added to `found`.

    Nothing is unpacked to the disk. Members with paths that lead outside, links and devices are refused all the same,
    because another program may unpack the tar later. If a tar is cut off, its last sample is given only if it seems
    to be complete.
    """
    # Why not webdataset's reader: it skips links and ends silently at a damaged header, so lost samples could not
    # be counted.
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(source, "rb")) if isinstance(source, Path) else source
        length = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        current: dict[str, Any] = {}
        before: set[str] = set()  # what the last whole sample has
        try:
            tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r:"))
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps all headers; typeshed lacks it
                if (refusal := _refusal_reason(member)):
                    faults.members.append((member.name, *refusal))
                    continue
                parts = KEY_AND_SUFFIX.match(member.name)
                if member.isdir() or parts is None or META_MEMBER.match(member.name):
                    continue
                key, suffix = parts.groups()
                if current and current["__key__"] != key:
                    yield current
                    current, before = {}, set(current)
                # Before it is read: memory is asked for what the header says, and it may say anything.
                if member.size < 0 or member.offset_data + member.size > length:
                    faults.cut = f"in the middle of {member.name}"
                    return
                suffix = suffix.lower()
                if suffix in current:
                    faults.members.append((member.name, "repeated_member", "its sample has one of that kind"))
                    continue
                current["__key__"] = key
                current[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
            # A tar ends with blocks of zeros: without them it was cut, or a header is damaged.
            stream.seek(tar.offset)
            end = stream.read(512)
            if len(end) < 512:
                faults.cut = "between two members: it has no end"
            elif any(end):
                faults.cut = "where its reader stops: a damaged header"
        # Headers of a hostile tar: whatever numbers they hold, and whatever those make of tarfile.
        except (tarfile.TarError, ValueError, OverflowError, KeyError, IndexError, EOFError, MemoryError) as error:
            faults.cut = f"where its reader stops: {error}"
        if current and not (faults.cut and before - set(current)):
            yield current


META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset passes these over
KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as webdataset divides names


def _refusal_reason(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """The reason and detail for which a member is not taken, None if it is."""
    parts = member.name.split("/")
    if parts[0] == "" or ".." in parts:
        return "unsafe_member", "its path leads outside"
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        return "unsafe_member", "neither file nor folder" if not member.isreg() else "a file with holes"
    if parts[-1].startswith(".") and len(parts) > 1:
        # webdataset takes "folder/" for the key of "folder/.name.jpg", and makes a sample of it.
        return "hidden_member", "a hidden file in a folder"
    return None
