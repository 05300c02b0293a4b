"""Sampling: `model.sample` with the network of RDM-256, random weights."""

from dataclasses import replace

import torch
from gpu_parts.report import Report, lines_by_count, seconds, synchronizations

from model import recipes
from model.diffusion.samplers import sample
from model.network.unet import UNet


def run(report: Report) -> None:
    """Rates by batch and precision, and the error of bf16 over a whole sampling."""
    recipe = recipes.tiny() if report.small else recipes.imagenet_400m()
    torch.manual_seed(0)
    network = UNet(replace(recipe.unet, checkpointing=False)).eval().requires_grad_(False)
    for weight in network.parameters():
        if not weight.any():  # branches that begin at zero would hide errors
            torch.nn.init.normal_(weight, std=0.02)
    network = network.to(report.device)
    for precision in ("fp32", "bf16"):
        for batch in (1, report.size(16, 2)):
            with report.attempt(f"batch {batch} in {precision}"):
                steps = report.size(10, 2)
                elapsed_s = seconds(lambda batch=batch, precision=precision, steps=steps: _sample(
                    report, network, recipe, batch, precision, steps), report.device, 2)
                report.figure(f"batch {batch} in {precision}", batch * steps / 50 / elapsed_s, "images/s",
                              "50 steps of DDIM with guidance, by the time of "
                              f"{steps} steps: {1000 * elapsed_s / steps:.0f} ms a step")
    with report.attempt("error of bf16"):
        steps = report.size(25, 4)
        exact, half = (_sample(report, network, recipe, 4, precision, steps) for precision in ("fp32", "bf16"))
        report.speed("error of bf16 / standard deviation", float((half - exact).pow(2).mean().sqrt() / exact.std()),
                     "<= 0.01", "", f"root mean square after {steps} steps of DDIM, guidance 2")
    if report.device.type == "cuda":
        with report.attempt("waits"):
            places = synchronizations(lambda: _sample(report, network, recipe, 2, "bf16", 8), report.device)
            report.check("waits for the GPU in a step", len(places) / 8, "<= 1", "", lines_by_count(places))


def _sample(report: Report, network: UNet, recipe: object, batch: int, precision: str, steps: int) -> torch.Tensor:
    unet, side = recipe.unet, 64
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, unet.in_channels, side, side, generator=generator).to(report.device)
    context = torch.nn.functional.normalize(torch.randn(batch, 4, unet.context_dim, generator=generator), dim=-1)

    def denoise(x: torch.Tensor, t: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        with torch.autocast(report.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return network(x, t, conditioning)

    return sample(denoise, recipe.diffusion, context.to(report.device), noise, steps=steps, guidance=2.0,
                  clamp=unet.patch > 1)
