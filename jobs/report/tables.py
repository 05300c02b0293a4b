"""The numbers of a report: headline, loss, indices, stages, encoders and settings."""

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from jobs.report.curve import curve, trade_off
from jobs.report.page import (
    Child,
    Html,
    amount,
    brief,
    details,
    duration,
    number,
    scrolling,
    settings,
    size,
    tag,
)
from jobs.report.root import Root
from jobs.runs.metrics import read
from jobs.runs.run import Run
from jobs.telemetry import progress_bar
from pipeline import storage
from pipeline.datasets.dataset import Dataset

_REMARKS = 20
_QUERIES = {"image": "pictures as queries", "text": "captions as queries"}


def headline(root: Root) -> Child:
    """A few numbers that say how much there is and how good it is."""
    shards = [one for one in (root.manifest(dataset.path("shards")) for dataset in root.datasets) if one]
    indices = [one for one in (root.manifest(dataset.path("index")) for dataset in root.datasets) if one]
    corpora = [one["samples"] for one in root.stages if one.get("stage") == "pictures" and "samples" in one]
    shown: list[tuple[str, str]] = []
    if corpora:
        shown.append((number(sum(corpora)), "pictures in the corpus"))
    if shards:
        kept = sum(one["totals"]["samples"] for one in shards)
        lost = sum(sum(one["totals"]["skipped"].values()) for one in shards)
        share = f", {_percent(kept, lost)} of the pictures given" if lost else ", no picture left out"
        shown.append((number(kept), f"samples in {amount(len(shards), 'dataset')}{share}"))
    if indices:
        shown.append((str(len(indices)), "databases with an index" if len(indices) > 1 else "database with an index"))
    if recalls := [one["info"]["recall_at_10"] for one in indices if one["info"].get("recall_at_10") is not None]:
        low, high = f"{min(recalls):.3f}", f"{max(recalls):.3f}"
        shown.append((low if low == high else f"{low}–{high}", "recall@10 of the indices"))
    for run in root.runs:
        of_run = f" of {run.name}" if len(root.runs) > 1 else ""
        if lines := read(run):
            steps = ((root.plan(run.path) or {}).get("section", {}).get("train") or {}).get("steps")
            of_all = f" of {number(steps)}" if steps and steps != lines[-1]["step"] else ""
            shown.append((number(lines[-1]["step"]), f"training steps{of_all}{of_run}"))
            shown.append((brief(_final(lines)), f"loss at the end{of_run}"))
    if not shown:
        return None
    return tag("dl", (tag("div", tag("dt", label), tag("dd", value)) for value, label in shown), class_="numbers")


def _percent(kept: int, lost: int) -> str:
    """The share that was kept, rounded down: never 100 where something was lost."""
    return f"{1000 * kept // (kept + lost) / 10:.1f} %"


