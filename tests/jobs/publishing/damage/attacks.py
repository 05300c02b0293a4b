"""Attacks on a published root: each damages one file. The hints of the commands must lead to a root without faults."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs.cli.main import main
from pipeline.embeddings.embed import dataset_encoder
from tests.jobs.publishing.published_art import NAME, paint, published_dataset, rebuild

SECONDS = 120


def make_place(first: Path, folder: Path) -> Path:
    """Three versions: a run uses the first one, and one image was forgotten before the last one."""
    place = shutil.copytree(first, folder)
    root = place / "root"
    paint(place / "source" / "second.png", 2)
    rebuild(root, place / "source")
    image = sorted((place / "source").rglob("*.png"))[0]
    run(root, "forget", "--sha256", hashlib.sha256(image.read_bytes()).hexdigest())
    paint(place / "source" / "third.png", 3)
    assert rebuild(root, place / "source")["published"] == "v3"
    consumer = root / "runs/consumer"
    consumer.mkdir(parents=True)
    (consumer / "plan.json").write_text(json.dumps({
        "format": 2, "stage": "train", "fingerprint": "", "items": [], "section": {
            "database": f"{NAME}@v1", "encoder": dataset_encoder(published_dataset(root))},
        "inputs": {"database": {"path": f"datasets/{NAME}/v1/embeddings", "digest": ""}}}))
    return place


def _edit(path: Path) -> None:
    """Change a relevant part of the content and keep the length."""
    data = bytearray(path.read_bytes())
    if (place := data.find(b'"number": ')) >= 0:
        data[place + 10] ^= 1
        path.write_bytes(data)
        return
    places = [place for place, byte in enumerate(data) if chr(byte).isdigit()] or range(len(data))
    for place in places[len(places) // 2:][:8]:
        data[place] = data[place] ^ 1
    path.write_bytes(data)


def _rot(path: Path) -> None:
    """Change the content as a failing disk does: the file keeps its length and its time."""
    before = path.stat()
    _edit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""), "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "edited": _edit, "rot": _rot, "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "removed": Path.unlink,
    "pipe": lambda path: _replace(path, os.mkfifo), "folder": lambda path: _replace(path, Path.mkdir)}


def run(root: Path, *arguments: str) -> tuple[int, str]:
    """The exit code of a command and what it printed. AssertionError if it takes longer than `SECONDS`."""
    printed = io.StringIO()

    def stop(*_: Any) -> None:
        raise AssertionError(f"{arguments} hangs")
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main([*arguments, "--root", str(root)])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    return code, printed.getvalue()


def follow(place: Path, output: str) -> Iterator[str]:
    """Run the command that a hint names, and those that its own hints name, until one ends with 0; the commands."""
    for _ in range(5):
        hint = output.rpartition("hint: ")[2].strip()
        if removed := re.match(r"remove (\S+?)[;,]", hint):
            path = Path(removed[1])
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield f"remove {path}"
            return
        if backup := re.search(r"or remove (runs/\w+), then python -m jobs (.*)", hint):
            shutil.rmtree(place / "root" / backup[1])
            words = backup[2].split()
        else:
            words = hint.partition("python -m jobs ")[2].partition("; or")[0].split()
        yield " ".join(words)
        words = [word for number, word in enumerate(words) if word != "--root" and words[number - 1] != "--root"]
        if words[0] == "rebuild":
            rebuild(place / "root", place / "source", thorough="--thorough" in words)
            return
        code, output = run(place / "root", *words)
        if code == 0:
            return
