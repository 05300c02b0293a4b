"""The numbers of a report: headline, loss, indices, stages, encoders and settings."""

import contextlib
import json
from collections.abc import Iterator
from itertools import groupby, islice
from typing import Any

from markupsafe import Markup

from jobs.inspection import status
from jobs.publishing.releases import describe_failed_gates
from jobs.report.charts import loss_curve, recall_over_time
from jobs.report.collect import RootContents
from jobs.report.names import names_of_keys
from jobs.report.render import Album, render
from jobs.runs.metrics import read_metrics
from jobs.runs.run import Run
from jobs.telemetry import progress_bar
from jobs.telemetry.units import flat_settings, format_count, format_number, format_share
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.stages.types import count_row_failures, is_ledger

_LEDGER_LINES = 20
_FAILURES = 20
_QUERIES = {"image": "images as queries", "text": "captions as queries"}


def headline(root: RootContents) -> Markup | None:
    """The amount of data and the quality, in a few numbers. None if there are none. One version of a dataset counts."""
    shards, indices = ([manifest for dataset in root.current if (manifest := root.manifest(dataset.path(name)))]
                       for name in ("shards", "index"))
    corpora = [state["samples"] for state in root.stages if state.get("stage") == "pictures" and "samples" in state]
    shown: list[tuple[str, str]] = []
    if corpora:
        shown.append((format_count(sum(corpora)), "images in the corpus"))
    if shards:
        kept = sum(manifest["totals"]["samples"] - manifest["info"].get("dead", 0) for manifest in shards)
        lost = sum(count_row_failures(manifest["totals"]["skipped"]) for manifest in shards)
        is_unknown = lost < sum(sum(manifest["totals"]["skipped"].values()) for manifest in shards)
        share = (f", {'at most ' * is_unknown}{_percent(kept, lost)} of the rows of their sources" if lost or is_unknown
                 else ", no image left out")
        shown.append((format_count(kept), f"samples in {format_count(len(shards), 'dataset')}{share}"))
    if indices:
        shown.append((str(len(indices)), "databases with an index" if len(indices) > 1 else "database with an index"))
    recalls = [manifest["info"].get("recall_at_10") for manifest in indices]
    if recalls := [recall for recall in recalls if recall is not None]:
        low, high = f"{min(recalls):.3f}", f"{max(recalls):.3f}"
        shown.append((low if low == high else f"{low}–{high}", "recall@10 of the indices"))
    for run in root.runs:
        shown += _run_numbers(root, run)
    return render("headline.html", numbers=shown) if shown else None


def _run_numbers(root: RootContents, run: Run) -> list[tuple[str, str]]:
    """The steps and the loss of a run, with what they are."""
    lines = read_metrics(run)
    if not lines:
        return []
    of_run = f" of {run.name}" if len(root.runs) > 1 else ""
    steps = ((root.plan(run.path) or {}).get("section", {}).get("train") or {}).get("steps")
    of_all = f" of {format_count(steps)}" if steps and steps != lines[-1]["step"] else ""
    return [(format_count(lines[-1]["step"]), f"training steps{of_all}{of_run}"),
            (format_number(_final_loss(lines)), f"mean loss of the last tenth{of_run}")]


def _percent(kept: int, lost: int) -> str:
    """The share that was kept, rounded down: it is never 100 if something was lost."""
    return format_share(kept, kept + lost).replace("%", " %")


