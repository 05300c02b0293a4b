"""Checks of a place to work: the root, the space on its disk, memory and GPUs."""

import logging
import os
import shutil
from pathlib import Path

from jobs.cluster.config import ClusterConfig
from jobs.cluster.gpus import local_device
from jobs.telemetry.units import format_bytes
from pipeline import storage
from pipeline.hardware import devices

_log = logging.getLogger(__name__)
_STORE_ANSWER_S = 10.0
_CERTAIN_SHARE = 0.25
"""Share of an estimate that is needed in any case: images of few colors take less than photographs."""
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_root(root: str) -> None:
    """OSError if the root cannot be written (a folder), or cannot be listed with these credentials (S3).

    A store that does not answer in time is no failure: it may be busy.
    """
    if storage.is_local(root):
        folder = _existing_folder(root)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} cannot be written by this user, and the root {root} lies there\n"
                                  f"hint: --root must name a folder that this user may write")
        return
    try:
        storage.check_store(root, _STORE_ANSWER_S)
    except storage.NoAnswer as error:
        _log.warning("%s; requests are repeated for minutes", storage.redact_credentials(storage.first_line(error)))


def check_disk(root: str, needed_bytes: float) -> None:
    """OSError if the disk of a local root certainly has too little room; a warning if that is likely."""
    if not storage.is_local(root):
        return
    free = shutil.disk_usage(_existing_folder(root)).free
    sizes = f"expected about {format_bytes(needed_bytes)}, got {format_bytes(free)} free"
    if free < needed_bytes * _CERTAIN_SHARE:
        raise OSError(f"the disk of {root} has too little room: {sizes}\nhint: make room, or another --root")
    if free < needed_bytes:
        _log.warning("the disk of %s may have too little room: %s", root, sizes)


def check_memory(needed_bytes: float, what: str) -> None:
    """MemoryError if this machine, or the limit of its container, has less memory than `needed_bytes`."""
    there = memory_bytes()
    if there < needed_bytes:
        raise MemoryError(f"{what} does not fit the memory of this machine: expected at least "
                          f"{format_bytes(needed_bytes)}, got {format_bytes(there)}\nhint: a smaller recipe, or more "
                          f"memory: python -m jobs recipes, which lists what each needs")


def memory_bytes() -> int:
    """Bytes of memory that processes here may use: those of the machine, or the limit of its container."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in map(Path, _CGROUP_LIMITS):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            there = min(there, int(text))
    return there


def check_gpus_here(cluster: ClusterConfig, *, local: bool) -> None:
    """DeviceUnavailable or ValueError if this command alone has fewer GPUs than a worker reserves."""
    if not cluster.each_gpus or int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun: each process takes its own
        return
    if local:
        with devices.reserve_temporarily("cuda"):
            devices.choose_device()
    elif not os.environ.get("RAY_ADDRESS") and not devices.list_cards(os.environ.get("CUDA_VISIBLE_DEVICES", "")):
        raise ValueError(f"a worker reserves {cluster.each_gpus:g} GPU: expected a GPU on this machine, got none\n"
                         f"hint: --gpus 0 computes on the CPU; RAY_ADDRESS names a cluster with GPUs")


def uses_gpu(cluster: ClusterConfig) -> bool:
    """Whether a process of this machine without Ray computes on a GPU."""
    import torch
    device = local_device(cluster)
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def _existing_folder(root: str) -> Path:
    """The root, or the nearest folder above it that exists."""
    folder = Path(storage.local_path(root)).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
