"""Training the denoiser, on one process or many, so that their number changes nothing but speed.

Letters: B pictures of this process (global batch / world size), C H W a picture or latent,
K stored and k used context vectors, D their dimension.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.nn.parallel import DistributedDataParallel

from model import checkpoint, diffusion, randomness
from model.config import TrainConfig
from model.ema import EMA
from model.precision import compute_dtype
from model.unet import UNet

Batch = dict[str, np.ndarray]
Write = Callable[[Path], None]


@dataclass
class State:
    """Everything that training changes; `step` counts finished updates."""

    model: UNet
    ema: EMA
    optimizer: optim.Optimizer
    step: int = 0


@dataclass(frozen=True)
class Inputs:
    """One step's share of this process: x0, eps (B, C, H, W), t (B,), context (B, k, D)."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    context: Tensor

    def to(self, device: torch.device) -> "Inputs":
        def move(x: Tensor) -> Tensor:
            if device.type == "cuda":
                return x.pin_memory().to(device, non_blocking=True)
            return x.to(device)

        return Inputs(move(self.x0), move(self.eps), move(self.t), move(self.context))


def train(
    config: TrainConfig,
    batch_at: Callable[[int], Batch],
    *,
    device: str | torch.device,
    save: Callable[[int, Write], None],
    log: Callable[[dict[str, Any]], None],
    resume: Path | None = None,
    stop: Callable[[], bool] | None = None,
) -> int:
    """Train until `config.steps` or until `stop()` is true anywhere, and return the step reached.

    batch_at(step) gives this process's contiguous slice of the global batch of that step (from
    0): `image` (B, H, W, 3) uint8 or `latent` (B, C, h, w) float16 already scaled, and
    `neighbors` (B, K, D) float16, K >= k, and where `config.own` asks for it `own` (B, D). It is
    called in a thread, one step ahead.
    On rank 0, save(step, write) is called every `checkpoint_every` steps and at the end, where
    write(folder) writes a complete checkpoint; log(record) every `log_every` steps, with the
    loss averaged over the global batch and the interval. `resume` is a folder so written.
    With torch.distributed initialised the global batch is shared by its processes.
    Raises ValueError if the batch cannot be shared evenly or `resume` does not fit, and
    FloatingPointError, saving nothing, where the loss or its gradient is not finite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if config.global_batch % world:
        raise ValueError(f"global_batch = {config.global_batch} does not divide by the world size {world}")
    device = torch.device(device)
    state = _start(config, device, resume)
    network = _shared(state.model, device) if dist.is_initialized() else state.model
    meter = _Meter(config)
    saved = state.step

    def publish() -> None:
        if rank == 0:
            save(state.step, lambda folder: _write(folder, state, config))

    with closing(_ahead(config, batch_at, rank, world, state.step)) as stream:
        for inputs in stream:
            leave = stop is not None and stop()
            loss, grad_norm, leave = _update(config, network, state, inputs.to(device), leave)
            record = meter.add(state.step, loss, grad_norm)
            if record and rank == 0:
                log(record)
            if leave:
                break
            if state.step % config.checkpoint_every == 0:
                publish()
                saved = state.step
    if saved != state.step:
        publish()
    if dist.is_initialized():
        # Nobody leaves before the last checkpoint is written: a launcher may end the group then.
        dist.barrier()
    return state.step


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of the update after `step` finished ones: linear warm-up, then constant."""
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup))


def _start(config: TrainConfig, device: torch.device, resume: Path | None) -> State:
    with torch.random.fork_rng(devices=[]):
        # Drawn on the CPU: the same first weights on every device and every process.
        torch.manual_seed(config.seed)
        model = UNet(config.unet)
    model = model.to(device).train()
    optimizer = optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    state = State(model, EMA(model, config.ema_decay), optimizer)
    if resume is not None:
        state.step = checkpoint.read(resume, model, state.ema, optimizer, config)
    if config.compile:
        model.compile()
    return state


def _shared(model: nn.Module, device: torch.device) -> nn.Module:
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def _write(folder: Path, state: State, config: TrainConfig) -> None:
    checkpoint.write(folder, state.model, state.ema, state.optimizer, state.step, config)


def _ahead(
    config: TrainConfig, batch_at: Callable[[int], Batch], rank: int, world: int, first: int
) -> Iterator[Inputs]:
    """The inputs of the steps from `first` on, the next always being prepared in a thread."""
    share = config.global_batch // world
    positions = range(rank * share, (rank + 1) * share)
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = None
        for step in range(first, config.steps):
            future = future or pool.submit(_prepare, config, batch_at, step, positions)
            inputs, future = future.result(), None
            if step + 1 < config.steps:
                future = pool.submit(_prepare, config, batch_at, step + 1, positions)
            yield inputs


