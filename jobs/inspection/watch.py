"""`status --watch`: show the state of a root repeatedly. It reads only files."""

import bisect
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

from jobs.inspection import status
from jobs.publishing.releases import describe_failed_gates
from jobs.telemetry import output, tables
from jobs.telemetry.units import format_count, format_duration
from pipeline import storage
from pipeline.stages.progress import period
from pipeline.stages.types import count_row_failures

_TITLE = 4
"""Cells that name a stage and its state."""
_HEAD = ("dataset, run", "version", "stage", "state", "done", "rate", "time", "failures, left out")
_WORKS, _FAILED, _DAMAGED, _STALE, _STOPPED, _UNFINISHED, _PUBLISHED, _SEALED = range(8)
"""The order of the rows on a terminal. Rows of the same rank keep their order."""
_SCREEN_KEYS = ("rank", "sealed")
"""Values of a stage that only the terminal needs."""


def watch_root(root: str, *, as_json: bool = False, every: float = 0.0) -> None:
    """Print the root until the reader has enough: in place on a terminal, elsewhere a block or a line of JSON a time.

    After a first look, a root that cannot be read for a moment is said and tried again.
    """
    every = every or period(root)
    if as_json or not sys.stdout.isatty():
        for now in _snapshots(root, every):
            if as_json:
                output.print_json(now | {"stages": [
                    {key: value for key, value in row.items() if key not in _SCREEN_KEYS} for row in now["stages"]]})
            else:
                output.print_text(f"{snapshot_text(now)}\n")
        return
    tables.show_live(map(screen_text, _snapshots(root, every)))


def _snapshots(root: str, every: float) -> Iterator[dict[str, Any]]:
    now = read_snapshot(root)
    while True:
        yield now
        time.sleep(every)
        try:
            now = read_snapshot(root)
        except OSError as error:
            now = now | {"error": storage.redact_credentials(storage.first_line(error))}


def read_snapshot(root: str) -> dict[str, Any]:
    """The state of a root: the time, the published versions, and each planned stage."""
    return {"time": round(time.time(), 1), "root": storage.redact_credentials(root),
            "published": status.read_published(root),
            "stages": [_stage_row(state) for state in status.read_status(root) if state["state"] != "absent"]}


def _stage_row(state: dict[str, Any]) -> dict[str, Any]:
    now, curve = state.get("progress"), state.get("curve")
    silent = status.seconds_silent(now) if now else 0.0
    known = status.state_labels(state["path"], state)
    row = {**known, "path": state["path"], "state": state["state"], "items": state.get("items"),
           "done": state.get("done"), "rows": None, "of_rows": None, "rate": None, "seconds_left": None,
           "silent_s": round(silent) or None, "failed": state.get("failed", 0), "skipped": state.get("skipped", {}),
           "error": state.get("error"), "failed_gates": state.get("failed_gates", []),
           "retired": (now or state).get("retired", [])}
    if "samples" in state:
        row["done"] = state["items"]
        if state["stage"] not in status.COUNT_PARAMETERS:
            row["rows"] = state["samples"] + count_row_failures(state["skipped"])
    if now:
        row |= {"done": now["items"], "rows": now["rows"], "of_rows": now["of_rows"] or None,
                "failed": max(state["failed"], now["failed_items"]), "skipped": now["skipped"]}
        if not silent:
            row |= {"rate": now["rows_per_s"], "seconds_left": now["seconds_left"]}
    if curve:
        rate = curve.get("samples_per_s")
        row |= {"step": curve["step"], "loss": curve.get("loss"), "rate": None if rate is None else round(rate, 1)}
    if now and "of_steps" in now:
        row |= {"step": now["step"], "loss": now.get("loss")} | ({} if silent else {"rate": now["rows_per_s"]})
    if state.get("stage") == "train":
        row["of_steps"] = now["of_steps"] if now and "of_steps" in now else state.get("of_steps")
    if not now and "samples" not in state and (steps := state.get("of_steps")) and not state.get("fault"):
        row["stopped"] = status.describe_stopped(steps)
    if fault := state.get("fault"):
        row |= {"error": (fault["message"].splitlines() or [fault["kind"]])[0]}
    return row | {"rank": _rank(row, bool(now and not silent)), "sealed": state.get("sealed")}


def _rank(row: dict[str, Any], works: bool) -> int:
    """The first rank that applies. `works`: a driver reports on this stage."""
    ranks = {_WORKS: works, _FAILED: row["state"] == "failed" or row["failed"], _DAMAGED: row["state"] == "damaged",
             _STALE: row["state"] == "stale", _STOPPED: row["failed_gates"], _SEALED: row["state"] == "sealed"}
    return next((rank for rank, applies in ranks.items() if applies), _UNFINISHED)


def snapshot_text(now: dict[str, Any]) -> str:
    """The whole table. The published version of a dataset comes before its stages."""
    return _title(now) + tables.render([cells for _, _, cells in _ranked_rows(now)], head=_HEAD) + _ending(now)


