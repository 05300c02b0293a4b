"""Named recipes: settings that were tested together."""

from dataclasses import replace

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


RECIPES = {recipe.__name__: recipe for recipe in (tiny, emoji_32, emoji_64, imagenet_400m, ffhq_415m, laion_1p3b)}
