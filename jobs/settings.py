"""The settings of every stage in one tree: a recipe, overridden by a TOML file, overridden by flags."""

import math
import tomllib
import typing
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from jobs.rebuild import RebuildConfig
from model import recipes as networks
from model.config import TrainConfig
from pipeline.corpora.demo_corpus import PicturesConfig
from pipeline.embeddings.embed import EmbedConfig
from pipeline.indices.config import IndexConfig
from pipeline.neighbors.config import NeighborsConfig
from pipeline.sources.config import ShardConfig


@dataclass(frozen=True)
class ClusterConfig:
    """Where the work runs; results do not depend on it."""

    workers: int = 2
    """Actors of a stage, or processes of a training run."""
    min_workers: int = 0
    """Processes that a training run goes on with where a node was lost, until there are more again; 0: it waits for
    all of them."""
    resize_every: float = 60.0
    """Seconds from one look for nodes that came (back) to the next, of such a run; it takes them in from its newest
    checkpoint on."""
    cpus: float = 1.0
    """Cores that each of them reserves."""
    gpus: float | None = None
    """GPUs that each worker of a stage with tensors reserves: 1, or a part of one that workers share. 0: the CPU, on
    any machine. Not given: the CPU on a cluster; with --local the GPU, if there is one."""
    decoders: int = 0
    """Actors of a core each, on nodes without a GPU, that decode pictures for the workers of embed: where the cores
    beside a GPU do not keep it busy; 0: each worker decodes its own."""
    max_failures: int = 3
    """Restarts of a training run after the loss of a worker."""

    def __post_init__(self) -> None:
        if self.min_workers > self.workers:
            raise ValueError(f"cluster.min_workers = {self.min_workers}: there are {self.workers} workers at most")
        for name, least in (("workers", 1), ("min_workers", 0), ("resize_every", 0), ("cpus", 0), ("gpus", 0),
                            ("decoders", 0), ("max_failures", 0)):
            if not (getattr(self, name) or 0) >= least:  # not a number is not enough either
                raise ValueError(f"cluster.{name} = {getattr(self, name)}: must be at least {least}\n"
                                 f"hint: --{name.replace('_', '-')} {max(least, 1)}")
        if self.each_gpus > 1 and self.each_gpus % 1:
            raise ValueError(f"cluster.gpus = {self.gpus}: must be a part of one GPU, or a whole number of them\n"
                             f"hint: --gpus 1")

    @property
    def each_gpus(self) -> float:
        """GPUs that each worker on a cluster reserves."""
        return self.gpus or 0.0