def screen_text(now: dict[str, Any]) -> str:
    """The table for the size of the terminal: what works, failed or needs a command first, sealed stages last.

    Rows that do not fit are left out, sealed ones first: those of published versions and the newest ones stay longest.
    The last line counts them. If the rows before the published versions need more lines, each gets only one.
    """
    rows = sorted(_ranked_rows(now), key=lambda row: row[0])
    # Sorting keeps the order of rows with equal keys. So the rows of a rank do not move from one refresh to the next.
    newest = sorted(range(len(rows)), key=lambda number: rows[number][1], reverse=True)
    kept = sorted(newest, key=lambda number: (rows[number][0], number if rows[number][0] < _SEALED else 0))
    urgent = sum(rank < _PUBLISHED for rank, _, _ in rows)
    height = shutil.get_terminal_size().lines - _title(now).count("\n")

    def table(count: int, cut: bool) -> str:
        shown = [rows[number][2] for number in sorted(kept[:count])]
        text = tables.fit_width(shown, head=_HEAD, title=_TITLE, cut=cut)
        return "\n".join([text, *_describe_hidden(len(rows) - count)])

    def lines(count: int, cut: bool) -> int:
        return table(count, cut).count("\n") + 1

    def fitting_count(cut: bool) -> int:
        if len(rows) < height and lines(len(rows), cut) <= height:
            return len(rows)
        return bisect.bisect_right(range(1, min(len(rows), height)), height, key=lambda count: lines(count, cut))

    cut = (count := fitting_count(False)) < urgent
    return _title(now) + table(fitting_count(True) if cut else count, cut) + _ending(now)


def _describe_hidden(count: int) -> list[str]:
    """The lines that say how many rows are not shown; none if all are."""
    if not count:
        return []
    command = output.fit_commands("python -m jobs status")
    sentence = f"{format_count(count, 'row')} not shown. All rows: {command}"
    return textwrap.wrap(sentence, shutil.get_terminal_size().columns, break_on_hyphens=False)


def _title(now: dict[str, Any]) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(now["time"]))
    wrong = f"\ncannot be read since then: {now['error']}" if now.get("error") else ""
    return f"{now['root']} at {clock}{wrong}\n\n"


def _ending(now: dict[str, Any]) -> str:
    return "" if now["stages"] else "\nnothing here yet"


def _ranked_rows(now: dict[str, Any]) -> list[tuple[int, tuple[bool, str], tuple[str, ...]]]:
    """For each row: its rank, whether it is of a published version and when it was sealed, and its cells."""
    rows: list[tuple[int, tuple[bool, str], tuple[str, ...]]] = []
    published = dict(now["published"])
    for row in sorted(now["stages"], key=lambda row: not row["dataset"]):
        if pointer := published.pop(row["dataset"], None):
            rows.append((_PUBLISHED, (True, ""), _published_cells(row["dataset"], pointer)))
        is_published = now["published"].get(row["dataset"], {}).get("version") == row["version"]
        rate = f"{row['rate']:.0f}/s" if row["rate"] is not None else ""
        rows.append((row["rank"], (is_published, row["sealed"] or ""), (
            row["dataset"] or row["run"], row["version"] + ("*" if is_published else ""), _stage_name(row),
            row["state"], _done_text(row), rate, _time_left(row), _failures_text(row))))
    return rows + [(_PUBLISHED, (True, ""), _published_cells(name, pointer)) for name, pointer in published.items()]


def _published_cells(name: str, pointer: dict[str, Any]) -> tuple[str, ...]:
    recall = pointer.get("recall@10")
    age = f"{format_duration(time.time() - pointer['published'])} ago" if pointer.get("published") else ""
    return (name, f"{pointer['version']}*", "", "published", "", "", age,
            f"recall@10 {recall:.4f}" if isinstance(recall, float) else "")


def _stage_name(row: dict[str, Any]) -> str:
    run = row["run"] if row["dataset"] else ""
    kind, _, *below = row["path"].split("/")
    part = below[-1] if kind == "runs" and below else ""
    return " ".join(filter(None, (row["stage"], run, part)))


def _done_text(row: dict[str, Any]) -> str:
    if row.get("step") is None and row["stage"] == "train":
        return ""  # its only item is the whole run
    if row.get("step") is not None:
        return f"step {row['step']}" + ("" if row["loss"] is None else f", loss {row['loss']:.4f}")
    rows = f", {row['rows']}{' of ' + str(row['of_rows']) if row['of_rows'] else ''} rows" if row["rows"] else ""
    return f"{row['done']} of {row['items']}{rows}" if row["items"] is not None else ""


def _time_left(row: dict[str, Any]) -> str:
    if row["silent_s"]:
        return f"silent for {format_duration(row['silent_s'])}"
    return f"{format_duration(row['seconds_left'])} left" if row["seconds_left"] else ""


def _failures_text(row: dict[str, Any]) -> str:
    said = [text for text in (row["error"], row.get("stopped")) if text]
    said += [describe_failed_gates(row["failed_gates"])] if row["failed_gates"] else []
    said += [f"{row['failed']} items failed"] if row["failed"] else []
    said += [f"{len(row['retired'])} workers retired"] if row["retired"] else []
    return ", ".join(said + [f"{count} {reason}" for reason, count in list(row["skipped"].items())[:4]])
