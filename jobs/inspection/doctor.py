"""`doctor`: what works on this machine, and how to fix the rest.

Each check runs in a thread. Checks of torch, Ray and the store run in separate processes, which may crash or hang.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from jobs.telemetry import tables
from jobs.telemetry.units import format_bytes, format_duration
from pipeline import storage
from pipeline.hardware import devices
from pipeline.hardware.memory import machine_memory

_PROJECT = "retrieval-diffusion"
_CODE = Path(__file__).parents[2]
_PROCESS_S, _REQUEST_S = 45.0, 5.0  # limits of a check in a process, and of a request
_LOOK_AGAIN_S = 0.1
_SKEW_S = 300.0  # S3 refuses requests whose clock differs by more than 15 minutes
_LEAST_DISK, _USUAL_DISK = 1 << 30, 20 << 30
_LEAST_MEMORY, _USUAL_MEMORY = 2 << 30, 8 << 30
_RAY_STORE = 200 << 20  # bytes of shared memory that a cluster of one machine takes
_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard and jobs", 9108: "status --serve"}
_TORCH = """
import torch
if torch.cuda.is_available():
    torch.zeros(8, device="cuda").sum().item()
print("torch", torch.__version__, "uses", "the GPU" if torch.cuda.is_available() else "the CPU")
"""
_STORE = "import sys; from pipeline import storage; sys.exit(0 if storage.can_swap(sys.argv[1]) else 3)"
_NO_CONDITIONS, _TOO_SLOW = 3, -1  # exit codes
_EXCEPTION = re.compile(r"^[\w.]+(Error|Failed|Exception|DeviceUnavailable): ")
_RAY = """
from jobs.cluster.connect import cluster_resources
there = cluster_resources()
print(f"{there.get('CPU', 0):g} logical CPUs, {there.get('GPU', 0):g} GPUs")
"""
_processes: set["subprocess.Popen[str]"] = set()  # those of the checks that run


@dataclass(frozen=True)
class Diagnosis:
    """The result of a check."""

    name: str
    state: Literal["ok", "warning", "failed"]
    detail: str
    cure: str = ""
    """A command or setting that fixes it."""

    def document(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self)


def run_checks(root: str) -> list[Diagnosis]:
    """All checks, in less than a minute."""
    checks: list[Callable[[], Diagnosis]] = [
        check_packages, check_devices, check_ray, partial(check_root, root), partial(check_disk, root), check_memory,
        partial(check_clock, root), check_ports, check_cache, check_index]
    with ThreadPoolExecutor(len(checks)) as pool:
        results = [pool.submit(check) for check in checks]
        try:
            return [result.result() for result in results]
        except BaseException:  # Ctrl-C must not wait for the processes; a check may still start one
            while wait(results, _LOOK_AGAIN_S).not_done:
                for process in tuple(_processes):
                    _end_process(process)
            raise


def checks_text(checks: list[Diagnosis]) -> str:
    """The checks as a table, and below it the cures."""
    lines = [tables.render([[check.name, check.state, check.detail] for check in checks],
                           head=("check", "state", "detail"))]
    lines += [f"{check.name}: {check.cure}" for check in checks if check.cure]
    return "\n".join(lines)


def check_packages(requirements: list[str] | None = None, python: str = "") -> Diagnosis:
    """The versions of Python and the packages against the ranges of the project, or against others."""
    if requirements is None:
        requirements, python = _project_requirements()
    version = ".".join(map(str, sys.version_info[:3]))
    if not SpecifierSet(python).contains(version):
        return Diagnosis("packages", "failed", f"Python {version}: expected {python}", "uv python install 3.12")
    faults = dict(_package_faults(requirements))
    if faults:
        return Diagnosis("packages", "failed", f"Python {version}; {', '.join(faults.values())}",
                     f"pip install {' '.join(repr(text) for text in faults)}")
    return Diagnosis("packages", "ok", f"Python {version}, {len(requirements)} packages within their ranges")


def _project_requirements() -> tuple[list[str], str]:
    """The requirements of the project, and of Python: of the folder that it runs from, or as it was installed."""
    project = _CODE / "pyproject.toml"
    if project.is_file():
        about = tomllib.loads(project.read_text())["project"]
        return about["dependencies"], about["requires-python"]
    about = metadata.metadata(_PROJECT)
    texts = [text for text in metadata.requires(_PROJECT) or [] if "extra ==" not in text]
    return texts, about["Requires-Python"] or ""


def _package_faults(requirements: list[str]) -> Iterator[tuple[str, str]]:
    """The requirement and a sentence for each package that is missing or has another version."""
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        names = [requirement.name, *(["faiss-gpu"] if requirement.name == "faiss-cpu" else [])]
        there = [name for name in names if _version(name)]
        wanted = f"{requirement.name}{requirement.specifier}"
        if not there:
            yield wanted, f"{requirement.name} is missing"
        elif not any(requirement.specifier.contains(_version(name), prereleases=True) for name in there):
            yield wanted, f"{there[0]} {_version(there[0])}: expected {requirement.specifier}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def check_devices() -> Diagnosis:
    """The GPUs that torch can compute on, or the CPU."""
    cards = devices.list_cards(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    code, text = _run_python(_TORCH)
    if code:
        cure = devices.failure_hint(RuntimeError(text)).partition("hint: ")[2]
        return Diagnosis("devices", _failure(code), _last_line(text), cure or "pip install --force-reinstall torch")
    if cards and "the GPU" not in text:
        return Diagnosis("devices", "warning", f"{_last_line(text)}, though there is {cards}",
                     "nvidia-smi; a torch for CUDA; CUDA_VISIBLE_DEVICES must not be empty")
    return Diagnosis("devices", "ok", f"{_last_line(text)}{f': {devices.visible_cards()}' if cards else ''}")


def check_ray() -> Diagnosis:
    """Whether Ray reaches the cluster of RAY_ADDRESS, or starts one here."""
    address = os.environ.get("RAY_ADDRESS", "")
    code, text = _run_python(_RAY)
    where = f"reaches {address}" if address else "starts here"
    if not code:
        return Diagnosis("Ray", "ok", f"{where}: {_last_line(text)}")
    cure = ("unset RAY_ADDRESS to use one on this machine, or --local for none" if address
            else "--local runs without Ray")
    if code == _TOO_SLOW:
        cure = f"run it again when the machine is less busy; {cure}"
    return Diagnosis("Ray", _failure(code), _last_line(text), cure)


def check_root(root: str) -> Diagnosis:
    """Whether the root can be written."""
    if not storage.is_local(root):
        return _check_store(root)
    try:
        folder = Path(root)
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
        return Diagnosis("root", "ok", f"{root} can be written" + ("" if there == folder else ", and is not there yet"))
    except (OSError, ValueError) as error:
        return Diagnosis("root", "failed", storage.first_line(error), "--root FOLDER, one that you may write to")


def _check_store(root: str) -> Diagnosis:
    """Whether an object store can be read and written, and keeps the conditions of writes."""
    shown = storage.redact_credentials(root)
    code, text = _run([sys.executable, "-c", _STORE, root], AWS_MAX_ATTEMPTS="2")
    if not code:
        return Diagnosis("root", "ok", f"{shown}: reads, writes and conditional writes work")
    if code == _NO_CONDITIONS:
        return Diagnosis("root", "failed", f"{shown} takes no conditional writes, which publishing needs",
                     "use AWS S3, MinIO, or another store with If-Match and If-None-Match")
    return Diagnosis("root", _failure(code), _last_line(text),
                 "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be set; AWS_ENDPOINT_URL names a store other than "
                 "AWS; the bucket must exist")


def check_disk(root: str) -> Diagnosis:
    """The free space for the root, the cache and temporary files."""
    places = {"cache": os.environ.get("RDM_CACHE") or tempfile.gettempdir(), "TMPDIR": tempfile.gettempdir()}
    if storage.is_local(root):
        places["root"] = root
    free = {name: _free_bytes(Path(place)) for name, place in places.items()}
    least = min(free, key=lambda name: free[name])
    detail = ", ".join(f"{name} {format_bytes(count)} free" for name, count in sorted(free.items()))
    state: Literal["ok", "warning", "failed"] = ("failed" if free[least] < _LEAST_DISK else "warning"
                                                 if free[least] < _USUAL_DISK else "ok")
    flag = {"cache": "RDM_CACHE=FOLDER", "TMPDIR": "TMPDIR=FOLDER", "root": "--root FOLDER"}[least]
    return Diagnosis("disk", state, detail, "" if state == "ok" else f"{flag} on a larger disk")


def _free_bytes(place: Path) -> int:
    return shutil.disk_usage(next(path for path in (place, *place.absolute().parents) if path.exists())).free


def check_memory() -> Diagnosis:
    """The memory of the machine or container, and its shared memory, which Ray takes."""
    total, shared = machine_memory(), _free_bytes(Path("/dev/shm"))
    detail = f"{format_bytes(total)}, shared memory {format_bytes(shared)} free"
    if total < _LEAST_MEMORY:
        return Diagnosis("memory", "failed", detail, "raise the limit of the container to 8 GiB")
    if shared < _RAY_STORE:
        return Diagnosis("memory", "warning", detail, "docker run --shm-size 2g; without it Ray uses the disk")
    if total < _USUAL_MEMORY:
        return Diagnosis("memory", "warning", detail, "--workers 1 --local")
    return Diagnosis("memory", "ok", detail)


def check_clock(root: str) -> Diagnosis:
    """The difference of the clock to that of the store. Only a store on HTTP tells its time."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if storage.is_local(root) or not endpoint:
        now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        return Diagnosis("clock", "ok", f"{now} UTC, compared with no other")
    try:
        skew = _clock_skew(endpoint)
    except (OSError, ValueError, TypeError) as error:
        return Diagnosis("clock", "warning", f"{storage.redact_credentials(endpoint)} tells no time: {error}",
                     "AWS_ENDPOINT_URL must name the store")
    detail = f"{format_duration(abs(skew))} {'behind' if skew > 0 else 'ahead of'} the store"
    if abs(skew) > _SKEW_S:
        return Diagnosis("clock", "failed", detail, "timedatectl set-ntp true")
    return Diagnosis("clock", "ok", detail)


