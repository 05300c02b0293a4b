"""Read tars that other tools wrote, and refuse or report what is damaged in them."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.media.foreign_tars.index import MOST_MEMBERS, SampleMembers, TarIndex
from pipeline.media.foreign_tars.recovery import AllMembers, Damage
from pipeline.media.sample_names import CAPTION_SUFFIXES, KEY_AND_SUFFIX, META_MEMBER, split_at_last_dot, system_folder
from pipeline.media.tar_members import LONGEST_NAME, Member, ReadAt, list_members

MOST_NAMED = 10_000
"""The ledger names so many members of one tar, and counts the others."""
_LONGEST_SHOWN = 1000
MOST_SAMPLE_BYTES, MOST_SAMPLE_MEMBERS = 1 << 30, 1000
_AHEAD_BYTES, _MOST_READ_BYTES = 4096, 64 << 10
MOST_JSON_BYTES = 16 << 20
"""JSON may take a hundred times its bytes of memory as objects. Captions and classes have the same limit."""
_TEXTS = {"json", "cls", *CAPTION_SUFFIXES}


@dataclass
class TarFaults:
    """The faults of a tar, and of members that are in no sample."""

    members: list[tuple[str, str, str]] = field(default_factory=list)
    """(member, reason, detail) of the first `MOST_NAMED`"""
    unnamed: Counter[str] = field(default_factory=Counter)
    """How many members more, by reason."""
    damages: list[Damage] = field(default_factory=list)
    """Parts that cannot be read."""
    end_marks: list[int] = field(default_factory=list)
    """Offsets of end marks that another tar in the same file follows."""
    is_empty: bool = False
    """Whether the tar has no files, and no damage."""
    is_apart: bool = False
    """Whether the members of a sample lie apart."""
    has_repeats: bool = False
    """Whether samples with the same key follow each other."""
    divided_keys: int = 0
    """Keys with several images, each of which makes a sample, because their names have dots."""
    endings: frozenset[str] = frozenset()
    """The parts of the names of members after their last dot."""

    @property
    def cut(self) -> str:
        """The first damage, "" if there is none."""
        return str(self.damages[0]) if self.damages else ""

    def add(self, name: str, reason: str, detail: str) -> None:
        """Report a member."""
        if len(self.members) < MOST_NAMED:
            self.members.append((name if len(name) < _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}...", reason, detail))
        else:
            self.unnamed[reason] += 1

    def remarks(self, tar_name: str) -> list[tuple[str, str, str]]:
        """(key, reason, detail) of everything that is wrong, for the ledger."""
        unnamed = [(tar_name, reason, f"{count} members more") for reason, count in sorted(self.unnamed.items())]
        damages = [(tar_name, "tar_cut", str(damage)) for damage in self.damages]
        divided = [(tar_name, "names_divided", f"{self.divided_keys} keys have several images, and each is a sample; "
                                               f"--image-key takes one of them")] if self.divided_keys else []
        empty = [(tar_name, "empty_tar", "it has no members")] if self.is_empty else []
        return [*self.members, *unnamed, *damages, *divided, *empty]


def read_foreign_tar(source: Path | BinaryIO, faults: TarFaults, *, divide_names: bool = False,
                     most_members: int = MOST_MEMBERS) -> Iterator[dict[str, Any]]:
    """The samples of a tar that others wrote, a path or an open file; what is wrong is added to `faults`.

    Nothing is unpacked to the disk. Members with paths that lead outside, links and devices are refused all the same,
    because another program may unpack the tar later. Headers are read first, so that members of a sample may lie
    apart. A sample beside a damage is left out if it lacks a member that others have.

    `divide_names`: a key with several images and no name with one dot makes a sample of each image.
    `most_members`: read so many members and ignore the others.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(source, "rb")) if isinstance(source, Path) else source
        length = stream.seek(0, os.SEEK_END)
        number = stream.fileno() if isinstance(source, Path) else -1

        def seek_and_read(offset: int, size: int) -> bytes:
            stream.seek(offset)
            return stream.read(size)

        read_at = (lambda offset, size: os.pread(number, size, offset)) if isinstance(source, Path) else seek_and_read
        index = _index_members(read_at, length, faults, divide_names, most_members)
        for members in index:
            if members.damage is not None:
                _leave_out(read_at, length, members, faults)
            elif sample := _read_sample(read_at, length, members, faults):
                yield sample


