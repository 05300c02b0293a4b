"""The UNet of the RDM: convolutions for the image, cross-attention for the set of neighbors.

Letters: B batch, C channels, H W height and width, p patch, N = H*W tokens. k context vectors,
D their dimension, E time-embedding width, h heads, d head dimension.

Structure and state-dict names are those of the CompVis code, so its checkpoints load by name.
Blattmann et al. 2022, arXiv:2204.11824; Rombach et al. 2022, arXiv:2112.10752.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import GROUPS, UNetConfig


class UNet(nn.Module):
    """Denoiser of an image at a noise level, given an unordered set of context vectors."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width = config.model_channels
        emb = 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks, skips = _down_path(config, emb)
        channels = skips[-1]
        self.middle_block = Stack(
            ResBlock(channels, channels, emb),
            _transformer(config, channels),
            ResBlock(channels, channels, emb),
        )
        self.output_blocks = _up_path(config, emb, skips)
        if config.learned_null:
            self.null = nn.Parameter(torch.zeros(config.context_dim))
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            _zero(nn.Conv2d(width, config.out_channels * config.patch**2, 3, padding=1)),
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Predict the target of the diffusion from a noisy image.

        x (B, C, H, W), t (B,) in 0..T-1, context (B, k, D) -> (B, C_out, H, W).
        Raises ValueError if the sides do not divide by `config.stride`.
        """
        if x.shape[-2] % self.config.stride or x.shape[-1] % self.config.stride:
            raise ValueError(f"image of {tuple(x.shape[-2:])}: sides must divide by {self.config.stride}")
        p = self.config.patch
        x = F.pixel_unshuffle(x, p) if p > 1 else x  # (B, C p p, H/p, W/p)
        if self.config.learned_null:
            context = torch.where(context.any(-1, keepdim=True), context, self.null.to(context.dtype))
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels))  # (B, E)
        skips = []
        for block in self.input_blocks:
            x = self._run(block, x, emb, context)
            skips.append(x)
        x = self._run(self.middle_block, x, emb, context)
        for block in self.output_blocks:
            x = self._run(block, torch.cat([x, skips.pop()], dim=1), emb, context)
        x = self.out(x)  # (B, C_out p p, H/p, W/p)
        return F.pixel_shuffle(x, p) if p > 1 else x

    def _run(self, block, x, emb, context):
        if self.config.checkpointing and self.training:
            return checkpoint(block, x, emb, context, use_reentrant=False)
        return block(x, emb, context)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t (B,) at frequencies from 1 down to 1/10000 -> (B, width)."""
    half = width // 2
    exponent = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angle = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)  # (B, width/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Stack(nn.Sequential):
    """Layers in sequence. Each gets the time embedding or the context, if it uses them."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]  # it takes more
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class ResBlock(nn.Module):
    """Two convolutions with the noise level added between them, around a skip."""

    def __init__(self, c_in: int, c_out: int, emb: int):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, c_out))
        # The published code has a dropout here. The identity keeps the numbers in the names.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, c_out),
            nn.SiLU(),
            nn.Identity(),
            _zero(nn.Conv2d(c_out, c_out, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)  # (B, C_out, H, W)
        h = h + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double height and width by repetition and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, around a skip."""

    def __init__(self, channels: int, head_dim: int, depth: int, context_dim: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, head_dim, context_dim) for _ in range(depth))
        self.proj_out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, N, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = h.transpose(1, 2).unflatten(2, (height, width))  # (B, C, H, W)
        return x + self.proj_out(h)


class TransformerBlock(nn.Module):
    """Self-attention over the pixels, cross-attention to the context set, a gated feed-forward."""

    def __init__(self, channels: int, head_dim: int, context_dim: int):
        super().__init__()
        self.attn1 = Attention(channels, channels, head_dim)
        self.attn2 = Attention(channels, context_dim, head_dim)
        self.ff = FeedForward(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)  # (B, N, C)
        # No projection and no positions before the keys: the context is a set, any k will do.
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) to a source (B, M, D)."""

    def __init__(self, channels: int, source_dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_dim, channels, bias=False)
        self.to_v = nn.Linear(source_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        q = self.to_q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, h, N, d)
        k = self.to_k(source).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, h, M, d)
        v = self.to_v(source).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, h, M, d)
        out = _attend(q, k, v)  # (B, h, N, d)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, N, C)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q (B, h, N, d) to k and v (B, h, M, d) -> (B, h, N, d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The CPU's fused backward is two to four times slower in bfloat16 than in float32.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return F.scaled_dot_product_attention(q, k, v)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # (B, N, C_out) each
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated two-layer perceptron on every token, four times as wide inside."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (B, N, C)


def _down_path(config: UNetConfig, emb: int) -> tuple[nn.ModuleList, list[int]]:
    """The encoder, and the channels of each output that the decoder uses."""
    channels = config.model_channels
    first = nn.Conv2d(config.in_channels * config.patch**2, channels, 3, padding=1)
    blocks, skips = [Stack(first)], [channels]
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            layers: list[nn.Module] = [ResBlock(channels, mult * config.model_channels, emb)]
            channels = mult * config.model_channels
            if 2**level in config.attention_downsampling:
                layers.append(_transformer(config, channels))
            blocks.append(Stack(*layers))
            skips.append(channels)
        if level < len(config.channel_mult) - 1:
            blocks.append(Stack(Downsample(channels)))
            skips.append(channels)
    return nn.ModuleList(blocks), skips


def _up_path(config: UNetConfig, emb: int, skips: list[int]) -> nn.ModuleList:
    """The decoder: one block more per level than the encoder. Each block uses one output of the encoder."""
    skips, channels, blocks = list(skips), skips[-1], []
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        for i in range(config.num_res_blocks + 1):
            layers: list[nn.Module] = [ResBlock(channels + skips.pop(), mult * config.model_channels, emb)]
            channels = mult * config.model_channels
            if 2**level in config.attention_downsampling:
                layers.append(_transformer(config, channels))
            if level > 0 and i == config.num_res_blocks:
                layers.append(Upsample(channels))
            blocks.append(Stack(*layers))
    assert not skips
    return nn.ModuleList(blocks)


def _transformer(config: UNetConfig, channels: int) -> SpatialTransformer:
    return SpatialTransformer(channels, config.head_dim, config.depth, config.context_dim)


def _zero(layer: nn.Module) -> nn.Module:
    """Start a residual branch, or the whole network, at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
