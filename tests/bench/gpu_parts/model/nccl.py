"""Two and more cards: bandwidth of NCCL, scaling of DDP and FSDP2, and a killed run that resumes. SKIP with one card.

On a CPU two processes with gloo run the same code, so that the script can be tested without cards.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_parts.report import Report

_CHILD = Path(__file__).with_name("nccl_child.py")


def run(report: Report) -> None:
    """Start as many processes as there are cards."""
    cards = torch.cuda.device_count() if report.device.type == "cuda" else 2
    if cards < 2:
        report.skip("NCCL, DDP and FSDP2 on several cards", "one card")
        return
    with report.attempt("bandwidth and scaling"):
        figures = _run_processes(report, cards, "rates")
        report.figure(f"all-reduce between {cards}", figures["bus_gb_per_s"], "GB/s", "bus bandwidth, 256 MB of bf16")
        single_card = _run_processes(report, 1, "rates")
        for name in ("ddp", "fsdp"):
            report.speed(f"{name.upper()}: rate of {cards} / {cards} x rate of one",
                         figures[name] / (cards * single_card[name]), ">= 0.9", "", f"{figures[name]:.1f} images/s")
    with report.attempt("killed and resumed"):
        report.expect("a killed run resumes to the same bits", _resumes_exactly(report, cards), "yes")


def _run_processes(report: Report, world: int, what: str) -> dict[str, float]:
    """Run the child in `world` processes. The output of rank 0."""
    processes = _start(report, world, what, report.scratch / what)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{what}: processes ended with {[process.returncode for process in processes]}")
    return dict(json.loads(outputs[0].strip().splitlines()[-1]))


def _start(report: Report, world: int, what: str, folder: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return [subprocess.Popen([sys.executable, str(_CHILD), what, report.device.type, str(folder)],
                             env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                             stdout=subprocess.PIPE, text=True) for rank in range(world)]


def _resumes_exactly(report: Report, world: int) -> bool:
    """Whether a run whose processes are killed after a checkpoint ends with the weights of an undisturbed one."""
    _run_processes(report, world, "undisturbed")
    folder = report.scratch / "killed"
    processes = _start(report, world, "killed", folder)
    deadline = time.monotonic() + 60
    while not list(folder.glob("*/checkpoint.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait()
    _run_processes(report, world, "killed")
    undisturbed, resumed = (_last_weights(report.scratch / name) for name in ("undisturbed", "killed"))
    return undisturbed == resumed


def _last_weights(folder: Path) -> bytes:
    """The weights of the checkpoint with the most steps."""
    return max(folder.glob("*/model.safetensors"), key=lambda path: int(path.parent.name)).read_bytes()
