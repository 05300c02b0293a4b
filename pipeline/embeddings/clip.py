"""Load CLIP encoders, and encode images and texts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.embeddings.clip_weights import (
    BUNDLED,
    BUNDLED_MODEL,
    INSTALL_AGAIN,
    OWN_WEIGHTS_SCHEMES,
    RANDOM,
    ClipConfig,
    check_model,
    describe_encoder,
    read_own_weights,
    read_tagged_weights,
    weights_path,
)
from pipeline.embeddings.open_clip_door import open_clip
from pipeline.hardware import devices
from pipeline.media import resize

if TYPE_CHECKING:
    import torch


@dataclass
class Encoder:
    """A loaded model with its own preprocessing."""

    dim: int
    prepare: Callable[[Image.Image], "torch.Tensor"]
    """open_clip's own preprocessing."""
    preprocessing: dict[str, Any]
    model: Any
    encode: Callable[["torch.Tensor"], "torch.Tensor"]
    compiled: bool
    tokenize: Callable[[list[str]], "torch.Tensor"]
    device: "torch.device"
    dtype: "torch.dtype"
    fit: devices.BatchFit = field(default_factory=devices.BatchFit)
    """How many images or texts fit the device in one forward pass."""

    @property
    def whole(self) -> bool:
        """Whether it takes batches of one size, whole ones wherever there are enough images: a GPU does."""
        return self.device.type != "cpu"

    def prepared(self, data: bytes) -> np.ndarray:
        """An encoded image as the model wants it but for the normalization; see `prepared`."""
        return prepare_image(data, self.preprocessing, self.prepare)

    def images(self, batch: np.ndarray) -> np.ndarray:
        """Unit vectors of a batch of `prepared` images: (B, S, S, 3) uint8 -> (B, D) float32."""
        return self.launch(batch).cpu().numpy()

    def launch(self, batch: np.ndarray, size: int = 0) -> "torch.Tensor":
        """As `images`, without waiting for a GPU to finish: (B, D) float32 on the device.

        size: repeat the first image until the batch has this size. A compiled encoder is compiled again for each new
        size, and others may sum in another order. Ignore the vectors beyond those of the batch.
        """
        import torch

        if len(batch) < size:
            batch = np.concatenate([batch, np.broadcast_to(batch[:1], (size - len(batch), *batch.shape[1:]))])
        # torch warns about arrays that cannot be written, such as the pixels of one image from Pillow.
        pixels = torch.from_numpy(batch if batch.flags.writeable else batch.copy())
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        pixels = pixels.to(self.device, non_blocking=True)
        if pixels.dtype == torch.uint8:
            # The channels stay last in memory, which the first convolution likes.
            pixels = pixels.permute(0, 3, 1, 2)
            mean, std = (torch.tensor(self.preprocessing[name], device=self.device)[:, None, None] * 255
                         for name in ("mean", "std"))
            pixels = (pixels - mean) / std
        return self._unit(self.encode, pixels.to(self.dtype))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts: (B, D) float32."""
        return self._unit(self.model.encode_text, self.tokenize(list(texts))).cpu().numpy()

    def _unit(self, encode: Callable[["torch.Tensor"], "torch.Tensor"], batch: "torch.Tensor") -> "torch.Tensor":
        import torch
        with torch.inference_mode():
            vectors = encode(batch.to(self.device)).float()
        # Normalised after the cast: in half precision the norm itself would be off by 1e-3.
        return torch.nn.functional.normalize(vectors, dim=-1)


def prepare_image(data: bytes, wanted: dict[str, Any], theirs: Callable[[Image.Image], "torch.Tensor"]) -> np.ndarray:
    """Decode an image and resize it as the preprocessing `wanted` says: (S, S, 3) uint8.

    It is not normalized. A preprocessing that this program does not have is done by open_clip's own transform
    (`theirs`): (3, H, W) float32. BadImage if the bytes are no image.
    """
    pixels = resize.decode_pixels(data)
    if (wanted["resize"] not in {"shortest", "squash"} or wanted["interpolation"] not in {"bicubic", "bilinear"}
            or not isinstance(wanted["image_size"], int)):
        return theirs(Image.fromarray(pixels)).numpy()
    height, width = pixels.shape[:2]
    size, short = wanted["image_size"], min(width, height)
    part = (0.0, 0.0, float(width), float(height))
    if wanted["resize"] == "shortest":
        # torchvision's rounding: of the long side down, of the crop's place to the nearest.
        shape = (int(size * width / short), int(size * height / short))
        x, top = (round((side - size) / 2) for side in shape)
        across, down = width / shape[0], height / shape[1]
        part = (x * across, top * down, (x + size) * across, (top + size) * down)
    if part == (0, 0, width, height) and (width, height) == (size, size):
        return pixels
    return resize.resample(pixels, (size, size), part, wanted["interpolation"])


def open_clip_transform(wanted: dict[str, Any]) -> Callable[[Image.Image], "torch.Tensor"]:
    """open_clip's own preprocessing of a description, without the model; loaded once an image needs it."""

    @lru_cache(maxsize=1)
    def build_transform() -> Any:
        settings = {name: wanted[name] for name in ("mean", "std", "interpolation", "fill_color") if name in wanted}
        wished = open_clip.transform.PreprocessCfg(size=wanted["image_size"], resize_mode=wanted["resize"], **settings)
        return open_clip.transform.image_transform_v2(wished, is_train=False)

    return lambda image: build_transform()(image)


