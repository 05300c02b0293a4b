"""Cost of a build: formulas of seconds and bytes for each stage. Nothing here is measured.

Letters: N training images, M database rows, D numbers in a vector, k neighbors, C candidates, W workers. Seconds are
those of one worker. Workers divide them. Bytes read are fetched from the root, bytes written are put there.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from jobs.config.settings import Settings
from jobs.planning.rates import Rates
from model.training.flops import Size
from pipeline.indices.choose import choose_key, estimated_bytes
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.exhaustive import LARGEST

_HEADER = 128  # bytes of a .npy file before its numbers
_CLUSTERING_ROUNDS = 10  # faiss's for the lists of an inverted file
_POINTS_PER_LIST = 256  # it takes no more of the sample for each list, or word of a codebook
_CODEBOOK_ROUNDS = 25
# Fixed cost of a list, as bytes to read and as operations: about 50 microseconds each on the machine of the rates.
_BYTES_A_LIST, _FLOP_A_LIST = 1 << 17, 1 << 21
_KEPT_CHECKPOINTS = 3
_BYTES_A_PARAMETER = 16  # of a checkpoint: weights, their average and two moments, float32


@dataclass(frozen=True)
class Build:
    """The build to estimate."""

    settings: Settings
    pictures: int
    """Training images N."""
    rows: int
    """Database rows M; 0: the training images are the database."""
    dim: int
    """Numbers in a vector D."""
    encoder_flop: float
    """Operations of the encoder for one image."""
    network: Size
    """Size of the denoiser."""
    sample_bytes: int = 0
    """Bytes of a latent. 0: the network is trained on pixels."""
    side: int = 0
    """Side of the input of the network, in pixels."""
    workers: int = 1
    gpus: int = 0
    memory: int = 16 << 30
    """Bytes of the database that a worker may cache."""
    epochs: float = 0.0
    """Number of epochs. 0: the steps of the recipe."""

    @property
    def database(self) -> int:
        """Rows of the database of the neighbors."""
        return self.rows or self.pictures

    @property
    def all_pictures(self) -> int:
        """Images to shard and embed."""
        return self.pictures + self.rows

    def shards(self, pictures: int) -> int:
        """Number of shards of `pictures` images."""
        return -(-pictures // self.settings.shard.rows_per_shard)

    @property
    def all_shards(self) -> int:
        """Shards of the training images and of the database."""
        return self.shards(self.pictures) + (self.shards(self.rows) if self.rows else 0)


@dataclass(frozen=True)
class Cost:
    """Cost of a stage."""

    stage: str
    worker_seconds: float
    workers: int
    """Number of workers that can work at the same time."""
    bytes_read: float
    bytes_written: float
    bytes_kept: float
    """Bytes that stay in the root."""
    serial_seconds: float = 0.0
    """The part of the worker seconds in which one worker works and the others wait."""
    gpu: bool = False

    @property
    def seconds(self) -> float:
        """Elapsed seconds, if the workers share the work evenly."""
        return self.serial_seconds + (self.worker_seconds - self.serial_seconds) / self.workers


@dataclass(frozen=True)
class Prices:
    """Money per hour of a worker with a GPU and without, per GB kept for a month, and per GB read or written."""

    gpu_hour: float | None = None
    cpu_hour: float | None = None
    gb_month: float | None = None
    gb_moved: float | None = None
    months: float = 1.0

    @property
    def has_any(self) -> bool:
        """Whether any price is set."""
        return any(price is not None for price in (self.gpu_hour, self.cpu_hour, self.gb_month, self.gb_moved))

    def price_of(self, cost: Cost) -> float:
        """The price of a stage. Resources without a price count as free."""
        hour = self.gpu_hour if cost.gpu else self.cpu_hour
        return (cost.worker_seconds / 3600 * (hour or 0) + cost.bytes_kept / 1e9 * self.months * (self.gb_month or 0)
                + (cost.bytes_read + cost.bytes_written) / 1e9 * (self.gb_moved or 0))


def costs(build: Build, rates: Rates) -> list[Cost]:
    """The stages in order. Both kinds of neighbor search are there, and a build uses one."""
    return [shard(build, rates), embed(build, rates), index(build, rates), neighbors_exact(build, rates),
            neighbors_index(build, rates), train(build, rates)]


def shard(build: Build, rates: Rates) -> Cost:
    """(N + M) (1 / rate + pixels beyond the measured ones * seconds a pixel). Reads the source, writes tars, parquet.

    Tars grow with the pixels, metadata does not. The estimate assumes that the images of the source are as large as
    the measured ones.
    """
    stage_rates, size = rates.shard, build.settings.shard.image_size
    more = size ** 2 - stage_rates.image_size ** 2
    each = max(1 / stage_rates.pictures_per_s + more * stage_rates.seconds_per_pixel, 1e-9)
    bytes_written = build.all_pictures * (_tar_bytes(build, rates) + stage_rates.metadata_bytes)
    return _cost("shard", build, rates, build.all_pictures * each, build.all_shards,
                 bytes_read=build.all_pictures * stage_rates.source_bytes, bytes_written=bytes_written)


def embed(build: Build, rates: Rates) -> Cost:
    """(N + M) (stored pixels * seconds a pixel + flop of the encoder / its rate); read: tars; written: (N + M) D 2.

    Decoding takes the time of its pixels, an encoder that of its operations, whichever encoder was measured: a smaller
    one may reach fewer operations a second.
    """
    stage_rates, pixels = rates.embed, build.settings.shard.image_size ** 2
    each = pixels * stage_rates.preparing_s_per_pixel + build.encoder_flop / stage_rates.flop_per_s
    return _cost("embed", build, rates, build.all_pictures * each, build.all_shards,
                 bytes_read=build.all_pictures * _tar_bytes(build, rates),
                 bytes_written=_vectors(build.all_pictures, build) + build.all_shards * _HEADER, gpu=stage_rates.gpu)


def index(build: Build, rates: Rates) -> Cost:
    """Operations of the training / training rate + M / fill rate, and in parts M / merging rate.

    Training and merging are one worker's. Read: the vectors, the sample beside them and, to merge them, the parts;
    written: the parts and the index.
    """
    stage_rates, config, rows = rates.index, build.settings.index, build.database
    room = config.rows_of_a_part(build.dim)
    in_parts = rows > room
    key, size = index_key(build, rates), index_bytes(build, rates)
    training = training_flop(key, rows, build.dim, config.train_points) / stage_rates.training_flop_per_s
    merging = rows / stage_rates.merged_per_s if in_parts else 0.0
    vectors = _vectors(rows, build)
    sample = min(rows, config.train_points) * build.dim * 2 if in_parts else 0
    return _cost("index", build, rates, training + rows / stage_rates.vectors_per_s + merging,
                 -(-rows // room), bytes_read=vectors + sample + (size if in_parts else 0),
                 bytes_written=size * (2 if in_parts else 1), bytes_kept=size, serial=training + merging)


def neighbors_exact(build: Build, rates: Rates) -> Cost:
    """The cost of an exact search: each amount by its rate.

    Read: queries and database. Written: N k (8 + 4) bytes for ids and scores, and 8 M for how often each row is used;
    with the vectors of neighbors N k D 2 more. The database is read once by each worker, or once for the shards that
    are searched together where it is more than a worker may keep.
    """
    searches, gpu = _searches(build, lists=False), rates.exact.gpu
    vectors, workers = _vectors(build.database, build), min(searches, _workers(build, gpu))
    times = workers if vectors <= build.memory else searches
    seconds = duration(exact_amounts(build.pictures, build.database, build.dim, searches, workers, gpu), rates.exact)
    return _neighbors("neighbors, exact", build, rates, seconds, vectors * times, searches, gpu)


def neighbors_index(build: Build, rates: Rates) -> Cost:
    """The amounts of `listed_amounts`, each by its rate. The rest is as in the exact search.

    A list is read once for all shards that are searched together. If there are few lists, each search reads nearly all
    of them, from the disk of the worker if its memory is too small. All rows are compared if the index has no lists, or
    if a search would read a quarter of them.
    """
    key, searches = index_key(build, rates), _searches(build, lists=True)
    copies = min(searches, build.workers)
    amounts = listed_amounts(key, build.pictures, build.database, build.dim, searches, copies, build.settings.neighbors,
                             rates.approximate.nprobe)
    if amounts is None:
        return replace(neighbors_exact(build, rates), stage="neighbors, index")
    vectors, seconds = _vectors(build.database, build), duration(amounts, rates.approximate)
    fetched = (index_bytes(build, rates) + vectors) * copies
    rows = read_rows(key, build.pictures, searches, build.database, build.settings.neighbors, rates.approximate.nprobe)
    again = 2.0 * rows * build.dim if vectors > build.memory else 0.0
    return _neighbors("neighbors, index", build, rates, seconds, fetched + again, searches, False)


def train(build: Build, rates: Rates) -> Cost:
    """Samples seen * flop of an update for one / rate; read: every process reads all shards of an epoch.

    With each sample its ids and k vectors; written: checkpoints of 16 bytes a parameter, of which the last three stay.
    """
    config, workers = build.settings.train, _workers(build, rates.train.gpu)
    steps = math.ceil(build.epochs * build.pictures / config.global_batch) if build.epochs else config.steps
    seen = steps * config.global_batch
    flop = build.network.training(config.unet.checkpointing)
    checkpoints = math.ceil(steps / config.checkpoint_every)
    each = build.network.parameters * _BYTES_A_PARAMETER
    stored = build.sample_bytes or _tar_bytes(build, rates)
    return _cost("train", build, rates, seen * flop / rates.train.flop_per_s, config.global_batch,
                 bytes_read=seen * (stored * workers + build.settings.neighbors.k * 8 + config.k * build.dim * 2),
                 bytes_written=checkpoints * each,
                 bytes_kept=min(checkpoints, _KEPT_CHECKPOINTS) * each, gpu=rates.train.gpu)


def index_key(build: Build, rates: Rates) -> str:
    """The kind of index: by the setting, as measured if both fit one part, or the choice of the stage."""
    config = build.settings.index
    if config.key:
        return config.key
    if not rates.index.in_parts and build.database <= config.rows_of_a_part(build.dim):
        return rates.index.key
    return choose_key(build.database, build.dim, config)


def index_bytes(build: Build, rates: Rates) -> float:
    """Bytes of the whole index."""
    key = index_key(build, rates)
    if key == rates.index.key:
        return build.database * rates.index.bytes_per_vector
    return estimated_bytes(key, build.database, build.dim)


def training_flop(key: str, rows: int, dim: int, train_points: int) -> float:
    """Operations of the training of an index; 0 for kinds that need next to none.

    Lists: 2 points lists D' in each of ten rounds, with 256 points a list at most; D' is what a rotation leaves of D.
    Codebooks of 2^bits words: 2 points words D' in each of 25 rounds. A rotation (OPQ) makes one of 256 words 50 times,
    in four rounds (the first time 40) and one to encode, with two products of the points and the rotation. faiss takes
    256 points a word.
    """
    lists, inner = _lists(key), _inner_dim(key, dim)
    points = min(rows, train_points)
    operations = 2.0 * min(points, _POINTS_PER_LIST * lists) * lists * inner * _CLUSTERING_ROUNDS
    if codebook := re.search(r"PQ\d+x(\d+)", key):
        words = 1 << int(codebook[1])
        operations += 2.0 * min(points, _POINTS_PER_LIST * words) * words * inner * _CODEBOOK_ROUNDS
    if key.startswith("OPQ"):
        operations += min(points, _POINTS_PER_LIST * 256) * inner * (2.0 * 256 * (50 * 5 + 36) + 50 * 4.0 * dim)
    return operations


def duration(amounts: dict[str, float], rates: Any) -> float:
    """Seconds of the amounts of what is done, each by the rate of its name."""
    return sum(amount / getattr(rates, name) for name, amount in amounts.items())


def exact_amounts(pictures: int, rows: int, dim: int, searches: int, workers: int, gpu: bool) -> dict[str, float]:
    """Amounts of work of an exhaustive search, by the names of the rates.

    2 N M D operations. Each search reads all rows, and each worker reads the labels of copies. The best rows are chosen
    among all rows of the first block, and among a share of 1 / n of the n-th block: the others are no better.
    """
    block = LARGEST["cuda" if gpu else "cpu"]
    among = rows if rows <= block else block * (1 + math.log(rows / block))
    return {"flop_per_s": 2.0 * pictures * rows * dim, "chosen_per_s": float(pictures) * among,
            "rows_per_s": float(searches + workers) * rows, "queries_per_s": float(pictures)}


def listed_amounts(key: str, pictures: int, rows: int, dim: int, searches: int, workers: int, config: NeighborsConfig,
                   nprobe: int) -> dict[str, float] | None:
    """Amounts of work of a search by an index, by the names of the rates. None: all rows are compared.

    Each sample is compared with M nprobe / lists rows. A list is read and multiplied twice: for the queries nearest to
    it, and for the others. Each worker lays the vectors out itself, as if it were alone on its node. A search that
    checks the recall of a sample reads all rows.
    """
    pairs = compared_rows(key, pictures, rows, config, nprobe)
    if pairs is None:
        return None
    read = read_rows(key, pictures, searches, rows, config, nprobe)
    lists = 2 * _lists(key) * read / rows
    return {"flop_per_s": 2.0 * pairs * dim + lists * _FLOP_A_LIST, "laid_per_s": float(workers) * rows,
            "read_per_s": read + lists * _BYTES_A_LIST / (2 * dim),
            "checked_per_s": float(min(searches, pictures, config.checked)) * rows, "queries_per_s": float(pictures)}


def compared_rows(key: str, pictures: int, rows: int, config: NeighborsConfig, nprobe: int) -> float | None:
    """Pairs of samples and database rows that a search by an index compares. None: it compares all.

    A graph of M edges compares about M vectors a step, with one step for each requested result (Malkov and Yashunin
    2018, arXiv:1603.09320).
    """
    lists, probes = _lists(key), config.probes or nprobe
    if graph := re.match(r"HNSW(\d+)", key):
        each = float(min(rows, probes * int(graph[1])))
    elif lists and 4 * probes < lists:
        each = rows * probes / lists
    else:
        return None
    return float(pictures) * each


def read_rows(key: str, pictures: int, searches: int, rows: int, config: NeighborsConfig, nprobe: int) -> float:
    """Database rows that are read list by list in all searches: of the lists that any sample of one looks into.

    As if samples chose lists at random; they are alike, and choose fewer.
    """
    lists, probes = _lists(key), config.probes or nprobe
    if not lists or probes >= lists:
        return 0.0
    return searches * rows * (1.0 - (1.0 - probes / lists) ** (pictures / searches))


def _lists(key: str) -> int:
    match = re.search(r"IVF(\d+)", key)
    return int(match[1]) if match else 0


def _inner_dim(key: str, dim: int) -> int:
    """Numbers that are left of a vector by a rotation, as in OPQ64_384."""
    match = re.match(r"(?:OPQ\d+_|PCAR?)(\d+),", key)
    return int(match[1]) if match else dim


def _neighbors(name: str, build: Build, rates: Rates, seconds: float, database: float, searches: int, gpu: bool
               ) -> Cost:
    config, shards = build.settings.neighbors, build.shards(build.pictures)
    bytes_written: float = build.pictures * config.k * (8 + 4) + 2 * shards * _HEADER + build.database * 8 + _HEADER
    if config.vectors:
        bytes_written += _vectors(build.pictures * config.k, build) + shards * _HEADER
    # Copies are known by their hashes, which stand in the metadata.
    hashes = rates.shard.metadata_bytes * (build.pictures + build.database * min(searches, _workers(build, gpu)))
    return _cost(name, build, rates, seconds, searches, bytes_read=_vectors(build.pictures, build) + database + hashes,
                 bytes_written=bytes_written, gpu=gpu)


def _searches(build: Build, *, lists: bool) -> int:
    """How many times some shards are searched together, by list or not."""
    shards = build.shards(build.pictures)
    return -(-shards // build.settings.neighbors.shards_at_once(shards, build.pictures, build.dim, lists=lists))


def _cost(name: str, build: Build, rates: Rates, seconds: float, items: int, *, bytes_read: float, bytes_written: float,
          bytes_kept: float | None = None, serial: float = 0.0, gpu: bool = False) -> Cost:
    """A cost. Its seconds are at least those of moving its bytes, if that rate is limited."""
    if rates.storage.bytes_per_s:
        seconds = max(seconds, (bytes_read + bytes_written) / rates.storage.bytes_per_s)
    return Cost(name, seconds, max(1, min(_workers(build, gpu), items)), bytes_read, bytes_written,
                bytes_written if bytes_kept is None else bytes_kept, serial, gpu)


def _workers(build: Build, gpu: bool) -> int:
    return build.gpus if gpu else build.workers


def _tar_bytes(build: Build, rates: Rates) -> float:
    return rates.shard.tar_bytes * (build.settings.shard.image_size / rates.shard.image_size) ** 2


def _vectors(count: int, build: Build) -> float:
    return count * build.dim * 2.0

