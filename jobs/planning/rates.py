"""How fast the stages are, per worker: measured in an existing root, read from a file, or those that come along.

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
    """Of one worker, with pictures of image_size."""
    image_size: int
    seconds_per_pixel: float
    """What each pixel of a larger picture takes beyond those of image_size."""
    source_bytes: float
    """Of a picture in the source; not measured in a root, for manifests do not tell."""
    tar_bytes: float
    """Of a picture of image_size in a tar."""
    metadata_bytes: float
    """Of a picture in the parquet beside it."""


@dataclass(frozen=True)
class EmbedRates:
    """From tars to vectors."""

    flop_per_s: float
    """Of one worker in the encoder."""
    preparing_s_per_pixel: float
    """Seconds of a worker for each stored pixel: reading, decoding, resizing."""
    gpu: bool = False
    """Whether the worker had a GPU."""


@dataclass(frozen=True)
class IndexRates:
    """From vectors to an index."""

    training_flop_per_s: float
    """Of the one worker that trains."""
    vectors_per_s: float
    """Vectors that a worker fills in, its share of the exact search for the recall among it."""
    merged_per_s: float
    """Vectors that one worker merges from parts, tuning and measuring among it."""
    key: str
    """Kind of the index that was measured, as faiss spells it."""
    bytes_per_vector: float
    """Of that kind; of others it is worked out."""
    in_parts: bool
    """Whether it was built in parts."""


@dataclass(frozen=True)
class ExactRates:
    """Neighbours by comparison with every row."""

    flop_per_s: float
    """Of one worker in the products, two for each number of each row for each query."""
    chosen_per_s: float
    """Rows out of which the best of a query are chosen: all of the first block, of later ones ever fewer."""
    rows_per_s: float
    """Rows of the database that are read: all of them for each search, and once more by each worker, to know copies."""
    queries_per_s: float
    """Queries whose candidates are ranked and written; what is not counted elsewhere is in it."""
    gpu: bool = False
    """Whether the worker had a GPU."""


@dataclass(frozen=True)
class ApproximateRates:
    """Neighbours by the lists of an index."""

    flop_per_s: float
    """Of one worker in the products, two for each number of each row in a list that is looked into."""
    laid_per_s: float
    """Vectors that are laid out list after list, before the first search of a worker."""
    read_per_s: float
    """Vectors that are read list by list, once for all samples of a search that look there."""
    checked_per_s: float
    """Vectors that samples whose recall is checked are compared with: all of them in each search that checks any."""
    queries_per_s: float
    """Samples whose best rows are chosen, ranked and written; what is not counted elsewhere is in it."""
    nprobe: int
    """Lists that a query looks into."""


@dataclass(frozen=True)
class TrainRates:
    """Training of the denoiser."""

    flop_per_s: float
    """Of one process, in the network, forwards and backwards."""
    gpu: bool = False
    """Whether the process had a GPU."""


@dataclass(frozen=True)
class StorageRates:
    """Between a worker and where the files lie."""

    bytes_per_s: float | None = None
    """No stage is faster than this lets its bytes through, reading and writing together; null: what was measured
    stays what it is."""


@dataclass(frozen=True)
class Rates:
    """All of them, and where they come from."""

    machine: str
    measured: str
    """When, or where."""
    shard: ShardRates
    embed: EmbedRates
    index: IndexRates
    exact: ExactRates
    approximate: ApproximateRates
    train: TrainRates
    storage: StorageRates
    defaults: tuple[str, ...] = field(default=())
    """Sections that are those of the built-in file."""

    def with_sections(self, sections: dict[str, Any], machine: str, measured_at: str) -> "Rates":
        """These rates with some sections replaced; the others are defaults still."""
        return replace(self, **sections, machine=machine, measured=measured_at,
                       defaults=tuple(name for name in self.defaults if name not in sections))


SECTIONS = tuple(section.name for section in fields(Rates) if section.name not in {"machine", "measured", "defaults"})


@cache
def built_in() -> Rates:
    """The rates that come along."""
    document = json.loads(BUILT_IN.read_text())
    types = typing.get_type_hints(Rates)
    return Rates(document["machine"], document["measured"],
                 **{name: types[name](**document[name]) for name in SECTIONS}, defaults=SECTIONS)


def read(file: str) -> Rates:
    """The rates in a JSON file over the built-in ones; ValueError naming what no rate is called, or is none."""
    try:
        document = storage.parse_json(Path(file).read_bytes(), file)
    except OSError as error:
        raise ValueError(f"cannot read the rates {file}: {error.strerror}") from None
    except storage.DamagedFile as error:
        raise ValueError(f"{str(error).splitlines()[0]}\nhint: python -m jobs plan --measure FILE writes a file "
                         f"of rates") from None
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
    """The rates as JSON, of the form that `read` takes."""
    return asdict(rates)