def _index_members(read_at: ReadAt, length: int, faults: TarFaults, divide_names: bool, most_members: int) -> TarIndex:
    index, gaps = TarIndex(), list[int]()
    members, count = AllMembers(_read_ahead(read_at), length), 0
    for member in members:
        if len(members.damages) > len(gaps):
            gaps.append(count)
        if (refusal := _refusal_reason(member)):
            faults.add(member.name, *refusal)
        elif member.kind != "file":
            continue
        elif not (parts := KEY_AND_SUFFIX.match(name := member.name)) or (name[0] == "_" and META_MEMBER.match(name)):
            faults.add(name, "ignored_member", "readers of WebDataset ignore such names")
        else:
            if count == most_members:
                if most_members == MOST_MEMBERS:
                    members.damages.append(Damage(member.start, length, f"more than {MOST_MEMBERS} members", count))
                break
            index.add(member, parts[1], parts[2].lower())
            count += 1
    index.finish(gaps + [count] * (len(members.damages) - len(gaps)), divide=divide_names)
    faults.damages, faults.end_marks, faults.is_apart = members.damages, members.end_marks, index.is_apart
    faults.is_empty = not count and not members.damages and not faults.members
    faults.divided_keys, faults.endings, faults.has_repeats = index.divided_keys, index.endings, index.has_repeats
    return index


def _read_ahead(read_at: ReadAt) -> ReadAt:
    """The same, with fewer reads of the headers of small members."""
    data, begin = b"", 0

    def read(offset: int, size: int) -> bytes:
        nonlocal data, begin
        start = offset - begin
        if 0 <= start <= len(data) - size:
            return data[start:start + size]
        if size > _AHEAD_BYTES:
            return read_at(offset, size)
        data, begin = read_at(offset, _AHEAD_BYTES), offset
        return data[:size]

    return read


def _read_sample(read_at: ReadAt, length: int, place: SampleMembers, faults: TarFaults) -> dict[str, Any]:
    """The contents of the members of a sample, without those that are refused."""
    begin, span = place.start, place.end - place.start
    if 0 < span <= _MOST_READ_BYTES:  # one read for all members
        read_at = _part_reader(read_at(begin, span), begin)
    sample: dict[str, Any] = {"__key__": _name_at(read_at, length, place, begin)[0]}
    sample_bytes = 0
    for suffix, start, offset, size in place.members:
        if suffix is None:
            suffix = _name_at(read_at, length, place, start)[1]
        if suffix in sample:
            refusal = "repeated_member", "its sample has one of that kind"
        elif size > (MOST_JSON_BYTES if suffix.rpartition(".")[2] in _TEXTS else MOST_SAMPLE_BYTES - sample_bytes):
            refusal = "too_large", f"{size} bytes"
        elif len(sample) > MOST_SAMPLE_MEMBERS:
            refusal = "too_large", f"its sample has more than {MOST_SAMPLE_MEMBERS} members"
        else:
            sample[suffix] = read_at(offset, size)
            sample_bytes += size
            continue
        faults.add(next(list_members(read_at, length, start)).name, *refusal)
    return sample if len(sample) > 1 else {}


def _part_reader(data: bytes, begin: int) -> ReadAt:
    return lambda offset, size: data[offset - begin:offset - begin + size]


def _leave_out(read_at: ReadAt, length: int, place: SampleMembers, faults: TarFaults) -> None:
    assert place.damage is not None
    key, damage = _name_at(read_at, length, place, place.start)[0], faults.damages[place.damage]
    faults.damages[place.damage] = damage._replace(why=f"{damage.why}; sample {key} beside it is not whole")


def _name_at(read_at: ReadAt, length: int, place: SampleMembers, start: int) -> tuple[str, str]:
    """Key and suffix of the member whose first header is at `start`."""
    parts = KEY_AND_SUFFIX.match(next(list_members(read_at, length, start)).name)
    assert parts
    key, suffix = parts[1], parts[2].lower()
    return split_at_last_dot(key, suffix) if place.is_divided else (key, suffix)


def _refusal_reason(member: Member) -> tuple[str, str] | None:
    """The reason and detail for which a member is not taken, None if it is."""
    if member.kind == "overlong":
        return "unsafe_member", f"its name has more than {LONGEST_NAME} bytes"
    if member.kind == "file" and "/" not in member.name and member.name != "..":
        return None
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
    if folder := system_folder(member.name):
        return "hidden_member", f"a file in {folder}, where servers and desktops keep thumbnails or deleted files"
    return None
