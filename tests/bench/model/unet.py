"""The UNet beside diffusers' UNet2DConditionModel of the same shape: training, and sampling in each one's own loop.

    python tests/bench/model/unet.py                                  # emoji_64's network, on this machine's CPU
    python tests/bench/model/unet.py --preset imagenet_400m --side 64 --batch 32 --compile    # on a GPU

Both get the same batches, optimiser and precision, in turns in one process; medians of the turns. Needs torch,
diffusers and this project's model/, nothing else.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # for a checkout that was not installed

from model import recipes
from model.config import DiffusionConfig, UNetConfig
from model.diffusion import process, samplers
from model.network.unet import UNet
from model.training import flops
from model.training.precision import compute_dtype

NOISE = DiffusionConfig(beta_start=0.0015, beta_end=0.0195)


class Peer(nn.Module):
    """diffusers' network of the same widths, depths, heads and places of attention, with the same patches."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel
        wide = [config.model_channels * mult for mult in config.channel_mult]
        attends = [2 ** level in config.attention_downsampling for level in range(len(wide))]
        self.patch = config.patch
        self.network = UNet2DConditionModel(
            in_channels=config.in_channels * config.patch ** 2, out_channels=config.out_channels * config.patch ** 2,
            block_out_channels=wide, layers_per_block=config.num_res_blocks, cross_attention_dim=config.context_dim,
            # What diffusers calls the dimension of a head is their number here, for reasons of its history.
            attention_head_dim=[one // config.head_dim for one in wide],
            down_block_types=["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends],
            up_block_types=["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)])
        if config.checkpointing:
            self.network.enable_gradient_checkpointing()

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pixel_unshuffle(x, self.patch)
        return nn.functional.pixel_shuffle(self.network(x, t, context).sample, self.patch)


def main() -> None:
    """Measure, and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="emoji_64", help="a recipe of model/recipes.py")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="training steps in a turn")
    parser.add_argument("--drawn", type=int, default=4, help="pictures that are sampled at once; 0: no sampling")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config: UNetConfig = getattr(recipes, given.preset)().unet
    torch.manual_seed(0)
    networks = {"ours": UNet(config), "diffusers": Peer(config)}
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "given": vars(given) | {"out": ""},
        "precision": str(compute_dtype("auto", device)).removeprefix("torch."),
        "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}}
    networks = {name: network.to(device, memory_format=torch.channels_last if given.channels_last
                                 else torch.preserve_format) for name, network in networks.items()}
    found["training"] = _training(networks, config, given, device)
    if given.drawn:
        found["sampling"] = _sampling(networks, config, given, device)
    print(json.dumps(found))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    for name, rates in found["training"]["pictures_per_s"].items():
        print(f"training  {name:10} {rates:9.2f} pictures/s")
    print(f"training  ratio {found['training']['ratio']:.2f}"
          + (f", MFU {found['training']['mfu']:.2f}" if "mfu" in found["training"] else ""))
    for what, one in found.get("sampling", {}).items():
        print(f"{what}: " + ", ".join(f"{name} {rate:.3f} pictures/s" for name, rate in one["pictures_per_s"].items())
              + f", ratio {one['ratio']:.2f}")


def _training(networks: dict[str, nn.Module], config: UNetConfig, given: argparse.Namespace,
              device: torch.device) -> dict[str, Any]:
    dtype = compute_dtype("auto", device)
    x0 = torch.randn(given.batch, config.in_channels, given.side, given.side, device=device)
    eps, t = torch.randn_like(x0), torch.randint(1000, (given.batch,), device=device)
    context = torch.randn(given.batch, 4, config.context_dim, device=device)
    x_t = process.q_sample(NOISE, x0, eps, t)
    if given.channels_last:
        x_t = x_t.contiguous(memory_format=torch.channels_last)
    steps: dict[str, Callable[[], None]] = {}
    for name, network in networks.items():
        network.train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
        asked = torch.compile(network) if given.compile else network

        def step(asked: Any = asked, optimizer: Any = optimizer) -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                answer = asked(x_t, t, context)
            process.loss(NOISE, answer, x0, eps, t).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        steps[name] = step
    seconds = _in_turns(steps, given.turns, given.steps, device)
    rates = {name: given.batch * given.steps / one for name, one in seconds.items()}
    found = {"pictures_per_s": rates, "ratio": rates["ours"] / rates["diffusers"]}
    operations = rates["ours"] * flops.size(config, given.side, 4).training(checkpointing=False)
    found["tflops_per_s"] = operations / 1e12
    if device.type == "cuda":
        found["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        if peak := flops.peak(torch.cuda.get_device_name(device)):
            found["mfu"] = operations / peak
    return found


def _sampling(networks: dict[str, nn.Module], config: UNetConfig, given: argparse.Namespace,
              device: torch.device) -> dict[str, Any]:
    """Each network in its own project's loop, with guidance 2 against nobody."""
    dtype = compute_dtype("auto", device)
    noise = torch.randn(given.drawn, config.in_channels, given.side, given.side, device=device)
    context = torch.randn(given.drawn, 4, config.context_dim, device=device)
    found = {}
    for what, sampler, count in (("50 steps of DDIM", "ddim", 50), ("20 steps of DPM-Solver++", "dpm++", 20)):
        def ours(sampler: Any = sampler, count: int = count) -> None:
            def asked(x: torch.Tensor, t: torch.Tensor, given_context: torch.Tensor) -> torch.Tensor:
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                    return networks["ours"](x, t, given_context)
            samplers.sample(asked, NOISE, context, noise, steps=count, guidance=2.0, sampler=sampler, clamp=False)

        def theirs(sampler: Any = sampler, count: int = count) -> None:
            _their_loop(networks["diffusers"], sampler, count, noise, context, dtype)

        for network in networks.values():
            network.eval()
        seconds = _in_turns({"ours": ours, "diffusers": theirs}, max(3, given.turns // 2), 1, device)
        rates = {name: given.drawn / one for name, one in seconds.items()}
        found[what] = {"pictures_per_s": rates, "ratio": rates["ours"] / rates["diffusers"]}
    return found


@torch.no_grad()
def _their_loop(network: nn.Module, sampler: str, count: int, noise: torch.Tensor, context: torch.Tensor,
                dtype: torch.dtype) -> torch.Tensor:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    kind = DDIMScheduler if sampler == "ddim" else DPMSolverMultistepScheduler
    more = {"clip_sample": False} if sampler == "ddim" else {}
    scheduler = kind(beta_start=NOISE.beta_start, beta_end=NOISE.beta_end, beta_schedule="scaled_linear", **more)
    scheduler.set_timesteps(count, device=noise.device)
    x, both = noise, torch.cat([torch.zeros_like(context), context])
    for t in scheduler.timesteps:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            answer = network(torch.cat([x, x]), t.expand(2 * len(x)), both).float()
        nobody, somebody = answer.chunk(2)
        x = scheduler.step(nobody + 2.0 * (somebody - nobody), t, x).prev_sample
    return x


def _in_turns(work: dict[str, Callable[[], None]], turns: int, repeat: int, device: torch.device) -> dict[str, float]:
    """Median seconds of `repeat` calls, one after the other, in turns after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(turns + 1):
        for name, call in work.items():
            _wait(device)
            started = time.perf_counter()
            for _ in range(repeat):
                call()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
