"""Files of settings to begin with: for each purpose the settings to look at first, and all others as comments."""

import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from jobs.config.field_docs import field_docs
from jobs.config.recipes import RECIPES

_WIDTH = 100


@dataclass(frozen=True)
class Starter:
    """The file of a purpose."""

    summary: str
    recipe: str
    sections: tuple[str, ...]
    settings: Mapping[str, Any]
    """Settings that the file sets, by their path, as in shard.image_size."""
    commands: tuple[str, ...]
    """Commands that use the file, without the program and --config."""


_DATA = ("shard", "embed", "index", "neighbors")
_MODEL = (*_DATA, "latents", "train", "sample", "evaluate", "cluster")
_TRAIN = ("pipeline NAME --source FOLDER", "latents NAME --first-stage FOLDER", "train RUN --dataset NAME --latents")
STARTERS = {
    "photographs": Starter(
        "Train a model on photographs of your own at 256 pixels, on one GPU.", "imagenet_400m", _MODEL,
        {"shard.image_size": 256, "shard.min_size": 256, "shard.duplicates": "exact",
         "embed.model": "ViT-B-32-quickgelu", "embed.pretrained": "openai", "neighbors.vectors": True,
         "latents.first_stage": "", "train.global_batch": 64, "train.steps": 500_000,
         "cluster.workers": 1, "cluster.gpus": 1.0},
        _TRAIN),
    "art": Starter(
        "Train a model on art at 768 pixels, on a cluster with GPUs.", "laion_1p3b", _MODEL,
        {"shard.image_size": 768, "shard.min_size": 512, "shard.duplicates": "near",
         "embed.model": "ViT-L-14-quickgelu", "embed.pretrained": "openai", "neighbors.vectors": True,
         "latents.first_stage": "", "train.global_batch": 1280, "train.steps": 1_000_000,
         "cluster.workers": 64, "cluster.gpus": 1.0},
        _TRAIN),
    "style": Starter(
        "Publish images of your own as a style database. Its encoder must be that of the run that samples with it.",
        "style", ("shard", "embed", "index", "rebuild", "sample", "cluster"),
        {"shard.image_size": 256, "embed.model": "tiny-clip-64", "embed.pretrained": "bundled",
         "rebuild.gates.max_failed": 0.1, "rebuild.gates.max_lost": 0.3},
        ("rebuild NAME --source FOLDER", "sample RUN --prompt 'a red apple' --database NAME")),
    "list": Starter(
        "Download and publish images of a list of URLs with captions, such as those of LAION.", "laion_1p3b",
        (*_DATA, "score", "rebuild", "cluster"),
        {"shard.kind": "list", "shard.url_column": "", "shard.caption_column": "", "shard.where": "",
         "shard.image_size": 256, "shard.min_size": 128, "shard.max_aspect": 3.0,
         "shard.download.robots_txt": True, "shard.download.contact": "", "embed.model": "ViT-L-14-quickgelu",
         "embed.pretrained": "openai", "rebuild.gates.max_failed": 0.5, "cluster.workers": 16, "cluster.gpus": 1.0},
        ("shard NAME --source 's3://lists/*.parquet' --dry-run", "rebuild NAME --source 's3://lists/*.parquet'")),
    "demo": Starter(
        "Run the demo on real emoji with a small model.", "emoji_32", ("pictures", *_MODEL),
        {"pictures.corpus": "emoji", "train.steps": 600, "sample.steps": 15, "cluster.workers": 2},
        ("demo",)),
}


def starter_text(purpose: str, file: str) -> str:
    """The TOML file of a purpose. A line that begins with # and a name shows the value that holds without it."""
    starter = STARTERS[purpose]
    settings = RECIPES[starter.recipe]()
    lines = [*_comment(starter.summary), "#"]
    lines += [f"#   python -m jobs {command} --config {file}" for command in starter.commands]
    lines += ["#", *_comment("Lines such as #seed = 0 show a setting with its value in the recipe. Remove the # to "
                             "change it. Flags override this file."), "", f'recipe = "{starter.recipe}"']
    for name in starter.sections:
        section = getattr(settings, name)
        lines += _section(name, _with_values(section, name, starter.settings), starter.settings)
    return "\n".join([*lines, ""])


def _with_values(section: Any, path: str, values: Mapping[str, Any]) -> Any:
    """A section with the values for it; ValueError if they do not fit."""
    changes = {}
    for field in fields(section):
        inner = f"{path}.{field.name}"
        value = getattr(section, field.name)
        if is_dataclass(value):
            changes[field.name] = _with_values(value, inner, values)
        elif inner in values:
            changes[field.name] = values[inner]
    return replace(section, **changes)


def _section(path: str, section: Any, values: Mapping[str, Any]) -> Iterator[str]:
    kind: type = type(section)
    docs = field_docs(kind)
    yield from ("", f"[{path}]", *_comment(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]))
    inner = [field.name for field in fields(section) if is_dataclass(getattr(section, field.name))]
    for field in fields(section):
        value = getattr(section, field.name)
        if field.name not in inner:
            yield from ("", *_comment(docs.get(field.name, "")))
            is_set = f"{path}.{field.name}" in values
            yield (f"{'' if is_set else '#'}{field.name} = {_toml(value)}" if value is not None
                   else f"# {field.name} has no value.")
    for name in inner:
        yield from _section(f"{path}.{name}", getattr(section, name), values)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)]


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)
