"""Training of the denoiser on one process or many. The number of processes changes only the speed.

Letters: B images of this process (global batch / world size), C H W sizes of an image or latent.
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
_LEVELS = 4  # ranges of noise levels whose losses are logged separately


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
    watch: Callable[[int, float], None] | None = None,
) -> int:
    """Train until `config.steps` or until `stop()` is true anywhere, and return the step reached.

    batch_at(step): returns the slice of this process of the global batch of a step, from 0. A thread calls it one step
    ahead. Keys of the slice:

    * `image` (B, H, W, 3) uint8, or `latent` (B, C, h, w) float16, already scaled
    * `neighbors` (B, K, D) float16, K >= k
    * `own` (B, D), if `config.own` needs it

    save(step, write): called on rank 0 every `checkpoint_every` steps and at the end. write(folder) writes a complete
    checkpoint.
    log(record): called on rank 0 every `log_every` steps and after the last one. The loss is the mean over the global
    batch and the interval.
    validate(step, network): called with the averaged network every `validate_every` steps. Its result is logged. Either
    all processes pass it, or none.
    watch(step, loss): called after each update, in any process that has one.
    resume: the folder of a checkpoint.
    Process r of w has the images r G / w to (r + 1) G / w of the global batch of G.

    ValueError: more processes than images, or `resume` does not fit. Nothing is saved after these two:
    FloatingPointError: the loss or its gradient is not finite. MemoryError: the device has too little memory.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if config.global_batch < world:
        raise ValueError(f"global_batch = {config.global_batch} is less than an image for each of {world} processes")
    device = torch.device(device)
    with _explain_out_of_memory(config, world, loading=True):
        state = _initial_state(config, device, resume)
        network = _wrap_in_ddp(state.model, device) if dist.is_initialized() and not config.fsdp else state.model
    meter = _Meter(config, device, world)
    saved = state.step
    every = config.validate_every or config.checkpoint_every

    def publish() -> None:
        # With FSDP each process has one part, so all processes take part.
        whole = checkpoint.gather_contents(state.model, state.ema, state.optimizer, rank == 0)
        if rank == 0:
            save(state.step, lambda folder: checkpoint.write(folder, whole, state.step, state.ema.updates, config))

    with (_explain_out_of_memory(config, world),
          closing(prefetch_inputs(config, batch_at, rank, world, state.step)) as stream):
        for inputs, waited in stream:
            leave = stop is not None and stop()
            done = _update(config, network, state, inputs.to(device), leave)
            if watch:
                watch(state.step, done.loss)
            record = meter.add(state.step, done, waited, inputs, last=done.leaving or state.step == config.steps)
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
        # A launcher may end the group when one process ends, so all wait for the last checkpoint.
        dist.barrier()
    return state.step


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of the update after `step` finished ones: linear warm-up, then constant."""
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup))


def _initial_state(config: TrainConfig, device: torch.device, resume: Path | None) -> State:
    with torch.random.fork_rng(devices=[]):
        # On the CPU, so that the first weights are the same on each device and process.
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
    """Shard the weights among the processes. A block gathers its weights while it computes."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in (*model.input_blocks, model.middle_block, *model.output_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _averaged_network(state: State, config: TrainConfig) -> UNet:
    """Another network with the averaged weights, for validation."""
    with torch.device("meta"):
        network = UNet(config.unet)
    # Only sharded weights are copied. Training waits meanwhile.
    network.load_state_dict({name: full_tensor(weight) for name, weight in state.ema.weights.items()}, assign=True)
    return network.eval().requires_grad_(False)


@contextlib.contextmanager
def _explain_out_of_memory(config: TrainConfig, world: int, loading: bool = False) -> Iterator[None]:
    """Turn out-of-memory errors of torch into a MemoryError with a hint. `loading`: while the network is loaded."""
    try:
        yield
    except RuntimeError as error:
        # torch has no special error for the CPU.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        if loading:
            raise MemoryError(f"the network, its average and the optimizer's moments do not fit the memory: "
                              f"{str(error).splitlines()[0]}\nhint: --fsdp divides them among several workers; "
                              f"nvidia-smi shows what else uses the GPU") from error
        share = -(-config.global_batch // world)
        raise MemoryError(
            f"out of memory with {share} images a process in {config.accumulate} parts: "
            f"{str(error).splitlines()[0]}\nhint: --accumulate {2 * config.accumulate} (the same updates), "
            f"--checkpointing or more workers; nothing after the last checkpoint was saved") from error


@dataclass(frozen=True)
class _StepResult:
    """The result of a step on the global batch. `by_level`: sums of losses and counts of images by noise level."""

    loss: float
    grad_norm: float
    leaving: bool
    by_level: Tensor
    """(2, 4) float64."""


def _update(config: TrainConfig, network: nn.Module, state: State, inputs: Inputs, leave: bool) -> _StepResult:
    """One optimizer step."""
    device, number = inputs.x0.device, state.step + 1
    world = dist.get_world_size() if dist.is_initialized() else 1
    # The loss, whether to stop, and the losses by level: one reduction, so that all processes see the same.
    shared = torch.zeros(2 + 2 * _LEVELS, dtype=torch.float64, device=device)
    # FSDP2 needs the same number of parts in each process. Their sizes may differ by one image.
    count = min(config.accumulate, config.global_batch // world)
    parts = list(zip(*(tensor.tensor_split(count) for tensor in (inputs.x0, inputs.eps, inputs.t, inputs.context)),
                     strict=True))
    for place, (x0, eps, t, context) in enumerate(parts):
        with _gradient_sync(network, last=place == len(parts) - 1):
            losses = _losses(config, network, x0, eps, t, context)  # (B,)
            # DDP averages the gradients of the processes. Their sizes may differ by one image.
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
    """Reduce the gradients of the processes only after the last part of a step."""
    if isinstance(network, DistributedDataParallel) and not last:
        with network.no_sync():
            yield
    else:
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        yield


def _losses(config: TrainConfig, network: nn.Module, x0: Tensor, eps: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """The loss of each image (B,)."""
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
        """Do not count the time inside as training."""
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def add(self, step: int, done: _StepResult, waited: float, inputs: Inputs, *, last: bool) -> dict[str, Any] | None:
        """Count a finished step. Returns a record at the end of an interval, which the last step ends too."""
        self.losses.append(done.loss)
        self.by_level += done.by_level
        self.waited += waited
        if step % self.config.log_every and not last:
            return None
        now, count = time.perf_counter(), len(self.losses)
        seconds = max(now - self.since, 1e-9)
        samples_per_s = count * self.config.global_batch / seconds
        sums, counts = self.by_level
        record = {
            "step": step,
            "loss": sum(self.losses) / count,
            # From the least noise to the most. A range without an image has no loss.
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
        # MFU does not count the repeated forward passes of checkpointing.
        done = samples_per_s * each.training(checkpointing=False)
        peak = flops.peak(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return {"tflops_per_s": done / 1e12} | ({"mfu": done / (peak * self.world)} if peak else {})


def _peak_memory(device: torch.device) -> int:
    """The most bytes that this process used, on its GPU if it has one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