@dataclass(frozen=True)
class LatentsConfig:
    """Which first stage, and what is kept of a picture."""

    first_stage: str = ""
    """Folder of an autoencoder as diffusers keeps it (convert writes such), or its name in the hub."""
    flips: bool = False
    """Keep the latents of the mirrored picture too, for training to choose from."""
    scale: float = 0.0
    """Factor of the latents; 0: that of the autoencoder's configuration or, where it names none, the inverse of the
    standard deviation of the first batch."""
    batch_size: int = 8
    """Pictures encoded at a time."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"latents.batch_size = {self.batch_size}: must be at least 1")
        if not self.scale >= 0:
            raise ValueError(f"latents.scale = {self.scale}: must be above 0, or 0 to have it chosen")


@dataclass(frozen=True)
class ConvertConfig:
    """What a released checkpoint does not say of itself."""

    head_dim: int = 32
    """Numbers of an attention head; 32 in all three released models."""
    scale: float = 0.0
    """Factor of the latents; 0: that in the checkpoint, or 1."""
    context_norm: float = 1.0
    """Length of the vectors that the network was trained with; those of the 256 pixel models were as CLIP makes them,
    about 10 for pictures of ViT-B/32."""
    k: int = 4
    """Neighbours that it was trained with."""


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn from a trained model."""

    k: int = 4
    """Neighbours of the text that join its vector in the context."""
    text: bool = True
    """Put the text's own vector before its neighbours; without, it only finds them."""
    guidance: float = 2.0
    """Guidance scale s: eps_u + s (eps_c - eps_u); 1 is none."""
    seed: int = 0
    """Seed of the noise; a prompt starts from the same noise in every database."""
    steps: int = 50
    """Steps of the sampler."""
    sampler: Literal["ddim", "dpm++", "euler", "heun"] = "ddim"
    """ddim; dpm++ (DPM-Solver++, 2M), for which 20 steps are enough; euler or heun for runs that predict a flow."""
    eta: float = 0.0
    """Noise that ddim draws anew in each step: 0 none, 1 as much as the diffusion it was trained with."""
    text_guidance: float = -1.0
    """Guidance scale of the prompt's own vector, `guidance` then being that of the neighbours; -1: the same."""
    batch_size: int = 16
    """Pictures drawn at a time."""
    ema: float = 0.0
    """Rate of the average that is drawn from, of those that the run kept; 0: its first one."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """What the network computes in; auto: bf16 where the machine is faster in it, which moves some pixels."""

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16", "auto"):
            raise ValueError(f"sample.precision = {self.precision!r}: must be fp32, bf16 or auto")
        for name, least in (("k", 0), ("batch_size", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"sample.{name} = {getattr(self, name)}: must be at least {least}")
        if not self.text and (self.k < 1 or self.text_guidance >= 0):
            raise ValueError("sample.text = false: takes neighbours, and no guidance of the text's own")
        if self.sampler not in ("ddim", "dpm++", "euler", "heun"):
            raise ValueError(f"sample.sampler = {self.sampler!r}: must be ddim, dpm++, euler or heun")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sample.eta = {self.eta}: must be within 0 and 1")
        if not (self.text_guidance == -1 or self.text_guidance >= 0):
            raise ValueError(f"sample.text_guidance = {self.text_guidance}: must be at least 0, or -1 for the other's")
        if not math.isfinite(self.guidance):
            raise ValueError(f"sample.guidance = {self.guidance}: must be a number")


@dataclass(frozen=True)
class QueryConfig:
    """What is drawn beside prompts and pictures, and which of the nearest neighbours are taken."""

    unconditional: int = 0
    """Pictures of each database without a prompt, from rows drawn as often as each is a neighbour in training (p_D)."""
    top_m: float = 1.0
    """Draw them from this share of the database's rows, those with the highest p_D; one row at least."""
    pool: int = 0
    """Take the neighbours at random from so many nearest ones of each database; 0: take the nearest."""

    def __post_init__(self) -> None:
        for name in ("unconditional", "pool"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 0")
        if not 0 < self.top_m <= 1:
            raise ValueError(f"top_m = {self.top_m}: must be above 0 and at most 1\nhint: --top-m 0.01")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is asked to find out whether the style follows the database."""

    prompts: int = 100
    """Subjects that the databases have and training has not seen, each one prompt."""
    seeds: int = 2
    """Pictures of each prompt, from so many seeds."""
    template: str = "{prompt} in the style of {style}"
    """A prompt that names the style."""
    words: tuple[str, ...] = ()
    """What a database's style is called in a prompt, as DATABASE=WORDS; by default its name, hyphens as spaces."""
    ways: tuple[str, ...] = ()
    """What names the style: database, prompt, both, text (the prompt, no neighbours), neither; by default all of it."""
    sweep_k: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of neighbours that are tried with swapped databases."""
    sweep_guidance: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Guidance scales that are tried with swapped databases."""
    sweep_prompts: int = 100
    """Prompts for each of these."""
    seen: bool = False
    """Let databases give pictures of the held-out subjects too."""
    judge_steps: int = 1500
    """Updates of the network that judges styles, of 64 pictures each."""

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "sweep_prompts", "judge_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluate.{name} = {getattr(self, name)}: must be at least 1")
        if "{prompt}" not in self.template or "{style}" not in self.template:
            raise ValueError(f"evaluate.template = {self.template!r}: must have {{prompt}} and {{style}}")
        if wrong := [one for one in self.words if "=" not in one]:
            raise ValueError(f"evaluate.words: {wrong[0]!r} is not DATABASE=WORDS")
        if any(k < 1 for k in self.sweep_k) or not all(map(math.isfinite, self.sweep_guidance)):
            raise ValueError("evaluate.sweep_k must be at least 1 each, evaluate.sweep_guidance numbers")


@dataclass(frozen=True)
class Settings:
    """One section for each stage."""

    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    neighbors: NeighborsConfig = field(default_factory=NeighborsConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    train: TrainConfig = field(default_factory=networks.tiny)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    rebuild: RebuildConfig = field(default_factory=RebuildConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


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
                    index=IndexConfig(max_memory="16G"), train=networks.laion_1p3b(),
                    cluster=ClusterConfig(workers=64, cpus=8, gpus=1))


RECIPES = {recipe.__name__: recipe for recipe in (tiny, emoji_32, emoji_64, imagenet_400m, ffhq_415m, laion_1p3b)}


def resolve(recipe: str, file: str) -> Settings:
    """The settings of a recipe as a TOML file overrides them; the file may name the recipe itself.

    ValueError naming the key of the file that no setting has, or whose value has another type.
    """
    document: dict[str, Any] = {}
    if file:
        try:
            document = tomllib.loads(Path(file).read_text())
        except OSError as error:
            raise ValueError(f"cannot read the settings {file}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not TOML: {error}") from None
    chosen = recipe or document.pop("recipe", "tiny")
    document.pop("recipe", None)
    if not isinstance(chosen, str) or chosen not in RECIPES:
        raise ValueError(f"there is no recipe {chosen!r}\nhint: {', '.join(RECIPES)}")
    return _overridden(RECIPES[chosen](), document, file)


def _overridden(section: Any, values: dict[str, Any], where: str) -> Any:
    types = typing.get_type_hints(type(section))
    changes = {}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{where}: there is no setting {name!r}\nhint: here are {', '.join(sorted(types))}")
        current = getattr(section, name)
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name} is a section: write [{name}] and its settings below")
            changes[name] = _overridden(current, value, f"{where}: {name}")
        else:
            changes[name] = _typed(types[name], value, f"{where}: {name}")
    return replace(section, **changes)


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A TOML value as the type that the setting has."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where} = {value!r}: must be one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} = {value!r}: must be a list")
        return tuple(_typed(arguments[0], each, where) for each in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and not isinstance(origin, UnionType) and type(value) is not kind:
        raise ValueError(f"{where} = {value!r}: must be of the type {kind.__name__}")
    return value
