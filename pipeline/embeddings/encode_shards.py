"""Samples of shards -> vectors: read, decoded and encoded in parts, each step ahead of the next.

Decoders release the interpreter lock, so threads decode while the encoder works.

* CPU: each thread decodes and encodes small parts of a shard. torch has one thread in each, because the number of
  threads of a sum changes its last bits, and so the bytes of the result.
* GPU: batches have one size and continue from shard to shard. One batch is encoded while the next one is decoded and
  the last one is fetched. If the GPU runs out of memory, it halves this batch and all later ones (`devices.BatchFit`).
* Decoders on other nodes get parts if there are any.

Times:

* `wait`: the encoder had no images
* `full`: nothing was decoded, because the encoder was behind
* `elsewhere`: decoding on other nodes, which takes no time of this process
* `encoding`: the encoder had all images that other nodes had decoded
"""

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pipeline.embeddings import clip, decode_batch
from pipeline.embeddings.clip_weights import ClipConfig, describe_encoder
from pipeline.media import tars
from pipeline.stages.decoder_pool import DecoderPool
from pipeline.stages.timers import Times

if TYPE_CHECKING:
    import torch

# Images in a forward pass on a CPU: larger passes are not faster, and leave less work for other threads.
_PART, _LEAST = 32, 8
_AHEAD = 4  # parts that are decoded, or being decoded, for each thread beside a GPU
_BATCHES = 4  # of images, beside a GPU: one that is put together, those on their way, and rests of parts
_BASE = 900 << 20  # bytes of a process that has loaded torch, open_clip, pyarrow and Ray
_WIDE = 14  # bytes of each channel of a pixel, from 8 bits to the input of the encoder


@dataclass
class ShardPart:
    """Consecutive samples of a shard. A part without samples ends its shard."""

    shard: int
    keys: list[str] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    """The encoded images, until they are decoded."""
    there: list[int] = field(default_factory=list)
    """Positions of the samples that decode."""
    rows: np.ndarray | None = None
    """Their images, and then their vectors (n, D) float32; None if there are none."""
    missing: int = 0
    """Vectors that are still to come."""
    error: Exception | None = None
    """The error that ends the shard here."""


@dataclass(frozen=True)
class ShardInput:
    """A shard to read: the number of samples by its record, and a function that opens its tar."""

    count: int
    open_tar: Callable[[], BinaryIO]


@dataclass(frozen=True)
class MemoryPlan:
    """Limits of the work in progress."""

    threads: int
    """Threads for forward passes on a CPU, or for decoding beside a GPU."""
    ahead: int
    """Parts that are decoded or being decoded."""


