"""A small world to train on: the context vectors determine the picture."""

import numpy as np

from model.config import TrainConfig
from model.diffusion import DiffusionConfig
from model.unet import UNetConfig

UNET = UNetConfig(
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_downsampling=(1,),
    context_dim=16,
    patch=2,
)
CLASSES, STORED, SIDE = 8, 5, 8


def config(**changes) -> TrainConfig:
    """A run of seconds in float32, logging every step."""
    settings = dict(
        steps=6,
        global_batch=8,
        unet=UNET,
        diffusion=DiffusionConfig(prediction="v"),
        lr=2e-3,
        warmup=3,
        seed=5,
        precision="fp32",
        checkpoint_every=1000,
        log_every=1,
    )
    return TrainConfig(**(settings | changes))


def batches(global_batch: int, rank: int = 0, world: int = 1, shuffled: bool = False):
    """batch_at of this rank: pictures of one colour a class, neighbours near the class's vector."""
    share = global_batch // world
    palette = np.random.default_rng(0)
    colours = palette.integers(0, 256, (CLASSES, 1, 1, 3)).astype(np.uint8)
    centres = palette.standard_normal((CLASSES, 1, 16))

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((1, step))
        kind = rng.integers(0, CLASSES, global_batch)
        seen = rng.integers(0, CLASSES, global_batch) if shuffled else kind
        near = centres[seen] + 0.1 * rng.standard_normal((global_batch, STORED, 16))
        near /= np.linalg.norm(near, axis=-1, keepdims=True)
        mine = slice(rank * share, (rank + 1) * share)
        image = np.broadcast_to(colours[kind], (global_batch, SIDE, SIDE, 3))
        return {
            "image": np.ascontiguousarray(image[mine]),
            "neighbors": near.astype(np.float16)[mine],
        }

    return batch_at
