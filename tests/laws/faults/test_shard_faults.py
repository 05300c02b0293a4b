"""Sharding lists of URLs while processes are killed and web servers fail."""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from pipeline import storage
from pipeline.stages import progress
from tests.laws.faults.sharding_runs import (
    arguments,
    checked_manifest,
    files,
    image_urls,
    packing_worker,
    ray,
    shards_folder,
    start_command,
    undisturbed_files,
    wait_until,
    write_slow_list,
    write_url_list,
)
from tests.pipeline import web_server
from tests.pipeline.synthetic import encoded, noise


@pytest.mark.slow
@ray
def test_a_worker_killed_in_the_middle_of_a_shard_changes_nothing(cluster: Any, tmp_path: Path, address: str) -> None:
    source, killed = write_slow_list(tmp_path / "list.parquet", address, 80, 0.15), []

    def kill() -> None:
        killed.append(wait_until(lambda: packing_worker(0.15)))
        os.kill(killed[0], signal.SIGKILL)
    thread = threading.Thread(target=kill)
    thread.start()
    assert main(arguments(tmp_path / "root", source, address)) == 0
    thread.join()
    assert killed and checked_manifest(tmp_path / "root", 80)["totals"]["skipped"] == {"not_a_picture": 20}
    assert files(tmp_path / "root") == undisturbed_files(tmp_path, source, address)


@pytest.mark.parametrize("way", ["--local", pytest.param("--workers=2", marks=[ray, pytest.mark.slow])])
def test_a_driver_killed_in_the_middle_of_a_shard_resumes(way: str, tmp_path: Path, address: str,
                                                          request: pytest.FixtureRequest) -> None:
    if way != "--local":
        request.getfixturevalue("cluster")
    source = write_slow_list(tmp_path / "list.parquet", address, 80, 0.03)
    process = start_command(*arguments(tmp_path / "root", source, address, way))
    records = storage.join(shards_folder(tmp_path / "root"), "records")
    wait_until(lambda: storage.list_files(records) and packing_worker(0.15), process)
    process.kill()
    process.communicate()
    done = len(storage.list_files(records))
    assert 0 < done < 4 and not storage.exists(storage.join(shards_folder(tmp_path / "root"), "manifest.json"))
    assert main(arguments(tmp_path / "root", source, address, way)) == 0
    checked_manifest(tmp_path / "root", 80)
    assert files(tmp_path / "root") == undisturbed_files(tmp_path, source, address)


