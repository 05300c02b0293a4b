"""A store that takes connections and does not answer."""

import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from jobs.checks import machine
from jobs.cli import parse
from jobs.cli.main import main
from pipeline import storage

_SECONDS = 2.0


@pytest.fixture
def stopped(s3: str, s3_process: tuple[str, "subprocess.Popen[bytes]"],
            monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A root in a store whose process is stopped."""
    storage.put_json({}, f"{s3}/rdm/datasets/art/current.json")
    monkeypatch.setattr(parse, "STORE_ANSWER_S", _SECONDS)
    s3_process[1].send_signal(signal.SIGSTOP)
    try:
        yield f"{s3}/rdm"
    finally:
        s3_process[1].send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_verbs_that_read_end_with_one_error_in_time(stopped: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["status"], ["verify"], ["search", "art", "apple"], ["ls"], ["show", "apple"], ["report"],
                  ["versions", "art"]):
        began = time.monotonic()
        assert main([*words, "--root", stopped]) == 1
        said = capsys.readouterr().err.splitlines()
        assert said[0] == f"error: cannot list {stopped}: no answer within 2 s" and len(said) == 2
        assert said[1].startswith(f"hint: python -m jobs doctor --root {stopped}; ")
        assert time.monotonic() - began < 3 * _SECONDS


def test_a_stage_waits_longer_and_says_so(stopped: str, monkeypatch: pytest.MonkeyPatch,
                                          caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(machine, "_STORE_ANSWER_S", _SECONDS)
    machine.check_root(stopped)
    assert "no answer within 2 s; requests are repeated for minutes" in caplog.text


def test_a_store_that_refuses_connections_is_named_without_the_query(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.storage import files
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    files._filesystem.cache_clear()
    files.fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        with pytest.raises(storage.NoAnswer, match=r'"http://127[^?]*"\nhint: the store does not answer') as caught:
            storage.check_store(f"{s3}/rdm")
        assert address in str(caught.value)
    finally:
        files._filesystem.cache_clear()
        files.fsspec.get_filesystem_class("s3").clear_instance_cache()
