"""Decompress a block of snappy in pieces. The libraries that exist need the whole block and its content in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

_PIECE = 1 << 20
_WINDOW = 1 << 16
"""Copies reach back so far. The format allows more, but its encoders work on blocks of 64 KiB."""


class DamagedBlock(ValueError):
    """A block that is not snappy, or that ends too early."""


def decompress_snappy(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """The content of a block in pieces; `read` gives so many of its bytes, fewer at its end."""
    source = _Source(read)
    left = source.varint()
    content = bytearray()
    while left > 0:
        tag = source.take(1)[0]
        if tag & 3:
            length, offset = _copy(tag, source)
            if not 0 < offset <= len(content):
                raise DamagedBlock(f"a copy from {offset} bytes back")
            start = len(content) - offset
            piece = bytes(content[start:start + length])
            # A copy may overlap itself: then it repeats its first bytes.
            content += (piece * (length // len(piece) + 1))[:length]
        else:
            length = (tag >> 2) + 1
            if length > 60:
                length = int.from_bytes(source.take(length - 60), "little") + 1
            content += source.take(length)
        left -= length
        if len(content) > _PIECE:
            yield bytes(content[:-_WINDOW])
            del content[:-_WINDOW]
    if left < 0:
        raise DamagedBlock("its content is longer than it says")
    yield bytes(content)


def _copy(tag: int, source: _Source) -> tuple[int, int]:
    """(length, offset) of a copy."""
    if tag & 3 == 1:
        return ((tag >> 2) & 7) + 4, (tag >> 5) << 8 | source.take(1)[0]
    return (tag >> 2) + 1, int.from_bytes(source.take(2 if tag & 3 == 2 else 4), "little")


class _Source:
    """Bytes that are read in large pieces and taken in small ones."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._piece, self._position = b"", 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        end = self._position + count
        if end <= len(self._piece):
            taken = self._piece[self._position:end]
            self._position = end
            return taken
        parts = [self._piece[self._position:]]
        missing = count - len(parts[0])
        while missing > 0:
            piece = self._read(_PIECE)
            if not piece:
                raise DamagedBlock("it ends too early")
            parts.append(piece[:missing])
            self._piece, self._position = piece, len(parts[-1])
            missing -= len(parts[-1])
        return b"".join(parts)

    def varint(self) -> int:
        """A number of seven bits a byte, the lowest first."""
        number = shift = 0
        while True:
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift > 35:
                raise DamagedBlock("a number without end")
