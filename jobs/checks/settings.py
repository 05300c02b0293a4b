"""Checks of settings alone: what a stage would refuse later, whatever the data are."""

from model.config import TrainConfig
from pipeline.embeddings.clip_weights import ClipConfig
from pipeline.embeddings.reachable import vector_length
from pipeline.neighbors.config import NeighborsConfig
from pipeline.sources.config import ShardConfig

PIXEL_CHANNELS = 3


def check_side(train: TrainConfig, height: int, width: int, hint: str) -> None:
    """ValueError unless a run can train on images of this height and width."""
    size, stride = train.image_size, train.unet.stride
    if size and (height != width or height % size):
        raise ValueError(f"images of {width} x {height} pixels cannot be averaged down: expected squares with a "
                         f"multiple of {size} pixels (train.image_size), got {width} x {height}\nhint: {hint}")
    if not size and (height % stride or width % stride):
        raise ValueError(f"the network takes images whose sides divide by {stride}: expected a multiple of {stride}, "
                         f"got {width} x {height} pixels\nhint: {hint}")


def check_image_size(shard: ShardConfig, train: TrainConfig) -> None:
    """ValueError if shards of squares with these settings do not fit the network."""
    if has_one_size(shard):
        fitting = train.image_size or train.unet.stride
        larger = -(-shard.image_size // fitting) * fitting
        check_side(train, shard.image_size, shard.image_size, f"--image-size {larger}")


def has_one_size(shard: ShardConfig) -> bool:
    """Whether all images of the shards have the size of the settings, whatever the source holds."""
    return bool(shard.patches) or (shard.resize in {"center_crop", "border"} and not (
        shard.only_if_bigger and shard.resize == "center_crop"))


def check_channels(train: TrainConfig) -> None:
    """ValueError if the network of a run on images is one for latents."""
    if train.unet.in_channels != PIXEL_CHANNELS:
        raise ValueError(f"the network trains on latents: expected {PIXEL_CHANNELS} channels for images, got "
                         f"{train.unet.in_channels}\nhint: leave --train out, then python -m jobs latents NAME "
                         f"--first-stage FOLDER; and python -m jobs train RUN --dataset NAME --latents")


def check_context_dim(train: TrainConfig, encoder: ClipConfig) -> None:
    """ValueError if the network takes vectors of another length than the encoder makes. An unknown length passes."""
    length, wanted = vector_length(encoder), train.unet.context_dim
    if length and length != wanted:
        raise ValueError(f"the network takes vectors of another length than {encoder.model} makes: expected {wanted} "
                         f"numbers, got {length}\nhint: --train.unet.context-dim {length}, or a recipe of this "
                         f"encoder: python -m jobs recipes")


def check_neighbor_count(neighbors: NeighborsConfig, train: TrainConfig) -> None:
    """ValueError if training takes more neighbors than are searched."""
    if neighbors.k < train.k:
        raise ValueError(f"training takes more neighbors than are found: expected at least {train.k} "
                         f"(train.k), got {neighbors.k} (neighbors.k)\nhint: --neighbors.k {train.k}")


def check_processes(train: TrainConfig, workers: int) -> None:
    """ValueError if a process of a run has no sample in a batch."""
    if train.global_batch < workers:
        raise ValueError(f"some processes of the run have no sample: expected at most {train.global_batch} workers "
                         f"(train.global_batch), got {workers}\nhint: --workers {train.global_batch}")


