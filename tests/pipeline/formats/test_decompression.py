"""Concatenated streams are read to the end. Other bytes and cuts are errors, for every compression."""

import bz2
import gzip
import io
import lzma

import pyarrow as pa
import pytest

from pipeline.formats.decompression import ERRORS, decompress

PACK = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress,
        "zstandard": lambda data: pa.compress(data, "zstd", asbytes=True),
        "lz4": lambda data: pa.compress(data, "lz4", asbytes=True)}
FIRST, SECOND = b"one, " * 9999, bytes(range(256)) * 99


@pytest.mark.parametrize("kind", PACK)
def test_joined_streams_are_read_to_the_last_byte(kind):
    first, second = PACK[kind](FIRST), PACK[kind](SECOND)
    assert decompress(io.BytesIO(first + second), kind).read() == FIRST + SECOND


@pytest.mark.parametrize("padding", [bytes(4), bytes(70_000)])
@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz"])
def test_zeros_after_a_stream_are_padding(kind, padding):
    assert decompress(io.BytesIO(PACK[kind](FIRST) + padding), kind).read() == FIRST


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("damage", [lambda first, second: first + b"junkjunk" + second,
                                    lambda first, second: first + second[:-9], lambda first, second: first[:-1],
                                    lambda first, second: first + second[:2]], ids=["junk", "cut", "short", "magic"])
def test_other_bytes_after_a_stream_and_cuts_are_errors(kind, damage):
    with pytest.raises(ERRORS):
        decompress(io.BytesIO(damage(PACK[kind](FIRST), PACK[kind](SECOND))), kind).read()
