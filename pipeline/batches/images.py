"""Images of a batch, decoded in threads or kept decoded."""

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from pipeline.batches.prefetch import Ahead
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import map_array
from pipeline.media import tars
from pipeline.media.resize import decode_pixels
from pipeline.media.types import BadImage

_THREADS = 8  # that decode, at most
_PIECES = 4  # of a batch for each thread, for some take longer than others


class Pictures:
    """The pictures of a dataset by global row, averaged down to `size` pixels a side unless it is 0."""

    def __init__(self, dataset: Dataset, size: int, decoded_bytes: int, threads: int) -> None:
        records = dataset.manifest("shards")["items"]
        counts = [record["samples"] for record in records]
        self.folder, self.size, self.decoded_bytes = dataset.folder("shards"), size, decoded_bytes
        self.offsets = np.cumsum([0, *counts])
        self._tars = Ahead(partial(_tar, dataset, [file_of(record, ".tar") for record in records], counts))
        self._threads = threads or min(_THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._threads)
        self._stored = self._given = None  # shape of a picture as it is in the tars, and as it is asked for
        self._kept: np.ndarray | None = None  # all pictures of the dataset, if they take little
        self._missing = np.ones(self.offsets[-1], bool)  # which of them are not there yet

    def want(self, shards: list[int]) -> None:
        """Have some shards opened, the first first, and forget all others."""
        self._tars.want(shards if self._missing.any() else [])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The pictures of global rows, (B, H, W, 3) uint8."""
        if self._stored is None:
            self._learn(int(rows[0]))
        if self._kept is None:
            out = np.empty((len(rows), *self._given), np.uint8)
            self._decode(rows, out, np.arange(len(rows)))
            return out
        missing = np.unique(rows[self._missing[rows]])
        self._decode(missing, self._kept, missing)
        self._missing[missing] = False
        return self._kept[rows]

    def _learn(self, row: int) -> None:
        """Take the size of one picture for that of all, and keep all if they take little."""
        shard = int(shard_numbers(self.offsets, row))
        picture = _decoded(self._tars[shard], row - int(self.offsets[shard]))
        self._given = average_down(picture[None], self.size).shape[1:] if self.size else picture.shape
        if np.prod(shape := (int(self.offsets[-1]), *self._given)) <= self.decoded_bytes:
            self._kept = np.empty(shape, np.uint8)  # takes memory as it is filled
        self._stored = picture.shape

    def _decode(self, rows: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Decode the pictures of `rows` to their `places` in `out`."""
        if not len(rows):
            return
        shards = shard_numbers(self.offsets, rows)
        positions = rows - self.offsets[shards]
        tars_ = {shard: self._tars[shard] for shard in np.unique(shards).tolist()}

        def piece(which: np.ndarray) -> None:
            for one in which.tolist():
                out[places[one]] = self._picture(tars_[int(shards[one])], int(positions[one]))

        # In the order of the tars, so that these are read forwards.
        pieces = np.array_split(np.argsort(rows, kind="stable"), min(len(rows), _PIECES * self._threads))
        for _ in self._pool.map(piece, pieces):
            pass

    def _picture(self, tar: tars.TarImages, position: int) -> np.ndarray:
        picture = _decoded(tar, position)
        if picture.shape != self._stored:
            raise ValueError(f"the pictures in {self.folder} have different sizes; training needs one size\n"
                             f"hint: shard with --resize center_crop")
        return average_down(picture[None], self.size)[0] if self.size else picture


def shard_numbers(offsets: np.ndarray, rows: Any) -> Any:
    """The numbers of the shards that global rows are in."""
    return np.searchsorted(offsets, rows, side="right") - 1


def _tar(dataset: Dataset, files: list[dict[str, Any]], counts: list[int], number: int) -> tars.TarImages:
    """The tar of a shard; ValueError if it has not the samples of the manifest."""
    tar = dataset.open_file("shards", files[number], tars.TarImages)
    if len(tar) != counts[number]:
        raise ValueError(f"{tar.path} has {len(tar)} samples, its manifest says {counts[number]}\n"
                         f"hint: python -m jobs verify")
    return tar


def open_array(dataset: Dataset, name: str, files: list[dict[str, Any]], counts: tuple[int, ...], wrong: str,
           number: int) -> np.ndarray:
    """The array of a shard; ValueError saying what is `wrong` if it has not a row for each sample."""
    array = dataset.open_file(name, files[number], map_array)
    if len(array) != counts[number]:
        raise ValueError(wrong)
    if len(array) and hasattr(mmap, "MADV_WILLNEED"):
        # From the first byte to the last and ahead: what is asked for later comes in no order.
        array._mmap.madvise(mmap.MADV_WILLNEED)
    return array


def _decoded(tar: tars.TarImages, position: int) -> np.ndarray:
    try:
        return decode_pixels(tar[position])
    except BadImage as error:
        raise ValueError(f"sample {position} of {tar.path} does not decode ({error})\n"
                         f"hint: shard these tars anew without --adopt, which leaves such samples out") from error


def average_down(pictures: np.ndarray, size: int) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 with the means of their squares in place of these, (N, size, size, 3) uint8.

    ValueError unless both sides are the same multiple of `size`.
    """
    height, width = pictures.shape[1:3]
    if height != width or height % size:
        raise ValueError(f"pictures of {width} x {height} cannot be averaged to {size} x {size}\n"
                         f"hint: --image-size must divide their sides, and these must be equal")
    step = height // size
    if step == 1:
        return pictures
    sums = pictures.reshape(len(pictures), size, step, size, step, 3).sum((2, 4), dtype=np.uint32)
    return ((sums + step * step // 2) // (step * step)).astype(np.uint8)
