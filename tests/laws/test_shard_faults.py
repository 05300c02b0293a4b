"""Lists of addresses sharded while processes are killed, disks are full, stores and servers misbehave.

Afterwards the same command is run again: it ends well, and the shards are those of a run that nobody disturbed.
"""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli.main import main
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.shards.shard import count_rows
from pipeline.stages import progress
from pipeline.stages.manifest import read_manifest
from pipeline.storage import files as storage_files
from pipeline.versions import verify
from tests.pipeline import web_server
from tests.pipeline.synthetic import encoded, noise

PICTURES = 20
ray = pytest.mark.ray


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with web_server.serving({f"{number}.jpg": encoded(noise(48, 40, number), "JPEG", quality=95)
                      for number in range(PICTURES)}) as started:
        yield started


def pictures(address: str, count: int) -> list[str]:
    """Addresses of pictures, each another."""
    return [f"http://{address}/{number % PICTURES}.jpg?{number}" for number in range(count)]


def listed(path: Path, urls: Sequence[str]) -> Path:
    """A parquet list with captions."""
    pq.write_table(pa.table({"url": urls, "caption": [f"picture {number}" for number in range(len(urls))]}), path)
    return path


def slowed(path: Path, address: str, count: int, pause: float) -> Path:
    """A list in which every fourth row takes ten pauses, and is no picture."""
    return listed(path, [url if number % 4 else f"http://{address}/slow-body?pause={pause}&{number}"
                         for number, url in enumerate(pictures(address, count))])


def arguments(root: Path | str, source: Path, address: str, *more: str) -> list[str]:
    return ["shard", "x", "--source", str(source), "--root", str(root), "--allow-hosts", address,
            "--image-size", "32", "--connections", "2", "--samples-per-shard", "20", *more]


