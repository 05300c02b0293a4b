"""Errors of a store name the URL and say what helps; a full disk under a copy is named by its own place."""

import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from jobs.cli.main import main
from pipeline import storage
from pipeline.storage import files

_ENTRY = {"name": "x", "bytes": 1 << 20, "sha256": "0" * 64}


@pytest.mark.parametrize("read", [storage.read_bytes, storage.size, storage.sha256, storage.modified_time,
                                  lambda url: storage.read_at_most(url, 5), lambda url: storage.read_range(url, 0, 1),
                                  lambda url: storage.download(url, Path("copy"))])
def test_a_missing_object_is_named(s3: str, read: Callable[[str], Any], tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        read(f"{s3}/x")
    assert caught.value.filename == f"{s3}/x" and f"{s3}/x" in str(caught.value)


def test_a_missing_object_of_a_manifest_is_damage(s3: str) -> None:
    with pytest.raises(storage.DamagedFile, match=rf"{s3}/x is in its manifest but not there\nhint: python"):
        storage.fetch(f"{s3}/x", _ENTRY)


class _Refuses(BaseHTTPRequestHandler):
    """A store that refuses these credentials."""

    protocol_version, code = "HTTP/1.1", "AccessDenied"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = f"<Error><Code>{self.code}</Code><Message>Not you.</Message></Error>".encode()
        self.send_response(403)
        self.send_header("Content-Length", "0" if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer

    def log_message(self, *arguments: Any) -> None:
        pass


def _forget() -> None:
    files._filesystem.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def refusing(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    _forget()
    yield "s3://bucket/x"
    _forget()
    server.shutdown()


@pytest.mark.parametrize("code", ["AccessDenied", "ExpiredToken", "SignatureDoesNotMatch"])
@pytest.mark.parametrize(("doing", "use"), [
    ("read", storage.read_bytes), ("look at", storage.size), ("write", lambda url: storage.put_bytes(b"x", url)),
    ("create", lambda url: storage.create_bytes(b"x", url)), ("list", lambda url: list(storage.walk(url))),
    ("read", lambda url: storage.fetch(url, _ENTRY)), ("create", storage.can_swap)])
def test_refused_credentials_are_named_with_the_object(refusing: str, doing: str, use: Callable[[str], Any], code: str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Refuses, "code", code)
    with pytest.raises(PermissionError, match=rf"^cannot {doing} s3://bucket/x.*\nhint: AWS_PROFILE") as caught:
        use(refusing)
    assert isinstance(caught.value, storage.StorageError) and "not-to-be-seen" not in str(caught.value)


@pytest.mark.parametrize("words", [["search", "art", "apple"], ["ls"], ["style", "art", "--source", "."]])
def test_a_command_names_refused_credentials(refusing: str, words: list[str],
                                             capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--root", refusing]) == 1
    said = capsys.readouterr().err
    assert "s3://bucket/x" in said and "hint: AWS_PROFILE" in said and "nothing that is recorded" not in said


@pytest.mark.parametrize("words", [["ls"], ["style", "art", "--source", "."], ["verify"]])
def test_a_missing_bucket_is_invalid_usage(s3: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--root", "s3://no-such-bucket-here/x"]) == 2
    assert "there is no such bucket\nhint: make it" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_cache_is_named_by_its_folder(s3: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDM_CACHE", str(small_disk / "cache"))
    storage.put_bytes(bytes(1 << 20), f"{s3}/x")
    with pytest.raises(storage.StorageError) as caught:
        storage.fetch(f"{s3}/x", _ENTRY)
    assert storage.disk_full_message(caught.value) == f"no space is left on the disk of {small_disk}/cache"
    with pytest.raises(storage.StorageError) as caught:
        storage.download(f"{s3}/x", small_disk / "copy")
    assert storage.disk_full_message(caught.value) == f"no space is left on the disk of {small_disk}/copy"


def test_weights_on_a_full_disk_name_it(small_disk: Path) -> None:
    import torch

    from model.weights import checkpoint
    with pytest.raises(OSError) as caught:
        checkpoint.save({"weight": torch.zeros(1 << 18)}, small_disk / "ema.safetensors")
    assert storage.disk_full_message(caught.value) == f"no space is left on the disk of {small_disk}/ema.safetensors"
