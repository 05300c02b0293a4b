"""What wandb wrote down offline, read back: a process that was killed had not given it everything."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, up to where it was cut: a log as LevelDB writes it, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = _BLOCK - at % _BLOCK
        if room < 7:  # no header fits: filled up
            at += room
            continue
        length, kind = struct.unpack("<4xHB", data[at:at + 7])
        if not kind or at + 7 + length > len(data):
            return
        whole = (b"" if kind in (1, 2) else whole) + data[at + 7:at + 7 + length]  # whole or first; middle, last
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(whole)


def last_step(folder: Path, id_: str) -> int | None:
    """The last step that the earlier sessions of a run have in `folder`; None if there are none of it here."""
    steps = [0] if (files := sorted(folder.glob(f"offline-run-*-{id_}*/*.wandb"))) else []
    for path in files:
        for record in records(path):
            for one in record.history.item:
                if "_step" in (one.key, *one.nested_key):
                    steps.append(int(json.loads(one.value_json)))
    return max(steps, default=None)
