"""Find and grade damage in the scan data of a JPEG.

libjpeg-turbo decodes damaged data to wrong pixels and only warns. simplejpeg turns its warnings into errors, so the
decoding itself is the check and a good file costs nothing more. Only files with a warning are examined further.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import simplejpeg

from pipeline.media import image_headers
from pipeline.media.types import JPEG_MAGIC, BadImage

MOST_LOST = 0.1
"""Share of an image's rows that may be lost at its lower edge. A sequential JPEG with more damage is refused."""
_LONGEST_ZERO_RUN = 64  # bytes
_ZEROS = bytes(_LONGEST_ZERO_RUN)
_END_MARKER = b"\xff\xd9"
# Texts of libjpeg-turbo. Its other warnings are about headers, and leave the pixels right.
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG", "Unsupported marker type", "Unsupported JPEG process", "Bogus",
           "Invalid JPEG file structure", "Huffman table")
_SEQUENTIAL, _FRAMES = {0xC0, 0xC1}, {0xC0, 0xC1, 0xC2}
_TABLES, _SCAN = 0xC4, 0xDA
_COEFFICIENTS = 64  # of a block
_SHORTEST_FILLER = 4  # bytes; fewer may be the rest of a damaged code
_FEW_BYTES = 16
_MOST_MARKERS = 10_000  # those after them are not looked at


class DamagedJpeg(ValueError):
    """A JPEG whose scan data is damaged; the text says how."""


@dataclass(frozen=True)
class _Scan:
    """One scan: its components, its range of coefficients, and where its coded data lies."""

    components: tuple[int, ...]
    first: int
    last: int
    missing_bits: int  # of each coefficient, after this scan
    start: int
    end: int


@dataclass(frozen=True)
class _Layout:
    """The structure of a JPEG by its markers."""

    frame: int  # the offset of its header
    is_sequential: bool
    components: tuple[int, ...]
    height: int  # pixels
    block_height: int  # pixels of a row of blocks
    zeros_are_flat: bool  # zero bits may be a flat area
    scans: tuple[_Scan, ...]


def decode_jpeg(data: bytes, colorspace: str, min_width: int = 0, min_height: int = 0, *, strict: bool = True
                ) -> np.ndarray:
    """(H, W, C) uint8, at the smallest scale that gives this size, as `simplejpeg.decode_jpeg`.

    DamagedJpeg, if `strict`, where libjpeg-turbo warns of damage or the data has a long run of zeros. ValueError if it
    cannot decode the file for another reason.
    """
    data = _with_usual_version(data)
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace, min_width=min_width, min_height=min_height, strict=strict)
    except ValueError as error:
        if not strict or not str(error).startswith(_DAMAGE):
            raise
        raise DamagedJpeg(str(error)) from None
    # A block of a file that was never written has zeros. libjpeg-turbo reads them as codes, often without a warning.
    if strict and _ZEROS in data and (layout := _read_layout(data)) and _find_zeros(data, layout) is not None:
        raise DamagedJpeg("a run of zeros")
    return pixels


def repair(data: bytes) -> tuple[bytes, str]:
    """The undamaged part of a damaged JPEG, as a JPEG, and a sentence that says what was lost.

    BadImage with the reason corrupt if the damage is large, or if its extent is unknown.
    """
    data = _with_usual_version(data)
    layout = _read_layout(data)
    if layout is None:
        raise BadImage("corrupt", "a JPEG with damaged headers")
    end = layout.scans[-1].end
    zeros = _find_zeros(data, layout)
    complaint = _complaint(data[:end] + _END_MARKER)
    if not complaint and zeros is None:
        return data[:end] + _END_MARKER, "the end marker is missing; no pixel is lost"
    filler = data[end - 1:end]
    coded = len(data[:end].rstrip(filler))
    if end - coded >= _SHORTEST_FILLER and (zeros is None or zeros >= coded):
        for count in range(_FEW_BYTES):  # the code itself may end with such bytes
            if not _complaint(shorter := data[:coded] + count * filler + _END_MARKER):
                return shorter, f"{end - coded - count} bytes of filler before the end marker; no pixel is lost"
    if not layout.is_sequential or len(layout.scans) > 1:
        return _keep_whole_scans(data, layout, complaint)
    if zeros is None:
        if data[end:end + 2] == _END_MARKER:
            raise BadImage("corrupt", f"a JPEG that is damaged at an unknown place ({complaint})")
        zeros = len(data[:end].rstrip(b"\0"))
    return _keep_whole_rows(data[:zeros] + _END_MARKER, layout)


def _with_usual_version(data: bytes) -> bytes:
    """The file with version 1 of JFIF. libjpeg-turbo warns of versions that it does not know, which says nothing."""
    return data[:11] + b"\1" + data[12:] if data[6:11] == b"JFIF\0" and data[11:12] not in b"\1\2" else data


