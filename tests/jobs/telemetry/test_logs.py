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


def test_events_name_their_subject_and_stdout_has_only_data(tmp_path: Path) -> None:
    source = str(_pictures(tmp_path / "in"))
    process = _run(tmp_path, "shard", "some@v2", "--source", source, "--local", "--samples-per-shard", "3",
                   "--log-format", "json")
    assert process.returncode == 0 and json.loads(process.stdout)["samples"] == 5
    events = _events(process.stderr)
    assert all({"time", "level", "logger", "message"} <= event.keys() for event in events)
    subjects = {(event["dataset"], event["version"], event["stage"]) for event in events}
    assert subjects == {("some", "v2", "shard")}
    assert [event["item"] for event in events if "item" in event] == ["000000", "000001"]
    assert events[0]["message"] == "shard begins"
    assert any(event["level"] == "warning" and "left out 1 not_a_picture" in event["message"] for event in events)


def test_the_reason_of_an_exit_is_an_event_too(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    process = _run(tmp_path, "embed", "some", "--local", RDM_LOG="json")
    events = _events(process.stderr)
    assert process.returncode == 2
    assert (events[-1]["level"], events[-1]["exit"]) == ("error", 2)
    assert "there is no dataset some" in events[-1]["message"]
    assert events[-1]["hint"].startswith("python -m jobs shard some")


def test_a_log_format_flag_overrides_the_environment(tmp_path: Path, monkeypatch, capsys) -> None:
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


def test_a_repeated_message_of_a_library_is_shown_once() -> None:
    once = logs._OncePerLibrary()

    def shown(name: str, text: str) -> str:
        record = logging.LogRecord(name, logging.WARNING, "", 0, text, None, None)
        return record.getMessage() if once.filter(record) else ""

    assert shown("some_library.client", "retry 1\nwith details") == "some_library: retry 1 ..."
    assert [shown("some_library.other", f"retry {number}") for number in range(40)] == [""] * 40
    assert [shown("jobs.x", "ours\nand more")] * 2 == ["ours\nand more"] * 2
