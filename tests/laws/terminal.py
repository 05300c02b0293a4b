"""Hostile text, and commands on a pseudo terminal."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable

from PIL import Image

HOSTILE = "evil\x1b]0;owned\x07\x9b31m\u202egnp\u2066\u200f\x08\x7f"
SHOWN = r"evil\x1b]0;owned\x07\x9b31m\u202egnp\u2066\u200f\x08\x7f"
RAW = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
PNG = io.BytesIO()
Image.new("RGB", (16, 16), (200, 30, 30)).save(PNG, "PNG")

# One process runs all verbs, because a process needs seconds to begin.
_VERBS = """
import json, sys
from jobs.cli.main import main
for words in json.loads(sys.argv[1]):
    print("VERB", ascii(words[0]), flush=True)
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    print("EXIT", code, flush=True)
"""


def run_on_terminal(commands: list[list[str]], term: str = "dumb", columns: int = 400, **environment: str) -> str:
    """The output of these commands on a pseudo terminal, stdout and stderr together."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", _VERBS, json.dumps(commands)], stdout=theirs, stderr=theirs,
                               env=os.environ | {"TERM": term, "COLUMNS": str(columns)} | environment)
    os.close(theirs)
    raw = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        raw += piece
    os.close(ours)
    assert process.wait() == 0, raw.decode()
    return raw.decode().replace("\r\n", "\n")


def check_verbs(commands: list[list[str]], columns: int = 400, expected: str = "[0-2]") -> dict[str, str]:
    """Run commands on a terminal. Returns what each printed by its first two words.

    No command may print a control character or a traceback, or end with another code than the `expected` ones.
    """
    parts = re.split(r"^VERB (?=')", run_on_terminal(commands, columns=columns), flags=re.MULTILINE)[1:]
    assert len(parts) == len(commands)
    for words, part in zip(commands, parts, strict=True):
        assert not RAW.search(part), (words, part)
        assert "Traceback" not in part and re.search(rf"EXIT {expected}\n", part), (words, part)
    return {" ".join(words[:2]): part for words, part in zip(commands, parts, strict=True)}


Meanwhile = Callable[[int, "subprocess.Popen[bytes]", bytes], None]


class Screen:
    """The output on a pseudo terminal: raw, and as the lines of the screen."""

    def __init__(self, raw: bytes, code: int, columns: int) -> None:
        self.raw, self.code, self.lines = raw.decode(), code, [""]
        row = column = 0
        for text, command in re.findall(r"(\x1b\[[?\d;]*([A-Za-z])|.|\n)", self.raw, re.DOTALL):
            if command == "A":
                row -= int(text[2:-1] or 1)
            elif text == "\x1b[2K":
                self.lines[row] = ""
            elif text == "\r":
                column = 0
            elif text == "\n" or (not command and column >= columns):
                row, column = row + 1, column if text == "\n" else 0
                self.lines += [""] * (row + 1 - len(self.lines))
            if not command and text not in "\r\n":
                self.lines[row] = self.lines[row][:column].ljust(column) + text + self.lines[row][column + 1:]
                column += 1


def set_columns(terminal: int, columns: int) -> None:
    """Resize a pseudo terminal."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def run_on_screen(command: list[str], columns: int = 120, meanwhile: Meanwhile | None = None,
                  **environment: str) -> Screen:
    """Run a command on a terminal; `meanwhile` is called with the terminal, the process and its output so far."""
    ours, theirs = pty.openpty()
    set_columns(theirs, columns)
    kept = {key: value for key, value in os.environ.items() if key not in {"COLUMNS", "LINES", "NO_COLOR"}}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                               env=kept | {"TERM": "xterm", "PYTHONPATH": os.getcwd()} | environment)
    os.close(theirs)
    raw = b""
    try:
        while True:
            try:
                raw += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if meanwhile:
                meanwhile(ours, process, raw)
        return Screen(raw, process.wait(30), columns)
    finally:
        process.kill()
        os.close(ours)


def interrupt_on_screen(command: list[str], seconds: float, presses: int = 1) -> Screen:
    """Run a command on a new terminal, and press Ctrl-C there after `seconds` seconds.

    The settings of the terminal, such as its echo, must be the same at the end.
    """
    pid, terminal = pty.fork()
    if not pid:
        os.environ |= {"TERM": "xterm", "PYTHONPATH": os.getcwd()}
        os.execv(command[0], command)
    set_columns(terminal, 120)
    raw, before, moment = b"", termios.tcgetattr(terminal), time.monotonic() + seconds
    try:
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if presses and time.monotonic() >= moment:
                os.write(terminal, b"\x03")  # the terminal sends the signal to the whole process group
                presses, moment = presses - 1, moment + 0.3
            raw += _read_available(terminal, 0.02)
        raw += _read_available(terminal, 0.0)
        pid = 0
        assert termios.tcgetattr(terminal) == before
        return Screen(raw, os.waitstatus_to_exitcode(ended[1]), 120)
    finally:
        if pid:
            os.killpg(pid, signal.SIGKILL)
        os.close(terminal)


def _read_available(terminal: int, seconds: float) -> bytes:
    raw = b""
    while select.select([terminal], [], [], seconds)[0]:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        raw += piece
    return raw
