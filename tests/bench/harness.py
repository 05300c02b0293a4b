"""Shared by all benchmarks: environments of other programs, resources of a command, facts of the machine.

The import also puts the checkout on sys.path.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import features

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))  # for a checkout that was not installed
_TICKS = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A command or a check failed. The text is a message for the user."""


@dataclass
class Usage:
    """Resources that all processes of a command used."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    others_cores: float  # cores busy with anything else, or taken away: where there are many, the seconds say little
    stdout: str


def environment(work: Path, name: str, *packages: str) -> Path:
    """The Python of a virtual environment with `packages`, which is made if it is missing."""
    folder = work / f"venv-{name}"
    python, ready = folder / "bin" / "python", folder / "installed.json"
    if ready.exists() and json.loads(ready.read_text()) == list(packages):
        return python
    adjacent_uv = Path(sys.executable).parent / "uv"
    uv = str(adjacent_uv) if adjacent_uv.exists() else shutil.which("uv")
    if uv:
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(python), *packages],
                       check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        # If Python cannot write to the folder, every process would compile the modules again. Some files are for other
        # versions of Python and do not compile, so errors are ignored.
        subprocess.run([str(python), "-m", "compileall", "-q", str(folder / "lib")], stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
    ready.write_text(json.dumps(packages))
    return python


class _Watch(threading.Thread):
    """Follows the processes that carry a token in their environment, and their children, daemons among them."""

    def __init__(self, token: str) -> None:
        super().__init__(daemon=True)
        self.token = f"RDM_BENCH_TOKEN={token}".encode()
        self.others = set(_processes())
        self.cpu: dict[str, float] = {}
        self.alive: set[str] = set()
        self.peak = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        due = 0.0
        while not self.stopped.wait(0.1):
            self.look()
            if time.monotonic() >= due:
                begin = time.monotonic()
                self.peak = max(self.peak, sum(_pss(pid) for pid in self.alive))
                # To add up the pages of many processes takes long: never more than a twentieth of a core.
                due = begin + max(0.25, 20 * (time.monotonic() - begin)) - 0.05

    def look(self) -> None:
        """Find new processes, and note the CPU seconds of all."""
        self.alive &= (running := set(_processes()))
        for pid in sorted(running - self.others, key=int):
            with contextlib.suppress(OSError):  # it ended meanwhile
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                # A process with a new title, as Ray's have, may overwrite its environment. Its parent identifies it.
                if pid in self.alive or fields[1] in self.alive or self.token in _environment(pid):
                    self.alive.add(pid)
                    if fields[0] != "Z":
                        self.cpu[pid] = (int(fields[11]) + int(fields[12])) / _TICKS


def _processes() -> Iterable[str]:
    return (name for name in os.listdir("/proc") if name.isdigit())


def _environment(pid: str) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def _pss(pid: str) -> int:
    """Bytes of memory of a process, what it shares with others divided among them."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


def _machine_busy_s() -> float:
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICKS  # all but idle and waiting for disks; with stolen time


def measure(command: list[str], log: Path, served: Callable[[], float] = lambda: 0.0) -> Usage:
    """Run a command from the checkout's folder; Failed with the end of its log if it does not exit 0.

    `served` tells the CPU seconds of a server, which are neither the command's nor those of something else.
    """
    token = secrets.token_hex(8)
    settings = os.environ | {"RDM_BENCH_TOKEN": token, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1",
                             "RAY_USAGE_STATS_ENABLED": "0", "WANDB_MODE": "disabled",
                             "NO_ALBUMENTATIONS_UPDATE": "1"}
    settings.pop("RAY_ADDRESS", None)
    os.sync()  # writes of earlier runs go to the disk now, not during this measurement
    watch = _Watch(token)
    busy, serving, own = _machine_busy_s(), served(), time.process_time()
    begin = time.perf_counter()
    with log.open("w") as err:
        process = subprocess.Popen(command, cwd=CHECKOUT, env=settings, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=err, text=True)
    watch.start()
    assert process.stdout
    stdout = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # like Popen.wait, with the resources that it used
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    others = _machine_busy_s() - busy - (served() - serving) - (time.process_time() - own)
    watch.stopped.set()
    watch.join()
    for _ in range(100):  # daemons may need a moment to end
        watch.look()
        if not watch.alive:
            break
        time.sleep(0.1)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise Failed(f"exit {process.returncode}: {' '.join(command)}\n{stdout[-2000:]}\n{tail}")
    # Two lower bounds: samples miss the last moment of each process, and the kernel's sum misses daemons.
    cpu = max(sum(watch.cpu.values()), usage.ru_utime + usage.ru_stime)
    return Usage(wall, cpu, watch.peak / 1e6, max(0.0, (others - cpu) / wall), stdout)


def machine() -> str:
    """Processor, cores, memory."""
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def versions(python: Path | None = None) -> str:
    """The versions of Python and the packages."""
    descriptions = [f"Python {platform.python_version()}", f"Pillow {importlib.metadata.version('pillow')} "
                    f"(libjpeg-turbo {features.version('libjpeg_turbo')})", f"Ray {importlib.metadata.version('ray')}"]
    git = subprocess.run(["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"], capture_output=True,
                         text=True)
    descriptions += [f"this checkout {git.stdout.strip()}"] if git.returncode == 0 else []
    if python:
        version_query = "import importlib.metadata as m; print(*(n + ' ' + m.version(n) for n in ('img2dataset', " \
                "'opencv-python-headless', 'albumentations', 'numpy')), sep=', ')"
        descriptions.append(subprocess.run([str(python), "-c", version_query], stdout=subprocess.PIPE, text=True,
                                           check=True).stdout.strip())
    return "; ".join(descriptions)


def spread(values: list[float], digits: int = 2) -> str:
    """The median, and the lowest and highest value in parentheses."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
