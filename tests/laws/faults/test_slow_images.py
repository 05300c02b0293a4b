"""SIGTERM and a closed terminal end a command within ten seconds, also during native code."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.telemetry import interrupts
from tests.laws.faults.sharding_runs import start_command, wait_until
from tests.pipeline.media.test_hostile_images import progressive
from tests.pipeline.synthetic import encoded, noise

REPOSITORY = Path(__file__).parents[3]


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def cpu_seconds(pid: int) -> float:
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


@pytest.fixture(scope="module")
def slow_image() -> bytes:
    """An image that takes a minute, and no more scans than are allowed."""
    return progressive(9000, 480)


@pytest.mark.timeout(120)
def test_sigterm_ends_a_command_that_decodes_a_slow_image(tmp_path: Path, slow_image: bytes) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(slow_image)
    (tmp_path / "pictures" / "b.png").write_bytes(encoded(noise(40, 40), "PNG"))
    arguments = ["shard", "x", "--source", str(tmp_path / "pictures"), "--root", str(tmp_path / "root"), "--local"]
    process = start_command(*arguments)

    def decoder() -> int:
        return next((child for child in children(process.pid) if cpu_seconds(child) > 1.5), 0)
    child = wait_until(decoder, process)
    process.terminate()
    begun = time.monotonic()
    _, text = process.communicate(timeout=30)
    assert time.monotonic() - begun < 10.5
    assert process.returncode == 130 and "the same command continues" in text and "Traceback" not in text
    wait_until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split())


@pytest.mark.timeout(120)
def test_a_closed_terminal_ends_a_command_without_its_scratch(tmp_path: Path) -> None:
    for folder in ("pictures", "scratch"):
        (tmp_path / folder).mkdir()
    image = encoded(noise(400, 400), "PNG")
    for number in range(500):  # seconds of work
        (tmp_path / "pictures" / f"{number}.png").write_bytes(image)
    pid, terminal = pty.fork()
    if not pid:
        os.environ |= {"TERM": "xterm", "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path / "scratch")}
        os.execv(sys.executable, [sys.executable, "-m", "jobs", "shard", "x", "--source", str(tmp_path / "pictures"),
                                  "--root", str(tmp_path / "root"), "--local"])

    def scratch() -> list[Path]:
        return list((tmp_path / "scratch").glob("rdm-shard-*"))
    try:
        wait_for(scratch, 60)
        os.close(terminal)
        ended = wait_for(lambda: [status for found, status in [os.waitpid(pid, os.WNOHANG)] if found], 12)
        assert os.waitstatus_to_exitcode(ended[0]) == 130 and not scratch()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(answer: Callable[[], list[Any]], seconds: float) -> list[Any]:
    """The first answer that is not empty."""
    end = time.monotonic() + seconds
    while not (found := answer()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def test_a_command_that_ignores_sighup_goes_on() -> None:
    raised = "signal.raise_signal(signal.SIGHUP)"
    with command(f"exec('with interrupts.defer_interrupts():\\n {raised}'); {raised}; print('on', file=sys.stderr)",
                 before="signal.signal(signal.SIGHUP, signal.SIG_IGN)") as process:  # as nohup does
        _, text = process.communicate(timeout=30)
        assert (process.returncode, text) == (0, "on\n")


@contextlib.contextmanager
def command(body: str, before: str = "") -> Iterator["subprocess.Popen[str]"]:
    """A process with the second stage of a signal that prints a line and runs `body`; `before` comes first."""
    program = f"""
import hashlib, signal, sys, time
{before}
from jobs.telemetry import interrupts
interrupts.SECONDS = 2.0
interrupts.end_for_certain(lambda: print("last words", file=sys.stderr), 130)
interrupts.handle_ctrl_c()
try:
    print("ready", flush=True)
    {body}
except KeyboardInterrupt:
    interrupts.ignore(7)
    print("tidy", file=sys.stderr)
    raise SystemExit(7)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "ready\n"
    try:
        yield process
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(("body", "code", "said"), [
    ("time.sleep(60)", 7, "tidy\n"),
    ("hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10 ** 9)", 130, "last words\n"),  # in the main thread
    ("import threading; threading.Thread(target=hashlib.pbkdf2_hmac, args=('sha256', b'', b'', 10 ** 9)).start(); "
     "time.sleep(60)", 7, "tidy\n"),  # in a thread that is waited for
    ("exec('with interrupts.defer_interrupts():\\n time.sleep(3)'); time.sleep(60)", 7, "tidy\n"),
], ids=["Python", "native", "native thread", "deferred"])
@pytest.mark.timeout(60)
def test_a_signal_ends_a_process_in_native_code(body: str, code: int, said: str, number: int) -> None:
    with command(body) as process:
        time.sleep(0.5)
        process.send_signal(number)
        begun = time.monotonic()
        _, text = process.communicate(timeout=30)
        assert (process.returncode, text) == (code, said) and time.monotonic() - begun < 10


def test_the_second_stage_leaves_two_seconds() -> None:
    assert interrupts.SECONDS <= 8