def _final_loss(lines: list[dict[str, Any]]) -> float:
    """The mean loss of the last tenth of the curve."""
    last = [line["loss"] for line in lines[-max(1, len(lines) // 10):]]
    return sum(last) / len(last)


def loss(root: RootContents, run: Run, album: Album) -> Markup | None:
    """The loss curve of a run and its speed. None if there is no curve yet."""
    lines = read_metrics(run)
    chart = loss_curve(lines)
    if chart is None:
        return None
    rates = sorted(line["samples_per_s"] for line in lines if "samples_per_s" in line)
    return render("loss.html", run=run.name, album=album, chart=chart, final=_final_loss(lines), last=lines[-1],
                  rate=rates[len(rates) // 2] if rates else None)


def indices(root: RootContents) -> Markup | None:
    """A row for each database with an index. None without any."""
    rows = [{"database": dataset.label, "changed": root.changed_inputs(dataset.path("index")),
             "vectors": manifest["totals"]["samples"], **manifest["info"]}
            for dataset in root.datasets if (manifest := root.manifest(dataset.path("index")))]
    return render("indices.html", rows=rows) if rows else None


def tuning(root: RootContents) -> Markup | None:
    """Recall over time for each index that was tuned with several settings. None without any."""
    figures = []
    for dataset in root.datasets:
        manifest = root.manifest(dataset.path("index"))
        if manifest is None or not manifest["items"]:
            continue
        times = manifest["items"][0]["run"].get("times", {}).get("milliseconds a query", {})
        kinds: dict[str, list[tuple[str, float, float]]] = {}
        for step in manifest["info"].get("curve", []):
            time = times.get(step["parameter"] or "all", {}).get("p50")
            for kind, title in _QUERIES.items():
                if time and kind in step:
                    kinds.setdefault(title, []).append((step["parameter"], time, step[kind]["10"]))
        if chart := recall_over_time(kinds):
            figures.append((dataset.label, manifest["info"]["key"], chart))
    return render("tuning.html", figures=figures) if figures else None


def stages(root: RootContents) -> Markup | None:
    """Every stage with its state and its counts, by dataset and run. Failures and ledgers follow below."""
    if root.broken:
        raise ValueError(root.broken)
    if not root.stages:
        return None
    groups = []
    for group, members in groupby(root.stages, lambda state: _group(state["path"])):
        states = list(members)
        note = "published" if states[0]["published"] else describe_failed_gates(states[0].get("failed_gates", ()))
        groups.append((group, note, [_stage(state, group) for state in states]))
    failures = [(state["path"], state["failed"], _failures(root, state["path"]))
                for state in root.stages if state.get("failed")]
    # Losses come before warnings, in each ledger and among them.
    lossy = sorted((state for state in root.stages if state.get("skipped") or state.get("noted")),
                   key=lambda state: not state["skipped"])
    ledgers = [(state["path"], sum(state["skipped"].values()) + sum(state["noted"].values()),
                _named_lines(root, state["path"], list(islice(_ledger(root, state), _LEDGER_LINES))))
               for state in lossy]
    return render("stages.html", groups=groups, failures=failures, ledgers=ledgers, most=_LEDGER_LINES)


def _group(path: str) -> str:
    return "/".join(path.split("/")[:{"datasets": 3, "runs": 2}.get(path.split("/")[0], 1)])


def _stage(state: dict[str, Any], group: str) -> dict[str, Any]:
    """The cells of a stage's row."""
    seconds, samples, failed = state.get("seconds"), state.get("samples"), state.get("failed")
    if state.get("stage") in status.COUNT_PARAMETERS:
        samples = None
    devices = state.get("devices") or (state.get("progress") or {}).get("devices", {})
    return {"name": state["path"][len(group):].strip("/") or state.get("stage", "run"),
            "state": state["state"] + (f", {failed} failed" if failed else ""),
            "kind": "failed" if failed else state["state"].split()[0], "changed": state.get("changed") or [],
            "device": progress_bar.describe_devices(devices), "items": state.get("items"), "samples": samples,
            "skipped": _reasons(state.get("skipped")), "noted": _reasons(state.get("noted")), "seconds": seconds,
            "rate": samples / seconds if samples and seconds else None, "bytes": state.get("bytes")}


def _reasons(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "–"
    listed = [f"{format_count(count)} {reason.replace('_', ' ')}" for reason, count in sorted(counts.items())]
    return ", ".join(listed) or "none"


def _failures(root: RootContents, path: str) -> list[tuple[str, str]]:
    """The ids and errors of a stage's failed items."""
    folder = storage.join(root.address, path, "failures")
    names = storage.list_files(folder)[:_FAILURES]
    failures = storage.map_urls(storage.read_json, [storage.join(folder, name) for name in names])
    return [(failure["id"], storage.redact_credentials(failure["error"])) for failure in failures]


def _ledger(root: RootContents, state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The ledger entries of a stage: first what was left out, then what was kept with a warning."""
    for name, kept in (("skipped", False), ("noted", True)):
        if state[name]:
            yield from (entry for entry in _read_ledger(root, state["path"]) if entry["kept"] is kept)


def _named_lines(root: RootContents, path: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ledger entries with the names of their rows: stages after `shards` know only keys."""
    dataset = next((dataset for dataset in root.datasets if path.startswith(dataset.path(""))), None)
    names: dict[str, str] = {}
    if dataset and path != dataset.path("shards"):
        with contextlib.suppress(ValueError, OSError):  # the shards may be damaged; the table of stages says so
            names = names_of_keys(dataset, [line["key"] for line in lines])
    return [line | {"name": names.get(line["key"], line["key"])} for line in lines]


def failures(root: RootContents) -> Markup | None:
    """The stages that failed, and damaged folders, in one line each. None without any."""
    lines = []
    for state in root.stages:
        if fault := state.get("fault"):
            lines.append((state["path"], f"stopped: {(fault['message'].splitlines() or [fault['kind']])[0]}"))
        elif state["state"] == "damaged":
            lines.append((state["path"], f"damaged: {state.get('error', '')}"))
        elif state.get("failed"):
            lines.append((state["path"], format_count(state["failed"], "failed item")))
    redacted = [(path, storage.redact_credentials(text)) for path, text in lines]
    return render("failures.html", lines=redacted) if lines else None


def _read_ledger(root: RootContents, path: str) -> Iterator[dict[str, Any]]:
    for record in root.sealed(path)["items"]:
        for entry in record["files"]:
            if is_ledger(entry["name"]):
                url = storage.manifest_file_url(storage.join(root.address, path), entry["name"])
                text = storage.read_bytes(url).decode()
                yield from map(json.loads, text.splitlines())


def encoders(root: RootContents) -> Markup | None:
    """The encoders, each with the datasets that it embedded. None if nothing is embedded."""
    users: dict[str, list[Dataset]] = {}
    for dataset in root.datasets:
        manifest = root.manifest(dataset.path("embeddings"))
        if manifest and manifest["info"].get("encoder"):
            users.setdefault(json.dumps(manifest["info"]["encoder"], sort_keys=True), []).append(dataset)
    tables = []
    for text, embedded in users.items():
        encoder = json.loads(text)
        shown = {"model": encoder.pop("model", None), "weights": encoder.pop("pretrained", None),
                 "sha256 of the weights": _short(encoder.pop("weights_sha256", None)),
                 "sha256 of the architecture": _short(encoder.pop("architecture_sha256", None)),
                 "dimensions": encoder.pop("dim", None), "datasets": [dataset.label for dataset in embedded], **encoder}
        tables.append(list(flat_settings({name: value for name, value in shown.items() if value is not None})))
    return render("encoders.html", tables=tables) if tables else None


def _short(sha256: str | None) -> str | None:
    return sha256 and sha256[:12]


def runs(root: RootContents) -> Markup | None:
    """The settings of every run and of its samples, folded."""
    tables = []
    for run in root.runs:
        for path in (run.path, *(f"{run.path}/samples/{name}" for name in root.samples(run))):
            if plan := root.plan(path):
                section = {key: value for key, value in plan["section"].items() if key != "encoder"}
                tables.append((path, list(flat_settings(section))))
    return render("runs.html", tables=tables) if tables else None
