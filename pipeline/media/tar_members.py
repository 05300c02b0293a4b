"""List the members of any tar: formats V7, ustar, GNU and pax. The only reader of tars.

tarfile is not used to read. It loops forever on a negative size (CVE-2025-8194), it calls itself for every extended
header, and it reads extended headers of any size into memory. Here each step goes forward in the file, and the memory
is bounded whatever the headers say.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

BLOCK = 512
LONGEST_NAME = 4096
"""Bytes of a name: the longest path of Linux."""
_MOST_HEADERS = 64
"""Extended headers before one member. Other programs write three at most."""
_MOST_PAX_BYTES = 1 << 20
_FILE_KINDS = {0, ord("0")}
_FILES, _FOLDER, _SPARSE = b"07\0", b"5", b"S"
_WITHOUT_CONTENT = b"12346"  # links, devices, pipes
_LONG_NAME, _LONG_LINK, _PAX, _GLOBAL_PAX = b"L", b"K", b"xX", b"g"
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")
_OCTAL = re.compile(rb" *([0-7]*) *(?:\0.*)?", re.DOTALL)

ReadAt = Callable[[int, int], bytes]
"""Gives so many bytes from an offset on, fewer at the end of the file."""


class DamagedTar(ValueError):
    """A tar that cannot be read further, and why.

    `start`: offset of the first header of the member that cannot be read. `resume`: offset from which a later member
    may be searched.
    """

    def __init__(self, why: str, start: int = 0, resume: int = 0) -> None:
        super().__init__(why)
        self.start, self.resume = start, resume


class EndlessTar(DamagedTar):
    """A tar that ends after a whole member, without the block of zeros that ends a tar: it was cut off."""


class Member(NamedTuple):
    """A member of a tar."""

    name: str
    kind: Literal["file", "folder", "sparse", "overlong", "other"]
    """overlong: a file whose name has more than `LONGEST_NAME` bytes. Only the beginning of the name is read."""
    offset: int
    """Offset of the content, in bytes."""
    size: int
    """Bytes of the content in the tar."""
    start: int
    """Offset of its first header, which is an extended one if it has any."""

    @property
    def end(self) -> int:
        """The offset of the next header."""
        return self.offset + _blocks(self.size)


def list_members(read_at: ReadAt, tar_bytes: int, offset: int = 0) -> Iterator[Member]:
    """The members of a tar of `tar_bytes` from the header at `offset` on, up to the zeros that end it.

    DamagedTar where it cannot be read further. The content of a member may end beyond the end of the file: compare
    `offset` and `size` with `tar_bytes`.
    """
    while offset < tar_bytes or not tar_bytes:
        header = read_at(offset, BLOCK)
        if (plain := parse_header(header)) is not None:
            name, size = plain
            member = Member(name, "file", offset + BLOCK, size, offset)
            offset += BLOCK - (-size // BLOCK) * BLOCK  # as member.end, in a tenth of the time
        elif len(header) == BLOCK and not any(header):
            return
        elif len(header) < BLOCK:
            raise EndlessTar("between two members: it has no end", offset, tar_bytes)
        else:
            # An offset beyond the file may be larger than a file can have.
            member, offset = _member(lambda at, size: read_at(at, size) if at < tar_bytes else b"", offset, header)
        yield member
    if offset == tar_bytes:
        raise EndlessTar("between two members: it has no end", offset, tar_bytes)
    raise DamagedTar("in the middle of its last member", tar_bytes, tar_bytes)


def is_header(block: bytes) -> bool:
    """Whether a block is a header with a right checksum."""
    try:
        return len(block) == BLOCK and any(block) and bool(_checked(block))
    except DamagedTar:
        return False


def parse_header(header: bytes) -> tuple[str, int] | None:
    """Name and length in the header of a file as `TarWriter` makes it, None for any other header.

    tarfile takes three times as long: a tenth of the time to decode an image of 256 pixels.
    """
    # A regular file of POSIX's format without a prefix to its name; longer names and sizes have other headers.
    if len(header) < BLOCK or header[257:265] != b"ustar\x0000" or header[345] or header[156] not in _FILE_KINDS:
        return None
    length, checksum = header[124:136].rstrip(b"\0 "), header[148:156].rstrip(b"\0 ")
    # int() also takes signs, spaces and underscores.
    if not length.isdigit() or not checksum.isdigit():
        return None
    try:
        # Adler-32 has 1 and the sum of the bytes modulo 65521. It is 20 times as fast as sum().
        total = (zlib.adler32(header) & 0xffff) - 1 - sum(header[148:156]) + 8 * ord(" ")
        if (int(checksum, 8) - total) % 65521:
            return None
        return str(header[:100].rstrip(b"\0"), "utf-8", "surrogateescape"), int(length, 8)
    except ValueError:  # a digit above 7
        return None


def _member(read_at: ReadAt, offset: int, header: bytes) -> tuple[Member, int]:
    """The member whose first header is at `offset`, after any extended headers, and the offset of the next header."""
    name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    start = last = offset
    try:
        for _ in range(_MOST_HEADERS):
            last = offset
            kind, size = _checked(header), _number(header[124:136])
            content = offset + BLOCK
            if kind in _LONG_NAME:
                name = read_at(content, min(size, LONGEST_NAME + 1)).split(b"\0")[0]
            elif kind in _PAX or kind == _GLOBAL_PAX:
                records = _pax_records(read_at, content, size)
                if kind in _PAX:
                    pax |= records
                elif {b"path", b"size"} & records.keys() or any(key.startswith(b"GNU.sparse.") for key in records):
                    raise DamagedTar("where its reader stops: a global header that names one member")
            elif kind != _LONG_LINK:
                return _finish(read_at, header, start, content, size, name, pax)
            offset = content + _blocks(size)
            if len(header := read_at(offset, BLOCK)) < BLOCK:
                raise DamagedTar("where its reader stops: no member after an extended header")
        raise DamagedTar(f"where its reader stops: more than {_MOST_HEADERS} extended headers for one member")
    except DamagedTar as damage:
        damage.start, damage.resume = start, last + 1
        raise


def _finish(read_at: ReadAt, header: bytes, start: int, content: int, size: int, long_name: bytes | None,
            pax: dict[bytes, bytes]) -> tuple[Member, int]:
    kind = header[156:157]
    name = header[:100].split(b"\0")[0]
    if kind == b"\0" and name.endswith(b"/"):  # V7 has no kind for folders
        kind = _FOLDER
    if kind != _SPARSE and (prefix := header[345:500].split(b"\0")[0]):
        name = prefix + b"/" + name
    if long_name is not None:
        name = long_name
    sparse = kind == _SPARSE or any(key.startswith(b"GNU.sparse.") for key in pax)
    path = pax.get(b"GNU.sparse.name", pax.get(b"path"))
    if path is not None:
        name = path[:LONGEST_NAME + 1].rstrip(b"/")
    if b"size" in pax:
        if not pax[b"size"].isdigit():
            raise DamagedTar("where its reader stops: a size that is no number")
        size = int(pax[b"size"][:30])
    if kind == _SPARSE:
        more = header[482]
        while more:  # blocks that list the holes
            block = read_at(content, BLOCK)
            if len(block) < BLOCK:
                raise DamagedTar("where its reader stops: a list of holes without an end")
            more, content = block[504], content + BLOCK
    text = name.decode("utf-8", "surrogateescape")
    if kind == _FOLDER:
        return Member(text.rstrip("/"), "folder", content, 0, start), content
    if kind in _WITHOUT_CONTENT:
        return Member(text, "other", content, 0, start), content
    if kind not in _FILES and kind != _SPARSE:
        kind_name: Literal["other", "overlong", "sparse", "file"] = "other"
    else:
        kind_name = "overlong" if len(name) > LONGEST_NAME else "sparse" if sparse else "file"
    member = Member(text, kind_name, content, size, start)
    return member, member.end


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _checked(header: bytes) -> bytes:
    """The kind of a header; DamagedTar if its checksum is wrong."""
    # The sum of signed bytes is what some old programs wrote.
    expected = _number(header[148:156])
    if expected != sum(header) - sum(header[148:156]) + 8 * ord(" ") and expected != 8 * ord(" ") + sum(
            struct.unpack("148b8x356b", header)):
        raise DamagedTar("where its reader stops: a damaged header")
    return header[156:157]


def _number(field: bytes) -> int:
    """A number of a header, in octal digits or in base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _OCTAL.fullmatch(field)
    if digits is None:
        raise DamagedTar("where its reader stops: " + (
            "a negative size" if field[0] == 0xff or b"-" in field else "a damaged header"))
    return int(digits[1] or b"0", 8)


def _pax_records(read_at: ReadAt, offset: int, size: int) -> dict[bytes, bytes]:
    if size > _MOST_PAX_BYTES:
        raise DamagedTar(f"where its reader stops: an extended header of {size} bytes")
    data, records, start = read_at(offset, size), dict[bytes, bytes](), 0
    while record := _PAX_RECORD.match(data, start):
        end = start + int(record[1])
        if not record.end() < end <= len(data) or data[end - 1:end] != b"\n":
            raise DamagedTar("where its reader stops: a damaged extended header")
        records[record[2]] = data[record.end():end - 1]
        start = end
    return records