def _prepare(config: TrainConfig, batch_at: Callable[[int], Batch], step: int, positions: range) -> Inputs:
    """One step's inputs, from its batch and from the random numbers of its positions."""
    batch = batch_at(step)
    if "latent" in batch:
        x0 = torch.from_numpy(batch["latent"]).float()  # (B, C, h, w)
    else:
        image = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)  # (B, 3, H, W)
        x0 = (image.float() / 127.5 - 1.0).contiguous()
    neighbors = torch.from_numpy(batch["neighbors"])  # (B, K, D)
    k = randomness.number(config.seed, "k", step, 1, config.k) if config.random_k else config.k
    wanted = (len(positions), config.k, config.unet.context_dim)
    found = (len(x0), min(neighbors.shape[1], config.k), neighbors.shape[2])
    if wanted != found or len(neighbors) != len(x0):
        raise ValueError(
            f"step {step}: batch of {len(x0)} pictures with neighbors {tuple(neighbors.shape)}, "
            f"but this process needs (B, at least k, D) = {wanted}"
        )
    context = _disturbed(config, neighbors[:, :k].float(), step, positions)  # (B, k, D)
    if config.own != "none":
        context = torch.cat([torch.from_numpy(batch["own"]).float()[:, None], context], dim=1)  # (B, 1 + k, D)
    context = config.context_norm * context
    # The condition of nobody is a set of zeros, as in the release's guidance.
    dropped = randomness.dropped(config.seed, step, positions, config.p_uncond)
    context = context.masked_fill(dropped[:, None, None], 0.0)
    eps = randomness.noise(config.seed, "noise", step, positions, x0.shape[1:])
    t = randomness.timesteps(config.seed, step, positions, config.diffusion.timesteps)
    return Inputs(x0, eps, t, context)


def _disturbed(config: TrainConfig, neighbors: Tensor, step: int, positions: range) -> Tensor:
    """Neighbours (B, k, D) with noise, each as long as before, and some of them left out."""
    if config.neighbor_noise:
        drawn = randomness.noise(config.seed, "neighbor noise", step, positions, neighbors.shape[1:])
        length = neighbors.norm(dim=-1, keepdim=True)
        # Noise of D numbers has the length sqrt(D).
        noisy = neighbors + config.neighbor_noise * length * drawn / neighbors.shape[-1] ** 0.5
        neighbors = torch.nn.functional.normalize(noisy, dim=-1) * length
    if config.p_drop_neighbor:
        draws = randomness.uniform(config.seed, "neighbor dropout", step, positions, neighbors.shape[1:2])
        neighbors = neighbors.masked_fill((draws < config.p_drop_neighbor)[..., None], 0.0)
    return neighbors


def _update(
    config: TrainConfig, network: nn.Module, state: State, inputs: Inputs, leave: bool
) -> tuple[float, float, bool]:
    """One optimiser step: loss and gradient norm of the global batch, and whether to leave."""
    device, number = inputs.x0.device, state.step + 1
    dtype = compute_dtype(config.precision, device)
    x_t = diffusion.q_sample(config.diffusion, inputs.x0, inputs.eps, inputs.t)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        answer = network(x_t, inputs.t, inputs.context)  # (B, C, H, W)
    losses = diffusion.loss(config.diffusion, answer, inputs.x0, inputs.eps, inputs.t)  # (B,)
    # Shares are equal, so the mean of the processes' means, which DDP takes, is the global mean.
    losses.mean().backward()
    shared = torch.tensor([0.0, float(leave)], dtype=torch.float64, device=device)
    shared[0] = losses.detach().mean()
    if dist.is_initialized():
        # One word for both: all processes see the same loss, and leave after the same step.
        dist.all_reduce(shared)
        shared /= dist.get_world_size()
    limit = config.grad_clip or math.inf
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), limit).item()
    loss, leaving = shared.tolist()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise FloatingPointError(
            f"step {number}: loss {loss}, gradient norm {grad_norm}; nothing was saved\n"
            "hint: resume from the last checkpoint, with a lower lr or a longer warmup in a new run"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.model)
    state.step = number
    return loss, grad_norm, leaving > 0


class _Meter:
    """Means over a logging interval, and the clock."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.begun = self.since = time.perf_counter()
        self.losses: list[float] = []

    def add(self, step: int, loss: float, grad_norm: float) -> dict[str, Any] | None:
        """Count a finished step; at the end of an interval, its record."""
        self.losses.append(loss)
        if step % self.config.log_every:
            return None
        now, count = time.perf_counter(), len(self.losses)
        record = {
            "step": step,
            "loss": sum(self.losses) / count,
            "lr": learning_rate(self.config, step - 1),
            "grad_norm": grad_norm,
            "samples_per_s": count * self.config.global_batch / (now - self.since),
            "seconds": now - self.begun,
        }
        self.since, self.losses = now, []
        return record
