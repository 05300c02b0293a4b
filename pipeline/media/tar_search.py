"""Find the image of one sample in a tar by a few ranged reads. Only the keys of the samples must be known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.media.foreign_tars import KEY_AND_SUFFIX, META_MEMBER
from pipeline.media.tar_members import BLOCK, parse_header
from pipeline.media.tars import IMAGE_SUFFIXES

_LEAST_WINDOW_BYTES = 64 << 10
_MOST_ROUNDS = 24
"""An image needs about three. A tar that needs more is not what its metadata say."""


@dataclass(frozen=True)
class _Member:
    offset: int
    """Of the header, in bytes."""
    length: int
    """Bytes of the content."""
    position: int
    """Of the sample, in the tar."""
    is_image: bool

    @property
    def end(self) -> int:
        """The offset of the next header."""
        return self.offset + BLOCK + -(-self.length // BLOCK) * BLOCK


def window_bytes(tar_bytes: int, samples: int) -> int:
    """The bytes of one ranged read: two samples of mean size, and at least what a store sends at once."""
    return max(_LEAST_WINDOW_BYTES, -(-2 * tar_bytes // max(samples, 1) // BLOCK) * BLOCK)


class TarSearch:
    """Images of a tar by position. A search estimates where a sample lies, reads there, and corrects the estimate.

    `read` gives the bytes from one offset to another. `positions` has the position of each key. A content may look
    like a header, so the caller must compare the hash of the image.
    """

    def __init__(self, read: Callable[[int, int], bytes], tar_bytes: int, positions: Mapping[str, int]) -> None:
        self._read, self._tar_bytes, self._positions = read, tar_bytes, positions
        self._window = window_bytes(tar_bytes, len(positions))

    def image(self, position: int) -> bytes | None:
        """The encoded image at `position`. None if it is not found: the headers are unusual, or the tar is damaged."""
        low, low_position = 0, -1  # the offset of a header, and the position of the sample before it
        high, high_position = self._tar_bytes, len(self._positions)  # the offset of a later header, and its sample
        for number in range(_MOST_ROUNDS):
            if low >= high:
                return None
            share = (position - low_position - 1) / max(1, high_position - low_position - 1)
            if number > 3 and number % 2:
                share = 0.5  # sizes that change along the tar mislead every estimate by position
            estimate = low + int((high - low) * share)
            start = estimate // BLOCK * BLOCK - self._window // 2 // BLOCK * BLOCK
            if start < low + self._window // 2 or high - low <= self._window:
                start = low
            data = bytearray()
            members = self._members(data, start, high, position)
            if members is None:
                return None
            for member in members:
                if member.position == position and member.is_image:
                    return self._content(member, data, start)
            for member in members:
                if member.position >= position:
                    high, high_position = member.offset, member.position
                    break
                low, low_position = member.end, member.position
            if not members:
                high = start  # no header begins between here and the later one
        return None

    def _members(self, data: bytearray, start: int, high: int, position: int) -> list[_Member] | None:
        """The members with a header in the window at `start`. `data` receives the window. None for an unknown key.

        The window grows while it has no header, and while it ends inside of the sample at `position`.
        """
        members: list[_Member] = []
        offset = start
        while True:
            if offset + BLOCK > start + len(data):
                end = min(max(offset, start + len(data)) + max(self._window, len(data)), high)
                if end < offset + BLOCK or (members and members[-1].position != position):
                    return members
                data += self._read(start + len(data), end)
                if start + len(data) < end:
                    return None  # the file is shorter than its manifest says
            header = parse_header(bytes(data[offset - start:offset - start + BLOCK]))
            if header is None:  # content of a member, or the end of the tar
                offset += BLOCK
                continue
            name, length = header
            parts = KEY_AND_SUFFIX.match(name)
            if not parts or META_MEMBER.match(name):
                offset += BLOCK
                continue
            key, suffix = parts.groups()
            if key not in self._positions:
                return None
            members.append(_Member(offset, length, self._positions[key], suffix.lower() in IMAGE_SUFFIXES))
            offset = members[-1].end
            if members[-1].position == position and members[-1].is_image:
                return members

    def _content(self, member: _Member, data: bytearray, start: int) -> bytes | None:
        """The content of a member whose header is in the window at `start`."""
        first = member.offset + BLOCK
        last, end = first + member.length, start + len(data)
        if last > self._tar_bytes:
            return None
        content = bytes(data[first - start:last - start])
        return content + self._read(max(first, end), last) if last > end else content
