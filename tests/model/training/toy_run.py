"""A small world to train on: the context vectors determine the image."""

import numpy as np

from model.config import TrainConfig
from model.diffusion.process import DiffusionConfig
from model.network.unet import UNetConfig

UNET = UNetConfig(
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_downsampling=(1,),
    context_dim=4,
    patch=2,
)
CODE, STORED, SIDE = 4, 5, 8


def config(**changes) -> TrainConfig:
    """A run of seconds in float32, logging every step."""
    settings = {
        "steps": 6,
        "global_batch": 8,
        "unet": UNET,
        "diffusion": DiffusionConfig(prediction="v"),
        "lr": 2e-3,
        "warmup": 3,
        "seed": 5,
        "precision": "fp32",
        "checkpoint_every": 1000,
        "log_every": 1,
    }
    return TrainConfig(**(settings | changes))


def batches(global_batch: int, rank: int = 0, world: int = 1, shuffled: bool = False):
    """batch_at of this rank. A hidden code determines the image, and the neighbors are near the code."""
    drawing = np.random.default_rng(0).standard_normal((CODE, SIDE * SIDE * 3))

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((1, step))
        code = rng.standard_normal((global_batch, CODE))
        picture = 127.5 + 127.5 * np.tanh(code @ drawing)
        neighbor_centers = np.roll(code, 1, axis=0) if shuffled else code
        neighbors = neighbor_centers[:, None] + 0.1 * rng.standard_normal((global_batch, STORED, CODE))
        rank_rows = slice(rank * global_batch // world, (rank + 1) * global_batch // world)
        return {
            "image": picture.astype(np.uint8).reshape(-1, SIDE, SIDE, 3)[rank_rows],
            "neighbors": neighbors.astype(np.float16)[rank_rows],
        }

    return batch_at
