"""Commands that shard lists of URLs, their processes and their files."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli.main import main
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.shards.shard import count_rows
from pipeline.stages.manifest import read_manifest
from pipeline.versions import verify

PICTURES = 20
ray = pytest.mark.ray


def image_urls(address: str, count: int) -> list[str]:
    """Distinct URLs of images."""
    return [f"http://{address}/{number % PICTURES}.jpg?{number}" for number in range(count)]


def write_url_list(path: Path, urls: Sequence[str]) -> Path:
    """A parquet list with captions."""
    pq.write_table(pa.table({"url": urls, "caption": [f"picture {number}" for number in range(len(urls))]}), path)
    return path


def write_slow_list(path: Path, address: str, count: int, pause: float) -> Path:
    """A list in which every fourth row takes ten pauses, and is no image."""
    return write_url_list(path, [url if number % 4 else f"http://{address}/slow-body?pause={pause}&{number}"
                                 for number, url in enumerate(image_urls(address, count))])


def arguments(root: Path | str, source: Path, address: str, *more: str) -> list[str]:
    return ["shard", "x", "--source", str(source), "--root", str(root), "--allow-hosts", address,
            "--image-size", "32", "--connections", "2", "--samples-per-shard", "20", *more]


def start_command(*command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", "jobs", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def shards_folder(root: Path | str) -> str:
    return Dataset.parse(str(root), "x").folder("shards")


def files(root: Path | str) -> dict[str, bytes]:
    """The tars and tables below a root."""
    folder = shards_folder(root)
    return {name: storage.read_bytes(storage.join(folder, name)) for name in storage.list_files(folder)
            if name.endswith(".tar") or (name.endswith(".parquet") and "-" not in name)}


def checked_manifest(root: Path | str, rows: int) -> dict[str, Any]:
    """The manifest of a root in which nothing is wrong and no row is lost."""
    assert list(verify.find_faults(str(root), "datasets/x/v1/shards")) == []
    manifest = read_manifest(shards_folder(root), "")
    lines = [line for record in manifest["items"] for line in pq.read_table(io.BytesIO(storage.read_bytes(
        storage.join(shards_folder(root), f"{record['id']}.parquet")))).to_pylist()]
    account = count_rows(manifest, lines)
    assert account["rows"] == rows == account["good"] + account["failed"] + account["filtered"]
    assert account["good"] == manifest["totals"]["samples"]
    assert storage.list_files(storage.join(shards_folder(root), "failures")) == []
    assert not storage.exists(storage.join(shards_folder(root), "progress.json"))
    return manifest


def undisturbed_files(tmp_path: Path, source: Path, address: str, *more: str) -> dict[str, bytes]:
    """The files of a run on a disk, in one process, that nothing happened to."""
    root = tmp_path / "undisturbed"
    assert main(arguments(root, source, address, "--local", "--connections", "32", *more)) == 0
    return files(root)


def wait_until(condition: Callable[[], Any], process: "subprocess.Popen[str] | None" = None) -> Any:
    """The first true value of the condition; AssertionError after two minutes, or if the process ends before."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if outcome := condition():
            return outcome
        assert process is None or process.poll() is None, f"ended too soon: {process.communicate()}"
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


def packing_worker(seconds: float, shard: str = "") -> int:
    """A process started here that has been packing a shard for so long, 0 if there is none."""
    for pid in _descendants(os.getpid()):
        folder = Path(f"/proc/{pid}/fd")
        try:
            for descriptor in folder.iterdir():
                if os.readlink(descriptor).endswith("/spool") and f"rdm-shard-{shard}" in os.readlink(descriptor) \
                        and time.time() - os.stat(descriptor).st_mtime >= seconds:
                    return pid
        except OSError:
            continue
    return 0


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            yield child
            yield from _descendants(child)
