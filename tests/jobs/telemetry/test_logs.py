"""Events on stderr as JSON, a line each, with what they are about; lines for people otherwise."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jobs.cli.main import main
from jobs.telemetry import logs


def _pictures(folder: Path) -> Path:
    from PIL import Image
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (20, 20), (number * 50, 0, 99)).save(folder / f"{number}.png")
    (folder / "broken.png").write_text("no picture")
    return folder


def _events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _run(tmp_path: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "jobs", *arguments, "--root", str(tmp_path / "root")],
                          capture_output=True, text=True, env=os.environ | environment)


def test_events_say_what_they_are_about_and_stdout_stays_data(tmp_path: Path) -> None:
    source = str(_pictures(tmp_path / "in"))
    done = _run(tmp_path, "shard", "some@v2", "--source", source, "--local", "--samples-per-shard", "3",
                "--log-format", "json")
    assert done.returncode == 0 and json.loads(done.stdout)["samples"] == 5
    events = _events(done.stderr)
    assert all({"time", "level", "logger", "message"} <= one.keys() for one in events)
    about = {(one["dataset"], one["version"], one["stage"]) for one in events}
    assert about == {("some", "v2", "shard")}
    assert [one["item"] for one in events if "item" in one] == ["000000", "000001"]
    assert events[0]["message"] == "shard begins"
    assert any(one["level"] == "warning" and "left out 1 not_a_picture" in one["message"] for one in events)


def test_why_a_command_ends_is_an_event_too(tmp_path: Path) -> None:
    done = _run(tmp_path, "embed", "some", "--local", RDM_LOG="json")
    said = _events(done.stderr)
    assert done.returncode == 2
    assert said[-1]["level"] == "error" and "is not sealed" in said[-1]["message"] and said[-1]["exit"] == 2
    assert said[-1]["hint"].startswith("python -m jobs shard some")


def test_people_get_lines_and_a_flag_wins(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RDM_LOG", "json")
    assert main(["embed", "some", "--local", "--root", str(tmp_path), "--log-format", "text"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    monkeypatch.setenv("RDM_LOG", "yaml")
    assert main(["status", "--root", str(tmp_path)]) == 2
    assert "RDM_LOG = 'yaml': must be text or json" in capsys.readouterr().err


def test_a_fault_keeps_its_traceback_and_no_passwords(monkeypatch) -> None:
    monkeypatch.setattr(logs, "_about", {"dataset": "some"})
    try:
        raise OSError("https://me:secret@host/x does not answer")
    except OSError:
        record = logging.LogRecord("jobs.x", logging.ERROR, __file__, 1, "it %s", ("broke",), sys.exc_info())
    event = json.loads(logs._Json().format(record))
    assert event["message"] == "it broke" and event["dataset"] == "some"
    assert "OSError" in event["traceback"] and "secret" not in event["traceback"] and "\n" in event["traceback"]
