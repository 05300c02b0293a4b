"""The one place that chooses where tensors are computed, and that recognizes why a device failed.

A process computes on the device that it reserved, and never on another one. A worker reserves what its driver gave it.
A process that reserved nothing (`--local`, a script) uses the GPU if there is one.
"""

import contextlib
import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Choice = Literal["auto", "cpu", "cuda"]
Failure = Literal["device lost", "out of memory", "old driver", "no device", "none"]
HALVED = "halved"  # key in the `run.times` of a record: which batch was halved, and why
_log = logging.getLogger(__name__)
_VARIABLE = "RDM_DEVICE"  # child processes inherit it

# Texts of torch and of the CUDA runtime, in the order in which they are tried: an error of a lost device may name
# memory.
_PATTERNS: tuple[tuple[Failure, str], ...] = (
    ("old driver", r"driver on your system is too old|driver version is insufficient|system has unsupported display "
                   r"driver|forward compatibility was attempted|system.driver.mismatch"),
    ("no device", r"no cuda gpus are available|no cuda-capable device|invalid device ordinal|not compiled with cuda"
                  r"|found no nvidia driver|no nvidia driver|devices? (is|are) busy or unavailable"
                  r"|no kernel image is available|might not have a cuda gpu|cuda unknown error"),
    ("out of memory", r"out of memory|cublas_status_alloc_failed|cudnn_status_alloc_failed"
                      r"|defaultcpuallocator: can't allocate memory"),
    ("device lost", r"cuda error|cuda driver error|device-side assert|illegal memory access|uncorrectable ecc|"
                    r"unspecified launch failure|cublas_status|cudnn_status|nccl error|cudnn error|gpu is lost"
                    r"|fallen off the bus|triton error \[cuda\]|hip error|unexpected error from cudagetdevicecount"
                    r"|cuda_error_"),
)
_SENTENCES: dict[Failure, str] = {
    "device lost": "The GPU failed, and this process cannot use it again.\n"
                   "hint: nvidia-smi -q shows its errors; run the same command again without that GPU",
    "out of memory": "The device has too little memory.\n"
                     "hint: a smaller --batch-size; on a GPU, nvidia-smi shows what else uses it",
    "old driver": "The NVIDIA driver is older than this torch needs (580 for CUDA 13).\n"
                  "hint: install a newer driver on this node; --gpus 0 computes on the CPU",
    "no device": "A GPU was reserved, but torch sees none that it can use.\n"
                 "hint: nvidia-smi and CUDA_VISIBLE_DEVICES on this node; --gpus 0 computes on the CPU",
    "none": "",
}
_NO_MEMORY = ("The machine has too little memory for this.\n"
              "hint: python -m jobs doctor; it shows the memory. End other programs there, or let fewer workers "
              "work on it")


class DeviceUnavailable(RuntimeError):
    """A GPU that was reserved cannot be used. The message has torch's own reason and a hint."""


class OutOfDeviceMemory(RuntimeError):
    """A batch of one does not fit the memory of the device."""


def reserve(device: Choice) -> None:
    """Fix the device of this process: `cpu`, `cuda` (a GPU was reserved), or `auto` (a GPU if there is one)."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"{_VARIABLE} = {device!r}: must be auto, cpu or cuda")
    os.environ[_VARIABLE] = device


def hide_gpus() -> None:
    """Hide all GPUs from this process and its children: Ray shows them also to workers that reserved none."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextlib.contextmanager
def reserve_temporarily(device: Choice) -> Iterator[None]:
    """`reserve` for the time of a block."""
    before = os.environ.get(_VARIABLE)
    reserve(device)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


def reserved_device() -> Choice:
    """The device that was reserved, in this process or in its parent."""
    device = os.environ.get(_VARIABLE, "auto")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"{_VARIABLE} = {device!r}: must be auto, cpu or cuda\nhint: unset {_VARIABLE}")
    return device  # type: ignore[return-value]