def load_encoder(config: ClipConfig, compiled: bool = False) -> Encoder:
    """The encoder of `config` on the device of this process; kept in this process.

    ValueError where open_clip knows no such model, or the weights do not fit it. OSError where a file cannot be read.
    DeviceUnavailable where the device cannot be used.
    """
    return load_encoder_on(config, compiled, devices.choose_device())


@lru_cache(maxsize=2)
def load_encoder_on(config: ClipConfig, compiled: bool, device: "torch.device") -> Encoder:
    """The encoder of `config` on a device; kept in this process."""
    import torch

    # Before anything else: open_clip takes random weights where a hub or a folder has none.
    description = describe_encoder(config)
    precision = config.precision if config.precision != "auto" else fastest_precision(device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    own = config.model.startswith(OWN_WEIGHTS_SCHEMES) or config.pretrained == RANDOM
    weights = None if own else weights_path(config)
    try:
        # open_clip keeps in full precision what has to stay so (norms).
        model, _, prepare = open_clip.create_model_and_transforms(
            check_model(config), pretrained=weights, device=device, precision=precision,
            require_pretrained=config.pretrained != RANDOM)
    except Exception as error:  # readers of weights raise whatever they like
        if devices.failure_kind(error) != "none":
            raise devices.DeviceUnavailable(f"the encoder {config.model} does not get onto the GPU: "
                                            f"{storage.first_line(error)}\n{devices.failure_hint(error)}") from error
        reason = storage.lost_folder_message(error) or storage.first_line(error)
        # A fault of this machine is no invalid usage: a retry may help.
        if isinstance(error, OSError):
            raise OSError(f"the encoder {config.model} cannot be loaded: {reason}") from error
        if config.pretrained == "bundled" and not own:
            raise OSError(f"the bundled encoder {weights} cannot be loaded: {reason}\n{INSTALL_AGAIN}") from error
        raise ValueError(f"open_clip cannot load {config.model} with the weights {config.pretrained}: {reason}\n"
                         f"hint: `python -c 'import open_clip; print(open_clip.list_pretrained())'` lists names and "
                         f"tags") from error
    model.eval().requires_grad_(False)

    @lru_cache(maxsize=1)
    def tokenizer() -> Any:
        # Loaded for texts only: some tokenizers need packages or files of a hub that images do not need.
        try:
            return open_clip.get_tokenizer(config.model)
        except Exception as error:
            raise ValueError(f"open_clip has no tokenizer for {config.model}: "
                             f"{storage.first_line(error)}\nhint: images can be embedded without "
                             f"one; for texts, `pip install transformers` and the files of the tokenizer") from error

    return Encoder(description["dim"], prepare, description["preprocessing"], model,
                   torch.compile(model.encode_image) if compiled else model.encode_image, compiled,
                   lambda texts: tokenizer()(texts), device, dtype)


def fastest_precision(device: "torch.device") -> str:
    """The precision in which a machine is fastest, of those that keep the cosine to 1e-3."""
    import torch

    if device.type == "cuda":
        return "bf16"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bf16_dot_products() else "fp32"


@lru_cache(maxsize=1)
def _has_bf16_dot_products() -> bool:
    """Whether this CPU multiplies in bf16; one that merely has vectors takes longer than in fp32."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):  # no Linux, or no x86
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())


def input_pixels(config: ClipConfig) -> int:
    """Pixels of an image as the encoder takes it."""
    size = describe_encoder(config)["preprocessing"]["image_size"]
    return size ** 2 if isinstance(size, int) else size[0] * size[1]


def activation_bytes(config: ClipConfig) -> int:
    """Largest memory of a forward pass over one image in fp32, in bytes. It is exact only for transformers."""
    own = config.model.startswith(OWN_WEIGHTS_SCHEMES)
    architecture = read_own_weights(config)[1]["model_cfg"] if own else read_tagged_weights(config)[1]
    vision = architecture["vision_cfg"]
    if not vision.get("patch_size"):
        return 200 * input_pixels(config)  # three of the first maps of a ResNet
    tokens = input_pixels(config) // vision["patch_size"] ** 2 + 1
    # Input, sum, query, key, value and output, and a network of 4 widths before and after its nonlinearity.
    return int(4 * tokens * vision.get("width", 768) * (6 + 2 * vision.get("mlp_ratio", 4.0)))


def flop_per_image(config: ClipConfig) -> tuple[float, int]:
    """Floating point operations of a forward pass over one image, and the length of its vector.

    A vision transformer with T tokens of width W has 24 T W^2 in each layer (projections, and a network of 4 W). It
    has also 4 T^2 W (scores and values), and the patches. ValueError for other networks.
    """
    if config.model == BUNDLED_MODEL:
        architecture = json.loads((BUNDLED / f"{BUNDLED_MODEL}.json").read_text())
    else:
        architecture = open_clip.get_model_config(check_model(config))
    vision = architecture["vision_cfg"]
    if not vision.get("patch_size") or not isinstance(vision.get("image_size"), int):
        raise ValueError(f"{config.model} is no vision transformer: how much it computes is not known here\n"
                         f"hint: a model whose name begins with ViT")
    width, patch = vision["width"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    tokens = patches + 1
    layer = (8 + 4 * vision.get("mlp_ratio", 4.0)) * tokens * width ** 2 + 4 * tokens ** 2 * width
    return (vision["layers"] * layer + 2 * patches * width * 3 * patch ** 2 + 2 * width * architecture["embed_dim"],
            architecture["embed_dim"])
