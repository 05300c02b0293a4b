"""Sharding with full disks and with S3 stores that are busy."""

import http.client
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from jobs.cli.main import main
from pipeline import storage
from pipeline.storage import files as storage_files
from tests.laws.faults.sharding_runs import (
    PICTURES,
    arguments,
    checked_manifest,
    files,
    image_urls,
    shards_folder,
    undisturbed_files,
    wait_until,
    write_url_list,
)
from tests.pipeline import web_server
from tests.pipeline.synthetic import encoded, noise


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A folder on a small disk of the given size. A second call makes the disk larger."""
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
    """A server of images of about 300 kB."""
    with web_server.serving({f"{number}.jpg": encoded(noise(400, 400, number), "JPEG", quality=95)
                      for number in range(PICTURES)}) as served:
        yield served


@pytest.mark.parametrize("size", ["4k", "3m"], ids=["for the plan", "for a shard"])
def test_a_full_disk_is_named_and_damages_nothing(size: str, small_disk: Any, tmp_path: Path, heavy: str,
                                                  capsys: Any) -> None:
    source = write_url_list(tmp_path / "list.parquet", image_urls(heavy, 18))
    root = small_disk(size) / "root"
    command = arguments(root, source, heavy, "--local", "--resize", "no", "--samples-per-shard", "6")
    assert main(command) == 1
    text = capsys.readouterr().err
    assert f"no space is left on the disk of {root}" in text and "hint: " in text and "Traceback" not in text
    assert text.count("error: ") == 1 and "the same command continues" in text
    assert "hint: make room there" in text
    for name in storage.list_files(storage.join(shards_folder(root), "records")):
        for entry in storage.read_json(storage.join(shards_folder(root), "records", name))["files"]:
            assert entry == storage.describe_file(entry["name"], Path(shards_folder(root)) / entry["name"])
    # No partial files are left.
    assert list(root.rglob(".*")) == [] and not storage.exists(storage.join(shards_folder(root), "manifest.json"))
    small_disk("64m")
    assert main(command) == 0
    checked_manifest(root, 18)
    assert files(root) == undisturbed_files(tmp_path, source, heavy, "--resize", "no", "--samples-per-shard", "6")


def test_a_full_scratch_is_named(small_disk: Any, tmp_path: Path, heavy: str, capsys: Any,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile
    source = write_url_list(tmp_path / "list.parquet", image_urls(heavy, 18))
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
    checked_manifest(tmp_path / "root", 18)
    assert files(tmp_path / "root") == undisturbed_files(tmp_path, source, heavy, "--resize", "no",
                                                         "--samples-per-shard", "6")


class Busy:
    """A proxy before a store that answers every n-th request with 503 SlowDown; 0: none."""

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

            def log_message(self, *log_arguments: Any) -> None:
                pass
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def busy(s3_server: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Busy]:
    proxy = Busy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    _forget()
    yield proxy
    _forget()
    proxy.server.shutdown()


def _forget() -> None:
    storage_files._filesystem.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.slow
def test_a_store_that_is_sometimes_busy_only_takes_longer(busy: Busy, s3: str, tmp_path: Path, address: str) -> None:
    source = write_url_list(tmp_path / "list.parquet", image_urls(address, 60))
    busy.every = 5
    assert main(arguments(f"{s3}/root", source, address, "--local")) == 0
    assert busy.refused > 5
    busy.every = 0
    checked_manifest(f"{s3}/root", 60)
    assert files(f"{s3}/root") == undisturbed_files(tmp_path, source, address)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at once", "in the middle"])
def test_a_store_that_is_always_busy_ends_the_command(when: str, busy: Busy, s3: str, tmp_path: Path, address: str,
                                                      capsys: Any) -> None:
    source = write_url_list(tmp_path / "list.parquet", image_urls(address, 60))
    command = arguments(f"{s3}/root", source, address, "--local")
    busy.every = 1 if when == "at once" else 0
    if when == "in the middle":
        def break_down() -> None:
            wait_until(lambda: busy.requests > 40)
            busy.every = 1
        threading.Thread(target=break_down).start()
    begun = time.monotonic()
    assert main(command) == 1
    assert time.monotonic() - begun < 300
    text = capsys.readouterr().err
    assert text.count("error: ") == 1 and f"{s3}/root" in text and "hint: " in text and "Traceback" not in text
    busy.every = 0
    assert main(command) == 0
    checked_manifest(f"{s3}/root", 60)
    assert files(f"{s3}/root") == undisturbed_files(tmp_path, source, address)
