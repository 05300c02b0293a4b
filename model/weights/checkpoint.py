"""Checkpoints: safetensors and JSON in one folder. A resumed run continues as if it had never stopped.

* `model.safetensors`: the weights, by the names of the network's state dict
* `ema.safetensors`: their moving average, by the same names; `ema-0.99.safetensors` has another rate
* `optimizer.safetensors`: AdamW's state as `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`
* `checkpoint.json`, written last: the step, the updates of the averages and the configuration
"""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor, distribute_tensor

from model.config import TrainConfig, differences, from_dict, to_dict
from model.network.unet import UNet
from model.weights.ema import EMA

FORMAT = 1


Contents = dict[str, dict[str, Tensor]]


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor. All processes must call it for a tensor that is sharded among them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_contents(model: nn.Module, ema: EMA, optimizer: optim.Optimizer, keep: bool) -> Contents:
    """The tensors of a checkpoint on the CPU, by file and name. {} in a process that does not `keep` them."""
    moments = {f"{kind}/{name}": tensor for name, weight in model.named_parameters()
               for kind, tensor in optimizer.state[weight].items()}
    parts = {"model.safetensors": model.state_dict()}
    parts |= {average_file(rate, ema.decay): weights for rate, weights in ema.averages.items()}
    parts["optimizer.safetensors"] = moments
    contents: Contents = {}
    for file, tensors in parts.items():
        for name, tensor in tensors.items():
            if keep or isinstance(tensor, DTensor):
                full = full_tensor(tensor.detach())
                if keep:
                    contents.setdefault(file, {})[name] = full.cpu().contiguous()
    return contents


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors into a file. OSError with its path if the disk refuses it: the library raises a text only."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        if not (code := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def write(folder: Path, tensors: Contents, step: int, updates: int, config: TrainConfig) -> None:
    """Write a complete checkpoint into the folder, which is created. The caller publishes it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file, named in tensors.items():
        save(named, folder / file)
    about = {"format": FORMAT, "step": step, "ema_updates": updates, "config": to_dict(config)}
    (folder / "checkpoint.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


def write_converted(folder: Path, model: nn.Module, config: TrainConfig, step: int) -> None:
    """Write the weights of another trainer into the folder. Sampling works with them, resuming does not."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save(_portable(model.state_dict()), folder / "ema.safetensors")
    about = {"format": FORMAT, "step": step, "ema_updates": 0, "config": to_dict(config)}
    (folder / "checkpoint.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


def halve(folder: Path, out: Path) -> dict:
    """Write the first average of a checkpoint in float16 into a folder. Returns the content of checkpoint.json.

    It is half as large. The rounding is 5e-4 of a weight, far below the changes by training.
    """
    about = _read_description(Path(folder))
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half() for name, tensor in _load(Path(folder) / "ema.safetensors").items()}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError(f"{folder}: there are weights too large for half precision")
    save(weights, out / "ema.safetensors")
    return about | {"ema_updates": 0, "config": about["config"] | {"ema_more": []}}


def read(folder: Path, model: nn.Module, ema: EMA, optimizer: optim.Optimizer, config: TrainConfig) -> int:
    """Load a checkpoint into model, average and optimizer, and return its step.

    Raises ValueError if it is not a checkpoint or belongs to a run with other settings.
    """
    folder = Path(folder)
    about = _read_description(folder)
    changed = differences(from_dict(about["config"]), config)
    if changed:
        raise ValueError(
            f"{folder} belongs to a run with other settings ({'; '.join(changed)})\n"
            "hint: resume with the old settings, or start a new run"
        )
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} was converted: it has no state to resume from")
    fill(dict(model.named_parameters()), _load(folder / "model.safetensors"))
    for rate, weights in ema.averages.items():
        fill(weights, _load(folder / average_file(rate, ema.decay)))
    ema.updates = about["ema_updates"]
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _load(folder / "optimizer.safetensors").items():
        kind, name = key.split("/", 1)
        moments.setdefault(name, {})[kind] = tensor
    state = optimizer.state_dict()
    # AdamW numbers the weights in the order of the model.
    state["state"] = {i: {kind: tensor if kind == "step" else _split_like(tensor, weight)
                          for kind, tensor in moments[name].items()}
                      for i, (name, weight) in enumerate(model.named_parameters())}
    optimizer.load_state_dict(state)
    return about["step"]


@torch.no_grad()
def fill(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy values into tensors, sharded ones too. Raises ValueError unless the names are the same."""
    if tensors.keys() != values.keys():
        raise ValueError(f"other weights than the network's: {sorted(tensors.keys() ^ values.keys())[:3]}")
    for name, tensor in tensors.items():
        tensor.copy_(_split_like(values[name], tensor))


def _split_like(value: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; ValueError if it is missing or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be read as weights: {error}\nhint: copy it again") from error


def average_file(rate: float, first: float) -> str:
    """The file of the average with a rate; `first` is the rate of the run's first average."""
    return "ema.safetensors" if rate == first else f"ema-{rate:g}.safetensors"


def load_denoiser(folder: Path, ema: bool = True, rate: float = 0.0) -> tuple[UNet, TrainConfig]:
    """The network of a checkpoint on the CPU, ready to sample, and the run's configuration.

    ema: load the average with `rate`; 0 is the first one. Otherwise load the weights themselves.
    ValueError if the folder is not a checkpoint, or has no such average.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_average(config, rate)
    # Files may have half precision. The network always has float32 weights.
    path = folder / (average_file(rate or config.ema_decay, config.ema_decay) if ema else "model.safetensors")
    weights = _load(path)
    with torch.device("meta"):  # takes no memory
        expected = {name: tensor.shape for name, tensor in UNet(config.unet).state_dict().items()}
    if expected != {name: tensor.shape for name, tensor in weights.items()}:
        raise ValueError(f"{path} has other weights than {folder / 'checkpoint.json'} describes\nhint: copy both again")
    model = UNet(config.unet)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval().requires_grad_(False), config


def check_average(config: TrainConfig, rate: float) -> None:
    """Raise ValueError unless the run keeps an average with this rate. 0 means its first average."""
    if rate and rate not in (config.ema_decay, *config.ema_more):
        raise ValueError(f"the run has no average of the rate {rate:g}\n"
                         f"hint: it has {', '.join(f'{decay:g}' for decay in (config.ema_decay, *config.ema_more))}")


def read_config(folder: Path) -> TrainConfig:
    """The settings in the description of a checkpoint; ValueError if they are damaged."""
    about = _read_description(folder)
    try:
        return from_dict(about["config"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'checkpoint.json'}: its settings cannot be read: {error!r}\n"
                         f"hint: was it edited, or written by another version?") from error


def _read_description(folder: Path) -> dict:
    path = folder / "checkpoint.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a complete checkpoint: it has no checkpoint.json")
    try:
        about = json.loads(path.read_bytes())
    # Bytes that are not UTF-8, numbers of thousands of digits, thousands of brackets.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})\nhint: was it edited or cut?") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} is not a description of a checkpoint\nhint: was it edited or cut?")
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} has format {about.get('format')}, and this version reads format {FORMAT}\n"
                         f"hint: install the version that wrote it")
    return about


def _portable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
