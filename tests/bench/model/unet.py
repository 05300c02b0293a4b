"""The UNet beside diffusers' UNet2DConditionModel of the same shape: training, and sampling in each one's own loop.

    python tests/bench/model/unet.py                                  # emoji_64's network, on this machine's CPU
    python tests/bench/model/unet.py --preset imagenet_400m --side 64 --batch 32 --compile    # on a GPU

Both get the same batches, optimizer and precision, in turns in one process; medians of the turns. Needs torch,
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
        widths = [config.model_channels * mult for mult in config.channel_mult]
        attention_levels = [2 ** level in config.attention_downsampling for level in range(len(widths))]
        self.patch = config.patch
        self.network = UNet2DConditionModel(
            in_channels=config.in_channels * config.patch ** 2, out_channels=config.out_channels * config.patch ** 2,
            block_out_channels=widths, layers_per_block=config.num_res_blocks, cross_attention_dim=config.context_dim,
            # diffusers takes the number of heads under the name of their dimension, for historical reasons.
            attention_head_dim=[width // config.head_dim for width in widths],
            down_block_types=["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention_levels],
            up_block_types=["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention_levels)])
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
    parser.add_argument("--drawn", type=int, default=4, help="images in a batch of sampling; 0: no sampling")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config: UNetConfig = getattr(recipes, args.preset)().unet
    torch.manual_seed(0)
    networks = {"ours": UNet(config), "diffusers": Peer(config)}
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "given": vars(args) | {"out": ""},
        "precision": str(compute_dtype("auto", device)).removeprefix("torch."),
        "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}}
    networks = {name: network.to(device, memory_format=torch.channels_last if args.channels_last
                                 else torch.preserve_format) for name, network in networks.items()}
    figures["training"] = _training(networks, config, args, device)
    if args.drawn:
        figures["sampling"] = _sampling(networks, config, args, device)
    print(json.dumps(figures))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    for name, rate in figures["training"]["pictures_per_s"].items():
        print(f"training  {name:10} {rate:9.2f} images/s")
    print(f"training  ratio {figures['training']['ratio']:.2f}"
          + (f", MFU {figures['training']['mfu']:.2f}" if "mfu" in figures["training"] else ""))
    for sampler, sampler_figures in figures.get("sampling", {}).items():
        rates = sampler_figures["pictures_per_s"]
        print(f"{sampler}: " + ", ".join(f"{name} {rate:.3f} images/s" for name, rate in rates.items())
              + f", ratio {sampler_figures['ratio']:.2f}")


def _training(networks: dict[str, nn.Module], config: UNetConfig, args: argparse.Namespace,
              device: torch.device) -> dict[str, Any]:
    dtype = compute_dtype("auto", device)
    x0 = torch.randn(args.batch, config.in_channels, args.side, args.side, device=device)
    eps, t = torch.randn_like(x0), torch.randint(1000, (args.batch,), device=device)
    context = torch.randn(args.batch, 4, config.context_dim, device=device)
    x_t = process.q_sample(NOISE, x0, eps, t)
    if args.channels_last:
        x_t = x_t.contiguous(memory_format=torch.channels_last)
    steps: dict[str, Callable[[], None]] = {}
    for name, network in networks.items():
        network.train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
        forward = torch.compile(network) if args.compile else network

        def step(forward: Any = forward, optimizer: Any = optimizer) -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                answer = forward(x_t, t, context)
            process.loss(NOISE, answer, x0, eps, t).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        steps[name] = step
    seconds = _in_turns(steps, args.turns, args.steps, device)
    rates = {name: args.batch * args.steps / duration for name, duration in seconds.items()}
    figures = {"pictures_per_s": rates, "ratio": rates["ours"] / rates["diffusers"]}
    operations = rates["ours"] * flops.size(config, args.side, 4).training(checkpointing=False)
    figures["tflops_per_s"] = operations / 1e12
    if device.type == "cuda":
        figures["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        if peak := flops.peak(torch.cuda.get_device_name(device)):
            figures["mfu"] = operations / peak
    return figures


def _sampling(networks: dict[str, nn.Module], config: UNetConfig, args: argparse.Namespace,
              device: torch.device) -> dict[str, Any]:
    """Each network in its own project's loop, with guidance 2 against the null condition."""
    dtype = compute_dtype("auto", device)
    noise = torch.randn(args.drawn, config.in_channels, args.side, args.side, device=device)
    context = torch.randn(args.drawn, 4, config.context_dim, device=device)
    figures = {}
    for what, sampler, count in (("50 steps of DDIM", "ddim", 50), ("20 steps of DPM-Solver++", "dpm++", 20)):
        def ours(sampler: Any = sampler, count: int = count) -> None:
            def denoise(x: torch.Tensor, t: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                    return networks["ours"](x, t, conditioning)
            samplers.sample(denoise, NOISE, context, noise, steps=count, guidance=2.0, sampler=sampler, clamp=False)

        def theirs(sampler: Any = sampler, count: int = count) -> None:
            _their_loop(networks["diffusers"], sampler, count, noise, context, dtype)

        for network in networks.values():
            network.eval()
        seconds = _in_turns({"ours": ours, "diffusers": theirs}, max(3, args.turns // 2), 1, device)
        rates = {name: args.drawn / duration for name, duration in seconds.items()}
        figures[what] = {"pictures_per_s": rates, "ratio": rates["ours"] / rates["diffusers"]}
    return figures


@torch.no_grad()
def _their_loop(network: nn.Module, sampler: str, count: int, noise: torch.Tensor, context: torch.Tensor,
                dtype: torch.dtype) -> torch.Tensor:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    kind = DDIMScheduler if sampler == "ddim" else DPMSolverMultistepScheduler
    more = {"clip_sample": False} if sampler == "ddim" else {}
    scheduler = kind(beta_start=NOISE.beta_start, beta_end=NOISE.beta_end, beta_schedule="scaled_linear", **more)
    scheduler.set_timesteps(count, device=noise.device)
    x, contexts = noise, torch.cat([torch.zeros_like(context), context])
    for t in scheduler.timesteps:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            answer = network(torch.cat([x, x]), t.expand(2 * len(x)), contexts).float()
        unconditional, conditional = answer.chunk(2)
        x = scheduler.step(unconditional + 2.0 * (conditional - unconditional), t, x).prev_sample
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
