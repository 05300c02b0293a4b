"""The one place that chooses where tensors are computed, and that recognizes why a device failed.

A process computes on the device that it reserved, and never on another one. A worker reserves what its driver gave it.
A process that reserved nothing (`--local`, a script) uses the GPU if there is one.
"""

import os
import re
import subprocess
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Choice = Literal["auto", "cpu", "cuda"]
Failure = Literal["device lost", "out of memory", "old driver", "no device", "none"]
_VARIABLE = "RDM_DEVICE"  # child processes inherit it

# Texts of torch and of the CUDA runtime, in the order in which they are tried: an error of a lost device may name memory.
_PATTERNS: tuple[tuple[Failure, str], ...] = (
    ("old driver", r"driver on your system is too old|driver version is insufficient|system has unsupported display "
                   r"driver|forward compatibility was attempted|system.driver.mismatch"),
    ("no device", r"no cuda gpus are available|no cuda-capable device|invalid device ordinal|not compiled with cuda"
                  r"|found no nvidia driver|no nvidia driver|devices? (is|are) busy or unavailable"
                  r"|no kernel image is available"),
    ("out of memory", r"out of memory|cublas_status_alloc_failed|cudnn_status_alloc_failed"
                      r"|defaultcpuallocator: can't allocate memory"),
    ("device lost", r"cuda error|cuda driver error|device-side assert|illegal memory access|uncorrectable ecc|"
                    r"unspecified launch failure|cublas_status|cudnn_status|nccl error|cudnn error|gpu is lost"
                    r"|fallen off the bus"),
)
_SENTENCES: dict[Failure, str] = {
    "device lost": "The GPU failed, and this process cannot use it again.\n"
                   "hint: nvidia-smi -q shows its errors; run the same command again without that GPU",
    "out of memory": "The GPU has too little memory.\nhint: a smaller --batch-size; nvidia-smi shows what else uses it",
    "old driver": "The NVIDIA driver is older than this torch needs (580 for CUDA 13).\n"
                  "hint: install a newer driver on this node; --gpus 0 computes on the CPU",
    "no device": "A GPU was reserved, but torch sees none that it can use.\n"
                 "hint: nvidia-smi and CUDA_VISIBLE_DEVICES on this node; --gpus 0 computes on the CPU",
    "none": "",
}


class DeviceUnavailable(RuntimeError):
    """A GPU that was reserved cannot be used. The message has torch's own reason and a hint."""


def reserve(choice: Choice) -> None:
    """Fix the device of this process: `cpu`, `cuda` (a GPU was reserved), or `auto` (a GPU if there is one)."""
    if choice not in ("auto", "cpu", "cuda"):
        raise ValueError(f"{_VARIABLE} = {choice!r}: must be auto, cpu or cuda")
    os.environ[_VARIABLE] = choice


def reserved() -> Choice:
    """The device that was reserved, in this process or in its parent."""
    choice = os.environ.get(_VARIABLE, "auto")
    if choice not in ("auto", "cpu", "cuda"):
        raise ValueError(f"{_VARIABLE} = {choice!r}: must be auto, cpu or cuda\nhint: unset {_VARIABLE}")
    return choice  # type: ignore[return-value]


def choose() -> "torch.device":
    """The device of this process. Raises DeviceUnavailable if a GPU was reserved and cannot be used."""
    import torch

    choice = reserved()
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    try:
        _probe()
    except (RuntimeError, AssertionError) as error:
        sentence = explain(error) or _SENTENCES["no device"]
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DeviceUnavailable(f"{reason}\n{sentence}") from error
    return torch.device("cuda")


def _probe() -> None:
    """Compute a small product on the GPU: a card can be listed and still be unusable."""
    import torch

    torch.cuda.init()
    one = torch.ones(16, 16, device="cuda")
    torch.mm(one, one).sum().item()


def kind_of(error: BaseException) -> Failure:
    """What an exception says of the device: by its type, then by its text, then by its cause."""
    torch_oom = type(error).__name__ in ("OutOfMemoryError", "OutOfMemory")
    if torch_oom or isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, DeviceUnavailable):
        return kind_of(error.__cause__) if error.__cause__ is not None else "no device"
    if isinstance(error, RuntimeError | AssertionError):
        text = str(error).lower()
        for kind, pattern in _PATTERNS:
            if re.search(pattern, text):
                return kind
    cause = error.__cause__
    return kind_of(cause) if cause is not None and cause is not error else "none"


def explain(error: BaseException) -> str:
    """A sentence and a hint for a failure of the device; empty if the exception is none."""
    return _SENTENCES[kind_of(error)]


@lru_cache(maxsize=1)
def describe() -> dict[str, str]:
    """Name, driver and memory of the device of this process, for records: {"name": ..., "driver": ...}."""
    import torch

    if choose().type == "cpu":
        return {"name": "CPU"}
    about = torch.cuda.get_device_properties(0)
    return {"name": about.name, "driver": _driver(), "memory_gb": f"{about.total_memory / 1e9:.0f}"}


def _driver() -> str:
    try:
        asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                               capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return asked.stdout.splitlines()[0].strip() if asked.stdout.strip() else "unknown"
