"""Images and color profiles for tests, byte by byte."""

import contextlib
import struct
import subprocess
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.media import isolation
from pipeline.media.decode import decode
from pipeline.media.types import BadImage


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG from its chunks. `rows` are unfiltered; without rows the file ends after its header."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    body = chunk(b"IDAT", zlib.compress(rows)) if rows else b""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
            + body + chunk(b"IEND", b""))


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile (version 2) from its tags, which include their type."""
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249), b"cprt": b"text" + bytes(4) + b"none\0",
            b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"made\0" + bytes(78)} | tags
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    kind, pcs = (b"prtr", b"Lab ") if space == b"CMYK" else (b"mntr", b"XYZ ")
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, kind, space, pcs) + bytes(12) + b"acsp"
    return (head + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0") + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def wide_gamut(power: float = 2.2) -> bytes:
    """Display P3's primaries."""
    return profile(b"RGB ", {b"rXYZ": xyz(0.5151, 0.2412, -0.0011), b"gXYZ": xyz(0.2920, 0.6922, 0.0419),
                             b"bXYZ": xyz(0.1571, 0.0666, 0.7841)} | {name: gamma(power)
                                                                      for name in (b"rTRC", b"gTRC", b"bTRC")})


def inks() -> bytes:
    """A press whose inks only reduce the lightness, all equally, so every print is gray."""
    ramp = bytes(range(256))
    clut = b"".join(bytes([round(255 * (1 - sum(corner) / 4)), 128, 128])
                    for corner in np.ndindex(2, 2, 2, 2))
    matrix = struct.pack(">9i", *(65536 if number % 4 == 0 else 0 for number in range(9)))
    return profile(b"CMYK", {b"A2B0": b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + clut + ramp * 3})


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image with soft and hard edges, and some noise."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(25):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        shape = (x, y, x + int(rng.integers(4, width // 3)), y + int(rng.integers(4, height // 3)))
        draw.ellipse(shape, fill=tuple(map(int, rng.integers(0, 256, 3))))
    grain = np.asarray(image) + rng.normal(0, 3, (height, width, 3))
    return Image.fromarray(grain.clip(0, 255).astype(np.uint8))


def psnr(image: Image.Image, reference: Image.Image) -> float:
    error = np.mean((np.asarray(image, np.float64) - np.asarray(reference, np.float64)) ** 2)
    return float(10 * np.log10(255 ** 2 / max(error, 1e-9)))


def decoded(data: bytes, max_pixels: int = 10_000_000) -> np.ndarray:
    return np.asarray(decode(data, max_pixels).image)


def reason(data: bytes, max_pixels: int = 10_000_000) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, max_pixels)
    return caught.value.reason


def jxl_header(width: int, height: int) -> bytes:
    """A JPEG XL that ends after its size (SizeHeader: not small, 30 bits a side, no ratio)."""
    bits = 0 | 3 << 1 | (height - 1) << 3 | 0 << 33 | 3 << 36 | (width - 1) << 38
    return b"\xff\n" + bits.to_bytes(12, "little") + bytes(20)


@contextlib.contextmanager
def without_extra_formats() -> Iterator[None]:
    """Decode in processes that have neither pi-heif nor pillow-jxl-plugin."""
    program = ("import sys; sys.modules['pi_heif'] = sys.modules['pillow_jxl'] = None; "
               "from pipeline.media import decode, isolation; decode.register_extra_formats(); isolation.serve()")
    with pytest.MonkeyPatch.context() as patch:
        run = subprocess.Popen
        patch.setattr(subprocess, "Popen", lambda command, **options: run([*command[:-1], program], **options))
        isolation._close()
        yield
        isolation._close()