def started(*given: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", "jobs", *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def shards(root: Path | str) -> str:
    return Dataset.parse(str(root), "x").folder("shards")


def files(root: Path | str) -> dict[str, bytes]:
    """The tars and tables below a root."""
    return {name: storage.read_bytes(storage.join(shards(root), name)) for name in storage.list_files(shards(root))
            if name.endswith(".tar") or (name.endswith(".parquet") and "-" not in name)}


def accounted(root: Path | str, rows: int) -> dict[str, Any]:
    """The manifest of a root in which nothing is wrong and no row is lost."""
    assert list(verify.find_faults(str(root), "datasets/x/v1/shards")) == []
    manifest = read_manifest(shards(root), "")
    lines = [line for record in manifest["items"] for line in pq.read_table(io.BytesIO(storage.read_bytes(
        storage.join(shards(root), f"{record['id']}.parquet")))).to_pylist()]
    account = count_rows(manifest, lines)
    assert account["rows"] == rows == account["good"] + account["failed"] + account["filtered"]
    assert account["good"] == manifest["totals"]["samples"]
    assert storage.list_files(storage.join(shards(root), "failures")) == []
    assert not storage.exists(storage.join(shards(root), "progress.json"))
    return manifest


def undisturbed(tmp_path: Path, source: Path, address: str, *more: str) -> dict[str, bytes]:
    """The files of a run on a disk, in one process, that nothing happened to."""
    root = tmp_path / "undisturbed"
    assert main(arguments(root, source, address, "--local", "--connections", "32", *more)) == 0
    return files(root)


def until(condition: Callable[[], Any], process: "subprocess.Popen[str] | None" = None) -> Any:
    """What the condition gives as soon as it gives something."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if found := condition():
            return found
        assert process is None or process.poll() is None, f"ended too soon: {process.communicate()}"
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


def packing(seconds: float, shard: str = "") -> int:
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


# Processes that die.


@ray
def test_a_worker_killed_in_the_middle_of_a_shard(cluster: Any, tmp_path: Path, address: str) -> None:
    source, killed = slowed(tmp_path / "list.parquet", address, 80, 0.15), []

    def kill() -> None:
        killed.append(until(lambda: packing(0.15)))
        os.kill(killed[0], signal.SIGKILL)
    thread = threading.Thread(target=kill)
    thread.start()
    assert main(arguments(tmp_path / "root", source, address)) == 0
    thread.join()
    assert killed and accounted(tmp_path / "root", 80)["totals"]["skipped"] == {"not_a_picture": 20}
    assert files(tmp_path / "root") == undisturbed(tmp_path, source, address)


@pytest.mark.parametrize("way", ["--local", pytest.param("--workers=2", marks=[ray, pytest.mark.slow])])
def test_the_driver_killed_in_the_middle_of_a_shard(way: str, tmp_path: Path, address: str,
                                                    request: pytest.FixtureRequest) -> None:
    if way != "--local":
        request.getfixturevalue("cluster")
    source = slowed(tmp_path / "list.parquet", address, 80, 0.03)
    process = started(*arguments(tmp_path / "root", source, address, way))
    until(lambda: storage.list_files(storage.join(shards(tmp_path / "root"), "records")) and packing(0.15), process)
    process.kill()
    process.communicate()
    done = len(storage.list_files(storage.join(shards(tmp_path / "root"), "records")))
    assert 0 < done < 4 and not storage.exists(storage.join(shards(tmp_path / "root"), "manifest.json"))
    assert main(arguments(tmp_path / "root", source, address, way)) == 0
    accounted(tmp_path / "root", 80)
    assert files(tmp_path / "root") == undisturbed(tmp_path, source, address)


def test_sigterm_stops_and_the_same_command_goes_on(tmp_path: Path, address: str, capsys: Any) -> None:
    source = slowed(tmp_path / "list.parquet", address, 200, 0.05)
    process = started(*arguments(tmp_path / "root", source, address, "--local"))
    now = until(lambda: _said(tmp_path / "root"), process)
    # From another terminal, while it is under way.
    assert now["rows"] and now["of_rows"] == 200 and now["bytes"] and now["rows_per_s"] > 0 and now["seconds_left"]
    assert now["skipped"].keys() == {"not_a_picture"}
    capsys.readouterr()
    assert main(["status", "--root", str(tmp_path / "root")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("datasets/x/v1/shards"))
    for word in (" of 10 items", " of 200 rows", "rows/s", "% good", "left out: ", "not_a_picture", " left"):
        assert word in line
    assert re.search(r"% good, [1-9][0-9.]* ([kM]?B), left out: ", line)
    assert "nothing heard" not in line
    assert main(["status", "--json", "--root", str(tmp_path / "root")]) == 0
    found = {one["path"]: one for one in json.loads(capsys.readouterr().out)}["datasets/x/v1/shards"]
    assert found["progress"]["of_rows"] == 200 and found["progress"].keys() == now.keys()
    process.terminate()
    _, text = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command goes on" in text and "Traceback" not in text
    assert main(arguments(tmp_path / "root", source, address, "--local", "--connections", "32")) == 0
    accounted(tmp_path / "root", 200)
    assert files(tmp_path / "root") == undisturbed(tmp_path, source, address)


def _said(root: Path) -> Any:
    """What the driver said last, once it has seen some of everything."""
    try:
        now = storage.read_json(storage.join(shards(root), "progress.json"))
    except FileNotFoundError:
        return None
    return now if now["skipped"] else None


# Disks that are full.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A folder on a disk of a size; called again it is made larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size: str) -> Path:
        how = f"remount,size={size}" if folder.is_mount() else f"size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no disks can be mounted here: {done.stderr.decode().strip()}")
        return folder
    yield sized
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def heavy() -> Iterator[str]:
    """A server of pictures of about 300 kB."""
    with web_server.serving({f"{number}.jpg": encoded(noise(400, 400, number), "JPEG", quality=95)
                      for number in range(PICTURES)}) as served:
        yield served


@pytest.mark.parametrize("size", ["4k", "3m"], ids=["for the plan", "for a shard"])
def test_a_full_disk_is_named_and_spoils_nothing(size: str, small_disk: Any, tmp_path: Path, heavy: str,
                                                 capsys: Any) -> None:
    source = listed(tmp_path / "list.parquet", pictures(heavy, 18))
    root = small_disk(size) / "root"
    command = arguments(root, source, heavy, "--local", "--resize", "no", "--samples-per-shard", "6")
    assert main(command) == 1
    text = capsys.readouterr().err
    assert f"no space is left on the disk of {root}" in text and "hint: " in text and "Traceback" not in text
    assert text.count("error: ") == 1 and "the same command goes on" in text
    for name in storage.list_files(storage.join(shards(root), "records")):
        for entry in storage.read_json(storage.join(shards(root), "records", name))["files"]:
            assert entry == storage.describe_file(entry["name"], Path(shards(root)) / entry["name"])
    # What is there is whole, and nothing else is.
    assert list(root.rglob(".*")) == [] and not storage.exists(storage.join(shards(root), "manifest.json"))
    small_disk("64m")
    assert main(command) == 0
    accounted(root, 18)
    assert files(root) == undisturbed(tmp_path, source, heavy, "--resize", "no", "--samples-per-shard", "6")


def test_a_full_scratch_is_named(small_disk: Any, tmp_path: Path, heavy: str, capsys: Any,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile
    source = listed(tmp_path / "list.parquet", pictures(heavy, 18))
    scratch = small_disk("1m")
    web_server.seen(heavy)
    command = arguments(tmp_path / "root", source, heavy, "--local", "--resize", "no", "--samples-per-shard", "6")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(scratch))
        assert main(command) == 1
        text = capsys.readouterr().err
        assert f"no space is left on the disk of {scratch}/rdm-shard-" in text and "TMPDIR" in text
        assert text.count("error: ") == 1 and "Traceback" not in text
        assert list(scratch.iterdir()) == [] and web_server.seen(heavy)["requests"] <= 6  # not tried again in vain
        small_disk("64m")
        assert main(command) == 0
    accounted(tmp_path / "root", 18)
    assert files(tmp_path / "root") == undisturbed(tmp_path, source, heavy, "--resize", "no",
                                                   "--samples-per-shard", "6")


# A store that is busy.


class Busy:
    """A proxy before a store that answers every so-manieth request with 503 SlowDown; 0: none."""

    BODY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"

    def __init__(self, store: str) -> None:
        self.store, self.every, self.requests, self.refused = store.removeprefix("http://"), 0, 0, 0
        lock, busy = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    busy.requests += 1
                    refused = bool(busy.every) and busy.requests % busy.every == 0
                    busy.refused += refused
                status, headers, body = (503, {}, busy.BODY) if refused else self.passed_on(body)
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)

            def passed_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
                connection = http.client.HTTPConnection(busy.store)
                connection.request(self.command, self.path, body, dict(self.headers))
                got = connection.getresponse()
                return got.status, {name: value for name, value in got.getheaders() if name.lower() not in {
                    "transfer-encoding", "connection", "server", "date"}}, got.read()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

            def log_message(self, *given: Any) -> None:
                pass
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def busy(s3_server: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Busy]:
    made = Busy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.address)
    _forget()
    yield made
    _forget()
    made.server.shutdown()


def _forget() -> None:
    storage_files._filesystem.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_store_that_is_busy_now_and_then_costs_time_only(busy: Busy, s3: str, tmp_path: Path, address: str) -> None:
    source = listed(tmp_path / "list.parquet", pictures(address, 60))
    busy.every = 5
    assert main(arguments(f"{s3}/root", source, address, "--local")) == 0
    assert busy.refused > 5
    busy.every = 0
    accounted(f"{s3}/root", 60)
    assert files(f"{s3}/root") == undisturbed(tmp_path, source, address)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at once", "in the middle"])
def test_a_store_that_is_always_busy_ends_the_command(when: str, busy: Busy, s3: str, tmp_path: Path, address: str,
                                                      capsys: Any) -> None:
    source = listed(tmp_path / "list.parquet", pictures(address, 60))
    command = arguments(f"{s3}/root", source, address, "--local")
    busy.every = 1 if when == "at once" else 0
    if when == "in the middle":
        def break_down() -> None:
            until(lambda: busy.requests > 40)
            busy.every = 1
        threading.Thread(target=break_down).start()
    begun = time.monotonic()
    assert main(command) == 1
    assert time.monotonic() - begun < 300
    text = capsys.readouterr().err
    assert text.count("error: ") == 1 and f"{s3}/root" in text and "hint: " in text and "Traceback" not in text
    busy.every = 0
    assert main(command) == 0
    accounted(f"{s3}/root", 60)
    assert files(f"{s3}/root") == undisturbed(tmp_path, source, address)


# Two at once.


@pytest.mark.parametrize("way", ["--local", pytest.param("--workers=1", marks=[ray, pytest.mark.slow])])
def test_two_drivers_on_one_folder_share_the_work(way: str, tmp_path: Path, address: str,
                                                  request: pytest.FixtureRequest) -> None:
    if way != "--local":
        request.getfixturevalue("cluster")
    source = slowed(tmp_path / "list.parquet", address, 240, 0.01)
    web_server.seen(address)
    command = arguments(tmp_path / "root", source, address, way)
    both = [started(*command), started(*command)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    totals = [json.loads(out) for out, _ in said]
    assert totals[0] == totals[1]
    # Of twelve items, both may have had the last ones in hand at once, and a few by chance.
    assert web_server.seen(address)["requests"] <= 1.7 * 240
    accounted(tmp_path / "root", 240)
    assert files(tmp_path / "root") == undisturbed(tmp_path, source, address)


def test_of_two_drivers_with_other_settings_one_wins(tmp_path: Path, address: str) -> None:
    source = slowed(tmp_path / "list.parquet", address, 60, 0.01)
    both = {quality: started(*arguments(tmp_path / "root", source, address, "--local", "--quality", quality))
            for quality in ("90", "80")}
    said = {quality: process.communicate(timeout=120) for quality, process in both.items()}
    codes = {process.returncode: quality for quality, process in both.items()}
    assert codes.keys() == {0, 2}, said
    assert f"section.quality: there {codes[0]}, now {codes[2]}" in said[codes[2]][1]
    accounted(tmp_path / "root", 60)
    assert files(tmp_path / "root") == undisturbed(tmp_path, source, address, "--quality", codes[0])


# Servers that misbehave.


FAULTS = {"hang": "timeout", "cut": "cut", "status/500": "http_500", "loop": "too_many_redirects",
          "forever": "too_large", "slow-body?pause=0.01": "not_a_picture", "status/404": "http_404",
          "garbage": "protocol", "reset": "connect", "slow-body?pause=0.6": "timeout"}


def test_every_row_of_a_bad_web_is_accounted_for_in_time(tmp_path: Path, address: str) -> None:
    urls, wanted = pictures(address, 100), Counter()
    for number, (path, reason) in enumerate(FAULTS.items()):
        for row in (number * 10 + 3, number * 10 + 4):
            urls[row] = f"http://{address}/{path}{'&' if '?' in path else '?'}{row}"
            wanted[reason] += 1
    urls[0], urls[1], urls[2] = "", "no address", f"http://{address}/type-lie?file=0.jpg"
    wanted["bad_url"] += 2
    source, begun = listed(tmp_path / "list.parquet", urls), time.monotonic()
    assert main(arguments(tmp_path / "root", source, address, "--local", "--retries", "1", "--timeout", "1.5",
                          "--read-timeout", "0.5", "--max-bytes", "3000000", "--connections", "16")) == 0
    assert time.monotonic() - begun < 40
    assert accounted(tmp_path / "root", 100)["totals"]["skipped"] == wanted


def test_a_dead_server_stops_the_run_and_a_live_one_mends_it(tmp_path: Path, capsys: Any,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    source, root = listed(tmp_path / "list.parquet", pictures(address, 2000)), tmp_path / "root"
    command = arguments(root, source, address, "--local", "--retries", "0", "--connections", "32",
                        "--samples-per-shard", "100", "--max-failed", "0.3")
    with monkeypatch.context() as patch:
        patch.setattr(progress, "period", lambda folder: 0.1)
        assert main(command) == 1
    text = capsys.readouterr().err
    assert "rows failed (100%, allowed are 30%): " in text and " connect\n" in text
    assert "hint: " in text and "--retry-failed" in text and "Traceback" not in text
    failed = len(storage.list_files(storage.join(shards(root), "records")))
    assert 1 < failed < 20
    with _alive(address):
        assert main([*command, "--retry-failed"]) == 0
    manifest = accounted(root, 2000)
    assert manifest["info"]["retried"] == failed * 100 and manifest["totals"]["samples"] == 2000
    assert not storage.exists(storage.join(shards(root), "progress"))


@contextlib.contextmanager
def _alive(address: str) -> Iterator[None]:
    """A server of one picture at a given address."""
    body = encoded(noise(20, 20), "JPEG")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.wfile.write(web_server.answer(body))

        def log_message(self, *given: Any) -> None:
            pass
    host, port = address.split(":")
    server = ThreadingHTTPServer((host, int(port)), Handler, bind_and_activate=False)
    server.request_queue_size = 128
    server.server_bind()
    server.server_activate()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield
    server.shutdown()
    server.server_close()
