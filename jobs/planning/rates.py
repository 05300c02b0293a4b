"""Speeds of the stages for each worker: measured in a root, read from a file, or the bundled ones.

A file of rates is JSON of the sections and fields below; what it does not name keeps its default.

    {"machine": "8 cores and an H100", "embed": {"flop_per_s": 2.1e14, "gpu": true}, "approximate": {"nprobe": 32}}
"""

import json
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import storage

_MAY_BE_NONE = {"seconds_per_pixel", "preparing_s_per_pixel", "source_bytes", "metadata_bytes"}
BUILT_IN = Path(__file__).with_name("rates.json")


@dataclass(frozen=True)
class ShardRates:
    """From a corpus to tars."""

    pictures_per_s: float
    """Images a second of one worker, with images of image_size."""
    image_size: int
    seconds_per_pixel: float
    """Seconds of each pixel beyond those of image_size."""
    source_bytes: float
    """Bytes of an image in the source. Manifests do not have it, so it is not measured in a root."""
    tar_bytes: float
    """Bytes of an image of image_size in a tar."""
    metadata_bytes: float
    """Bytes of an image in the parquet beside the tar."""


@dataclass(frozen=True)
class EmbedRates:
    """From tars to vectors."""

    flop_per_s: float
    """Operations a second of one worker in the encoder."""
    preparing_s_per_pixel: float
    """Seconds of a worker for each stored pixel: reading, decoding, resizing."""
    gpu: bool = False
    """Whether the worker had a GPU."""


@dataclass(frozen=True)
class IndexRates:
    """From vectors to an index."""

    training_flop_per_s: float
    """Operations a second of the worker that trains."""
    vectors_per_s: float
    """Vectors a second that a worker adds, with its share of the exact search for the recall."""
    merged_per_s: float
    """Vectors a second that one worker merges from parts, with tuning and measuring."""
    key: str
    """Kind of the measured index, as a factory string of faiss."""
    bytes_per_vector: float
    """Bytes of a vector in an index of that kind. Other kinds are computed."""
    in_parts: bool
    """Whether it was built in parts."""


@dataclass(frozen=True)
class ExactRates:
    """Neighbors by comparison with every row."""

    flop_per_s: float
    """Operations a second of one worker in the products: two for each number of each row and query."""
    chosen_per_s: float
    """Rows a second among which the best are chosen: all of the first block, and fewer of later ones."""
    rows_per_s: float
    """Rows a second that are read: all rows for each search, and once more by each worker for copies."""
    queries_per_s: float
    """Queries a second that are ranked and written, with everything that no other rate counts."""
    gpu: bool = False
    """Whether the worker had a GPU."""


@dataclass(frozen=True)
class ApproximateRates:
    """Neighbors by the lists of an index."""

    flop_per_s: float
    """Operations a second of one worker in the products: two for each number of each row of a searched list."""
    laid_per_s: float
    """Vectors a second that a worker sorts by list before its first search."""
    read_per_s: float
    """Vectors a second that are read list by list, once for all samples of a search."""
    checked_per_s: float
    """Vectors a second of the check of the recall: all vectors in each search that checks a sample."""
    queries_per_s: float
    """Samples a second that are ranked and written, with everything that no other rate counts."""
    nprobe: int
    """Lists that a query searches."""


@dataclass(frozen=True)
class TrainRates:
    """Training of the denoiser."""

    flop_per_s: float
    """Operations a second of one process in the network, forward and backward."""
    gpu: bool = False
    """Whether the process had a GPU."""


@dataclass(frozen=True)
class StorageRates:
    """Speed between a worker and the storage of the root."""

    bytes_per_s: float | None = None
    """Limit of reading and writing together, in bytes a second. null: no limit."""


@dataclass(frozen=True)
class Rates:
    """All rates, and their origin."""

    machine: str
    measured: str
    """Time or place of the measurement."""
    shard: ShardRates
    embed: EmbedRates
    index: IndexRates
    exact: ExactRates
    approximate: ApproximateRates
    train: TrainRates
    storage: StorageRates
    defaults: tuple[str, ...] = field(default=())
    """Sections from the bundled file."""

    def with_sections(self, sections: dict[str, Any], machine: str, measured_at: str) -> "Rates":
        """These rates with some sections replaced."""
        return replace(self, **sections, machine=machine, measured=measured_at,
                       defaults=tuple(name for name in self.defaults if name not in sections))


SECTIONS = tuple(section.name for section in fields(Rates) if section.name not in {"machine", "measured", "defaults"})


@cache
def built_in() -> Rates:
    """The bundled rates."""
    document = json.loads(BUILT_IN.read_text())
    types = typing.get_type_hints(Rates)
    return Rates(document["machine"], document["measured"],
                 **{name: types[name](**document[name]) for name in SECTIONS}, defaults=SECTIONS)


def read(file: str) -> Rates:
    """The rates in a JSON file over the bundled ones. ValueError names unknown rates and bad values."""
    try:
        document = storage.parse_json(storage.read_small_file(file), file)
    except OSError as error:
        raise ValueError(f"cannot read the rates {file}: {error.strerror}\n"
                         f"hint: python -m jobs plan --measure {file}, which writes such a file") from None
    except (storage.DamagedFile, storage.FileTooLarge) as error:
        raise ValueError(f"{storage.first_line(error)}\nhint: python -m jobs plan --measure FILE, which writes a "
                         f"file of rates") from None
    if not isinstance(document, dict):
        raise ValueError(f"{file}: must be an object of sections\nhint: here are {', '.join(SECTIONS)}")
    base, sections = built_in(), {}
    for name, values in document.items():
        if name in {"machine", "measured", "defaults"}:
            continue
        if name not in SECTIONS or not isinstance(values, dict):
            raise ValueError(f"{file}: {name!r} is no section of rates\nhint: here are {', '.join(SECTIONS)}")
        sections[name] = _section(getattr(base, name), values, f"{file}: {name}")
    return base.with_sections(sections, str(document.get("machine", file)), str(document.get("measured", file)))


def _section(base: Any, values: dict[str, Any], where: str) -> Any:
    assert is_dataclass(base)
    types = typing.get_type_hints(type(base))
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{where}: there is no rate {name!r}\nhint: here are {', '.join(types)}")
        kind = typing.get_args(types[name])[0] if typing.get_args(types[name]) else types[name]
        if value is None and kind != types[name]:
            continue
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, int | float if kind is float else kind):
            raise ValueError(f"{where}: {name} = {value!r}: must be of the type {kind.__name__}")
        if kind in (int, float) and not (0 < value < float("inf") or (value == 0 and name in _MAY_BE_NONE)):
            raise ValueError(f"{where}: {name} = {value}: must be more than 0")
    return replace(base, **values)  # type: ignore[type-var]


def document(rates: Rates) -> dict[str, Any]:
    """The rates as JSON, which `read` accepts."""
    return asdict(rates)
