"""The first stage: images to latents and back, in fp32 as the stage computes and in bf16. Random weights."""

import torch
from gpu_parts.report import Report, seconds

# AutoencoderKL of Stable Diffusion: f = 8, 84 M parameters.
_KL_F8 = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
          "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
          "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
          "scaling_factor": 0.18215}


def run(report: Report) -> None:
    """Rates of encoder and decoder, and the error of bf16."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        report.skip("all of latents", f"{error}; pip install diffusers")
        return
    from model.weights.first_stage import FirstStage
    config = _KL_F8 | ({"block_out_channels": [32, 32, 64, 64]} if report.small else {})
    torch.manual_seed(0)
    network = AutoencoderKL.from_config(config).eval().requires_grad_(False).to(report.device)
    stage, side = FirstStage(network, "AutoencoderKL", 0.18215), report.size(256, 64)
    for batch in (8, report.size(64, 8)):
        with report.attempt(f"encode in batches of {batch}"):
            _encode(report, stage, batch, side)
    with report.attempt("decode"):
        latents = torch.randn(report.size(16, 2), 4, side // 8, side // 8, device=report.device)
        single_s = seconds(lambda: [stage.decode(latent[None]) for latent in latents], report.device, 3) / len(latents)
        batch_s = seconds(lambda: stage.decode(latents), report.device, 3) / len(latents)
        report.figure("decode one by one, as sample does", 1 / single_s, "images/s", f"{side} px, fp32")
        report.figure("decode together", 1 / batch_s, "images/s", f"{single_s / batch_s:.2f} x one by one")


def _encode(report: Report, stage: object, batch: int, side: int) -> None:
    images = torch.nn.functional.interpolate(torch.rand(batch, 3, 16, 16, device=report.device) * 2 - 1,
                                             (side, side), mode="bicubic").clamp(-1, 1)
    exact = stage.moments(images)[0]
    rate = batch / seconds(lambda: stage.moments(images), report.device, 3)
    report.figure(f"encode in batches of {batch}, fp32", rate, "images/s", f"{side} px")

    def half() -> torch.Tensor:
        with torch.autocast(report.device.type, dtype=torch.bfloat16):
            return stage.moments(images)[0].float()

    fast = batch / seconds(half, report.device, 3)
    error = float((half() - exact).pow(2).mean().sqrt() / exact.std())
    report.figure(f"encode in batches of {batch}, bf16", fast, "images/s", f"{fast / rate:.2f} x fp32")
    report.speed(f"error of bf16 / standard deviation, batches of {batch}", error, "<= 0.01", "", "root mean square")