def count_cores() -> int:
    """Threads that this process may have."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def plan_memory(budget: int, config: ClipConfig, shards: Iterable[tuple[int, int]], size: int, *, whole: bool,
         parts_in_flight: int = 0, threads: int = 0) -> MemoryPlan:
    """The limits that fit `budget` bytes beside the encoder: at most one thread a core, and two parts a thread.

    shards: (samples, bytes) of each. whole: the encoder takes batches of `size`. parts_in_flight: parts that keep the
    decoders on other nodes busy. ValueError with the least budget if not even one thread fits.
    """
    threads = threads or count_cores()
    dim, pixels = describe_encoder(config)["dim"], 3 * clip.input_pixels(config)
    largest, encoded, part = 0, 0.0, -(-size // threads) if whole else 1
    for count, length in shards:
        largest, encoded = max(largest, count), max(encoded, length / max(1, count))
        part = part if whole else max(part, samples_per_pass(count, size))
    each = int(part * (pixels + encoded))
    passing = 0 if whole else part * (_WIDE * pixels + clip.activation_bytes(config))
    fixed = _BASE + 2 * largest * dim + (_BATCHES * size * pixels if whole else 0)

    def needed(threads_used: int, ahead: int) -> int:
        return fixed + threads_used * passing + (ahead + 1) * each

    if (least := needed(1, 2)) > budget:
        raise ValueError(f"embed.max_memory = {budget >> 20}Mi: a worker takes {-(-least >> 20)}Mi at least, "
                         f"{_BASE >> 20}Mi of it for libraries, with {'batches' if whole else 'passes'} of "
                         f"{size if whole else part} images and shards of {largest}\n"
                         f"hint: --max-memory {-(-least >> 20)}Mi")
    threads = next(number for number in range(threads, 0, -1) if number == 1 or needed(number, number + 1) <= budget)
    most = (_AHEAD if whole else 2) * threads + parts_in_flight
    ahead = most if not each else min(most, 2 + (budget - needed(threads, 2)) // each)
    return MemoryPlan(threads, ahead)


def samples_per_pass(count: int, size: int) -> int:
    """Samples of a forward pass on a CPU: passes of a shard have about one size, and large shards have at least two.

    The result does not depend on the number of threads: the last bits of a vector may depend on the other images of
    its pass.
    """
    passes = max(-(-count // min(size, _PART)), min(2, count // _LEAST), 1)
    return -(-count // passes) or 1


def encode_parts(encoder: clip.Encoder, shards: Sequence[ShardInput], size: int, fitting: MemoryPlan,
                 pool_of_decoders: DecoderPool | None, times: Times) -> Generator[ShardPart, None, None]:
    """The parts of all shards in order, with vectors."""
    parts_in_flight = pool_of_decoders.at_once if pool_of_decoders else 0
    decode = _decoder(encoder, pool_of_decoders, fitting.threads if encoder.whole else 0, times)

    def forward(part: ShardPart) -> ShardPart:
        if part.rows is not None:
            full = samples_per_pass(shards[part.shard].count, size) if encoder.compiled else 0
            with times("forward"):
                part.rows = _launched(encoder, part.rows, full)[:len(part.rows)].numpy()
        return part

    if encoder.whole:
        parts = _read(shards, lambda shard: -(-size // fitting.threads), times)
        with ThreadPoolExecutor(fitting.threads + parts_in_flight) as pool:
            yield from _in_whole_batches(encoder, map_in_order(pool, decode, parts, fitting.ahead, times), size, times)
        return
    parts = _read(shards, lambda shard: samples_per_pass(shard.count, size), times)
    with torch_threads(fitting.threads) as pool, ThreadPoolExecutor(max(1, parts_in_flight)) as asking:
        if pool_of_decoders:
            # Decoders get the rest of the parts.
            passing = min(2 * fitting.threads, fitting.ahead - 1)
            parts = map_in_order(asking, decode, parts, max(1, min(parts_in_flight, fitting.ahead - passing)), times)
            yield from map_in_order(pool, forward, parts, passing, times, waiting="encoding")
        else:
            yield from map_in_order(pool, lambda part: forward(decode(part)), parts, fitting.ahead, times)


@contextmanager
def torch_threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads. torch uses one thread in each."""
    import torch

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def _decoder(encoder: clip.Encoder, pool_of_decoders: DecoderPool | None, threads: int, times: Times
             ) -> Callable[[ShardPart], ShardPart]:
    """The function that decodes a part: on `threads` threads here, and on other nodes if these are busy."""
    here = threading.Semaphore(threads)

    def decode(part: ShardPart) -> ShardPart:
        data, part.data = part.data, []
        if not data:
            return part
        result, mine = None, pool_of_decoders is None or here.acquire(blocking=False)
        try:
            if pool_of_decoders and not mine and (result := pool_of_decoders(data, encoder.preprocessing)):
                times.add("elsewhere", result.seconds)
            if result is None:
                result = decode_batch.decode_images(data, encoder.prepared)
                times.add("decode", result.seconds)
        finally:
            if pool_of_decoders and mine:
                here.release()
        part.there, part.rows = result.there, result.pictures
        return part

    return decode


def _read(shards: Sequence[ShardInput], length: Callable[[ShardInput], int], times: Times) -> Iterator[ShardPart]:
    """The samples of all shards in parts. The next shard is opened while one is read."""
    with ThreadPoolExecutor(1) as opening:
        following = opening.submit(shards[0].open_tar) if shards else None
        for number, shard in enumerate(shards):
            here, following = following, (opening.submit(shards[number + 1].open_tar) if number + 1 < len(shards)
                                          else None)
            assert here
            try:
                with times("read"):
                    stream = here.result()
                with stream:
                    for samples in read_chunks(tars.read(stream), length(shard), times):
                        yield ShardPart(number, [sample["__key__"] for sample in samples],
                                   [tars.sample_image(sample) for sample in samples])
                yield ShardPart(number)
            except Exception as error:
                yield ShardPart(number, error=error)