@pytest.mark.slow
def test_sigterm_stops_a_command_and_the_same_command_resumes(tmp_path: Path, address: str, capsys: Any) -> None:
    source = write_slow_list(tmp_path / "list.parquet", address, 200, 0.05)
    process = start_command(*arguments(tmp_path / "root", source, address, "--local"))
    now = wait_until(lambda: _last_progress(tmp_path / "root"), process)
    # From another terminal, while the stage runs.
    assert now["rows"] and now["of_rows"] == 200 and now["bytes"] and now["rows_per_s"] > 0
    assert now["skipped"].keys() == {"not_a_picture"}
    capsys.readouterr()
    assert main(["status", "--root", str(tmp_path / "root")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("datasets/x/v1/shards"))
    for word in (" of 10 items", " of 200 rows", "rows/s", "% good", "left out: ", "not_a_picture", " left"):
        assert word in line
    assert re.search(r"% good, [1-9][0-9.]* ([kM]?B), left out: ", line)
    assert "no report for" not in line
    assert main(["status", "--json", "--root", str(tmp_path / "root")]) == 0
    stage_status = {stage["path"]: stage for stage in json.loads(capsys.readouterr().out)}["datasets/x/v1/shards"]
    assert stage_status["progress"]["of_rows"] == 200 and stage_status["progress"].keys() == now.keys()
    process.terminate()
    _, text = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command continues" in text and "Traceback" not in text
    assert main(arguments(tmp_path / "root", source, address, "--local", "--connections", "32")) == 0
    checked_manifest(tmp_path / "root", 200)
    assert files(tmp_path / "root") == undisturbed_files(tmp_path, source, address)


def _last_progress(root: Path) -> Any:
    """The last progress of the driver, once it has seen some of everything."""
    try:
        now = storage.read_json(storage.join(shards_folder(root), "progress.json"))
    except FileNotFoundError:
        return None
    return now if now["skipped"] else None


@pytest.mark.parametrize("way", ["--local", pytest.param("--workers=1", marks=[ray, pytest.mark.slow])])
def test_two_drivers_on_one_folder_share_the_work(way: str, tmp_path: Path, address: str,
                                                  request: pytest.FixtureRequest) -> None:
    if way != "--local":
        request.getfixturevalue("cluster")
    source = write_slow_list(tmp_path / "list.parquet", address, 240, 0.01)
    web_server.seen(address)
    command = arguments(tmp_path / "root", source, address, way)
    both = [start_command(*command), start_command(*command)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    totals = [json.loads(out) for out, _ in said]
    assert totals[0] == totals[1]
    # There are twelve items. Both drivers may process the last ones, and by chance a few others.
    assert web_server.seen(address)["requests"] <= 1.7 * 240
    checked_manifest(tmp_path / "root", 240)
    assert files(tmp_path / "root") == undisturbed_files(tmp_path, source, address)


def test_one_of_two_drivers_with_different_settings_wins(tmp_path: Path, address: str) -> None:
    source = write_slow_list(tmp_path / "list.parquet", address, 60, 0.01)
    both = {quality: start_command(*arguments(tmp_path / "root", source, address, "--local", "--quality", quality))
            for quality in ("90", "80")}
    said = {quality: process.communicate(timeout=120) for quality, process in both.items()}
    codes = {process.returncode: quality for quality, process in both.items()}
    assert codes.keys() == {0, 2}, said
    assert f"section.quality: there {codes[0]}, now {codes[2]}" in said[codes[2]][1]
    checked_manifest(tmp_path / "root", 60)
    assert files(tmp_path / "root") == undisturbed_files(tmp_path, source, address, "--quality", codes[0])


# Servers that misbehave.


FAULTS = {"hang": "timeout", "cut": "cut", "status/500": "http_500", "loop": "too_many_redirects",
          "forever": "too_large", "slow-body?pause=0.01": "not_a_picture", "status/404": "http_404",
          "garbage": "protocol", "reset": "connect", "slow-body?pause=0.6": "timeout"}


def test_every_row_of_bad_servers_is_accounted_for_in_time(tmp_path: Path, address: str) -> None:
    urls, wanted = image_urls(address, 100), Counter()
    for number, (path, reason) in enumerate(FAULTS.items()):
        for row in (number * 10 + 3, number * 10 + 4):
            urls[row] = f"http://{address}/{path}{'&' if '?' in path else '?'}{row}"
            wanted[reason] += 1
    urls[0], urls[1], urls[2] = "", "no address", f"http://{address}/type-lie?file=0.jpg"
    wanted["bad_url"] += 2
    source, begun = write_url_list(tmp_path / "list.parquet", urls), time.monotonic()
    assert main(arguments(tmp_path / "root", source, address, "--local", "--retries", "1", "--timeout", "1.5",
                          "--read-timeout", "0.5", "--max-bytes", "3000000", "--connections", "16")) == 0
    assert time.monotonic() - begun < 40
    assert checked_manifest(tmp_path / "root", 100)["totals"]["skipped"] == wanted


def test_a_dead_server_stops_the_run_and_a_live_one_completes_it(tmp_path: Path, capsys: Any,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    source, root = write_url_list(tmp_path / "list.parquet", image_urls(address, 2000)), tmp_path / "root"
    command = arguments(root, source, address, "--local", "--retries", "0", "--connections", "32",
                        "--samples-per-shard", "100", "--max-failed", "0.3")
    with monkeypatch.context() as patch:
        patch.setattr(progress, "period", lambda folder: 0.1)
        assert main(command) == 1
    text = capsys.readouterr().err
    assert "rows failed (100%, allowed are 30%): " in text and " connect\n" in text
    assert "hint: " in text and "--retry-failed" in text and "Traceback" not in text
    failed = len(storage.list_files(storage.join(shards_folder(root), "records")))
    assert 1 < failed < 20
    with _image_server(address):
        assert main([*command, "--retry-failed"]) == 0
    manifest = checked_manifest(root, 2000)
    assert manifest["info"]["retried"] == failed * 100 and manifest["totals"]["samples"] == 2000
    assert not storage.exists(storage.join(shards_folder(root), "progress"))


@contextlib.contextmanager
def _image_server(address: str) -> Iterator[None]:
    """A server of one image at a given address."""
    body = encoded(noise(20, 20), "JPEG")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.wfile.write(web_server.answer(body))

        def log_message(self, *log_arguments: Any) -> None:
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
