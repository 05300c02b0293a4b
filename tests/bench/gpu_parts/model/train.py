"""Training: `model.train` on random latents, for the recipes of the papers.

MFU counts the operations that the network needs; what checkpointing computes again is not counted (PaLM, Chowdhery et
al. 2022, arXiv:2204.02311, appendix B).
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_parts.report import Report, lines_by_count, synchronizations

from model import recipes
from model.config import TrainConfig
from model.training.train import train
from model.weights import checkpoint

_K = 4


def run(report: Report) -> None:
    """Check laws first, because they are quick; then measure rates, the largest network last."""
    small = _small(report)
    with report.attempt("bf16 and fp32"):
        _precisions(report, small)
    with report.attempt("resume"):
        _resume(report, small)
    with report.attempt("waits"):
        _waits(report, small)
    for name, change in (("DDP", {}), ("FSDP2", {"fsdp": True})):
        with report.attempt(f"{name} in one process"):
            _one_process(report, small, name, change)
    if report.device.type == "cuda":
        with report.attempt("out of memory"):
            _out_of_memory(report)
    _rates(report)


def _small(report: Report) -> TrainConfig:
    recipe = recipes.tiny() if report.small else recipes.emoji_64()
    return replace(recipe, steps=12, global_batch=report.size(64, 8), warmup=4, checkpoint_every=1000, log_every=12,
                   random_k=False, k=_K)


def random_batches(config: TrainConfig, side: int) -> Callable[[int], dict[str, np.ndarray]]:
    """Eight random batches, repeated: latents, or images if the network takes those."""
    rng = np.random.default_rng(0)
    unet, count = config.unet, config.global_batch

    def batch() -> dict[str, np.ndarray]:
        neighbors = rng.standard_normal((count, config.k, unet.context_dim))
        neighbors /= np.linalg.norm(neighbors, axis=-1, keepdims=True)
        if unet.patch > 1:
            target = {"image": rng.integers(0, 256, (count, side, side, 3), np.uint8)}
        else:
            latents = rng.standard_normal((count, unet.in_channels, side, side), np.float32)
            target = {"latent": latents.astype(np.float16)}
        return target | {"neighbors": neighbors.astype(np.float16)}

    batches = [batch() for _ in range(8)]
    return lambda step: batches[step % len(batches)]


def _train(config: TrainConfig, report: Report, side: int, *, save: Any = None, resume: Path | None = None
           ) -> list[dict[str, Any]]:
    """Train on random batches; the log."""
    log: list[dict[str, Any]] = []
    train(config, random_batches(config, side), device=report.device, save=save or (lambda step, write: None),
          log=log.append, resume=resume)
    return log


def _precisions(report: Report, config: TrainConfig) -> None:
    losses = {precision: _train(replace(config, precision=precision), report, 64)[-1]["loss"]
              for precision in ("fp32", "bf16")}
    difference = abs(losses["bf16"] / losses["fp32"] - 1)
    report.check("loss of bf16 against fp32", difference, "<= 0.01", "", f"mean of {config.steps} steps: {losses}")


def _resume(report: Report, config: TrainConfig) -> None:
    """Equal bits of a run that was never stopped and of one that resumed half-way."""
    def save_under(name: str) -> Any:
        return lambda step, write: write(report.scratch / name / str(step))

    _train(config, report, 64, save=save_under("whole"))
    _train(config, report, 64, save=save_under("again"))
    _train(replace(config, steps=6), report, 64, save=save_under("half"))
    _train(config, report, 64, save=save_under("half"), resume=report.scratch / "half/6")
    whole, again, half = (_weights(report.scratch / name / "12") for name in ("whole", "again", "half"))
    report.expect("two equal runs give equal weights", _equal_weights(whole, again), "yes", _difference(whole, again))
    report.expect("a resumed run gives equal weights", _equal_weights(whole, half), "yes", _difference(whole, half))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_denoiser(folder, ema=False)[0].state_dict()


def _equal_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def _difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> str:
    largest = max(float((first[name] - second[name]).abs().max()) for name in first)
    return f"largest difference {largest:.1e}"


def _waits(report: Report, config: TrainConfig) -> None:
    """Waits for the GPU in a step, from the difference of a long and a short run."""
    few, many = (synchronizations(lambda steps=steps: _train(replace(config, steps=steps), report, 64),
                                  report.device) for steps in (4, 12))
    if report.device.type == "cuda":
        report.check("waits for the GPU in a step", (len(many) - len(few)) / 8, "<= 1", "", lines_by_count(many))


def _one_process(report: Report, config: TrainConfig, name: str, change: dict[str, Any]) -> None:
    """Losses under torch.distributed with one process, compared with a run without it."""
    alone = _train(config, report, 64)[-1]["loss"]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29731", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("nccl" if report.device.type == "cuda" else "gloo")
    try:
        loss = _train(replace(config, **change), report, 64)[-1]["loss"]
    finally:
        torch.distributed.destroy_process_group()
    report.check(f"loss under {name} in one process / alone", abs(loss / alone - 1), "<= 0.001", "", f"{loss:.6f}")


def _out_of_memory(report: Report) -> None:
    """A batch that cannot fit is refused with a hint, and the card is usable afterwards."""
    config = replace(recipes.emoji_64(), steps=1, global_batch=64, k=_K, random_k=False)
    limit = 2 << 30
    torch.cuda.set_per_process_memory_fraction(
        limit / torch.cuda.get_device_properties(report.device).total_memory, report.device)
    try:
        _train(config, report, 128)
        report.expect("out of memory is MemoryError", False, "yes", "2 GB were enough")
    except MemoryError as error:
        report.expect("out of memory is MemoryError", "hint:" in str(error), "yes", str(error).split("\n")[-1])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, report.device)


def _rates(report: Report) -> None:
    if report.small:
        log = _train(replace(_small(report), steps=6, log_every=3), report, 64)
        report.figure("tiny: rate", log[-1]["samples_per_s"], "images/s")
        return
    memory = torch.cuda.get_device_properties(report.device).total_memory
    cases = [("emoji_64", recipes.emoji_64(), 64, {"global_batch": 256}, 0.0),
             ("imagenet_400m, checkpointing", recipes.imagenet_400m(), 64, {"global_batch": 40}, 0.0),
             ("imagenet_400m", without_checkpointing(recipes.imagenet_400m()), 64, {"global_batch": 40}, 0.35),
             ("imagenet_400m, channels last", without_checkpointing(recipes.imagenet_400m()), 64,
              {"global_batch": 40, "channels_last": True}, 0.0),
             ("laion_1p3b, checkpointing", recipes.laion_1p3b(), 48, {"global_batch": 40}, 0.0),
             ("laion_1p3b", without_checkpointing(recipes.laion_1p3b()), 48,
              {"global_batch": 40, "accumulate": 1 if memory > 100 << 30 else 2}, 0.4)]
    for name, recipe, side, overrides, min_mfu in cases:
        with report.attempt(name):
            torch.cuda.reset_peak_memory_stats()
            steps, since = (20, 10) if name == "emoji_64" else (12, 6)
            config = replace(recipe, steps=steps, log_every=since, k=_K, random_k=False, checkpoint_every=10**6,
                             **overrides)
            measure_rate(report, name, config, side, min_mfu)


def without_checkpointing(recipe: TrainConfig) -> TrainConfig:
    """The recipe without checkpointing: all activations are kept for the backward pass."""
    return replace(recipe, unet=replace(recipe.unet, checkpointing=False))


def measure_rate(report: Report, name: str, config: TrainConfig, side: int, min_mfu: float) -> None:
    saved: dict[str, float] = {}

    def save(step: int, write: Callable[[Path], None]) -> None:
        if name != "laion_1p3b":
            return
        begun = time.perf_counter()
        write(report.scratch / "large")
        saved["write"] = time.perf_counter() - begun
        saved["bytes"] = float(sum(path.stat().st_size for path in (report.scratch / "large").iterdir()))

    gather_contents = checkpoint.gather_contents

    def gather_and_time(*arguments: Any) -> checkpoint.Contents:
        begun = time.perf_counter()
        contents = gather_contents(*arguments)
        saved["copy"] = time.perf_counter() - begun
        return contents

    begun = time.perf_counter()
    checkpoint.gather_contents = gather_and_time  # to time the copy from the device too
    try:
        log = _train(config, report, side, save=save)
    finally:
        checkpoint.gather_contents = gather_contents
    last = log[-1]
    note = (f"{last['samples_per_s']:.1f} images/s, batch {config.global_batch} in {config.accumulate}, "
            f"{last['memory_gb']:.1f} GB, waiting for data {last['data_wait']:.2f}, "
            f"{time.perf_counter() - begun:.0f} s with start")
    if min_mfu:
        report.check(f"{name}: MFU", last.get("mfu", float("nan")), f">= {min_mfu}", "", note)
    elif "mfu" in last:
        report.figure(f"{name}: MFU", last["mfu"], "", note)
    else:
        report.figure(f"{name}: rate", last["tflops_per_s"], "TFLOP/s", note)
    if "bytes" in saved:
        report.check("saving the largest checkpoint stops training for", saved["copy"] + saved["write"], "<= 5", "s",
                     f"{saved['bytes'] / 1e9:.1f} GB: {saved['copy']:.1f} s to host, {saved['write']:.1f} s to disk")
