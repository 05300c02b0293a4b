"""List the members of a file that may hold several tars, or lack parts.

GNU tar stops at the first end mark without `-i`, Python's tarfile without `ignore_zeros`, webdataset always. With these
options, zeros in place of lost members raise no error. Here zeros that are no end mark count as damage, and the list
continues at the next header.
"""

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.media.tar_members import BLOCK, DamagedTar, Member, ReadAt, is_header, list_members

_RECORD = 20 * BLOCK
"""An end mark has two blocks of zeros. Most programs add zeros up to a multiple of this."""
_TAIL_BYTES = 64
"""If the end of a content has so many zeros, and more zeros follow, it was not written whole."""
_FIRST_READ, _MOST_READ = 4096, 1 << 20
_MOST_DAMAGES = 10_000
_MAGIC, _MAGIC_OFFSET, _NAME_BYTES = b"ustar", 257, 100


class Damage(NamedTuple):
    """A part of a tar that cannot be read."""

    start: int
    """Offset of its first byte."""
    end: int
    why: str
    members: int
    """Members that were listed before it."""

    def __str__(self) -> str:
        return f"{self.why}; bytes {self.start} to {self.end} are lost" if self.start < self.end else self.why


class AllMembers:
    """All members of a file of `tar_bytes`. Iterate over it once, then see what is damaged."""

    def __init__(self, read_at: ReadAt, tar_bytes: int) -> None:
        self._read_at, self._tar_bytes = read_at, tar_bytes
        self._count = 0
        self.damages: list[Damage] = []
        self.end_marks: list[int] = []
        """Offsets of the end marks that another tar follows."""

    def __iter__(self) -> Iterator[Member]:
        offset: int | None = 0
        while offset is not None:
            first, damage = offset, None
            last: Member | None = None
            try:
                for member in list_members(self._read_at, self._tar_bytes, first):
                    if last is not None:
                        self._count += 1
                        yield last
                    last = None
                    # A reader must not allocate what a header says before this check.
                    if member.offset + member.size > self._tar_bytes:
                        raise DamagedTar(f"in the middle of {member.name}", member.start, member.offset)
                    last = member
                offset = self._after_zeros(first, last)
            except DamagedTar as error:
                damage = self._in_last(last, error) if last is not None and error.start == last.end else error
            if last is not None and (damage is None or damage.start >= last.end):
                self._count += 1
                yield last
            if damage is not None:
                offset = self._resume(damage)

    def _after_zeros(self, first: int, last: Member | None) -> int | None:
        """The offset of the next tar in the file, None if only zeros follow; DamagedTar if the zeros are no end mark.

        `first`: offset of the first header of the tar; `last`: its last member.
        """
        start = first if last is None else last.end
        end = _skip_zeros(self._read_at, start, self._tar_bytes)
        is_cut = last is not None and self._ends_in_zeros(last)
        if end == self._tar_bytes and not (is_cut and end - start > 2 * _RECORD):
            return None
        if last is not None and is_cut:
            raise DamagedTar(f"zeros from the middle of {last.name} on", last.start, end)
        is_filled = end - start < _RECORD + 2 * BLOCK and 0 in {(end - first) % _RECORD, end % _RECORD}
        if end - start < 2 * BLOCK or not (end - start == 2 * BLOCK or is_filled):
            raise DamagedTar("zeros that are no end mark", start, end)
        if not is_header(self._read_at(end, BLOCK)):
            raise DamagedTar("bytes after the end mark that are no tar", end, end)
        self.end_marks.append(start)
        return end

    def _in_last(self, last: Member, damage: DamagedTar) -> DamagedTar:
        """The damage, or one in the middle of the member before it, if another tar begins in its content."""
        past = min(last.end + BLOCK - 1, self._tar_bytes)
        if _find_header(self._read_at, last.offset, past) is None:
            return damage
        return DamagedTar(f"in the middle of {last.name}", last.start, last.offset)

    def _ends_in_zeros(self, member: Member) -> bool:
        count = min(member.size, _TAIL_BYTES)
        return count > 0 and not any(self._read_at(member.offset + member.size - count, count))

    def _resume(self, damage: DamagedTar) -> int | None:
        """Note a damage. Returns the offset of the next header, None if there is none."""
        offset = _find_header(self._read_at, damage.resume, self._tar_bytes)
        # A name that fills its field may be the beginning of a longer one, whose own header is lost.
        while offset is not None and b"\0" not in self._read_at(offset, _NAME_BYTES):
            offset = _find_header(self._read_at, offset + BLOCK, self._tar_bytes)
        end = self._tar_bytes if offset is None else offset
        last = self.damages[-1] if self.damages else None
        if last and last.members == self._count:  # nothing between the two
            self.damages[-1] = last._replace(end=end)
        elif last and len(self.damages) == _MOST_DAMAGES:
            self.damages[-1] = last._replace(end=end, why=f"more than {_MOST_DAMAGES} damaged places")
        else:
            self.damages.append(Damage(damage.start, end, str(damage), self._count))
        return offset


def _skip_zeros(read_at: ReadAt, offset: int, tar_bytes: int) -> int:
    """The offset of the first byte that is not zero, `tar_bytes` if there is none."""
    size = _FIRST_READ
    while offset < tar_bytes and (data := read_at(offset, min(size, tar_bytes - offset))):
        if rest := data.lstrip(b"\0"):
            return offset + len(data) - len(rest)
        offset, size = offset + len(data), min(2 * size, _MOST_READ)
    return tar_bytes


def _find_header(read_at: ReadAt, offset: int, tar_bytes: int) -> int | None:
    """The offset of the first header from `offset` on, None if there is none. Headers of V7 have no mark to find."""
    size = _FIRST_READ  # grows, so that many damages close to each other cost few bytes
    while offset + BLOCK <= tar_bytes:
        data = read_at(offset, min(size, tar_bytes - offset))
        place = data.find(_MAGIC, _MAGIC_OFFSET)
        while 0 <= place <= len(data) - BLOCK + _MAGIC_OFFSET:
            start = place - _MAGIC_OFFSET
            if is_header(data[start:start + BLOCK]):
                return offset + start
            place = data.find(_MAGIC, place + 1)
        if len(data) < size:
            return None
        offset, size = offset + len(data) - BLOCK + 1, min(2 * size, _MOST_READ)
    return None
