"""Hostile text, and commands on a pseudo terminal."""

import io
import json
import os
import pty
import re
import subprocess
import sys

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


def run_on_terminal(commands: list[list[str]], term: str = "dumb") -> str:
    """The output of these commands on a pseudo terminal, stdout and stderr together."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", _VERBS, json.dumps(commands)], stdout=theirs, stderr=theirs,
                               env=os.environ | {"TERM": term, "COLUMNS": "400"})
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


def check_verbs(commands: list[list[str]]) -> dict[str, str]:
    """Run commands on a terminal. Returns what each printed by its first two words.

    No command may print a control character or a traceback, or end with another code than 0, 1 or 2.
    """
    parts = run_on_terminal(commands).split("VERB ")[1:]
    assert len(parts) == len(commands)
    for words, part in zip(commands, parts, strict=True):
        assert not RAW.search(part), (words, part)
        assert "Traceback" not in part and re.search(r"EXIT [0-2]\n", part), (words, part)
    return {" ".join(words[:2]): part for words, part in zip(commands, parts, strict=True)}