def choose_device(number: int | None = None) -> "torch.device":
    """The device of this process; with `number` that one of its GPUs, as each process of torchrun takes another.

    Raises DeviceUnavailable if a GPU was reserved and cannot be used.
    """
    import torch

    device = reserved_device()
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        _mention_unused(device)
        return torch.device("cpu")
    try:
        _probe(number)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise DeviceUnavailable(f"a GPU was reserved on {platform.node()} and cannot be used: {reason}\n"
                                f"CUDA_VISIBLE_DEVICES is {visible or 'empty'}. "
                                f"{failure_hint(error) or _SENTENCES['no device']}") from error
    _mention_slice(torch.cuda.get_device_name())
    return torch.device("cuda", torch.cuda.current_device())


@lru_cache(maxsize=8)
def _probe(number: int | None) -> None:
    """Compute a small product on the GPU: a card can be listed and still be unusable."""
    import torch

    torch.cuda.init()
    if number is not None:
        torch.cuda.set_device(number)
    matrix = torch.ones(16, 16, device="cuda")
    torch.mm(matrix, matrix).sum().item()


@lru_cache(maxsize=2)
def _mention_unused(device: Choice) -> None:
    """Log once that there is a GPU which this process does not use."""
    import torch

    if device == "cpu" and torch.cuda.is_available():
        _log.info("this computes on the CPU, as --gpus 0 says; there is a GPU here: %s", torch.cuda.get_device_name())


@lru_cache(maxsize=8)
def _mention_slice(name: str) -> None:
    """Log once that the GPU is a slice of one."""
    if " MIG " in name:
        _log.warning("%s is a slice of a GPU: it has a part of its memory and rate, and processes of one training run "
                     "on slices cannot reach each other through NCCL", name)


@contextlib.contextmanager
def explain_failures(what: str) -> Iterator[None]:
    """Turn a failure of the device inside into DeviceUnavailable, which says what it happened to, and a hint."""
    try:
        yield
    except (DeviceUnavailable, OutOfDeviceMemory):
        raise
    except RuntimeError as error:
        if failure_kind(error) == "none":
            raise
        reason = (str(error) or repr(error)).splitlines()[0]
        raise DeviceUnavailable(f"{what}: {reason}\n{failure_hint(error)}") from error


def failure_kind(error: BaseException) -> Failure:
    """The kind of a device failure: by the type of the exception, then by its text, then by its cause."""
    torch_oom = type(error).__name__ in ("OutOfMemoryError", "OutOfMemory")
    if torch_oom or isinstance(error, MemoryError | OutOfDeviceMemory):
        return "out of memory"
    if isinstance(error, DeviceUnavailable):
        return failure_kind(error.__cause__) if error.__cause__ is not None else "no device"
    if isinstance(error, RuntimeError | AssertionError):
        text = str(error).lower()
        for kind, pattern in _PATTERNS:
            if re.search(pattern, text):
                return kind
        torch = sys.modules.get("torch")  # not imported for this: without it there is no exception of torch
        if torch and isinstance(error, torch.AcceleratorError):
            return "device lost"
    cause = error.__cause__
    return failure_kind(cause) if cause is not None and cause is not error else "none"


def is_unusable(error: BaseException) -> bool:
    """Whether this process cannot use its device any more after this exception."""
    return failure_kind(error) in ("device lost", "no device", "old driver")


def failure_hint(error: BaseException) -> str:
    """A sentence and a hint for a failure of the device; empty if the exception is none."""
    kind = failure_kind(error)
    return _NO_MEMORY if kind == "out of memory" and _is_of_machine(error) else _SENTENCES[kind]


def _is_of_machine(error: BaseException | None) -> bool:
    """Whether the memory of the machine is too small, and not that of a device: Python and NumPy raise MemoryError."""
    return error is not None and (isinstance(error, MemoryError) or _is_of_machine(error.__cause__))


def describe_failure(kind: Failure) -> str:
    """The sentence of `explain` alone, without the hint; empty for "none"."""
    return _SENTENCES[kind].partition("\n")[0].rstrip(".")


