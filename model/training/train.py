"""Training the denoiser, on one process or many, so that their number changes nothing but speed.

Letters: B pictures of this process (global batch / world size), C H W a picture or latent,
K stored and k used context vectors, D their dimension.
"""

import contextlib
import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from model.config import TrainConfig
from model.diffusion import process
from model.network.unet import UNet
from model.training import flops
from model.training.inputs import Batch, Inputs, prefetch_inputs
from model.training.precision import compute_dtype
from model.weights import checkpoint
from model.weights.checkpoint import full_tensor
from model.weights.ema import EMA

Write = Callable[[Path], None]
_LEVELS = 4  # parts of the noise levels whose losses are told apart


@dataclass
class State:
    """Everything that training changes; `step` counts finished updates."""

    model: UNet
    ema: EMA
    optimizer: optim.Optimizer
    step: int = 0


def train(
    config: TrainConfig,
    batch_at: Callable[[int], Batch],
    *,
    device: str | torch.device,
    save: Callable[[int, Write], None],
    log: Callable[[dict[str, Any]], None],
    resume: Path | None = None,
    stop: Callable[[], bool] | None = None,
    validate: Callable[[int, UNet], dict[str, Any]] | None = None,
) -> int:
    """Train until `config.steps` or until `stop()` is true anywhere, and return the step reached.

    batch_at(step) gives this process's contiguous slice of the global batch of that step (from
    0): `image` (B, H, W, 3) uint8 or `latent` (B, C, h, w) float16 already scaled, and
    `neighbors` (B, K, D) float16, K >= k, and where `config.own` asks for it `own` (B, D). It is
    called in a thread, one step ahead.
    On rank 0, save(step, write) is called every `checkpoint_every` steps and at the end, where
    write(folder) writes a complete checkpoint; log(record) every `log_every` steps, with the
    loss averaged over the global batch and the interval; validate(step, network), given the
    averaged network, every `validate_every` steps, what it returns being logged by itself (all
    processes are to be given one, or none).
    `resume` is a folder so written. With torch.distributed initialised process r of w has the
    pictures r B / w .. (r + 1) B / w of the global batch B.
    Raises ValueError if there are more processes than pictures or `resume` does not fit, and,
    saving nothing, FloatingPointError where the loss or its gradient is not finite and
    MemoryError where the device has too little memory.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if config.global_batch < world:
        raise ValueError(f"global_batch = {config.global_batch} is less than a picture for each of {world} processes")
    device = torch.device(device)
    with _explain_out_of_memory(config, world, loading=True):
        state = _initial_state(config, device, resume)
        network = _wrap_in_ddp(state.model, device) if dist.is_initialized() and not config.fsdp else state.model
    meter = _Meter(config, device, world)
    saved = state.step
    every = config.validate_every or config.checkpoint_every

    def publish() -> None:
        # Where each process has a part of everything, all of them bring theirs.
        whole = checkpoint.gather_contents(state.model, state.ema, state.optimizer, rank == 0)
        if rank == 0:
            save(state.step, lambda folder: checkpoint.write(folder, whole, state.step, state.ema.updates, config))

    with (_explain_out_of_memory(config, world),
          closing(prefetch_inputs(config, batch_at, rank, world, state.step)) as stream):
        for inputs, waited in stream:
            leave = stop is not None and stop()
            done = _update(config, network, state, inputs.to(device), leave)
            record = meter.add(state.step, done, waited, inputs)
            if record and rank == 0:
                log(record)
            if validate and (state.step % every == 0 or state.step == config.steps):
                with meter.paused():
                    averaged = _averaged_network(state, config)
                    if rank == 0:
                        log({"step": state.step, **validate(state.step, averaged)})
            if done.leaving:
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


def _initial_state(config: TrainConfig, device: torch.device, resume: Path | None) -> State:
    with torch.random.fork_rng(devices=[]):
        # Drawn on the CPU: the same first weights on every device and every process.
        torch.manual_seed(config.seed)
        model = UNet(config.unet)
    model = model.to(device).train()
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.fsdp and dist.is_initialized():
        _shard_weights(model, device)
    optimizer = optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    state = State(model, EMA(model, config.ema_decay, config.ema_more), optimizer)
    if resume is not None:
        state.step = checkpoint.read(resume, model, state.ema, optimizer, config)
    if config.compile:
        model.compile()
    return state


def _wrap_in_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def _shard_weights(model: UNet, device: torch.device) -> None:
    """Leave each process its part of the weights; a block's are brought together while it works."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in (*model.input_blocks, model.middle_block, *model.output_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _averaged_network(state: State, config: TrainConfig) -> UNet:
    """A network of its own with the averaged weights, to be looked at."""
    with torch.device("meta"):
        network = UNet(config.unet)
    # No copy, unless it is in parts: nothing is trained meanwhile.
    network.load_state_dict({name: full_tensor(weight) for name, weight in state.ema.weights.items()}, assign=True)
    return network.eval().requires_grad_(False)


