"""The cost of decoding an image, read from its bytes before a decoder starts."""

import itertools
import re
import struct
from collections.abc import Iterator

from pipeline.media import isolation
from pipeline.media.types import JPEG_MAGIC, BadImage

MOST_SCANS = 500
"""A JPEG may have so many, as in djpeg. Each scan goes over the whole image, and may take a hundred bytes."""
MOST_FRAMES = 10_000
"""The frames of a GIF are counted up to this number."""
_FEW_SCANS = 64
_FEW_SEGMENTS = 2000
_FEW_CHUNKS = 10_000
_LARGE_GIF = 1 << 20  # bytes; Pillow reads blocks of 1 to 255 bytes, each in Python
_PNG, _ICO = b"\x89PNG\r\n\x1a\n", b"\0\0\1\0"
# Pillow decodes an icon when it opens it. It reads the content of all tags of a TIFF. Before version 13 each tag may
# refer to the whole file.
# It reads comments of a PPM and boxes of a JPEG 2000 and AVIF one by one. None of these formats is plain.
_COSTLY_TO_OPEN = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+", _ICO,
                   b"\0\0\0\x0c", b"\xffO\xffQ")
_PPM = re.compile(rb"P[0-9Ffy]\s")
_JXL_CODESTREAM, _JXL_CONTAINER = b"\xff\n", b"\0\0\0\x0cJXL \r\n\x87\n"
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_HEIF_SIZE = re.compile(rb"ispe\0{4}(.{8})", re.DOTALL)
# Height over width is 1 over these in a JPEG XL that has only its height.
_JXL_RATIOS = (None, (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_NEXT_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")
_SEGMENT = struct.Struct(">BBH")
_SCAN, _END, _WITHOUT_LENGTH = 0xDA, 0xD9, {0x01, *range(0xD0, 0xD9)}


def is_suspicious(data: bytes) -> bool:
    """Whether an image must be opened in another process. BadImage with too_many_scans for a JPEG."""
    if data[:3] == JPEG_MAGIC:
        if _has_one_scan(data):
            return len(data) > isolation.MOST_BYTES
        # Text and thumbnails may look like scans too, so only then they are counted properly.
        if data.count(b"\xff\xda") > _FEW_SCANS and (scans := _count_scans(data)) > _FEW_SCANS:
            if scans > MOST_SCANS:
                raise BadImage("too_many_scans", f"more than {MOST_SCANS}")
            return True
        return len(data) > isolation.MOST_BYTES or _has_many_segments(data)
    return (len(data) > isolation.MOST_BYTES or data[:4] in _COSTLY_TO_OPEN or data[4:8] == b"ftyp"
            or bool(_PPM.match(data)) or (data[:4] == b"GIF8" and len(data) > _LARGE_GIF)
            or (data[:8] == _PNG and _has_many_chunks(data)) or bool(extra_format(data)))


def extra_format(data: bytes) -> str:
    """The name in Pillow of a format that only the packages of the extra `formats` decode; empty for any other."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and b"avif" not in data[8:int.from_bytes(data[:4], "big")]:
        return "HEIF"
    return "JXL" if data[:2] == _JXL_CODESTREAM or data[:12] == _JXL_CONTAINER else ""


def is_plain(image_format: str | None, decoder: str) -> bool:
    """Whether a format, as Pillow calls it, is decoded in bounded time and memory for its pixels."""
    return image_format in {"JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP"} and decoder != "bmp_rle"


def sizes_before_opening(data: bytes) -> list[tuple[int, int]]:
    """Width and height of a WebP, HEIC or JPEG XL, and of each image in an ICO or HEIC.

    Pillow takes memory for their pixels when it opens one. Empty for other formats.
    """
    if extra := extra_format(data):
        return _heif_sizes(data) if extra == "HEIF" else _jxl_sizes(data)
    if data[:4] == _ICO:
        return [size for size in _icon_sizes(data) if min(size) > 0]
    size = _webp_size(data)
    return [size] if size else []


def _webp_size(data: bytes) -> tuple[int, int] | None:
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return (int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1)
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _heif_sizes(data: bytes) -> list[tuple[int, int]]:
    # The whole of a grid of tiles has a size too. Coded data may look like one.
    headers = data.partition(b"mdat")[0]
    return [struct.unpack(">II", match[1]) for match in _HEIF_SIZE.finditer(headers)]


def _jxl_sizes(data: bytes) -> list[tuple[int, int]]:
    """Width and height of a JPEG XL (ISO/IEC 18181-1, SizeHeader). Empty if it has none."""
    start = _jxl_codestream(data)
    bits = int.from_bytes(data[start + 2:start + 14], "little")
    if data[start:start + 2] != _JXL_CODESTREAM or len(data) < start + 14:
        return []

    def read(count: int) -> int:
        nonlocal bits
        value, bits = bits & (1 << count) - 1, bits >> count
        return value

    def read_side() -> int:
        return 8 * (read(5) + 1) if is_small else read((9, 13, 18, 30)[read(2)]) + 1

    is_small = read(1)
    height = read_side()
    ratio = _JXL_RATIOS[read(3)]
    return [(height * ratio[0] // ratio[1] if ratio else read_side(), height)]


def _jxl_codestream(data: bytes) -> int:
    """The offset of the codestream in a JPEG XL, or the length of the data if it has none."""
    if data[:2] == _JXL_CODESTREAM:
        return 0
    at = len(_JXL_CONTAINER)
    for _ in range(_FEW_SEGMENTS):
        size, kind = int.from_bytes(data[at:at + 4], "big"), data[at + 4:at + 8]
        header = 16 if size == 1 else 8
        if kind in {b"jxlc", b"jxlp"}:
            return at + header + 4 * (kind == b"jxlp")  # a part has a number
        at += max(header, int.from_bytes(data[at + 8:at + 16], "big") if size == 1 else size)
    return len(data)


def _icon_sizes(data: bytes) -> list[tuple[int, int]]:
    # Its directory says 256 at most, whatever they are.
    sizes: list[tuple[int, int]] = []
    for number in range(int.from_bytes(data[4:6], "little")):
        entry = data[6 + 16 * number:22 + 16 * number]
        if len(entry) < 16:
            break
        start = int.from_bytes(entry[12:16], "little")
        header = data[start:start + 24]
        if header[:8] == _PNG and len(header) == 24:
            sizes.append(struct.unpack(">II", header[16:24]))
        elif len(header) >= 12:  # a BMP without its file header; the mask counts as as many rows again
            width, height = struct.unpack_from("<HH" if header[0] == 12 else "<ii", header, 4)
            sizes.append((abs(width), abs(height) // 2))
    return sizes


def has_many_frames(data: bytes) -> bool:
    """Whether a GIF has more than `MOST_FRAMES`, of which Pillow would read each."""
    if data.count(b",") <= MOST_FRAMES:
        return False
    frames, at = 0, 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while at < len(data) and data[at] != 0x3B and frames <= MOST_FRAMES:
        if data[at] == 0x2C:
            frames += 1
            packed = data[at + 9] if at + 9 < len(data) else 0
            at += 11 + (3 << (packed & 7) + 1 if packed & 0x80 else 0)
        elif data[at] == 0x21:
            at += 2
        else:
            at += 1
            continue
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return frames > MOST_FRAMES


def _has_one_scan(data: bytes) -> bool:
    """Whether a JPEG is sequential, with all its channels in the first scan: its decoder reads no other scan."""
    channels, at = 0, 2
    try:
        for _ in range(_FEW_SEGMENTS):
            start, marker, size = _SEGMENT.unpack_from(data, at)
            if start != 0xFF or marker == 0xFF or marker in _WITHOUT_LENGTH:
                return False  # unusual
            if marker == _SCAN:
                return data[at + 4] == channels
            if marker in {0xC0, 0xC1}:
                channels = data[at + 9]
            at += 2 + size
    except (struct.error, IndexError):
        pass
    return False


def _has_many_chunks(data: bytes) -> bool:
    """Whether a PNG has very many chunks. Pillow reads each of them, also after the pixels."""
    if len(data) < 12 * _FEW_CHUNKS:  # bytes of that many empty ones
        return False
    at = len(_PNG)
    for _ in range(_FEW_CHUNKS):
        if at >= len(data):
            return False
        at += 12 + int.from_bytes(data[at:at + 4], "big")
    return True


def _has_many_segments(data: bytes) -> bool:
    """Whether a JPEG has very many segments before its first scan."""
    at = 2
    for _ in range(_FEW_SEGMENTS):
        if data[at:at + 1] != b"\xff" or at + 4 > len(data):
            return False  # damaged: its decoder stops there too, or searches on for a marker
        marker = data[at + 1]
        if marker in {_SCAN, _END}:
            return False
        at += 1 if marker == 0xFF else 2 if marker in _WITHOUT_LENGTH else 2 + (data[at + 2] << 8 | data[at + 3])
    return True


def jpeg_markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Each marker of a JPEG and its offset, up to and with the end marker. The data of scans is passed over."""
    at = 2
    while match := _NEXT_MARKER.search(data, at):
        marker, at = data[match.start() + 1], match.end()
        yield marker, match.start()
        if marker == _END:
            return
        if marker not in _WITHOUT_LENGTH:
            at += max(2, int.from_bytes(data[at:at + 2], "big"))


def _count_scans(data: bytes) -> int:
    """The scans of a JPEG, up to one more than `MOST_SCANS`."""
    scans = (marker for marker, _ in jpeg_markers(data) if marker == _SCAN)
    return sum(1 for _ in itertools.islice(scans, MOST_SCANS + 1))
