"""The records of the files that wandb writes offline."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file up to where it was cut.

    The file is a log in LevelDB's format, and its records are protocol buffers. wandb's Python package has no reader.
    """
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = _BLOCK - at % _BLOCK
        if room < 7:  # the rest of a block is filled when no header fits
            at += room
            continue
        length, kind = struct.unpack("<4xHB", data[at:at + 7])
        if not kind or at + 7 + length > len(data):
            return
        whole = (b"" if kind in (1, 2) else whole) + data[at + 7:at + 7 + length]  # 1 full, 2 first, 3 middle, 4 last
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(whole)
