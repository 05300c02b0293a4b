"""Named recipes: settings that were tested together."""

from dataclasses import dataclass, replace

from jobs.cluster.config import ClusterConfig
from jobs.config.settings import Settings
from jobs.evaluation.config import EvaluateConfig
from jobs.sampling.config import SampleConfig
from model import recipes as networks
from pipeline.embeddings.config import EmbedConfig
from pipeline.indices.config import IndexConfig
from pipeline.sources.config import ShardConfig


def tiny() -> Settings:
    """Everything small: 64 pixels, the bundled CLIP, a network that two cores train in minutes."""
    return Settings(shard=ShardConfig(image_size=64, format="png"), index=IndexConfig(bytes_per_vector=288))


_EMOJI_WORDS = ("emojione-monotone=monotone", "fluent-emoji=fluent", "fluent-emoji-flat=fluent flat",
                "fluent-emoji-high-contrast=high contrast")


def emoji_32() -> Settings:
    """The finding on emoji, small enough for two cores: 32 pixels, under an hour of training."""
    return replace(tiny(), train=networks.emoji_32(),
                   sample=SampleConfig(sampler="dpm++", steps=15, precision="auto", batch_size=50),
                   evaluate=EvaluateConfig(words=_EMOJI_WORDS, sweep_prompts=25))


def emoji_64() -> Settings:
    """The finding on emoji of 64 pixels, on one GPU."""
    return replace(emoji_32(), train=networks.emoji_64(), cluster=ClusterConfig(workers=1, cpus=4, gpus=1),
                   sample=SampleConfig(sampler="dpm++", steps=30, precision="auto", batch_size=200),
                   evaluate=EvaluateConfig(words=_EMOJI_WORDS))


def style() -> Settings:
    """A style database of a folder of some hundred to some thousand images: 256 pixels, and an exact index."""
    return Settings(shard=ShardConfig(image_size=256), index=IndexConfig(key="Flat"))


def imagenet_400m() -> Settings:
    """RDM-256 on ImageNet: CLIP ViT-B/32 and 400 M parameters on latents (arXiv:2204.11824)."""
    return Settings(shard=ShardConfig(image_size=256),
                    embed=EmbedConfig(model="ViT-B-32-quickgelu", pretrained="openai", batch_size=256),
                    train=networks.imagenet_400m(), cluster=ClusterConfig(workers=8, cpus=4, gpus=1))


def ffhq_415m() -> Settings:
    """RDM-256 on FFHQ: CLIP ViT-B/32 and 415 M parameters on latents (arXiv:2204.11824)."""
    return replace(imagenet_400m(), train=networks.ffhq_415m())


def laion_1p3b() -> Settings:
    """RDM-768 on LAION: CLIP ViT-L/14 and 1.3 B parameters on latents (arXiv:2207.13038)."""
    return Settings(shard=ShardConfig(image_size=768, samples_per_shard=10_000),
                    embed=EmbedConfig(model="ViT-L-14-quickgelu", pretrained="openai", batch_size=256),
                    index=IndexConfig(max_memory="16Gi"), train=networks.laion_1p3b(),
                    cluster=ClusterConfig(workers=64, cpus=8, gpus=1))


@dataclass(frozen=True)
class Purpose:
    """The purpose of a recipe, and the corpus of its paper."""

    name: str
    images: int
    """Training images."""
    rows: int
    """Database rows. 0: the training images are the database."""
    downsampling: int
    """Pixels on a side for each pixel of a latent. 1: the network trains on pixels."""


_DEMO_IMAGES = 10_114

# ImageNet with patches of OpenImages (arXiv:2204.11824); a corpus like LAION, its size assumed.
PURPOSES = {
    "tiny": Purpose("first try: the demo's images", _DEMO_IMAGES, 0, 1),
    "emoji_32": Purpose("demo: emoji on two CPU cores", _DEMO_IMAGES, 0, 1),
    "emoji_64": Purpose("demo: emoji on one GPU", _DEMO_IMAGES, 0, 1),
    "style": Purpose("style database of a folder", _DEMO_IMAGES, 0, 1),
    "imagenet_400m": Purpose("photographs of many kinds", 1_281_167, 20_000_000, 4),
    "ffhq_415m": Purpose("photographs of one kind: faces", 70_000, 20_000_000, 4),
    "laion_1p3b": Purpose("art and text prompts", 100_000_000, 20_000_000, 16)}
RECIPES = {recipe.__name__: recipe for recipe in (tiny, emoji_32, emoji_64, style, imagenet_400m, ffhq_415m,
                                                  laion_1p3b)}
