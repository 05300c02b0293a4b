"""Measure everything that runs on a GPU, with gates: what `make gpu` runs.

    python tests/bench/gpu.py                       # every part on this machine's GPU, at most ten minutes
    python tests/bench/gpu.py --only train,search   # some parts
    python tests/bench/gpu.py --device cpu          # small sizes on a CPU: tries the script, gives no figures of use

Each part is a process with a time limit. It prints PASS, FAIL or SKIP with the figure and its gate, and writes its rows
to OUT/<part>.jsonl immediately. The end is OUT/gpu.json and a Markdown table that names the card. It needs torch,
numpy, pillow, pyarrow and fsspec. Parts that need open_clip, diffusers or faiss are skipped where those are missing.
The exit code is 0 if no check failed, 1 if one did, and 2 if there is no such device.
"""

import argparse
import datetime
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

try:
    import torch
except ImportError as missing:
    print(f"{sys.executable} has no torch: {missing}\nhint: make setup, or make gpu GPU_PYTHON=PYTHON with torch",
          file=sys.stderr)
    sys.exit(2)
from gpu_parts.report import Report, Row, line

ROOT = Path(__file__).parents[2]


class Part(NamedTuple):
    """A module below gpu_parts, and the seconds that it may take."""

    module: str
    limit_s: int


PARTS = {"ceilings": Part("card.ceilings", 25), "device": Part("card.device", 45), "tests": Part("tests", 20),
         "stages": Part("stages", 80), "embed": Part("search.embed", 75), "search": Part("search.search", 60),
         "index": Part("search.index", 15), "train": Part("model.train", 180), "latents": Part("model.latents", 35),
         "sample": Part("model.sample", 30), "nccl": Part("model.nccl", 35), "compile": Part("model.compile", 240),
         "profile": Part("model.profile", 150)}
# Ten minutes at most. The last two run only if --only names them.
DEFAULT = [part for part in PARTS if part not in {"compile", "profile"}]


def main() -> int:
    """Run the parts; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", default="", help=f"parts, with commas: {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the figures")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        _run_part(args.part, args.device, args.out)
        return 0
    parts = [part for part in args.only.split(",") if part] or DEFAULT
    if unknown := sorted(set(parts) - set(PARTS)):
        print(f"there is no part {', '.join(unknown)}\nhint: --only {','.join(PARTS)}", file=sys.stderr)
        return 2
    if args.device == "cuda" and (reason := _no_gpu()):
        print(f"there is no GPU to measure: {reason}\nhint: --device cpu tries the script with small sizes",
              file=sys.stderr)
        return 2
    return _run_parts(parts, args.device, args.out)


def _run_parts(parts: list[str], device: str, out: Path) -> int:
    machine = _machine(device)
    print(f"{machine['device']}, {machine['cores']} cores, torch {machine['torch']}, driver {machine['driver']}",
          flush=True)
    rows: list[Row] = []
    for part in parts:
        begun = time.perf_counter()
        rows += _process(part, device, out)
        print(f"       {part} took {time.perf_counter() - begun:.0f} s", flush=True)
        _write(out, machine, rows)
    print(f"\n{_table(machine, rows)}")
    return int(any(row.status == "FAIL" for row in rows))


def _process(part: str, device: str, out: Path) -> list[Row]:
    """Run one part as another process. Returns its rows, with one more if it broke or took too long."""
    path, limit = out / f"{part}.jsonl", PARTS[part].limit_s * (8 if device == "cpu" else 1)
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", part, "--device", device, "--out", str(out)]
    problem = ""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        if code := process.wait(limit):
            problem = f"the process ended with {code}"
    except subprocess.TimeoutExpired:
        problem = f"the part took more than {limit} s"
        os.killpg(process.pid, signal.SIGKILL)  # with its own children
        process.wait()
    rows = [Row(**json.loads(text)) for text in path.read_text().splitlines()] if path.exists() else []
    if problem or not rows:
        rows.append(Row(part, "the whole part", "FAIL", note=problem or "no figures"))
        print(line(rows[-1]), flush=True)
    return rows


def _run_part(part: str, device: str, out: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    module = importlib.import_module(f"gpu_parts.{PARTS[part].module}")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="rdm-gpu-") as scratch:
        module.run(Report(part, torch.device(device, 0) if device == "cuda" else torch.device(device),
                          out / f"{part}.jsonl", Path(scratch)))


def _no_gpu() -> str:
    """Why there is no GPU, in torch's words; empty if there is one."""
    try:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return ""


def _machine(device: str) -> dict[str, Any]:
    name, driver = platform.processor() or platform.machine(), "-"
    if device == "cuda":
        name = torch.cuda.get_device_name()
        if torch.cuda.device_count() > 1:
            name = f"{torch.cuda.device_count()} x {name}"
        nvidia_smi = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                    capture_output=True, text=True, check=False)
        driver = (nvidia_smi.stdout.splitlines() or ["unknown"])[0].strip()
    commit = os.environ.get("RDM_REVISION") or subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {"device": name, "driver": driver, "cores": os.cpu_count(), "torch": torch.__version__,
            "python": platform.python_version(), "commit": commit or "unknown",
            "date": datetime.date.today().isoformat()}


def _write(out: Path, machine: dict[str, Any], rows: list[Row]) -> None:
    document = {"machine": machine, "rows": [vars(row) for row in rows]}
    (out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "gpu.md").write_text(_table(machine, rows))


def _table(machine: dict[str, Any], rows: list[Row]) -> str:
    count = {status: sum(row.status == status for row in rows) for status in ("PASS", "FAIL", "SKIP")}
    lines = [f"{machine['device']}, driver {machine['driver']}, {machine['cores']} cores, torch {machine['torch']}, "
             f"Python {machine['python']}, {machine['date']}, commit {machine['commit']}: {count['PASS']} passed, "
             f"{count['FAIL']} failed, {count['SKIP']} skipped.", "",
             "| part | check | figure | gate | result | note |", "|---|---|---|---|---|---|"]
    for row in rows:
        value = f"{row.value:.4g}" if isinstance(row.value, float) else "" if row.value is None else str(row.value)
        note = row.note.replace("|", "/").replace("\n", " ")
        lines.append(f"| {row.part} | {row.name} | {value} {row.unit} | {row.gate} | {row.status} | {note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
