"""Small models that score samples: linear layers on CLIP vectors, or a Python function."""

import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from pipeline import storage
from pipeline.embeddings.encode_shards import torch_threads
from pipeline.embeddings.open_clip_door import open_clip
from pipeline.scores.config import Activation, OutputFunction, ScoreConfig

if TYPE_CHECKING:
    import torch

HUB = "hf-hub:"
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_BLOCK_ROWS = 4096
_ACTIVATIONS, _OUTPUTS = ({name for name in get_args(kind) if name} for kind in (Activation, OutputFunction))
_CONVERT = "hint: docs/guides/score.md shows how to convert the weights that you trust"


@dataclass(frozen=True)
class ScoredShard:
    """The n samples of a shard that a function scores, without samples whose image does not decode."""

    vectors: np.ndarray
    """(n, D) float32 of unit length"""
    keys: list[str]
    captions: list[str]
    images: Callable[[], Iterator[bytes]]
    """Reads the n encoded images one by one."""


Scores = np.ndarray | dict[str, np.ndarray]
"""Scores (n,) of samples, or several by the names of their columns."""
ScoreFunction = Callable[[ScoredShard], Scores]


@dataclass(frozen=True)
class Head:
    """A model that scores samples."""

    function: ScoreFunction
    description: dict[str, Any]
    """Facts that its scores depend on, for the fingerprint."""
    encoder: str = ""
    """The encoder whose vectors it was trained on, if the file says so: name and tag of open_clip."""
    width: int = 0
    """Numbers in these vectors, 0 if any."""


def parse_spec(spec: str) -> tuple[str, str]:
    """The name and the head of `NAME=HEAD`."""
    name, sign, head = spec.partition("=")
    if not sign or not head or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"--head {spec}: expected NAME=HEAD, the name in letters, digits and _, got {spec}\n"
                         f"hint: aesthetic=heads/aesthetic.safetensors")
    return name, head


def is_name(head: str) -> bool:
    """Whether a head is one of a hub or a function, and no path."""
    return head.startswith(HUB) or _FUNCTION.fullmatch(head) is not None


@lru_cache(maxsize=8)
def load_head(head: str, config: ScoreConfig) -> Head:
    """The head at the path or URL of a safetensors file, on a hub, or `module:function`.

    On a hub it is hf-hub:ORGANISATION/NAME, with /FILE if that is not model.safetensors. ValueError if it cannot be
    used.
    """
    if _FUNCTION.fullmatch(head):
        return _load_function(head)
    place = head
    if head.startswith(HUB):
        organisation, name, file = [*head.removeprefix(HUB).split("/", 2), ""][:3]
        place = _download(head, f"{organisation}/{name}", file or "model.safetensors")
    return _load_layers(place, head, config)


def _load_function(head: str) -> Head:
    """The function that `module:function` names: the point where other models are plugged in."""
    module_name, _, name = head.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"there is no module {error.name} to score with {head}\nhint: "
                         f"PYTHONPATH=FOLDER python -m jobs score ..., on every worker") from error
    function, source = getattr(module, name, None), inspect.getsourcefile(module)
    if not callable(function) or source is None:
        raise ValueError(f"{module_name} has no function {name} with a source file\nhint: module:function, as in "
                         f"docs/guides/score.md")
    return Head(function, {"function": head, "sha256": hashlib.sha256(Path(source).read_bytes()).hexdigest()})


def _download(head: str, repository: str, file: str) -> str:
    if not file.endswith(".safetensors"):
        raise _no_safetensors(head)
    try:
        return str(open_clip.pretrained.download_pretrained_from_hf(repository, filename=file))
    except Exception as error:  # what a hub's client raises has no common type
        raise ValueError(f"{head} cannot be read: {storage.first_line(error)}\nhint: "
                         f"{HUB}ORGANISATION/NAME/FILE.safetensors; where there is no way to the hub, the path of a "
                         f"copy of the file") from error


def _no_safetensors(head: str) -> ValueError:
    return ValueError(f"{head} is no file of safetensors: expected FILE.safetensors or module:function, for other "
                      f"files of weights are pickles, and a pickle may run anything\n{_CONVERT}")


