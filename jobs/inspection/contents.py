"""`ls`: the datasets, runs and samples of a root, and the stages and files of one of them."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from jobs.inspection.status import COUNT_PARAMETERS, read_status
from jobs.publishing.releases import describe_failed_gates
from jobs.runs.targets import is_within, refuse_unknown_target, suggest
from jobs.telemetry import tables
from jobs.telemetry.units import format_bytes, format_count
from pipeline import storage
from pipeline.stages.manifest import read_manifest

_SHOWN_FILES = 10
"""Files of a stage in the table. JSON has all of them."""
_DEPTHS = {"datasets": 3, "runs": 2, "pictures": 2}
_WORST = ("damaged", "stale")


def list_contents(root: str) -> list[dict[str, Any]]:
    """Each version of a dataset, run, and set of samples or results of a run: state, rows, bytes, date."""
    entries = []
    for path, members in groupby(read_status(root), key=lambda state: _owner(state["path"])):
        states = list(members)
        entries.append(_summarize(path, states) | ({"published": True} if states[0]["published"] else {}))
    return entries


def list_stages(root: str, below: str) -> list[dict[str, Any]]:
    """Each stage in a folder of a root, with its files; ValueError if there is none."""
    states = read_status(root)
    chosen = [state for state in states if is_within(state["path"], below)]
    if not chosen:
        refuse_unknown_target(root, below)
        hint = suggest(below, [state["path"] for state in states])
        raise ValueError(f"there is no {below} in {root}\nhint: {hint}")
    return [_summarize(state["path"], [state]) | {"files": list(_files(root, state))}
            for state in chosen if state["state"] != "absent"]


def _owner(path: str) -> str:
    """The version of a dataset, the run, or the set of samples that a stage folder belongs to."""
    parts = path.split("/")
    depth = _DEPTHS[parts[0]]
    return "/".join(parts if parts[0] == "runs" and len(parts) > depth else parts[:depth])


def _summarize(path: str, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One entry for stages: the worst of their states, rows of the first, bytes of all, date of the newest seal."""
    present = [state for state in states if state["state"] != "absent"]
    counts = [state["samples"] - state.get("removed", 0) if "samples" in state else
              (state.get("progress") or {}).get("samples") for state in present
              if state.get("stage") not in COUNT_PARAMETERS]
    return {"path": path, "state": _state(present), "rows": next(iter(counts), None),
            "bytes": sum(state.get("bytes", 0) for state in present) if present else None,
            "sealed": max((state["sealed"] for state in present if "sealed" in state), default=None)}


def _state(states: Sequence[dict[str, Any]]) -> str:
    """The worst state: damaged, stale, unfinished, stopped by gates, sealed; empty without stages."""
    for word in (*_WORST, ""):
        for state in states:
            if state["state"] == word or (not word and state["state"] != "sealed"):
                return _with_stage(state, len(states))
    return describe_failed_gates(states[0].get("failed_gates", ())) or "sealed" if states else "empty"


def _with_stage(state: dict[str, Any], count: int) -> str:
    return f"{state.get('stage', state['path'].rpartition('/')[2])} {state['state']}" if count > 1 else state["state"]


def _files(root: str, state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The files that the manifest of a stage names. Without a manifest, and for a run, the files in the folder."""
    folder = storage.join(root, state["path"])
    if state["state"] != "damaged" and "samples" in state:
        manifest = read_manifest(folder, "")
        if named := [*(entry for record in manifest["items"] for entry in record["files"]), *manifest["files"]]:
            yield from ({"name": entry["name"], "bytes": entry["bytes"]} for entry in named)
            return
    yield from ({"name": name, "bytes": length} for name, length in sorted(storage.walk(folder)))


def contents_table(entries: Sequence[dict[str, Any]], root: str) -> str:
    """The entries as a table of at most 80 columns, if their names are short."""
    if not entries:
        return f"nothing here yet: {storage.redact_credentials(root)} has no datasets and no runs"
    rows = [[entry["path"].removeprefix("datasets/"), f"{'published, ' if entry.get('published') else ''}"
             f"{entry['state']}", *_cells(entry)] for entry in entries]
    return tables.render(rows, head=("name", "state", "rows", "size", "sealed"), right={2, 3}, whole={0})


def stages_table(stages: Sequence[dict[str, Any]]) -> str:
    """The stages as a table, and the first files of each below it."""
    texts = [tables.render([[stage["path"].removeprefix("datasets/"), stage["state"], *_cells(stage)]
                            for stage in stages], head=("stage", "state", "rows", "size", "sealed"), right={2, 3},
                           whole={0})]
    for stage in stages:
        files = stage["files"]
        rows = [[entry["name"], format_bytes(entry["bytes"])] for entry in files[:_SHOWN_FILES]]
        more = len(files) - len(rows)
        rows += [[f"and {format_count(more, 'more file')}", ""]] if more else []
        texts.append(f"\n{stage['path']}\n" + tables.render(rows, right={1}, whole={0}))
    return "\n".join(texts)


def _cells(entry: dict[str, Any]) -> list[str]:
    date = (entry["sealed"] or "–")[:16].replace("T", " ")
    return [format_count(entry["rows"]), format_bytes(entry["bytes"]), date]
