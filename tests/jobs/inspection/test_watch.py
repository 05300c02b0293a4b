"""`status --watch` and `--serve` read only files, and end when the reader leaves."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from jobs.cli.main import main
from jobs.inspection import prometheus as inspection_prometheus
from jobs.inspection import status, watch
from jobs.report.report import write_report
from jobs.runs.metrics import Metrics
from jobs.runs.run import Run
from jobs.training.live_progress import RunProgress
from model.config import TrainConfig
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.stages.plan import replace_plan
from tests.jobs.inspection import prometheus_server
from tests.laws import terminal


@pytest.fixture
def root(trained_root: Path, tmp_path: Path) -> str:
    """Four datasets and a run; one is published, and of one the embeddings are under way."""
    shutil.copytree(trained_root, tmp_path / "root")
    root = str(tmp_path / "root")
    storage.put_json({"version": "v1", "content": "x", "published": time.time() - 3 * 86400, "number": 7,
                      "recall@10": 0.95}, storage.join(root, "datasets/drawn/current.json"))
    Metrics(Run.parse(root, "small"), 0).add({"step": 3, "loss": 0.5, "samples_per_s": 80.0, "seconds": 1.0})
    dataset = Dataset.parse(root, "flat")
    embed = Embed(dataset, EmbedConfig(batch_size=8))
    replace_plan(embed)
    storage.put_json({"rows": 30, "samples": 29, "bytes": 1000, "of_rows": 120, "items": 0, "of_items": 1,
                      "failed_items": 0, "skipped": {"cut": 1}, "rows_per_s": 10.0, "retried": 0, "seconds_left": 9,
                      "updated": time.time(), "host": "here"}, storage.join(embed.folder, "progress.json"))
    return root


def _start_status(root: str, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", "jobs", "status", "--root", root, *arguments], text=True,
                            stderr=subprocess.PIPE, **options)


def test_a_snapshot_has_published_running_failed_and_unfinished_stages(root: str) -> None:
    Path(root, "runs/small/manifest.json").unlink()
    storage.put_json({"launch": "", "kind": "FloatingPointError", "message": "step 4: loss nan\nhint", "at": 1.0},
                     Run.parse(root, "small").fault_address)
    snapshot = watch.read_snapshot(root)
    stages = {(stage["dataset"], stage["stage"]): stage for stage in snapshot["stages"]}
    under_way = stages["flat", "embed"]
    assert (under_way["rows"], under_way["of_rows"], under_way["rate"], under_way["seconds_left"]) == (30, 120, 10.0, 9)
    assert under_way["skipped"] == {"cut": 1} and under_way["state"] == "0 of 1"
    assert stages["flat", "index"]["state"] == "stale"
    run = stages["drawn", "train"]
    assert (run["run"], run["step"], run["state"], run["error"]) == ("small", 3, "failed", "step 4: loss nan")
    assert run["of_steps"] == 3 and "of_steps" not in under_way
    assert snapshot["published"]["drawn"]["number"] == 7
    text = watch.snapshot_text(snapshot)
    lines = {line.split("  ")[0] for line in text.splitlines()}
    assert {"drawn", "flat", "hatched", "outline"} <= lines
    row = next(line for line in text.splitlines() if "published" in line and "drawn" in line)
    assert "v1*" in row and "3 days 0 h ago" in row and "number" not in row and "recall@10 0.9500" in row
    row = next(line for line in text.splitlines() if line.startswith("flat") and " embed " in line)
    assert "10/s" in row and "30 of 120 rows" in row and "9 s" in row and "1 cut" in row


def test_a_run_without_a_command_is_not_running(root: str) -> None:
    Path(root, "runs/small/manifest.json").unlink()
    Path(root, "runs/small/metrics.jsonl").unlink()
    for text in (status.status_table(root, status.read_status(root)), watch.snapshot_text(watch.read_snapshot(root))):
        row = next(line for line in text.splitlines() if "at step 3" in line)
        assert "not running; 3 steps in all" in row and "0 of 1" not in row


def test_the_four_views_show_the_same_states(root: str) -> None:
    Path(root, "runs/small/manifest.json").unlink()
    storage.put_json({"launch": "", "kind": "FloatingPointError", "message": "step 4: loss nan", "at": 1.0},
                     Run.parse(root, "small").fault_address)
    storage.put_json([{"name": "recall@10", "passed": False}], f"{root}/datasets/hatched/v1/gates.json")
    Path(root, "datasets/outline/v1/index/manifest.json").write_text("{")
    known = {state["path"]: state for state in status.read_status(root)}
    wanted = {"datasets/flat/v1/embeddings": "0 of 1", "datasets/flat/v1/index": "stale", "runs/small": "failed",
              "datasets/outline/v1/index": "damaged", "datasets/hatched/v1/index": "sealed"}
    assert {path: known[path]["state"] for path in wanted} == wanted
    assert {path for path, state in known.items() if state["published"]} == {
        path for path in known if path.startswith("datasets/drawn/v1/")}
    snapshot = watch.read_snapshot(root)
    assert {row["path"]: row["state"] for row in snapshot["stages"]} == {
        path: state["state"] for path, state in known.items()}
    assert {name: pointer["version"] for name, pointer in snapshot["published"].items()} == {"drawn": "v1"}
    registry = CollectorRegistry()
    registry.register(inspection_prometheus.RootMetrics(root))
    for path, state in known.items():
        labels = status.state_labels(path, state)
        told = {name: registry.get_sample_value(f"rdm_stage_{name}", labels) for name in (
            "stale", "damaged", "failed", "published", "stopped")}
        assert told == {name: float(state["state"] == name) for name in ("stale", "damaged", "failed")} | {
            "published": float(state["published"]), "stopped": float("failed_gates" in state)}, path
    with pytest.raises(storage.DamagedFile, match="1 part of it could not be read: datasets/outline/v1/index"):
        write_report(root, f"{root}/report.html")
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", Path(root, "report.html").read_text()))
    table = status.status_table(root, list(known.values()))
    for text in (table, watch.snapshot_text(snapshot), page):
        for word in ("stale", "failed", "step 4: loss nan", "damaged", "published", "stopped by recall@10"):
            assert word in text, (word, text)


def test_a_snapshot_has_the_steps_of_a_run_while_it_trains_and_when_it_is_sealed(root: str) -> None:
    def run() -> dict[str, Any]:
        return next(row for row in watch.read_snapshot(root)["stages"] if row["path"] == "runs/small")

    assert (run()["state"], run()["of_steps"]) == ("sealed", 3) and "stopped" not in run()
    Path(root, "runs/small/manifest.json").unlink()
    progress = RunProgress(Run.parse(root, "small"), TrainConfig(steps=40, global_batch=8))
    progress(4, 1.0)
    assert (run()["step"], run()["of_steps"]) == (4, 40)


def test_a_driver_that_ended_is_shown_as_silent(root: str) -> None:
    address = storage.join(root, "datasets/flat/v1/embeddings/progress.json")
    storage.put_json(storage.read_json(address) | {"updated": time.time() - 600}, address)
    stages = {stage["path"]: stage for stage in watch.read_snapshot(root)["stages"]}
    stage = stages["datasets/flat/v1/embeddings"]
    assert stage["rate"] is None and stage["silent_s"] == pytest.approx(600, abs=5)
    assert "silent for 10 min" in watch.snapshot_text(watch.read_snapshot(root))


def test_a_temporarily_unreadable_root_is_named(root: str, monkeypatch) -> None:
    snapshots = watch._snapshots(root, 0.0)
    first = next(snapshots)

    def broken(root: str) -> Any:
        raise OSError("the store does not answer")

    monkeypatch.setattr(watch, "read_snapshot", broken)
    second = next(snapshots)
    assert second["stages"] == first["stages"] and "the store does not answer" in watch.snapshot_text(second)
    monkeypatch.undo()
    assert "error" not in next(snapshots)


def test_watch_ends_with_0_on_ctrl_c_and_prints_a_line_of_json_each_time(root: str) -> None:
    process = _start_status(root, "--watch", "--json", stdout=subprocess.PIPE)
    assert process.stdout and process.stderr
    first = json.loads(process.stdout.readline())
    assert {stage["path"] for stage in first["stages"]} == {stage["path"] for stage in status.read_status(root)
                                                            if stage["state"] != "absent"}
    assert not {"rank", "sealed"} & set(first["stages"][0])
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0 and process.stderr.read() == ""


def test_watch_redraws_in_place_on_a_terminal(root: str) -> None:
    ours, theirs = pty.openpty()
    process = _start_status(root, "--watch", stdout=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "150"})
    os.close(theirs)
    output = b""
    while b"outline" not in output:
        output += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert b"\x1b[?25l" in output and b"published" in output


@pytest.mark.parametrize("columns", [80, 40])
def test_no_line_is_longer_than_the_terminal_and_no_word_is_cut(root: str, columns: int) -> None:
    """Failures are in the last column of the table, so a terminal that is too narrow cut them first."""
    address = storage.join(root, "datasets/flat/v1/embeddings/progress.json")
    skipped = {"download_failed_404": 777, "not_a_picture": 12}
    storage.put_json(storage.read_json(address) | {"skipped": skipped}, address)
    ours, theirs = pty.openpty()
    process = _start_status(root, "--watch", stdout=theirs, env=os.environ | {
        "TERM": "xterm", "COLUMNS": str(columns), "LINES": "100"})
    os.close(theirs)
    output = b""
    while b"outline" not in output:
        output += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    lines = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", output.decode()).split("\r\n")
    table = lines[lines.index("") + 1:]
    assert max(map(len, table)) <= columns and "…" not in "".join(table)
    assert "777 download_failed_404, 12 not_a_picture" in " ".join(" ".join(table).split())


def _add_sealed_versions(root: str, count: int) -> None:
    """Add so many versions to a dataset. Every stage of them is sealed, the ones of the last version as the last."""
    for number in range(2, count + 2):
        version = Path(root, f"datasets/outline/v{number}")
        shutil.copytree(Path(root, "datasets/outline/v1"), version)
        for path in version.glob("*/manifest.json"):
            manifest = json.loads(path.read_text())
            manifest["run"]["sealed"] = f"20{30 + number}-01-01T00:00:00Z"
            path.write_text(json.dumps(manifest))


def _watch_frames(root: str, columns: int, lines: int, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The lines of the first two frames on a terminal of this size."""
    def press(terminal: int, process: "subprocess.Popen[bytes]", raw: bytes) -> None:
        if raw.count(b"not shown") == 2 and raw.endswith(f"--root {Path(root).name}".encode()):
            process.send_signal(signal.SIGINT)

    checkout = os.getcwd()
    monkeypatch.chdir(Path(root).parent)
    screen = terminal.run_on_screen([sys.executable, "-m", "jobs", "status", "--watch", "--root", Path(root).name],
                                    columns, press, PYTHONPATH=checkout, COLUMNS=str(columns), LINES=str(lines))
    assert screen.code == 0, screen.raw
    frames = re.split(r"(?:\r?\x1b\[(?:2K|1A))+", screen.raw)
    shown = [re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", frame) for frame in frames if "not shown" in frame]
    return [frame.strip().splitlines() for frame in shown[:2]]


def _check_frames(root: str, frames: list[list[str]], columns: int, lines: int) -> list[str]:
    """Check what is true of every frame. Returns the rows of the table, one line for each."""
    first, second = ([line[:50].split("silent")[0] for line in frame[1:]] for frame in frames)
    assert first == second
    assert lines - 3 <= len(frames[0]) <= lines and max(map(len, frames[0])) <= columns
    assert frames[0][2].split()[:5] == ["dataset,", "run", "version", "stage", "state"]
    rows = [line for line in frames[0][3:-1] if not line.startswith(" ")]
    count = len(watch.read_snapshot(root)["stages"]) + 1 - len(rows)
    assert frames[0][-1] == f"{count} rows not shown. All rows: python -m jobs status --root {Path(root).name}"
    return rows


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40)])
def test_rows_that_work_or_failed_come_first_on_a_terminal_and_sealed_ones_are_left_out(
        root: str, columns: int, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _add_sealed_versions(root, 20)
    Path(root, "runs/small/manifest.json").unlink()
    RunProgress(Run.parse(root, "small"), TrainConfig(steps=40, global_batch=8))(4, 1.0)
    storage.put_json([{"name": "recall@10", "passed": False}], f"{root}/datasets/hatched/v1/gates.json")
    Path(root, "datasets/outline/v2/index/manifest.json").unlink()
    address = storage.join(root, "datasets/flat/v1/embeddings/progress.json")
    storage.put_json(storage.read_json(address) | {"skipped": {"download_failed_" + "4" * 30: 777}}, address)
    rows = _check_frames(root, _watch_frames(root, columns, lines, monkeypatch), columns, lines)
    cells = [re.split(" {2,}", row) for row in rows]
    assert [row[:3] for row in cells[:3]] == [
        ["flat", "v1", "embed"], ["drawn", "v1*", "train small"], ["flat", "v1", "index"]]
    states = [row[3] if row[2] != "published" else row[2] for row in cells]
    assert states[2] == "stale" and "stopped by" in rows[3]
    published = states.index("published")
    assert {row[0] for row in cells[3:published - 1]} == {"hatched"} and cells[published - 1][:2] == ["outline", "v2"]
    assert set(states[published + 1:]) == {"sealed"}
    kept = {tuple(row[:2]) for row in cells[published + 1:]}
    assert ("drawn", "v1*") in kept and ("flat", "v1") not in kept
    versions = {int(version[1:]) for name, version in kept if name == "outline"}
    assert versions == set(range(22 - len(versions), 22))


def test_each_row_has_one_line_when_too_many_rows_failed(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _add_sealed_versions(root, 20)
    for path in Path(root, "datasets/outline").glob("*/index/manifest.json"):
        path.write_text("{")
    Path(root, "runs/small/manifest.json").unlink()
    storage.put_json({"launch": "", "kind": "MemoryError", "message": "too large", "at": 1.0},
                     Run.parse(root, "small").fault_address)
    rows = _check_frames(root, _watch_frames(root, 80, 24, monkeypatch), 80, 24)
    assert len(rows) == 24 - 4 and [row.split("  ")[0] for row in rows] == ["flat", "drawn", *["outline"] * 18]
    assert "failed" in rows[1] and all("damaged" in row and row.endswith("…") for row in rows[2:])


def test_nothing_is_left_out_without_a_terminal(root: str) -> None:
    _add_sealed_versions(root, 20)
    process = _start_status(root, "--watch", stdout=subprocess.PIPE, env=os.environ | {"COLUMNS": "80", "LINES": "24"})
    assert process.stdout and process.stderr
    block = list(iter(process.stdout.readline, "\n"))[1:] + list(iter(process.stdout.readline, "\n"))
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert len(block) == 1 + len(watch.read_snapshot(root)["stages"]) + 1


@pytest.mark.parametrize("more", [(), ("--watch",), ("--json",)])
def test_a_reader_that_leaves_is_no_fault(root: str, more: tuple[str, ...]) -> None:
    process = _start_status(root, *more, stdout=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()  # before anything is written: every write fails
    assert process.wait(30) == 0 and process.stderr.read() == ""


def test_metrics_are_served_when_nothing_runs(root: str) -> None:
    port = prometheus_server.free_port()
    Path(root, "runs/small/manifest.json").unlink()
    storage.put_json({"launch": "", "kind": "MemoryError", "message": "too large", "at": 1.0},
                     Run.parse(root, "small").fault_address)
    process = _start_status(root, "--serve", str(port), stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}/metrics"
        prometheus_server.wait_until(lambda: prometheus_server.answers(address), "it does not answer", process)
        with urllib.request.urlopen(address) as answer:
            lines = answer.read().decode().splitlines()
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    samples = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    metrics = {name: float(value) for name, value in samples}
    flat = '{dataset="flat",run="",stage="embed",version="v1"}'
    assert metrics["rdm_root_readable"] == 1
    assert metrics[f"rdm_stage_items_left{flat}"] == 1 and metrics[f"rdm_stage_rows_per_second{flat}"] == 10
    assert metrics['rdm_stage_left_out{dataset="flat",reason="cut",run="",stage="embed",version="v1"}'] == 1
    assert metrics['rdm_stage_sealed{dataset="flat",run="",stage="shard",version="v1"}'] == 1
    assert metrics['rdm_stage_stale{dataset="flat",run="",stage="index",version="v1"}'] == 1
    published = '{dataset="drawn",run="",stage="index",version="v1"}'
    assert (metrics[f"rdm_stage_published{published}"], metrics[f"rdm_stage_published{flat}"]) == (1, 0)
    small = '{dataset="drawn",run="small",stage="train",version="v1"}'
    assert (metrics[f"rdm_stage_failed{small}"], metrics[f"rdm_stage_failed{published}"]) == (1, 0)
    assert metrics['rdm_database_recall{dataset="drawn",version="v1"}'] == 0.95
    assert metrics['rdm_database_age_seconds{dataset="drawn",version="v1"}'] == pytest.approx(3 * 86400, abs=60)
    assert metrics['rdm_train_step{dataset="drawn",run="small",stage="train",version="v1"}'] == 3
    assert metrics['rdm_index_recall{dataset="drawn",k="10",run="",stage="index",version="v1"}'] > 0.5


def test_a_root_that_cannot_be_read_is_a_metric(root: str, monkeypatch) -> None:
    root_metrics = inspection_prometheus.RootMetrics(root)
    assert {metric.name: metric for metric in root_metrics.collect()}["rdm_root_readable"].samples[0].value == 1

    def broken(root: str) -> Any:
        raise OSError("https://me:secret@store does not answer")

    monkeypatch.setattr(inspection_prometheus.status, "read_status", broken)
    monkeypatch.setattr(inspection_prometheus, "period", lambda root: -1.0)
    metrics = list(root_metrics.collect())
    assert [(metric.name, metric.samples[0].value) for metric in metrics] == [("rdm_root_readable", 0.0)]
    monkeypatch.undo()
    assert len(list(root_metrics.collect())) > 5


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--watch", "--serve", "9108"], "these are two commands"), (["--serve", "here"], "'here' is no port"),
    (["--serve", "70000"], "'70000' is no port")])
def test_invalid_usage_is_a_sentence(arguments: list[str], sentence: str, tmp_path: Path, capsys) -> None:
    assert main(["status", "--root", str(tmp_path), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_metrics_have_one_series_for_the_samples_of_a_run() -> None:
    sealed = {"stage": "sample", "state": "sealed", "items": 1, "samples": 4, "skipped": {}, "bytes": 10}
    states = [sealed | {"path": "runs/small/samples/new", "sealed": "2026-01-02T00:00:00Z"},
              sealed | {"path": "runs/small/samples/old", "sealed": "2026-01-01T00:00:00Z", "samples": 3},
              sealed | {"path": "runs/small", "stage": "import", "sealed": "2026-01-01T00:00:00Z",
                        "samples": 4_191_280}]
    families = {family.name: family for family in inspection_prometheus._stage_metrics(states)}
    labels = [tuple(sample.labels.items()) for sample in families["rdm_stage_items"].samples]
    assert len(set(labels)) == len(labels) == 2
    assert [sample.value for sample in families["rdm_stage_samples"].samples] == [4.0]