@contextlib.contextmanager
def _explain_out_of_memory(config: TrainConfig, world: int, loading: bool = False) -> Iterator[None]:
    """MemoryError, naming what to change, where torch has none left; `loading`: not even for the network."""
    try:
        yield
    except RuntimeError as error:
        # On a CPU it is no error of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        if loading:
            raise MemoryError(f"the network, its average and the optimizer's moments do not fit the memory: "
                              f"{str(error).splitlines()[0]}\nhint: --fsdp divides them among several workers; "
                              f"nvidia-smi shows what else uses the GPU") from error
        share = -(-config.global_batch // world)
        raise MemoryError(
            f"out of memory with {share} pictures a process in {config.accumulate} parts: "
            f"{str(error).splitlines()[0]}\nhint: --accumulate {2 * config.accumulate} (the same updates), "
            f"--checkpointing or more workers; nothing after the last checkpoint was saved") from error


@dataclass(frozen=True)
class _StepResult:
    """What came of a step, of the global batch: sums of the loss and counts of pictures by quarter of noise levels."""

    loss: float
    grad_norm: float
    leaving: bool
    by_level: Tensor
    """(2, 4) float64."""


def _update(config: TrainConfig, network: nn.Module, state: State, inputs: Inputs, leave: bool) -> _StepResult:
    """One optimiser step."""
    device, number = inputs.x0.device, state.step + 1
    world = dist.get_world_size() if dist.is_initialized() else 1
    # The loss, whether to leave, and the losses by level: one word for all, so that all processes see the same.
    shared = torch.zeros(2 + 2 * _LEVELS, dtype=torch.float64, device=device)
    # As many parts in every process, whose shares may differ by a picture: FSDP2 has them wait for each other.
    count = min(config.accumulate, config.global_batch // world)
    parts = list(zip(*(tensor.tensor_split(count) for tensor in (inputs.x0, inputs.eps, inputs.t, inputs.context)),
                     strict=True))
    for place, (x0, eps, t, context) in enumerate(parts):
        with _gradient_sync(network, last=place == len(parts) - 1):
            losses = _losses(config, network, x0, eps, t, context)  # (B,)
            # DDP takes the mean of the processes' gradients, whose shares may differ by a picture.
            (losses.sum() / (config.global_batch / world)).backward()
        losses = losses.detach()
        shared[0] += losses.sum() / (config.global_batch / world)
        level = (t * _LEVELS // config.diffusion.timesteps).clamp(max=_LEVELS - 1)
        shared[2:2 + _LEVELS].index_add_(0, level, losses.double())
        shared[2 + _LEVELS:].index_add_(0, level, torch.ones_like(losses, dtype=torch.float64))
    shared[1].fill_(float(leave))  # an assignment would wait for the GPU
    if dist.is_initialized():
        dist.all_reduce(shared)
        shared[:2] /= world
    limit = config.grad_clip or math.inf
    norm = full_tensor(nn.utils.clip_grad_norm_(state.model.parameters(), limit))
    shared = torch.cat([shared, norm.double()[None]]).cpu()  # the only wait for the GPU in a step
    loss, leaving, *_, grad_norm = shared.tolist()
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
    return _StepResult(loss, grad_norm, leaving > 0, shared[2:-1].reshape(2, _LEVELS))


@contextlib.contextmanager
def _gradient_sync(network: nn.Module, *, last: bool) -> Iterator[None]:
    """Add the processes' gradients up after the last part of a step only."""
    if isinstance(network, DistributedDataParallel) and not last:
        with network.no_sync():
            yield
    else:
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        yield


def _losses(config: TrainConfig, network: nn.Module, x0: Tensor, eps: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """The loss of each picture (B,)."""
    dtype = compute_dtype(config.precision, x0.device)
    x_t = process.q_sample(config.diffusion, x0, eps, t)
    if config.channels_last:
        x_t = x_t.contiguous(memory_format=torch.channels_last)
    with torch.autocast(x0.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        answer = network(x_t, t, context)  # (B, C, H, W)
    return process.loss(config.diffusion, answer, x0, eps, t)


class _Meter:
    """Means over a logging interval, and the clock."""

    def __init__(self, config: TrainConfig, device: torch.device, world: int):
        self.config, self.device, self.world = config, device, world
        self.begun = self.since = time.perf_counter()
        self.waited = 0.0
        self.losses: list[float] = []
        self.by_level = torch.zeros(2, _LEVELS, dtype=torch.float64)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside belongs to no step."""
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def add(self, step: int, done: _StepResult, waited: float, inputs: Inputs) -> dict[str, Any] | None:
        """Count a finished step; at the end of an interval, its record."""
        self.losses.append(done.loss)
        self.by_level += done.by_level
        self.waited += waited
        if step % self.config.log_every:
            return None
        now, count = time.perf_counter(), len(self.losses)
        seconds = max(now - self.since, 1e-9)
        samples_per_s = count * self.config.global_batch / seconds
        sums, counts = self.by_level
        record = {
            "step": step,
            "loss": sum(self.losses) / count,
            # From the least noise to the most; a quarter that no picture fell into has none.
            **{f"loss_{number + 1}_of_{_LEVELS}": (sums[number] / counts[number]).item()
               for number in range(_LEVELS) if counts[number]},
            "lr": learning_rate(self.config, step - 1),
            "grad_norm": done.grad_norm,
            "samples_per_s": samples_per_s,
            "data_wait": min(1.0, self.waited / seconds),
            "memory_gb": _peak_memory(self.device) / 1e9,
            **self._operations(samples_per_s, inputs),
            "seconds": now - self.begun,
        }
        self.since, self.losses, self.waited = now, [], 0.0
        self.by_level.zero_()
        return record

    def _operations(self, samples_per_s: float, inputs: Inputs) -> dict[str, float]:
        """Operations a second of all processes, and the share of what their GPUs could do, if that is known."""
        each = flops.size(self.config.unet, inputs.x0.shape[-1], self.config.k)
        # What goes forwards again to save memory is no work that the model needs.
        done = samples_per_s * each.training(checkpointing=False)
        peak = flops.peak(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return {"tflops_per_s": done / 1e12} | ({"mfu": done / (peak * self.world)} if peak else {})


def _peak_memory(device: torch.device) -> int:
    """The most bytes that this process had: of the GPU's memory where it has one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
