"""One process of several of `nccl.py`. Rank 0 prints its measurements as a line of JSON."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[4]))

import numpy as np
import torch
import torch.distributed as dist

from model import recipes
from model.config import TrainConfig
from model.training.train import train


def main() -> None:
    """Join the group, measure or train, and leave."""
    what, kind, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    figures = _rates(device, rank, world) if what == "rates" else _resumable(device, rank, world, folder)
    if rank == 0:
        print(json.dumps(figures))
    dist.destroy_process_group()


def _rates(device: torch.device, rank: int, world: int) -> dict[str, float]:
    small = device.type == "cpu"
    recipe = recipes.tiny() if small else recipes.imagenet_400m()
    config = replace(recipe, steps=12, log_every=6, global_batch=(4 if small else 32) * world, k=4,
                     checkpoint_every=10**6, unet=replace(recipe.unet, checkpointing=False))
    figures = {"bus_gb_per_s": _bandwidth(device, world)}
    for name, change in (("ddp", {}), ("fsdp", {"fsdp": True})):
        log: list[dict[str, Any]] = []
        train(replace(config, **change), _batches(config, rank, world), device=device,
              save=lambda step, write: None, log=log.append)
        figures[name] = log[-1]["samples_per_s"] if log else 0.0
    return figures


def _bandwidth(device: torch.device, world: int) -> float:
    """Bus bandwidth of an all-reduce, GB/s: 2 (n - 1) / n of the bytes pass each link (NCCL's own tests)."""
    data = torch.ones((1 << 20) if device.type == "cpu" else (1 << 27), dtype=torch.bfloat16, device=device)
    for _ in range(3):
        dist.all_reduce(data)
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(10):
        dist.all_reduce(data)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 10 * data.nbytes * 2 * (world - 1) / max(1, world) / (time.perf_counter() - begun) / 1e9


def _resumable(device: torch.device, rank: int, world: int, folder: Path) -> dict[str, float]:
    """Train with checkpoints, from the newest one that exists."""
    config = replace(recipes.tiny(), steps=24, global_batch=2 * world, checkpoint_every=6, log_every=10)
    checkpoints = sorted((path.parent for path in folder.glob("*/checkpoint.json")), key=lambda path: int(path.name))

    def save(step: int, write: Any) -> None:
        scratch = folder / f"{step}.part"
        write(scratch)
        scratch.rename(folder / str(step))

    last_step = train(config, _batches(config, rank, world), device=device, save=save, log=lambda record: None,
                      resume=next((path for path in reversed(checkpoints) if path.name.isdigit()), None))
    return {"step": last_step}


def _batches(config: TrainConfig, rank: int, world: int) -> Any:
    unet, own_rows = config.unet, slice(rank * config.global_batch // world, (rank + 1) * config.global_batch // world)

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((3, step % 8))
        neighbors = rng.standard_normal((config.global_batch, config.k, unet.context_dim)).astype(np.float16)
        if unet.patch > 1:
            return {"image": rng.integers(0, 256, (config.global_batch, 64, 64, 3), np.uint8)[own_rows],
                    "neighbors": neighbors[own_rows]}
        latent = rng.standard_normal((config.global_batch, unet.in_channels, 64, 64), np.float32)
        return {"latent": latent.astype(np.float16)[own_rows], "neighbors": neighbors[own_rows]}

    return batch_at


if __name__ == "__main__":
    main()
