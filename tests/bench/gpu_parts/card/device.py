"""How torch reports a hidden card, a broken one and a full one, each provoked in a child process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from gpu_parts.report import Report

_CHILD = Path(__file__).with_name("device_child.py")


def run(report: Report) -> None:
    """Provoke each failure that `pipeline.devices` must recognize."""
    if report.device.type == "cuda":
        report.figure("compute capability", ".".join(map(str, torch.cuda.get_device_capability(report.device))))
        report.figure("CUDA of torch", str(torch.version.cuda), "", torch.__version__)
    for name, kind, visible in (("hidden card", "no device", ""), ("absent card", "no device", "7"),
                                ("device-side assert", "device lost", None),
                                ("out of memory", "out of memory", None)):
        if visible is None and report.device.type != "cuda":
            report.skip(name, "needs a GPU")
            continue
        with report.attempt(name):
            outcome = _run_child(name, visible)
            report.expect(name, outcome["kind"] == kind, kind, f"{outcome['type']}: {outcome['text']}"[:240])
    if report.device.type == "cuda":
        with report.attempt("usable after out of memory"):
            outcome = _run_child("after out of memory", None)
            report.expect("usable after out of memory", outcome["kind"] == "fine", "fine")
        with report.attempt("lost after an assert"):
            outcome = _run_child("after an assert", None)
            report.expect("lost after an assert", outcome["kind"] == "device lost", "device lost",
                          "the process cannot use the card again: its worker has to be replaced")


def _run_child(failure: str, visible: str | None) -> dict[str, str]:
    environment = dict(os.environ) if visible is None else os.environ | {"CUDA_VISIBLE_DEVICES": visible}
    child = subprocess.run([sys.executable, str(_CHILD), failure], env=environment, capture_output=True, text=True,
                           timeout=60, check=False)
    lines = child.stdout.strip().splitlines()
    if not lines:
        raise RuntimeError(f"the child for {failure!r} ended with {child.returncode}: {child.stderr.strip()[-300:]}")
    return dict(json.loads(lines[-1]))
