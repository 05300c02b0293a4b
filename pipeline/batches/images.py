"""Images of a batch, decoded in threads or kept decoded."""

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from pipeline.batches.prefetch import Prefetcher
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.formats.arrays import map_array
from pipeline.media import tars
from pipeline.media.resize import decode_pixels
from pipeline.media.types import BadImage
from pipeline.storage import DamagedFile

_MOST_DECODER_THREADS = 8
_PARTS_PER_THREAD = 4
"""Parts of a batch for each thread, because some images take longer than others."""


class DatasetImages:
    """The images of a dataset by global row, averaged down to `size` pixels a side unless it is 0."""

    def __init__(self, dataset: Dataset, size: int, decoded_bytes: int, threads: int) -> None:
        records = dataset.manifest("shards")["items"]
        counts = [record["samples"] for record in records]
        self.folder, self.size, self.decoded_bytes = dataset.folder("shards"), size, decoded_bytes
        self.offsets = np.cumsum([0, *counts])
        self._tars = Prefetcher(partial(_open_tar, dataset, [file_of(record, ".tar") for record in records], counts))
        self._threads = threads or min(_MOST_DECODER_THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._threads)
        self._stored: tuple[int, ...] | None = None  # shape of an image in the tars
        self._shape: tuple[int, ...] = ()  # shape of an image of a batch
        self._kept: np.ndarray | None = None  # all images of the dataset, if they take little memory
        self._missing = np.ones(self.offsets[-1], bool)  # the rows that are not decoded yet

    def want(self, shards: list[int]) -> None:
        """Open these shards in this order, and forget all others."""
        self._tars.want(shards if self._missing.any() else [])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The images of global rows, (B, H, W, 3) uint8."""
        if self._stored is None:
            self._set_shape(int(rows[0]))
        if self._kept is None:
            out = np.empty((len(rows), *self._shape), np.uint8)
            self._decode(rows, out, np.arange(len(rows)))
            return out
        missing = np.unique(rows[self._missing[rows]])
        self._decode(missing, self._kept, missing)
        self._missing[missing] = False
        return self._kept[rows]

    def _set_shape(self, row: int) -> None:
        """Take the size of one image as the size of all. Keep all if they take little memory."""
        shard = int(shard_numbers(self.offsets, row))
        picture = _decode_image(self._tars[shard], row - int(self.offsets[shard]))
        self._shape = average_down(picture[None], self.size).shape[1:] if self.size else picture.shape
        if np.prod(shape := (int(self.offsets[-1]), *self._shape)) <= self.decoded_bytes:
            self._kept = np.empty(shape, np.uint8)  # takes memory as it is filled
        self._stored = picture.shape

    def _decode(self, rows: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Decode the images of `rows` to their `places` in `out`."""
        if not len(rows):
            return
        shards = shard_numbers(self.offsets, rows)
        positions = rows - self.offsets[shards]
        tars_by_shard = {shard: self._tars[shard] for shard in np.unique(shards).tolist()}

        def piece(which: np.ndarray) -> None:
            for index in which.tolist():
                out[places[index]] = self._decode_one(tars_by_shard[int(shards[index])], int(positions[index]))

        # In the order of the tars, so that each is read forwards.
        pieces = np.array_split(np.argsort(rows, kind="stable"), min(len(rows), _PARTS_PER_THREAD * self._threads))
        for _ in self._pool.map(piece, pieces):
            pass

    def _decode_one(self, tar: tars.TarImages, position: int) -> np.ndarray:
        picture = _decode_image(tar, position)
        if picture.shape != self._stored:
            raise ValueError(f"the images in {self.folder} have different sizes; training needs one size\n"
                             f"hint: shard with --resize center_crop")
        return average_down(picture[None], self.size)[0] if self.size else picture


def shard_numbers(offsets: np.ndarray, rows: Any) -> Any:
    """The numbers of the shards that global rows are in."""
    return np.searchsorted(offsets, rows, side="right") - 1


def _open_tar(dataset: Dataset, files: list[dict[str, Any]], counts: list[int], number: int) -> tars.TarImages:
    """The tar of a shard. ValueError if it does not have the number of samples in the manifest."""
    tar = dataset.open_file("shards", files[number], tars.TarImages)
    if len(tar) != counts[number]:
        raise DamagedFile(f"{tar.path} has {len(tar)} samples, its manifest says {counts[number]}\n"
                          f"hint: python -m jobs verify")
    return tar


def open_array(dataset: Dataset, name: str, files: list[dict[str, Any]], counts: tuple[int, ...], wrong: str,
           number: int) -> np.ndarray:
    """The array of a shard. ValueError with the text `wrong` if it does not have a row for each sample."""
    array = dataset.open_file(name, files[number], map_array)
    if len(array) != counts[number]:
        raise ValueError(wrong)
    if len(array) and hasattr(mmap, "MADV_WILLNEED"):
        # Read the file ahead from its first byte to its last: later reads come in random order.
        array._mmap.madvise(mmap.MADV_WILLNEED)
    return array


def _decode_image(tar: tars.TarImages, position: int) -> np.ndarray:
    try:
        return decode_pixels(tar[position])
    except BadImage as error:
        raise ValueError(f"sample {position} of {tar.path} does not decode ({error})\n"
                         f"hint: shard these tars again without --adopt, which leaves such samples out") from error


def average_down(pictures: np.ndarray, size: int) -> np.ndarray:
    """Images (N, H, W, 3) uint8 reduced to (N, size, size, 3) uint8 by the mean of each square of pixels.

    ValueError unless both sides are the same multiple of `size`.
    """
    height, width = pictures.shape[1:3]
    if height != width or height % size:
        raise ValueError(f"images of {width} x {height} cannot be averaged to {size} x {size}\n"
                         f"hint: --image-size must divide their sides, and these must be equal")
    step = height // size
    if step == 1:
        return pictures
    sums = pictures.reshape(len(pictures), size, step, size, step, 3).sum((2, 4), dtype=np.uint32)
    return ((sums + step * step // 2) // (step * step)).astype(np.uint8)
