"""Style classifiers: a small network on pixels (`Judge`), and a linear probe on CLIP vectors.

The network shares nothing with the CLIP that conditions the denoiser, so it does not repeat the errors of that CLIP.
The probe is the measure of Rombach et al. 2022, arXiv:2207.13038, section 4.

Letters: N images, S their side, C styles, D the dimension of the vectors.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.training.precision import compute_dtype

JUDGE_BATCH = 64
"""Images of each step of a judge."""
_WIDTH = 32


class Judge(nn.Module):
    """Classifies the style by the pixels: convolutions, then the mean over the image."""

    def __init__(self, styles: int, width: int = _WIDTH) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for level in range(4):
            wide = width * 2 ** min(level, 2)
            layers += [nn.Conv2d(channels, wide, 3, stride=1 if level == 0 else 2, padding=1, bias=False),
                       nn.BatchNorm2d(wide), nn.ReLU(),
                       nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            channels = wide
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, styles)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) in [-1, 1] -> logits (N, C)."""
        return self.head(self.features(images).mean((2, 3)))


def train_judge(images: np.ndarray, labels: np.ndarray, styles: int, *, steps: int, seed: int,
                on_step: Callable[[int], None] = lambda step: None) -> Judge:
    """A judge trained on images (N, S, S, 3) uint8 and their styles (N,) int64, all styles equally often.

    Random mirroring, shifts, blur and noise hide how clean a file is. Samples are less clean than real images, and the
    judge must classify them by style alone. `on_step` gets the number of each finished step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(styles).train()
    rng = np.random.default_rng((seed, 41))
    generator = torch.Generator().manual_seed(seed)
    fast = compute_dtype("auto", torch.device("cpu")) == torch.bfloat16
    rows_of_style = [np.flatnonzero(labels == style) for style in range(styles)]
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(1, steps + 1):
        chosen_styles = rng.integers(styles, size=JUDGE_BATCH)
        rows = np.array([rng.choice(rows_of_style[style]) for style in chosen_styles])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
            logits = judge(_augment(as_tensor(images[rows]), generator))
        loss = F.cross_entropy(logits.float(), torch.from_numpy(chosen_styles), label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step)
    return judge.eval().requires_grad_(False)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, 3, S, S), randomly mirrored, shifted by at most an eighth, blurred, and with noise."""
    count = len(images)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    mirror = torch.where(draw(count) < 0.5, -1.0, 1.0)
    shifts = (draw(count, 2) - 0.5) / 2
    moves = torch.zeros(count, 2, 3)
    moves[:, 0, 0], moves[:, 1, 1], moves[:, :, 2] = mirror, 1.0, shifts
    grid = F.affine_grid(moves, list(images.shape), align_corners=False)
    # The border is repeated: most images have a white background.
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = draw(count, 1, 1, 1) * (draw(count, 1, 1, 1) < 0.5)
    noise = torch.randn(images.shape, generator=generator) * 0.1 * draw(count, 1, 1, 1)
    return torch.lerp(moved, blurred, share) + noise


def as_tensor(images: np.ndarray) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def classify_images(judge: Judge, images: np.ndarray) -> np.ndarray:
    """The style that the judge assigns to each image (N, S, S, 3) uint8: (N,) int64."""
    return np.concatenate([judge(as_tensor(images[start:start + 256])).argmax(1).numpy()
                           for start in range(0, len(images), 256)] or [np.empty(0, np.int64)])


def train_probe(vectors: np.ndarray, labels: np.ndarray, styles: int) -> np.ndarray:
    """Logistic regression on unit vectors (N, D) and styles (N,) int64: weights (C, D + 1); styles weigh the same."""
    x = torch.from_numpy(_with_bias(vectors)).double()
    y = torch.from_numpy(labels)
    counts = torch.bincount(y, minlength=styles).double()
    weights = torch.zeros(styles, x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weights.T, y, weight=1 / counts.clamp(min=1)) + 1e-5 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach().float().numpy()


def classify_vectors(weights: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The style that the probe assigns to each vector (N, D): (N,) int64."""
    return (_with_bias(vectors) @ weights.T).argmax(1)


def _with_bias(vectors: np.ndarray) -> np.ndarray:
    # Unit vectors of a CLIP lie close together: ten times as long, a fit takes a tenth of the steps.
    return np.concatenate([10 * vectors.astype(np.float32), np.ones((len(vectors), 1), np.float32)], 1)


def kid(samples: np.ndarray, reference: np.ndarray, groups: np.ndarray | None = None) -> float:
    """Kernel Inception distance between two sets of unit vectors (N, D) and (M, D), on any features.

    The unbiased estimate of the squared maximum mean discrepancy with the kernel (x y + 1)^3 (Binkowski et al. 2018,
    arXiv:1801.01401, section 4). They divide the product by D because their features are not of unit length. The
    estimate may be slightly below zero. Vectors of `samples` with equal `groups` (N,) are not independent: their pairs
    are left out. NaN where no pair is left.
    """
    n, m = len(samples), len(reference)
    x, y = samples.astype(np.float64), reference.astype(np.float64)
    xx, yy, xy = ((a @ b.T + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    groups = np.arange(n) if groups is None else groups
    apart = groups[:, None] != groups[None]
    if not apart.any() or m < 2:
        return math.nan
    return float(xx[apart].mean() + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean())