def _final(lines: list[dict[str, Any]]) -> float:
    """The mean loss of the last tenth of the curve."""
    last = [line["loss"] for line in lines[-max(1, len(lines) // 10):]]
    return sum(last) / len(last)


def loss(root: Root, run: Run) -> Child:
    """The loss curve of a run with how fast it went; None while there is none."""
    lines = read(run)
    drawing = curve(lines)
    if drawing is None:
        return None
    last = lines[-1]
    rates = sorted(line["samples_per_s"] for line in lines if "samples_per_s" in line)
    facts = [f"step {number(last['step'])}"]
    if rates:
        facts.append(f"{brief(rates[len(rates) // 2])} samples/s in the median interval")
    if "seconds" in last:
        facts.append(f"{duration(last['seconds'])} of training")
    if "world_size" in last:
        facts.append(amount(last["world_size"], "process", "processes"))
    caption = tag("figcaption", "The training loss over the steps: each logged interval, faint, and a moving mean over "
                  f"a twelfth of the curve. At the end it is {brief(_final(lines))}. ", f"Run {run.name}: "
                  + ", ".join(facts) + ".")
    return tag("figure", tag("h3", run.name), drawing, caption)


def indices(root: Root) -> Child:
    """A row for each database with an index; None without any."""
    rows = []
    for dataset in root.datasets:
        manifest = root.manifest(dataset.path("index"))
        if manifest is None:
            continue
        info = manifest["info"]
        recall = info.get("recall_at_10")
        rows.append(tag("tr", tag("th", dataset.label, root.mark(dataset.path("index")), scope="row"),
                        tag("td", tag("code", info["key"]), tag("small", info["parameter"]) if info.get("parameter")
                            else None),
                        _n(number(manifest["totals"]["samples"])), _n(size(info["bytes"])),
                        _n(number(info["bytes_per_vector"], 1)), _n(size(info["budget"])),
                        _n("–" if recall is None else f"{recall:.3f}"), _n(number(info.get("recall_queries")))))
    if not rows:
        return None
    head = _head("database", "kind", *(f"#{name}" for name in ("vectors", "size", "bytes per vector", "budget",
                                                               "recall@10", "held-out queries")))
    caption = tag("figcaption", "Recall@10 is the share of a query's ten nearest vectors that the compressed index "
                  "finds among its own ten. It was measured on a trial index without the held-out rows, which served "
                  "as the queries; the index in use holds all rows.")
    return tag("figure", scrolling(tag("table", head, tag("tbody", rows), class_="data")), caption)


def tuning(root: Root) -> Child:
    """What each index finds in what time, for those that were tried with several settings; None without any."""
    figures = []
    for dataset in root.datasets:
        manifest = root.manifest(dataset.path("index"))
        if manifest is None or not manifest["items"]:
            continue
        took = manifest["items"][0]["run"].get("times", {}).get("milliseconds a query", {})
        kinds: dict[str, list[tuple[str, float, float]]] = {}
        for step in manifest["info"].get("curve", []):
            time = took.get(step["parameter"] or "all", {}).get("p50")
            for kind, title in _QUERIES.items():
                if time and kind in step:
                    kinds.setdefault(title, []).append((step["parameter"], time, step[kind]["10"]))
        if drawing := trade_off(kinds):
            figures.append(tag("figure", tag("h3", dataset.label, tag("small", manifest["info"]["key"])), drawing))
    if not figures:
        return None
    return [figures, tag("p", "What a larger effort of search finds, and how long it takes: the median time of one "
                         "query by one thread. An index is left at the least effort that reaches the recall asked "
                         "for.", class_="note")]


def stages(root: Root) -> Child:
    """Every stage with its state and its counts, by dataset and run; what failed and was left out below."""
    if root.broken:
        raise ValueError(root.broken)
    if not root.stages:
        return None
    head = _head("stage", "state", "#items", "#samples", "left out", "remarks", "#seconds", "#samples/s", "#size")
    bodies = []
    for group, members in groupby(root.stages, lambda one: _group(one["path"])):
        rows = [tag("tr", tag("th", group, scope="rowgroup", colspan=9, class_="group"))]
        rows += [_stage(one, group) for one in members]
        bodies.append(tag("tbody", rows))
    caption = tag("figcaption", "Sealed folders are whole and have their hashes written down. Seconds are those of all "
                  "workers together, of a training run those of its clock. Left out are samples that were bad; remarks "
                  "are on samples that were kept all the same.")
    table = scrolling(tag("table", head, bodies, class_="data"))
    return tag("figure", table, caption, [_failures(root, one) for one in root.stages if one.get("failed")],
               [_ledger(root, one) for one in root.stages if one.get("skipped") or one.get("noted")])


def _group(path: str) -> str:
    return "/".join(path.split("/")[:{"datasets": 3, "runs": 2}.get(path.split("/")[0], 1)])


def _stage(one: dict[str, Any], group: str) -> Html:
    name = one["path"][len(group):].strip("/") or one.get("stage", "run")
    seconds, samples, stored = one.get("seconds"), one.get("samples"), one.get("bytes")
    state = one["state"] + (f", {one['failed']} failed" if one.get("failed") else "")
    kind = "failed" if one.get("failed") else one["state"].split()[0]
    changed = tag("small", f"rebuilt since: {', '.join(one['changed'])}") if one.get("changed") else None
    on = progress_bar.computed_on(one.get("devices") or (one.get("progress") or {}).get("devices", {}))
    return tag("tr", tag("th", name, scope="row"), tag("td", tag("span", state, class_=f"state {kind}"), changed,
                                                       tag("small", on) if on else None),
               _n(number(one.get("items"))), _n(number(samples)), tag("td", _reasons(one.get("skipped"))),
               tag("td", _reasons(one.get("noted"))), _n(brief(seconds)),
               _n(brief(samples / seconds if samples and seconds else None)), _n(size(stored)))


def _reasons(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "–"
    written = [f"{number(count)} {reason.replace('_', ' ')}" for reason, count in sorted(counts.items())]
    return ", ".join(written) or "none"


def _failures(root: Root, one: dict[str, Any]) -> Html:
    """The errors of a stage's failed items."""
    folder = storage.join(root.address, one["path"], "failures")
    found = storage.each(storage.read_json, [storage.join(folder, name) for name in storage.names(folder)[:_REMARKS]])
    rows = [tag("tr", tag("th", failure["id"], scope="row"), tag("td", storage.without_credentials(failure["error"])))
            for failure in found]
    return details(f"{one['path']}: {amount(one['failed'], 'failed item')}", _list(rows))


def _ledger(root: Root, one: dict[str, Any]) -> Html:
    """The first lines of a stage's ledger."""
    rows = [tag("tr", tag("th", line["key"], scope="row"), tag("td", line["reason"].replace("_", " ")),
                tag("td", line["detail"]), tag("td", "kept" if line["kept"] else "left out"))
            for line, _ in zip(_lines(root, one["path"]), range(_REMARKS), strict=False)]
    count = sum(one["skipped"].values()) + sum(one["noted"].values())
    first = f", the first {_REMARKS}" if count > _REMARKS else ""
    return details(f"{one['path']}: {amount(count, 'line')} in the ledger{first}", _list(rows))


def _lines(root: Root, path: str) -> Iterator[dict[str, Any]]:
    for record in root.sealed(path)["items"]:
        for entry in record["files"]:
            if entry["name"].startswith("ledger/"):
                text = storage.read_bytes(storage.join(root.address, path, entry["name"])).decode()
                yield from map(json.loads, text.splitlines())


def _list(rows: list[Html]) -> Html:
    return scrolling(tag("table", tag("tbody", rows), class_="settings"))


def encoders(root: Root) -> Child:
    """The encoders, each with the datasets it embedded; None while nothing is embedded."""
    users: dict[str, list[Dataset]] = {}
    for dataset in root.datasets:
        manifest = root.manifest(dataset.path("embeddings"))
        if manifest and manifest["info"].get("encoder"):
            users.setdefault(json.dumps(manifest["info"]["encoder"], sort_keys=True), []).append(dataset)
    parts = []
    for text, its in users.items():
        encoder = json.loads(text)
        shown = {"model": encoder.pop("model", None), "weights": encoder.pop("pretrained", None),
                 "sha256 of the weights": _short(encoder.pop("weights_sha256", None)),
                 "sha256 of the architecture": _short(encoder.pop("architecture_sha256", None)),
                 "dimensions": encoder.pop("dim", None), "datasets": [one.label for one in its],
                 **encoder}
        parts.append(settings({name: value for name, value in shown.items() if value is not None}))
    return parts or None


def _short(sha256: str | None) -> str | None:
    return sha256 and sha256[:12]


def runs(root: Root) -> Child:
    """The settings of every run and of its samples, folded."""
    parts = []
    for run in root.runs:
        for path in (run.path, *(f"{run.path}/samples/{name}" for name in root.samples(run))):
            if plan := root.plan(path):
                section = {key: value for key, value in plan["section"].items() if key != "encoder"}
                parts.append(details(f"Settings of {path}", settings(section)))
    return parts or None


def _head(*names: str) -> Html:
    """The head of a table; names of columns of numbers begin with #."""
    return tag("thead", tag("tr", (tag("th", name.lstrip("#"), scope="col", class_="n" if name[0] == "#" else None)
                                   for name in names)))


def _n(text: str) -> Html:
    return tag("td", text, class_="n")
