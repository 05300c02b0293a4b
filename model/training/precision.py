"""Which floating-point type the network computes in; weights and averages stay float32."""

from functools import lru_cache
from pathlib import Path

import torch


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type for autocast: float32 (no autocast) or bfloat16.

    Never float16: it gave users of the published model blank images.
    """
    if precision == "auto":
        return torch.bfloat16 if _bfloat16_pays(device) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def _bfloat16_pays(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Measured with a network of 1.6 M parameters, training on one thread of an EPYC core with avx512_bf16:
    # 110 images a second, 74 in float32. Without these instructions bfloat16 is emulated.
    return device.type == "cpu" and bool({"avx512_bf16", "amx_bf16"} & _cpu_flags())


@lru_cache(maxsize=1)
def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}