def read_chunks(samples: Iterable[Any], size: int, times: Times) -> Iterator[list[Any]]:
    """Samples in lists of `size`."""
    source = iter(samples)
    while True:
        with times("read"):
            chunk = list(itertools.islice(source, size))
        if not chunk:
            return
        yield chunk


def map_in_order(pool: ThreadPoolExecutor, work: Callable[[Any], Any], source: Iterable[Any], ahead: int,
                 times: Times, *, waiting: str = "wait") -> Iterator[Any]:
    """The result of `work` for each element, in the order of the source. At most `ahead` are in progress."""
    going: deque[Future] = deque()
    last = [0.0]  # time of the last result

    def noted(_: Future) -> None:
        last[0] = time.perf_counter()

    def first() -> Any:
        with times(waiting):
            return going.popleft().result()

    for element in source:
        going.append(pool.submit(work, element))
        going[-1].add_done_callback(noted)
        if len(going) >= ahead:
            done = first()
            yielded_at = time.perf_counter()
            yield done
            if going and all(future.done() for future in going):
                times.add("full", time.perf_counter() - max(yielded_at, last[0]))
    while going:
        yield first()


def _in_whole_batches(encoder: clip.Encoder, parts: Iterable[ShardPart], size: int, times: Times
                      ) -> Iterator[ShardPart]:
    """The parts with their vectors, encoded in batches of `size`.

    Batches continue over the ends of parts and shards. The vectors of one batch are fetched while the next one is
    computed.
    """
    held: deque[ShardPart] = deque()  # in order, until all of their vectors are there
    pieces: deque[tuple[ShardPart, int, np.ndarray]] = deque()  # (part, first image, images) that are to be encoded
    going: tuple[list[tuple[ShardPart, int, np.ndarray]], Any] | None = None
    count = 0
    for part in itertools.chain(parts, [None]):
        if part is not None:
            held.append(part)
            if part.rows is not None:
                pieces.append((part, 0, part.rows))
                part.missing = len(part.rows)
                count += part.missing
                part.rows = np.empty((part.missing, encoder.dim), np.float32)
        while count >= size or (part is None and count):
            batch = _cut(pieces, size)
            count -= sum(len(pictures) for _, _, pictures in batch)
            with times("forward"):
                launched = _launched(encoder, np.concatenate([pictures for _, _, pictures in batch]), size)
                if going:
                    _fetch(*going)
            going = batch, launched
        if part is None and going:
            with times("forward"):
                _fetch(*going)
        while held and not held[0].missing:
            yield held.popleft()


def _launched(encoder: clip.Encoder, batch: np.ndarray, size: int) -> "torch.Tensor":
    """`Encoder.launch`, in several smaller forward passes if the device has no memory for one."""
    import torch

    # Parts are padded like whole batches, so that a compiled encoder compiles once.
    return encoder.fit(batch, size or len(batch),
                       lambda part, most: encoder.launch(part, most if size else 0), torch.cat)


def _cut(pieces: deque[tuple[ShardPart, int, np.ndarray]], size: int) -> list[tuple[ShardPart, int, np.ndarray]]:
    """Take `size` images from the front, or what is there."""
    batch, missing = [], size
    while pieces and missing:
        part, first, pictures = pieces.popleft()
        if len(pictures) > missing:
            pieces.appendleft((part, first + missing, pictures[missing:]))
            pictures = pictures[:missing]
        batch.append((part, first, pictures))
        missing -= len(pictures)
    return batch


def _fetch(batch: list[tuple[ShardPart, int, np.ndarray]], launched: Any) -> None:
    """Give the vectors of a batch to the parts that its images are of."""
    vectors, start = launched.cpu().numpy(), 0
    for part, first, pictures in batch:
        assert part.rows is not None
        part.rows[first:first + len(pictures)] = vectors[start:start + len(pictures)]
        part.missing -= len(pictures)
        start += len(pictures)
