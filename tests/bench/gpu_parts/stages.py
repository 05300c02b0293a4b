"""The command line without Ray: shard, embed, exact neighbors and training on the device, as a user types them."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_parts.report import Report

_ROOT = Path(__file__).parents[3]


def run(report: Report) -> None:
    """Run each verb, and look for the device in its records."""
    try:
        import tyro  # noqa: F401
    except ImportError as error:
        report.skip("all of stages", f"{error}; pip install tyro")
        return
    from pipeline.corpora.config import DemoCorpusConfig
    from pipeline.corpora.demo_corpus import DemoCorpus
    from pipeline.stages.driver import run_stage
    config = DemoCorpusConfig(corpus="drawn", subjects=report.size(200, 24), size=64, pictures_per_item=200)
    images = DemoCorpus(str(report.scratch / "images"), config, report.scratch / "cache")
    run_stage(images)
    source = Path(images.folder)
    gpus = "0" if report.small else "1"
    verbs = [["shard", "drawn", "--source", str(source), "--captions", str(source / "train.csv"), "--only-captioned",
              "--image-size", "64", "--format", "png"],
             ["embed", "drawn", "--gpus", gpus],
             ["neighbors", "drawn", "--method", "exact", "--gpus", gpus],
             ["train", "run", "--dataset", "drawn", "--gpus", gpus, "--recipe",
              "emoji_32" if report.small else "emoji_64", "--steps", str(report.size(20, 4)), "--checkpoint-every",
              str(report.size(10, 2)), "--log-every", "2"]]
    for command in verbs:
        with report.attempt(command[0]):
            begun = time.perf_counter()
            _run_command(report, command)
            report.figure(f"{command[0]}: seconds with start", time.perf_counter() - begun, "s")
    with report.attempt("devices"):
        _devices(report)


def _run_command(report: Report, command: list[str]) -> str:
    done = subprocess.run([sys.executable, "-m", "jobs", *command, "--root", str(report.scratch / "root"), "--local"],
                          cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {' '.join(done.stderr.strip().splitlines()[-3:])}")
    return done.stdout


def _devices(report: Report) -> None:
    done = subprocess.run([sys.executable, "-m", "jobs", "status", "--json", "--root", str(report.scratch / "root")],
                          cwd=_ROOT, capture_output=True, text=True, check=True)
    devices_by_stage: dict[str, Any] = {record["stage"]: record.get("devices", {}) for record in json.loads(done.stdout)
                                        if record["state"] == "sealed"}
    for name in ("embed", "neighbors", "train"):
        devices = list(devices_by_stage.get(name, {}))
        good = bool(devices) and all(device.startswith("CPU") == report.small for device in devices)
        report.expect(f"{name}: records name the device", good, "yes", "; ".join(devices))
