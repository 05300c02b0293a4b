"""An image of the dashboard, from a real Prometheus that watched a real run of a few minutes.

    python tests/bench/dashboard.py [--subjects 400] [--steps 800] [--work FOLDER] [--out FILE]

The script starts a Ray cluster on this machine. `rebuild` publishes a synthetic corpus as v1 of a database; some of its
files are broken. A run is trained on it. Then images are added, and `rebuild` publishes v2. Prometheus, which must be
installed, scrapes Ray and `status --serve` as infra/prometheus says, only more often. At the end the script sends each
query of infra/grafana/rdm.json for the whole time, and plots the answer at the place of Grafana's panel.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import CHECKOUT
from matplotlib import pyplot as plt
from matplotlib.dates import DateFormatter, MinuteLocator, date2num
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(CHECKOUT / "tests/jobs/inspection"))
import prometheus_server

_BROKEN = 0.04
_STEP_S = 2.0
_BACK, _INK, _FAINT = "#111217", "#ccccdc", "#2c3037"
_COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#37872d", "#8ab8ff", "#ffcb7d")


def corpus(work: Path, subjects: int) -> Path:
    """Synthetic images of `subjects` subjects in six styles; some of the files are cut short."""
    from pipeline.corpora.config import DemoCorpusConfig
    from pipeline.corpora.demo_corpus import DemoCorpus
    from pipeline.stages.driver import run_stage
    config = DemoCorpusConfig(corpus="drawn", subjects=subjects, size=64)
    demo_corpus = DemoCorpus(str(work / f"drawn-{subjects}"), config, work)
    run_stage(demo_corpus)
    files = sorted(Path(demo_corpus.folder).rglob("*.png"))
    for file in random.Random(0).sample(files, int(_BROKEN * len(files))):
        file.write_bytes(file.read_bytes()[:60])
    return Path(demo_corpus.folder)


def build(root: Path, source: Path, version: str) -> None:
    """The next version of the database, published, and its neighbors."""
    from jobs.cli.main import main as cli_main
    common = ["--root", str(root), "--workers", "2"]
    assert cli_main(["rebuild", "train", "--source", str(source), "--samples-per-shard", "100",
                     "--index.bytes-per-vector", "48", "--min-overlap", "0", *common]) == 0
    assert cli_main(["neighbors", f"train@{version}", *common]) == 0


def run_and_watch(work: Path, args: argparse.Namespace) -> tuple[list[Any], list[float], tuple[float, float]]:
    """The panels with the series of their queries, when a version was published, when the run began and ended."""
    from jobs.cli.main import main as cli_main
    from jobs.cluster import connect
    root, port = work / "root", prometheus_server.free_port()
    shutil.rmtree(root, ignore_errors=True)
    corpus_v1, corpus_v2 = corpus(work, args.subjects), corpus(work, args.subjects * 3 // 2)
    connect.connect()
    status_server = subprocess.Popen(
        [sys.executable, "-m", "jobs", "status", "--serve", str(port), "--root", str(root)],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)})
    try:
        discovery = Path(os.environ["RAY_TMPDIR"]) / "ray/prom_metrics_service_discovery.json"
        with prometheus_server.running(work / f"prometheus-{int(time.time())}", str(discovery), port,
                                       every="2s") as server:
            begun = time.time()
            build(root, corpus_v1, "v1")
            assert cli_main(["train", "run", "--dataset", "train@v1", "--root", str(root), "--workers", "1", "--steps",
                             str(args.steps), "--tracker", "none", "--checkpoint-every", "200"]) == 0
            build(root, corpus_v2, "v2")
            time.sleep(15)
            ended = time.time()
            panels = [(panel, [(legend, server.query_range(expression, begun, ended, _STEP_S))
                               for expression, legend in queries])
                      for panel, queries in prometheus_server.panels("20s", "train")]
            marks = [float(timestamp) for expression in prometheus_server.annotations("20s", "train")
                     for series in server.query_range(expression, begun, ended, _STEP_S)
                     for timestamp, _ in series["values"]]
            publish_times = [timestamp for timestamp, previous in zip(marks, [0.0, *marks], strict=False)
                             if timestamp - previous > 60]
            return panels, publish_times, (begun, ended)
    finally:
        status_server.terminate()
        status_server.wait(20)


def _label(legend: str, metric: dict[str, str]) -> str:
    for name in ("dataset", "version", "stage", "run", "reason", "state"):
        legend = legend.replace(f"{{{{{name}}}}}", metric.get(name, ""))
    return " ".join(legend.split())


_UNITS = {"s": "seconds", "Bps": "bytes/s", "percentunit": "share", "decgbytes": "GB", "none": ""}
_ROW_IN, _SHOWN = 2.25, 6
_FRESH_S = 8.0  # a value that is older is no longer true


def draw(panels: list[Any], marks: list[float], span: tuple[float, float], out: Path) -> None:
    """Every panel where the dashboard has it, with a line at each of the `marks`."""
    plt.rcParams.update({"font.size": 7.5, "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK,
                         "ytick.color": _INK, "axes.edgecolor": _FAINT})
    rows = sorted({panel["gridPos"]["y"] for panel, _ in panels})
    figure = plt.figure(figsize=(14, _ROW_IN * len(rows)), facecolor=_BACK)
    for panel, queries in panels:
        place, row = panel["gridPos"], len(rows) - 1 - rows.index(panel["gridPos"]["y"])
        axis = figure.add_axes((place["x"] / 24 + 0.038, (row + 0.28) / len(rows), place["w"] / 24 - 0.05,
                                0.6 / len(rows)))
        _panel(axis, panel, _lines(queries), span)
        for mark in marks:
            axis.axvline(_at([mark])[0], color="#73bf69", linewidth=0.8, linestyle=(0, (4, 3)))
    figure.savefig(out, dpi=110, facecolor=_BACK)
    print(out)


def _lines(queries: list[Any]) -> list[tuple[str, Any]]:
    """(legend, (n, 2) times and values) of all series of a panel, the largest first."""
    lines = [(_label(legend, series["metric"]), np.array(series["values"], float))
             for legend, query_series in queries for series in query_series]
    lines = [(label, values[np.isfinite(values[:, 1])]) for label, values in lines]
    return sorted(((label, values) for label, values in lines if len(values)), key=lambda line: -line[1][:, 1].max())


def _at(times: Any) -> Any:
    return date2num((np.asarray(times) * 1000).astype("datetime64[ms]"))


def _panel(axis: Any, panel: dict[str, Any], lines: list[tuple[str, Any]], span: tuple[float, float]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    axis.set_facecolor("#181b1f")
    axis.set_title(panel["title"], loc="left", fontsize=9, color="white", pad=5)
    axis.grid(color=_FAINT, linewidth=0.6)
    axis.tick_params(length=0)
    stacked = np.zeros(int((span[1] - span[0]) / _STEP_S) + 1)
    for number, (label, values) in enumerate(lines):
        colour, shown = _COLOURS[number % len(_COLOURS)], label if number < _SHOWN else None
        if "stacking" in defaults["custom"]:
            times, below = span[0] + _STEP_S * np.arange(len(stacked)), stacked.copy()
            last = np.searchsorted(values[:, 0], times + 0.1) - 1
            there = (last >= 0) & (times - values[last, 0] < _FRESH_S)
            stacked[there] += values[last[there], 1]
            axis.fill_between(_at(times), below, stacked, step="mid", color=colour, alpha=0.6, linewidth=0, label=shown)
        else:
            gaps = np.flatnonzero(np.diff(values[:, 0]) > 3 * _STEP_S) + 1
            axis.plot(np.insert(_at(values[:, 0]), gaps, np.nan), np.insert(values[:, 1], gaps, np.nan), color=colour,
                      linewidth=1.4, label=shown, marker="." if len(values) < 30 else None, markersize=3)
    axis.set_xlim(*_at(span))
    axis.xaxis.set_major_formatter(DateFormatter("%H:%M"))
    axis.xaxis.set_major_locator(MinuteLocator())
    if defaults["unit"] == "Bps":
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_ylabel(_UNITS[defaults["unit"]])
    if defaults.get("min") == 0:
        axis.set_ylim(0, 1.1 * max([values[:, 1].max() for _, values in lines] + [stacked.max()], default=1) or 1)
    if lines:
        axis.legend(loc="upper left", bbox_to_anchor=(-0.01, -0.13), fontsize=6, frameon=False, labelcolor=_INK,
                    ncols=3, columnspacing=1.2, handlelength=1.2, borderpad=0.2)
    else:
        axis.text(0.5, 0.5, "no data: needs a GPU", transform=axis.transAxes, ha="center", color="#8e8e8e")


def main() -> None:
    """Run, watch, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=400)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--work", default="")
    parser.add_argument("--out", default=str(CHECKOUT / "docs/images/dashboard.png"))
    args = parser.parse_args()
    if not prometheus_server.binary():
        raise SystemExit("prometheus is not installed\nhint: apt-get install prometheus")
    work = Path(args.work or tempfile.mkdtemp(prefix="rdm-dashboard-"))
    work.mkdir(parents=True, exist_ok=True)
    # Ray's sockets want a short path, and its discovery file shall be ours.
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="rdm-ray-", dir="/tmp")
    os.environ.setdefault("RAY_metrics_report_interval_ms", "2000")
    os.environ["PYTHONPATH"] = str(CHECKOUT)
    seen = run_and_watch(work, args)
    (work / "seen.json").write_text(json.dumps(seen))
    draw(*seen, Path(args.out))


if __name__ == "__main__":
    main()
