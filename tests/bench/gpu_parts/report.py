"""Shared by the parts of `tests/bench/gpu.py`: the device, rows of figures with their gates, and timing."""

import contextlib
import json
import operator
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq}


@dataclass
class Row:
    """One figure. `status` is PASS or FAIL where there is a gate, else FIGURE; SKIP names the reason in `note`."""

    part: str
    name: str
    status: str
    value: float | str | None = None
    unit: str = ""
    gate: str = ""
    note: str = ""


@dataclass
class Report:
    """The rows of one part. Each row is written to `path` immediately, so a killed part keeps its figures."""

    part: str
    device: torch.device
    path: Path
    scratch: Path
    rows: list[Row] = field(default_factory=list)

    @property
    def small(self) -> bool:
        """Whether to use sizes for a CPU."""
        return self.device.type == "cpu"

    def size(self, on_gpu: int, on_cpu: int) -> int:
        """The size for this device."""
        return on_cpu if self.small else on_gpu

    def figure(self, name: str, value: float | str, unit: str = "", note: str = "") -> None:
        """Add a figure that has no gate."""
        self._add(Row(self.part, name, "FIGURE", value, unit, "", note))

    def speed(self, name: str, value: float, gate: str, unit: str = "", note: str = "") -> None:
        """Add a figure whose gate holds on a GPU only: on a CPU the figure has no gate."""
        if self.small:
            self.figure(name, value, unit, note)
        else:
            self.check(name, value, gate, unit, note)

    def check(self, name: str, value: float, gate: str, unit: str = "", note: str = "") -> None:
        """Add a figure with a gate such as ">= 0.95"."""
        comparison, bound = gate.split()
        # A figure that is not a number passes no gate.
        good = value == value and _COMPARISONS[comparison](value, float(bound))
        self._add(Row(self.part, name, "PASS" if good else "FAIL", value, unit, gate, note))

    def expect(self, name: str, good: bool, wanted: str, note: str = "") -> None:
        """Add a yes-or-no check."""
        self._add(Row(self.part, name, "PASS" if good else "FAIL", "yes" if good else "no", "", wanted, note))

    def skip(self, name: str, reason: str) -> None:
        """Add a check that cannot run here."""
        self._add(Row(self.part, name, "SKIP", None, "", "", reason))

    def fail(self, name: str, reason: str) -> None:
        """Add a check that raised or ran out of time."""
        self._add(Row(self.part, name, "FAIL", None, "", "", reason))

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Turn an exception of one check into a FAIL row, so that the next check still runs."""
        try:
            yield
        except Exception as error:
            self.fail(name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        finally:
            if self.device.type == "cuda":
                with contextlib.suppress(Exception):
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a") as stream:
            stream.write(json.dumps(asdict(row)) + "\n")
        print(line(row), flush=True)


def line(row: Row) -> str:
    """A row for the terminal."""
    value = f"{row.value:.4g}" if isinstance(row.value, float) else "" if row.value is None else str(row.value)
    text = f"{row.status:6} {row.part:9} {row.name:48} {value:>10} {row.unit:10} {row.gate:9}"
    return f"{text} {row.note}".rstrip()


def wait(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 5, warm: int = 1) -> float:
    """Median seconds of a call, the device idle before and after."""
    for _ in range(warm):
        call()
    durations = []
    for _ in range(repeats):
        wait(device)
        begun = time.perf_counter()
        call()
        wait(device)
        durations.append(time.perf_counter() - begun)
    return statistics.median(durations)


def products_per_second(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Floating-point operations a second of a product of two random square matrices."""
    left_matrix, right_matrix = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    inner = 4 if device.type == "cpu" else 20

    def multiply() -> None:
        for _ in range(inner):
            torch.mm(left_matrix, right_matrix)

    return 2.0 * side ** 3 * inner / seconds(multiply, device)


def synchronizations(call: Callable[[], object], device: torch.device) -> list[str]:
    """Code lines at which a call made the host wait for the GPU: the texts of the warnings of torch."""
    if device.type != "cuda":
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught
            if "synchroniz" in str(warning.message)]


def lines_by_count(places: list[str]) -> str:
    """Code lines such as search.py:120 with their counts."""
    return ", ".join(f"{place} x{places.count(place)}" for place in sorted(set(places), key=places.count)[::-1][:5])
