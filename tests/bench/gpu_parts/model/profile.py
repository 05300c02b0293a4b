"""The GPU kernels of a training step by kind, in seconds. Runs only if `--only` names it."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from gpu_parts.model.train import random_batches, without_checkpointing
from gpu_parts.report import Report

from model import recipes
from model.config import TrainConfig
from model.training.train import train

# The first pattern that a kernel's name has gives its kind.
KINDS = {"attention": "flash|fmha|attention|softmax", "layout": "nchwtonhwc|nhwctonchw|transpose|permute",
         "optimizer": "multi_tensor|foreach|lerp", "convolution": "conv|fprop|dgrad|wgrad|cudnn|implicit",
         "product": "gemm|cutlass|nvjet|cublas|splitk", "normalization": "norm|welford|moments",
         "copy": "memcpy|memset|copy|cat", "reduction": "reduce", "elementwise": "elementwise|vectorized|triton"}
_SKIPPED, _MEASURED = 5, 5


def run(report: Report) -> None:
    """Profile the recipes of the papers in both memory formats."""
    if report.small:
        _profile(report, "tiny", replace(recipes.tiny(), global_batch=8), 64)
        return
    for name, side in (("imagenet_400m", 64), ("laion_1p3b", 48)):
        recipe = without_checkpointing(getattr(recipes, name)())
        for suffix, channels_last in (("", False), (", channels last", True)):
            with report.attempt(name + suffix):
                _profile(report, name + suffix, replace(recipe, global_batch=40, channels_last=channels_last), side)


def _profile(report: Report, name: str, config: TrainConfig, side: int) -> None:
    """Train a few steps; a row for the time, and one for each kind of kernel with its slowest kernels."""
    config = replace(config, steps=_SKIPPED + _MEASURED + 1, log_every=1, k=4, random_k=False,
                     checkpoint_every=10 ** 6)
    activity = torch.profiler.ProfilerActivity.CPU if report.small else torch.profiler.ProfilerActivity.CUDA
    logged: list[dict[str, Any]] = []
    schedule = torch.profiler.schedule(wait=_SKIPPED - 1, warmup=1, active=_MEASURED, repeat=1)
    seconds_by_kernel: Counter[str] = Counter()

    def collect(profile: torch.profiler.profile) -> None:
        for event in profile.key_averages():
            duration = event.self_cpu_time_total if report.small else event.self_device_time_total
            if not event.key.startswith("ProfilerStep"):  # a whole step
                seconds_by_kernel[event.key] += duration / 1e6 / _MEASURED

    with torch.profiler.profile(activities=[activity], schedule=schedule, on_trace_ready=collect) as profile:
        def log(row: dict[str, Any]) -> None:
            if "samples_per_s" in row:
                logged.append(row)
                profile.step()

        train(config, random_batches(config, side), device=report.device, save=lambda step, write: None, log=log)
    measured = sorted(logged[_SKIPPED:_SKIPPED + _MEASURED], key=lambda row: row["samples_per_s"])
    median = measured[_MEASURED // 2]
    busy = sum(seconds_by_kernel.values())
    report.figure(f"{name}: a step", 1e3 * config.global_batch / median["samples_per_s"], "ms",
                  f"MFU {median.get('mfu', 0):.3f}")
    report.figure(f"{name}: kernels in a step", 1e3 * busy, "ms", f"{len(seconds_by_kernel)} kinds of kernel")
    for kind in [*KINDS, "other"]:
        kernels = Counter({kernel: time for kernel, time in seconds_by_kernel.items() if _kind(kernel) == kind})
        if total := sum(kernels.values()):
            slowest = "; ".join(f"{1e3 * time:.1f} {_short(kernel)}" for kernel, time in kernels.most_common(4))
            report.figure(f"{name}: {kind}", 1e3 * total, "ms", slowest)


def _kind(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel.lower())), "other")


def _short(kernel: str) -> str:
    """The name of a kernel without the parts that all have."""
    short = re.sub(r"void |at::native::|\(anonymous namespace\)::|std::|<unnamed>::", "", kernel)
    return short[:110]
