"""Run commands in forked children that die or pause at their nth write."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Ended:
    """How a command ended."""

    arguments: tuple[str, ...]
    code: int | None
    """The exit code; None: it was killed."""
    writes: int
    output: str
    """stdout and stderr."""

    def __str__(self) -> str:
        return f"{' '.join(self.arguments)}: {'killed' if self.code is None else f'exit {self.code}'}\n{self.output}"


class Command:
    """A command that runs in a child."""

    def __init__(self, connected: socket.socket, arguments: tuple[str, ...], output: Path) -> None:
        self.arguments, self.paused_before = arguments, ""
        self._connected, self._output = connected, output
        self._file = connected.makefile("rwb", buffering=0)
        self._last: dict[str, Any] = {}

    def next_event(self) -> str:
        """Wait until the command ended, has paused, or waits for another: "ended", "paused", "waiting"."""
        if self._last.get("event") != "ended":
            line = self._file.readline()
            self._last = json.loads(line) if line else {"event": "ended", "code": None, "writes": 0}
            self.paused_before = self._last.get("before", self.paused_before)
        return self._last["event"]

    def resume(self) -> None:
        """Let a paused command continue."""
        self._file.write(b"{}\n")

    def end(self) -> Ended:
        """Wait for the end of the command."""
        while self.next_event() != "ended":
            pass
        self._connected.close()
        return Ended(self.arguments, self._last["code"], self._last["writes"],
                     self._output.read_text(errors="replace"))


@dataclass
class Commands:
    """Starts commands in children of a fork server."""

    socket_path: str
    environment: dict[str, str] = field(default_factory=dict)
    _started: int = 0

    def start(self, place: Path, root: str, arguments: tuple[str, ...], *, pause: int | None = None,
              kill: int | None = None, all_abandoned: bool = False) -> Command:
        """Start a command on a root. It pauses or is killed right before its write of that number.

        With `all_abandoned` the command takes every unfinished file for an old one: no test can age an object.
        """
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(300)
        connected.connect(self.socket_path)
        self._started += 1
        output = place / f"output-{self._started}"
        output.touch()
        for folder in ("cache", "scratch"):
            (place / folder).mkdir(mode=0o700, exist_ok=True)
        environment = {**os.environ, **self.environment, "RDM_CACHE": str(place / "cache"),
                       "TMPDIR": str(place / "scratch"), "RDM_REVISION": "tested"}
        command = Command(connected, arguments, output)
        connected.sendall(json.dumps({
            "arguments": arguments, "root": root, "environment": environment, "output": str(output),
            "at": kill if pause is None else pause, "action": "kill" if pause is None else "pause",
            "all_abandoned": all_abandoned}).encode() + b"\n")
        return command

    def run(self, place: Path, root: str, arguments: tuple[str, ...], **how: Any) -> Ended:
        """Run a command to its end."""
        return self.start(place, root, arguments, **how).end()


@contextlib.contextmanager
def serve_commands(folder: Path, *modules: str) -> Iterator[Commands]:
    """A fork server, ended afterwards. `modules`: what it imports before it forks, beside what every command needs."""
    path = str(folder / "socket")
    assert len(path) < 100, path
    server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("fork_server.py")), path, *modules],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert server.stdout and server.stdin
    try:
        assert server.stdout.readline() == "ready\n"
        yield Commands(path)
    finally:
        server.stdin.close()
        server.wait(120)