def _complaint(data: bytes) -> str:
    """The warning of libjpeg-turbo on the whole file; empty if there is none."""
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_width=1, min_height=1)  # at the smallest size
    except ValueError as error:
        return str(error)
    return ""


def _keep_whole_scans(data: bytes, layout: _Layout, complaint: str) -> tuple[bytes, str]:
    """The scans before the first that is damaged, if they hold every coefficient but for its last bit."""
    scans = layout.scans
    count = bisect_left(range(1, len(scans) + 1), True,  # damage stays in what follows
                        key=lambda number: bool(_complaint(data[:scans[number - 1].end] + _END_MARKER)))
    precise = {(component, number) for scan in scans[:count] if scan.missing_bits <= 1
               for component in scan.components for number in range(scan.first, scan.last + 1)}
    if len(precise) < len(layout.components) * _COEFFICIENTS:
        raise BadImage("corrupt", f"a JPEG of which {count} scans are whole, too few ({complaint or 'a run of zeros'})")
    end = scans[-1].end
    if count == len(scans) - 1 and data[end:end + 2] != _END_MARKER:
        return data[:end].rstrip(b"\0") + _END_MARKER, "the end of the last scan is missing; it refines the others"
    return data[:scans[count - 1].end] + _END_MARKER, f"only the first {count} scans are whole; the others refine them"


def _keep_whole_rows(data: bytes, layout: _Layout) -> tuple[bytes, str]:
    """The rows of a sequential JPEG of one scan above the place where its data ends."""
    try:
        pixels = simplejpeg.decode_jpeg(data, "GRAY", strict=False)
    except ValueError as error:
        raise BadImage("corrupt", str(error)) from None
    step = layout.block_height
    # libjpeg-turbo paints lost blocks in one gray. Chroma of other blocks may leak into the edges of their row.
    lines = pixels[np.minimum(np.arange(step // 2, layout.height + step // 2, step), layout.height - 1), :, 0]
    painted = (lines == lines[-1, -1]).all(axis=1)
    first = len(lines) - int(np.argmin(painted[::-1])) if not painted.all() else 0
    rows = max(first - 1, 0) * step  # the last row of blocks with other pixels is the one that ends somewhere
    lost = layout.height - rows
    if lost > MOST_LOST * layout.height:
        raise BadImage("corrupt", f"a JPEG of which {lost} of {layout.height} rows are lost")
    at = layout.frame + 5
    return data[:at] + rows.to_bytes(2, "big") + data[at + 2:], f"{lost} of {layout.height} rows are lost and cut off"


def _find_zeros(data: bytes, layout: _Layout) -> int | None:
    """The offset of a long run of zeros that no encoder wrote; None if there is none."""
    if not layout.is_sequential or layout.zeros_are_flat:
        return None  # scans that refine others have long runs of zeros
    offsets = (data.find(_ZEROS, scan.start, scan.end) for scan in layout.scans)
    return next((at for at in offsets if at >= 0), None)


def _read_layout(data: bytes) -> _Layout | None:
    """The layout of a JPEG; None if its headers are damaged or it has no scan."""
    if data[:3] != JPEG_MAGIC:
        return None
    frame, flat = -1, True
    scans: list[_Scan] = []
    markers = [*islice(image_headers.jpeg_markers(data), _MOST_MARKERS), (0, len(data))]
    try:
        for (marker, at), (_, following) in pairwise(markers):
            if marker in _FRAMES and frame < 0:
                frame = at
            elif marker == _TABLES and not scans:
                flat = flat and all(code == 0 for code in _shortest_codes(data, at))
            elif marker == _SCAN:
                scans.append(_read_scan(data, at, following))
        if frame < 0 or not scans:
            return None
        count = data[frame + 9]
        components = tuple(data[frame + 10 + 3 * number] for number in range(count))
        tallest = max(data[frame + 11 + 3 * number] & 15 for number in range(count)) if count > 1 else 1
    except (IndexError, ValueError):
        return None
    height = int.from_bytes(data[frame + 5:frame + 7], "big")
    return _Layout(frame, data[frame + 1] in _SEQUENTIAL, components, height, 8 * max(tallest, 1), flat, tuple(scans))


def _read_scan(data: bytes, at: int, end: int) -> _Scan:
    count = data[at + 4]
    components = tuple(data[at + 5 + 2 * number] for number in range(count))
    first, last, precision = data[at + 5 + 2 * count:at + 8 + 2 * count]
    return _Scan(components, first, last, precision & 15, at + 2 + int.from_bytes(data[at + 2:at + 4], "big"), end)


def _shortest_codes(data: bytes, at: int) -> Iterator[int]:
    """The meaning of the code of zero bits in each table for AC coefficients. 0 is the end of a block."""
    end = at + 2 + int.from_bytes(data[at + 2:at + 4], "big")
    at += 4
    while at < end:
        if data[at] >> 4:
            yield data[at + 17]
        at += 17 + sum(data[at + 1:at + 17])