def visible_cards() -> str:
    """The GPUs that this process sees, without CUDA of torch: for libraries that bring their own."""
    return f"{list_cards(os.environ.get('CUDA_VISIBLE_DEVICES', '')) or 'GPU'}, driver {_driver()}"


def list_cards(visible: str) -> str:
    """Names and UUIDs of the GPUs in a CUDA_VISIBLE_DEVICES, as nvidia-smi lists them; empty if it cannot.

    torch would initialize CUDA for this. That takes memory of the GPU, and fails on a broken one.
    """
    return ", ".join(line.replace(", ", " ") for line in _query_driver("name,uuid", visible))


def _query_driver(fields: str, visible: str = "") -> list[str]:
    """The lines of nvidia-smi for some fields, one for each GPU; none if it cannot answer."""
    try:
        listed = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader",
                                 *(["-i", visible] if visible else [])],
                                capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]


def describe_device(precision: str = "") -> str:
    """The device that this process computed on, for records: name, driver and precision.

    A process that never touched a GPU computed on its CPU: this initializes no CUDA.
    """
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    return ", ".join(filter(None, [_gpu() if on_gpu else _cpu(), precision]))


def dtype_name(dtype: "torch.dtype") -> str:
    """fp32, bf16 or fp16."""
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)


@lru_cache(maxsize=1)
def _gpu() -> str:
    import torch

    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{about.name} ({about.total_memory / 2 ** 30:.0f} GiB), driver {_driver()}"


@lru_cache(maxsize=1)
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"CPU {name or platform.machine()}"


@lru_cache(maxsize=1)
def _driver() -> str:
    return next(iter(_query_driver("driver_version")), "unknown")


class BatchFit:
    """The largest batch that fits the memory of this process's device.

    It is halved after each out of memory, and stays at that. Each kind of batch has its own; threads may share it.
    """

    def __init__(self, unit: str = "batch") -> None:
        self.unit = unit
        self.most: int | None = None
        """The largest size that is tried, None as long as every size fitted."""
        self.note = ""
        """For the record of an item: "from 256 to 128 after out of memory on ...". Empty if nothing was halved."""
        self._first = 0

    def __call__(self, batch: Any, size: int, compute: Callable[[Any, int], Any],
                 join: Callable[[list[Any]], Any]) -> Any:
        """`compute(rows, most)` for a batch of at most `size` rows, or its parts of `most` rows joined.

        `compute` may return more rows than it was given; they are cut off. OutOfDeviceMemory if one row does not fit.
        """
        while True:
            most = min(size, self.most or size)
            try:
                if len(batch) <= most:
                    return compute(batch, most)
                parts = [batch[start:start + most] for start in range(0, len(batch), most)]
                return join([compute(part, most)[:len(part)] for part in parts])
            except RuntimeError as error:
                if failure_kind(error) != "out of memory":
                    raise
                text = (str(error) or repr(error)).splitlines()[0]
            # After the handler: while it runs, the traceback keeps the tensors of the failed pass.
            self.halve(most, text)

    def halve(self, most: int, text: str) -> None:
        """Note that `most` rows do not fit; OutOfDeviceMemory if that is one."""
        free_cached_memory()
        if most <= 1:
            raise OutOfDeviceMemory(f"a {self.unit} of {most} does not fit the memory of {_device()}: {text}\n"
                                    f"expected room for one, got none\nhint: nvidia-smi lists the processes that use "
                                    f"it")
        self._first = max(self._first, most)
        self.most = min(most // 2, self.most or most)
        self.note = f"from {self._first} to {self.most} after out of memory on {_device()}"
        _log.warning("%s halved from %d to %d after out of memory on %s: %s", self.unit, most, self.most, _device(),
                     text)

    def times(self) -> dict[str, str]:
        """The note as an entry of `Output.times`, if there is one."""
        return {HALVED: f"{self.unit} {self.note}"} if self.note else {}


def free_cached_memory() -> None:
    """Give the device's memory that torch caches back to it."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return f"{torch.cuda.get_device_name()} of {platform.node()}" + (f" (GPU {visible})" if visible else "")
    return f"the device of {platform.node()}"
