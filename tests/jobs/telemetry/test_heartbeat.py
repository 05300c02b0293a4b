"""The line that says what a command waits for, on a terminal that others write to as well."""

import sys
import time

import pytest

from jobs.telemetry import heartbeat
from tests.laws.terminal import run_on_screen

_WAITS = """
import sys, time, warnings
from jobs.telemetry import heartbeat
heartbeat.start("verb", lambda: True)
with heartbeat.doing("reading"):
    time.sleep(3.3)
    warnings.warn("of a library")
    time.sleep(3.3)
    print("a result")
    print("an open line", end="", flush=True)
    time.sleep(3.3)
    print("after it", file=sys.stderr)
heartbeat.stop()
"""


@pytest.mark.slow
def test_texts_of_others_do_not_share_a_line_with_it() -> None:
    seen = run_on_screen([sys.executable, "-c", _WAITS])
    lines = [line.rstrip() for line in seen.lines if line.strip()]
    assert seen.code == 0 and seen.raw.count("reading: at work for 2 s") == 1
    assert seen.raw.count("reading: at work for") >= 3
    assert lines == ["<string>:7: UserWarning: of a library", "a result", "an open line", "after it"]


def test_a_block_of_the_same_name_continues_its_time() -> None:
    with heartbeat.doing("sample"):
        time.sleep(1.1)
        with heartbeat.doing("sample"):
            assert heartbeat._describe() == "sample: at work for 1 s"