def _clock_skew(endpoint: str) -> float:
    """Seconds that the clock of a server is ahead of this one."""
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_REQUEST_S) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:  # a refusal has a date too
        date = error.headers["Date"]
    return parsedate_to_datetime(date).timestamp() - time.time()


def check_ports() -> Diagnosis:
    """Whether a port can be opened, and which of the usual ones are in use."""
    try:
        with socket.socket() as any_port:
            any_port.bind(("127.0.0.1", 0))
    except OSError as error:
        return Diagnosis("ports", "failed", f"no port of 127.0.0.1 can be opened: {error.strerror}",
                         "ip link set lo up")
    used = [f"{port} ({what})" for port, what in _PORTS.items() if _is_used(port)]
    return Diagnosis("ports", "ok", f"in use: {', '.join(used)}" if used else "the usual ones are free")


def _is_used(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0


def check_cache() -> Diagnosis:
    """Whether the folder of fetched files can be written, and only by this user."""
    try:
        folder = storage.cache_folder()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        message, _, cure = str(error).partition("\nhint: ")
        return Diagnosis("cache", "failed", message, cure or "RDM_CACHE=FOLDER, one that only you may write to")
    return Diagnosis("cache", "ok", f"{folder} is writable and private")


def check_index() -> Diagnosis:
    """Whether pip reaches its package index. Only the installation needs it."""
    code, text = _run([sys.executable, "-m", "pip", "index", "versions", "packaging", "--timeout", "4", "--retries",
                       "0", "--disable-pip-version-check"])
    if not code:
        return Diagnosis("network", "ok", "pip reaches its package index")
    reason = "pip is not installed" if "No module named pip" in text else "pip does not reach its package index"
    return Diagnosis("network", "warning", reason, "PIP_INDEX_URL or HTTPS_PROXY; the installed program works offline")


def _run_python(code: str) -> tuple[int, str]:
    return _run([sys.executable, "-c", code])


def _run(command: list[str], **variables: str) -> tuple[int, str]:
    """The exit code and the output of a process, which is ended with its children if it takes too long."""
    paths = [str(_CODE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                               text=True, errors="replace", start_new_session=True, env=environment)
    _processes.add(process)
    try:
        text, _ = process.communicate(timeout=_PROCESS_S)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        return _TOO_SLOW, f"no answer within {_PROCESS_S:.0f} s (load {os.getloadavg()[0]:.0f}, {os.cpu_count()} cores)"
    finally:
        _end_process(process)
        process.wait()
        _processes.discard(process)


def _end_process(process: "subprocess.Popen[str]") -> None:
    """End a process and its children, if it runs."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _failure(code: int) -> Literal["warning", "failed"]:
    """The state for an exit code that is not 0. A slow answer on a busy machine is no proof of a fault."""
    return "warning" if code == _TOO_SLOW and os.getloadavg()[0] > (os.cpu_count() or 1) else "failed"


def _last_line(text: str) -> str:
    """The last line of a process's output, without the name of the exception and without a hint that follows."""
    lines = [line.strip() for line in text.partition("\nhint: ")[0].splitlines() if line.strip()]
    return storage.redact_credentials(_EXCEPTION.sub("", lines[-1])) if lines else "no output"