def _load_layers(place: str, head: str, config: ScoreConfig) -> Head:
    from safetensors import SafetensorError
    from safetensors.torch import load
    if not place.endswith(".safetensors"):
        raise _no_safetensors(head)
    try:
        data = storage.read_bytes(place)
        tensors = load(data)
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except FileNotFoundError:
        raise ValueError(f"there is no file {place}\nhint: --head NAME=FILE.safetensors") from None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{head} cannot be read as safetensors: {error}\n{_CONVERT}") from error
    layers = _sort_layers(tensors, head)
    activation = _choose(head, config.activation, header, "activation", _ACTIVATIONS)
    if not activation and len(layers) > 1:
        raise ValueError(f"{head} has {len(layers)} layers and does not say what is between them: expected "
                         f"`activation` in its metadata, got {sorted(header) or 'no metadata'}\n"
                         f"hint: --activation none for the aesthetic predictor of LAION, --activation relu for most "
                         f"others")
    output = _choose(head, config.output, header, "output", _OUTPUTS) or "none"
    outputs = layers[-1][0].shape[0]
    labels = [label.strip() for label in header.get("labels", "").split(",") if label.strip()]
    if labels and (len(labels) != outputs or len(set(labels)) < outputs):
        raise ValueError(f"{head} has {outputs} outputs, and its metadata name {len(labels)}: {', '.join(labels)}\n"
                         f"hint: `labels` has another name for each output, separated by commas")
    if output == "softmax" and outputs == 1:
        raise ValueError(f"{head} has one output: expected two or more for softmax, which gives 1 for each image else\n"
                         f"hint: --output sigmoid")

    def score(shard: ScoredShard) -> Scores:
        with torch_threads(1) as pool:  # how torch splits a sum among threads changes its last bits
            rows = pool.submit(_forward, shard.vectors, layers, activation or "none", output).result()
        if outputs == 1 and not labels:
            return rows[:, 0]
        return dict(zip(labels or map(str, range(outputs)), rows.T, strict=True))

    return Head(score, {"sha256": hashlib.sha256(data).hexdigest(), "activation": activation or "none",
                        "output": output}, header.get("encoder", ""), layers[0][0].shape[1])


def _choose(head: str, flag: str, header: dict[str, str], name: str, known: set[str]) -> str:
    """A setting of a head: the flag, or what the file says; "" if neither does."""
    value = flag or header.get(name, "")
    if value and value not in known:
        raise ValueError(f"{head}: {name} is {value!r} in its metadata: expected one of {', '.join(sorted(known))}\n"
                         f"hint: --{name} overrides it")
    return value


def _sort_layers(tensors: "dict[str, torch.Tensor]", head: str) -> "list[tuple[torch.Tensor, torch.Tensor | None]]":
    """Weights (out, in) and biases (out,) of linear layers, float32, in the order of their names."""
    def natural(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

    layers: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    used: set[str] = set()
    for name in sorted((name for name in tensors if name.split(".")[-1] == "weight"), key=natural):
        bias = f"{name.removesuffix('weight')}bias"
        weight = tensors[name].float()
        expected = layers[-1][0].shape[0] if layers else weight.shape[-1]
        if weight.ndim != 2 or weight.shape[1] != expected:
            raise ValueError(f"{head}: the tensor {name} is no linear layer after the one before it: expected (n, "
                             f"{expected}), got {tuple(weight.shape)}\nhint: module:function scores with any model")
        if bias in tensors and tensors[bias].shape != weight.shape[:1]:
            raise ValueError(f"{head}: the tensor {bias} does not fit its weights: expected {tuple(weight.shape[:1])}, "
                             f"got {tuple(tensors[bias].shape)}\nhint: module:function scores with any model")
        layers.append((weight, tensors[bias].float() if bias in tensors else None))
        used |= {name, bias}
    if not layers or (others := sorted(set(tensors) - used)):
        raise ValueError(f"{head}: expected weights and biases of linear layers alone, got "
                         f"{', '.join((others if layers else sorted(tensors))[:9]) or 'no tensor'}\n"
                         f"hint: module:function scores with any model")
    return layers


def _forward(vectors: np.ndarray, layers: "list[tuple[torch.Tensor, torch.Tensor | None]]", activation: str, output: str
             ) -> np.ndarray:
    """Outputs (n, C) float32 of linear layers for vectors (n, D) float32."""
    import torch
    from torch.nn import functional
    parts = [np.empty((0, layers[-1][0].shape[0]), np.float32)]
    with torch.inference_mode():
        for start in range(0, len(vectors), _BLOCK_ROWS):
            rows = torch.from_numpy(np.ascontiguousarray(vectors[start:start + _BLOCK_ROWS], np.float32))
            for number, (weight, bias) in enumerate(layers):
                rows = functional.linear(rows, weight, bias)
                if activation != "none" and number + 1 < len(layers):
                    rows = getattr(torch if activation == "tanh" else functional, activation)(rows)
            if output != "none":
                rows = rows.sigmoid() if output == "sigmoid" else rows.softmax(1)
            parts.append(rows.numpy())
    return np.concatenate(parts)
