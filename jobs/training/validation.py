"""Validation during training: losses and images of held-out samples, with and without their neighbors."""

import io
import json
import logging
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jobs.runs.run import SHOWN_ROWS
from jobs.training import latents
from jobs.training.train_stage import Job
from model.config import TrainConfig
from model.diffusion import process, randomness
from model.diffusion.samplers import initial_noise, sample
from model.network.unet import UNet
from model.training.precision import compute_dtype
from model.weights.first_stage import FirstStage
from pipeline import storage
from pipeline.batches.batches import OWN
from pipeline.batches.forgotten import ForgottenRows
from pipeline.batches.images import average_down
from pipeline.datasets import lookup
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings
from pipeline.formats import arrays
from pipeline.media.contact_sheet import contact_sheet
from pipeline.media.resize import decode_pixels
from pipeline.neighbors.files import load_neighbors
from pipeline.takedowns.hidden_rows import read_hidden_rows

_COUNT, _AT_ONCE = 256, 64
_SHOWN, _STEPS = 8, 20
_SMALL, _LARGE = 64, 192  # least and most pixels of a side of an image in the grid
_log = logging.getLogger(__name__)


class Validation:
    """Samples of a dataset that training does not see, spread evenly over it, with the vectors of their neighbors.

    The noise and the noise level of each are always the same, so that losses of different steps can be compared.
    """

    def __init__(self, job: Job, dataset: Dataset) -> None:
        self.job, self.config, self.dataset = job, job.config, dataset
        counts = [record["samples"] for record in dataset.manifest("shards")["items"]]
        total = sum(counts)
        spread = np.linspace(0, total - 1, min(total, _COUNT)).astype(np.int64)
        rows = np.unique(ForgottenRows(dataset, np.cumsum([0, *counts])).replace(spread))
        ids = np.concatenate(list(load_neighbors(dataset, job.database)))[rows][:, :self.config.k]
        ids[np.isin(ids, read_hidden_rows(job.database))] = -1  # the lists may be older than these
        context = torch.from_numpy(Embeddings(job.database).rows(ids)).float()  # (N, k, D)
        if self.config.own != "none":
            own = Embeddings(dataset, OWN[self.config.own]).rows(rows)
            context = torch.cat([torch.from_numpy(own).float()[:, None], context], 1)
        self.context = self.config.context_norm * context
        # Spread over all of them: rows that follow each other often have one subject.
        self.shown = np.linspace(0, len(rows) - 1, min(len(rows), _SHOWN)).astype(np.int64)
        self.pictures = lookup.samples(dataset, rows[self.shown].tolist())
        rows_of_neighbors = sorted({int(row) for row in ids[self.shown].ravel() if row >= 0})
        self.near = dict(zip(rows_of_neighbors, lookup.samples(job.database, rows_of_neighbors), strict=True))
        self.ids = ids
        self.x0 = self._latents(rows) if job.latents else self._pixels(rows)  # (N, C, h, w)
        self.eps = randomness.noise(self.config.seed, "validation", 0, range(len(rows)), self.x0.shape[1:])
        levels = (np.arange(len(rows)) + 0.5) / len(rows) * self.config.diffusion.timesteps
        # In random order, so that similar samples do not get similar levels.
        self.t = torch.from_numpy(np.random.default_rng(0).permutation(levels.astype(np.int64)))

    def __call__(self, step: int, network: UNet) -> dict[str, Any]:
        """The losses of a network with the true neighbors, with those of other samples and with none. Writes a grid."""
        device = next(network.parameters()).device
        shuffled = self.context.roll(len(self.context) // 2, 0)
        losses = {f"validation_{name}": self._loss(network, context, device) for name, context in (
            ("loss", self.context), ("shuffled", shuffled), ("nobody", torch.zeros_like(self.context)))}
        if (images := self.generate(network, device)) is not None:
            buffer, about = io.BytesIO(), PngInfo()
            about.add_text(SHOWN_ROWS, json.dumps(self._shown_rows()))
            self._grid(images).save(buffer, "PNG", pnginfo=about)
            storage.put_bytes(buffer.getvalue(), self.job.run.validated(step))
        return losses

    def generate(self, network: UNet, device: torch.device) -> np.ndarray | None:
        """Images (N, S, S, 3) uint8 that a network generates from neighbors. None if its latents cannot be decoded."""
        if self.job.latents and not self._first_stage:
            return None
        count = len(self.pictures)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._half(device)):
            generated = sample(network, self.config.diffusion, self.context[self.shown].to(device),
                           initial_noise(self.config.seed, range(count), self.x0.shape[1:]).to(device),
                           steps=_STEPS, guidance=1.5, sampler=_sampler(self.config), clamp=not self.job.latents)
        decoded = self._decode_latents(generated.float()) if self.job.latents else generated
        if decoded is None:
            return None
        return ((decoded.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()

    @cached_property
    def _first_stage(self) -> FirstStage | None:
        """The decoder of the latents, on the CPU. None, with one warning, if it cannot be loaded."""
        try:
            return latents.first_stage_of_run(self.job.run, "cpu")
        except (ValueError, OSError) as error:
            _warn_not_decodable(error)
            return None

    def _decode_latents(self, generated: torch.Tensor) -> torch.Tensor | None:
        """Images of latents, decoded one by one. The first stage is on the GPU only during this call."""
        assert self._first_stage is not None
        network, decode = self._first_stage.network, self._first_stage.decode
        try:
            network.to(generated.device)
            return torch.cat([decode(latent[None]).cpu() for latent in generated])
        except torch.OutOfMemoryError as error:
            _warn_not_decodable(error)
            self._first_stage = None
        finally:
            network.cpu()
            if generated.device.type == "cuda":
                torch.cuda.empty_cache()  # training needs the memory
        return None

    @torch.no_grad()
    def _loss(self, network: UNet, context: torch.Tensor, device: torch.device) -> float:
        total = 0.0
        for start in range(0, len(self.x0), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            x0, eps, t = (tensor[part].to(device) for tensor in (self.x0, self.eps, self.t))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._half(device)):
                answer = network(process.q_sample(self.config.diffusion, x0, eps, t), t, context[part].to(device))
            total += process.loss(self.config.diffusion, answer, x0, eps, t).sum().item()
        return total / len(self.x0)

    def _half(self, device: torch.device) -> bool:
        return compute_dtype(self.config.precision, device) == torch.bfloat16

    def _grid(self, images: np.ndarray) -> Image.Image:
        """A row for each shown sample: the image, the generated image, and the neighbors."""
        cells: list[Image.Image | None] = []
        for held_out, image, place in zip(self.pictures, images, self.shown, strict=True):
            cells += [_decode_image(held_out.picture), Image.fromarray(image)]
            cells += [_decode_image(self.near[int(row)].picture) if row >= 0 else None for row in self.ids[place][:4]]
        columns = len(cells) // len(self.pictures)
        return contact_sheet(cells, columns, cell=min(max(_SMALL, images.shape[1]), _LARGE),
                             row_labels=[held_out.caption or held_out.key for held_out in self.pictures],
                             column_labels=["held out", "sample", *(f"neighbor {n + 1}" for n in range(columns - 2))])

    def _shown_rows(self) -> list[dict[str, Any]]:
        """The rows that the grid shows, so that the report can leave it out once one of them is forgotten."""
        shown = [(self.dataset, self.pictures), (self.job.database, list(self.near.values()))]
        return [{"database": dataset.label, "row": one.row, "sha256": one.sha256, "url": one.url}
                for dataset, samples in shown for one in samples]

    def _pixels(self, rows: np.ndarray) -> torch.Tensor:
        samples = lookup.samples(self.dataset, rows.tolist())
        pictures = np.stack([decode_pixels(held_out.picture) for held_out in samples])
        if self.config.image_size:
            pictures = average_down(pictures, self.config.image_size)
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1

    def _latents(self, rows: np.ndarray) -> torch.Tensor:
        parts = [arrays.map_array(self.dataset.fetch("latents", file_of(record, ".npy")))
                 for record in self.dataset.manifest("latents")["items"]]
        offsets = np.cumsum([0, *map(len, parts)])
        shards = np.searchsorted(offsets, rows, side="right") - 1
        latents_of_rows = torch.from_numpy(np.stack([parts[shard][row - offsets[shard], 0] for shard, row in
                                           zip(shards, rows, strict=True)])).float()
        # Without a given factor, each dataset has its own.
        ours, theirs = (dataset.manifest("latents")["info"]["first_stage"]["scale"] for dataset in
                        (self.job.dataset, self.dataset))
        return latents_of_rows if ours == theirs else latents_of_rows * (ours / theirs)


def _warn_not_decodable(error: Exception) -> None:
    _log.warning("train: validation samples no images, because latents cannot be decoded here; losses continue: %s",
                 storage.first_line(error))


def _sampler(config: TrainConfig) -> Any:
    return "heun" if config.diffusion.prediction == "flow" else "dpm++"


def _decode_image(picture: bytes) -> Image.Image:
    return Image.fromarray(decode_pixels(picture))
