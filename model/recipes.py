"""Named training runs: the three of the papers, and one that two CPU cores finish in minutes."""

from dataclasses import replace

from model.config import DiffusionConfig, TrainConfig, UNetConfig


def tiny() -> TrainConfig:
    """A pixel-space RDM on 64x64 drawings: two processes of one thread each, about five minutes.

    The number of updates decides so short a run. The smallest network, small batches and a high
    rate beat wider or deeper networks. The coarse patch needs the x0 prediction: epsilon or v at
    this width leaves noise in the image.
    """
    return TrainConfig(
        steps=3600,
        global_batch=16,
        unet=UNetConfig(
            model_channels=64,
            channel_mult=(1,),
            num_res_blocks=1,
            attention_downsampling=(1,),
            context_dim=256,
            patch=8,
        ),
        diffusion=DiffusionConfig(prediction="x0"),
        lr=2e-3,
        betas=(0.9, 0.99),
        ema_decay=0.995,
        checkpoint_every=900,
        log_every=20,
    )


def emoji_32() -> TrainConfig:
    """A pixel-space RDM on emoji of 32x32: two processes of one thread each, about three quarters of an hour.

    It is `tiny` with twice the width and a random number of neighbors in each step. So it works with a prompt alone
    and with any number of neighbors.
    """
    return TrainConfig(
        steps=12_000,
        global_batch=32,
        unet=UNetConfig(
            model_channels=128,
            channel_mult=(1,),
            num_res_blocks=1,
            attention_downsampling=(1,),
            context_dim=256,
            patch=4,
        ),
        diffusion=DiffusionConfig(prediction="x0"),
        lr=1e-3,
        betas=(0.9, 0.99),
        ema_decay=0.999,
        k=5,
        random_k=True,
        image_size=32,
        checkpoint_every=1000,
        log_every=50,
    )


def emoji_64() -> TrainConfig:
    """A pixel-space RDM on emoji of 64x64 for one GPU; 25 M parameters, 49 MB in half precision."""
    return TrainConfig(
        steps=12_000,
        global_batch=256,
        unet=UNetConfig(
            model_channels=96,
            channel_mult=(1, 2, 3),
            num_res_blocks=1,
            attention_downsampling=(2, 4),
            context_dim=256,
            patch=2,
        ),
        diffusion=DiffusionConfig(prediction="x0"),
        lr=5e-4,
        warmup=500,
        betas=(0.9, 0.99),
        ema_decay=0.9995,
        k=5,
        random_k=True,
        checkpoint_every=2000,
        log_every=50,
    )


def imagenet_400m() -> TrainConfig:
    """RDM-256 on ImageNet, 401 M parameters, on VQ-f4 latents of 64x64x3 (arXiv:2204.11824).

    The length of its training was not published. The published model was trained with raw CLIP ViT-B/32
    vectors and without dropout of the condition. The dropout here is for guidance against zeros.
    """
    return TrainConfig(
        steps=500_000,
        global_batch=320,
        unet=UNetConfig(
            in_channels=3,
            out_channels=3,
            model_channels=192,
            channel_mult=(1, 2, 3, 5),
            attention_downsampling=(8, 4, 2),
            context_dim=512,
            checkpointing=True,
        ),
        diffusion=DiffusionConfig(beta_start=0.0015, beta_end=0.0195),
        warmup=100,
    )


def ffhq_415m() -> TrainConfig:
    """RDM-256 on FFHQ: 415 M parameters on VQ-f4 latents of 64x64x3 (arXiv:2204.11824).

    It is wider than `imagenet_400m`, and equal otherwise.
    """
    recipe = imagenet_400m()
    return replace(recipe, unet=replace(recipe.unet, model_channels=224, channel_mult=(1, 2, 3, 4)))


def laion_1p3b() -> TrainConfig:
    """RDM-768 on text-guided art, 1.34 B parameters, on KL-f16 latents of 48x48x16.

    Rombach et al. 2022, arXiv:2207.13038; the length and the batch of its training were not published.
    """
    return TrainConfig(
        steps=1_000_000,
        global_batch=1280,
        unet=UNetConfig(
            in_channels=16,
            out_channels=16,
            model_channels=448,
            channel_mult=(1, 2, 3, 4),
            attention_downsampling=(4, 2, 1),
            context_dim=768,
            checkpointing=True,
        ),
        diffusion=DiffusionConfig(beta_start=0.0015, beta_end=0.015),
        warmup=10_000,
    )
