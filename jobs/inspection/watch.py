"""`status --watch`: a root as it is now, again and again, from the files alone."""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from jobs.inspection import status
from jobs.telemetry import progress_bar, tables
from pipeline import storage
from pipeline.stages.progress import period

_HEAD = ("dataset", "version", "stage", "state", "done", "rate", "left", "failures, left out")


def show(root: str, *, as_json: bool = False, every: float = 0.0) -> None:
    """Print the root until the reader has enough: in place on a terminal, elsewhere a block or a line of JSON a time.

    After a first look, a root that cannot be read for a moment is said and tried again.
    """
    every = every or period(root)
    if as_json or not sys.stdout.isatty():
        for now in _looks(root, every):
            print(json.dumps(now) if as_json else f"{text(now)}\n", flush=True)
        return
    tables.show_live(map(text, _looks(root, every)))


def _looks(root: str, every: float) -> Iterator[dict[str, Any]]:
    now = look(root)
    while True:
        yield now
        time.sleep(every)
        try:
            now = look(root)
        except OSError as error:
            now = now | {"error": storage.redact_credentials(str(error).splitlines()[0])}


def look(root: str) -> dict[str, Any]:
    """What there is: the time, what is published, and each stage that was planned."""
    return {"time": round(time.time(), 1), "root": storage.redact_credentials(root),
            "published": status.published(root),
            "stages": [_stage(one) for one in status.read_status(root) if one["state"] != "absent"]}


def _stage(one: dict[str, Any]) -> dict[str, Any]:
    now, curve = one.get("progress"), one.get("curve")
    gone = status.silent(now) if now else 0.0
    known = status.named(one["path"], one)
    told = {**known, "path": one["path"], "state": one["state"], "items": one.get("items"), "done": one.get("done"),
            "rows": None, "of_rows": None, "rate": None, "seconds_left": None, "silent_s": round(gone) or None,
            "failed": one.get("failed", 0), "skipped": one.get("skipped", {}), "error": one.get("error"),
            "retired": (now or one).get("retired", [])}
    if "samples" in one:
        told |= {"done": one["items"], "rows": one["samples"] + sum(one["skipped"].values())}
    if now:
        told |= {"done": now["items"], "rows": now["rows"], "of_rows": now["of_rows"] or None,
                 "failed": max(one["failed"], now["failed_items"]), "skipped": now["skipped"]}
        if not gone:
            told |= {"rate": now["rows_per_s"], "seconds_left": now["seconds_left"]}
    if curve:
        told |= {"step": curve["step"], "loss": curve["loss"], "rate": round(curve["samples_per_s"], 1)}
    if fault := one.get("fault"):
        told |= {"state": "failed", "error": fault["message"].splitlines()[0]}
    return told


def text(now: dict[str, Any]) -> str:
    """The table: what is published of a dataset stands before its stages."""
    lines: list[tuple[str, ...]] = []
    published = dict(now["published"])
    for one in sorted(now["stages"], key=lambda one: not one["dataset"]):
        if told := published.pop(one["dataset"], None):
            lines.append(_published(one["dataset"], told))
        mark = "*" if now["published"].get(one["dataset"], {}).get("version") == one["version"] else ""
        lines.append((one["dataset"] or one["run"], one["version"] + mark, _name(one), one["state"], _done(one),
                      f"{one['rate']:.0f}/s" if one["rate"] is not None else "", _left(one), _failures(one)))
    lines += [_published(name, told) for name, told in published.items()]
    clock = time.strftime("%H:%M:%S", time.localtime(now["time"]))
    what = "" if now["stages"] else "\nnothing here yet"
    wrong = f"\ncannot be read since then: {now['error']}" if now.get("error") else ""
    return f"{now['root']} at {clock}{wrong}\n\n" + tables.render(lines, head=_HEAD, fold=False) + what


def _published(name: str, told: dict[str, Any]) -> tuple[str, ...]:
    recall = told.get("recall@10")
    age = f"{progress_bar.span(time.time() - told['published'])} ago" if told.get("published") else ""
    number = f"number {told['number']}" if told.get("number") is not None else ""
    return (name, f"{told['version']}*", "published", age, number, "", "",
            f"recall@10 {recall:.4f}" if isinstance(recall, float) else "")


def _name(one: dict[str, Any]) -> str:
    return f"{one['stage']} {one['run']}" if one["dataset"] and one["run"] else one["stage"]


def _done(one: dict[str, Any]) -> str:
    if one.get("step") is not None:
        return f"step {one['step']}, loss {one['loss']:.4f}"
    rows = f", {one['rows']}{' of ' + str(one['of_rows']) if one['of_rows'] else ''} rows" if one["rows"] else ""
    return f"{one['done']} of {one['items']}{rows}" if one["items"] is not None else ""


def _left(one: dict[str, Any]) -> str:
    if one["silent_s"]:
        return f"silent for {progress_bar.span(one['silent_s'])}"
    return progress_bar.span(one["seconds_left"]) if one["seconds_left"] else ""


def _failures(one: dict[str, Any]) -> str:
    said = [one["error"]] if one["error"] else []
    said += [f"{one['failed']} items failed"] if one["failed"] else []
    said += [f"{len(one['retired'])} workers retired"] if one["retired"] else []
    return ", ".join(said + [f"{count} {reason}" for reason, count in list(one["skipped"].items())[:4]])
