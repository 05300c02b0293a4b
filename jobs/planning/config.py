"""Settings of `plan`."""

from dataclasses import dataclass
from math import inf
from typing import Annotated

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds

_Price = Annotated[float | None, Interval(ge=0, lt=inf)]


@dataclass(frozen=True)
class PlanConfig:
    """Settings of an estimate."""

    pictures: tuple[str, ...] = ()
    """Training images, for example 1M 100M 1B. Several make a table of all combinations. Default: the recipe's."""
    database_rows: tuple[str, ...] = ()
    """Rows of a separate database. Several make a table too. 0: the training images are the database. Default: the
    recipe's."""
    workers: Annotated[int, Ge(0)] = 0
    """Workers without a GPU. Default: the recipe's."""
    gpus: Annotated[int, Ge(0)] = 0
    """Workers with one GPU each. They run the stages whose rates were measured on a GPU. Default: the number of
    --workers."""
    memory: str = "16Gi"
    """Memory of a worker for a database that is compared row by row."""
    epochs: Annotated[float, Interval(ge=0, lt=inf)] = 0.0
    """Passes of training over the images. Default: the steps of the recipe."""
    downsampling: Annotated[int, Ge(0)] = 0
    """Pixels on a side for each pixel of a latent. 1: the network trains on images. Default: the recipe's."""
    rates: str = ""
    """JSON file of rates, as `plan --json` prints them. Missing entries keep their defaults."""
    measure: str = ""
    """Run a small part of each stage first, with these settings, on this cluster, below --root. Write the measured
    rates into this file, and use them."""
    source: tuple[str, ...] = ()
    """Source for --measure, as for `shard`. Default: generated images."""
    seconds: Annotated[float, Interval(gt=0, lt=inf)] = 60.0
    """Approximate limit of each measured stage."""
    measure_workers: Annotated[int, Ge(1)] = 1
    """Workers of --measure. Several show how they slow each other down."""
    price_gpu_hour: _Price = None
    """Price of an hour of a worker with a GPU."""
    price_cpu_hour: _Price = None
    """Price of an hour of any other worker."""
    price_gb_month: _Price = None
    """Price of storing one GB for a month."""
    price_gb_moved: _Price = None
    """Price of reading or writing one GB."""
    months: Annotated[float, Interval(ge=0, lt=inf)] = 1.0
    """Months that everything is stored."""
    totals: bool = False
    """Print one row for each combination, with the worker hours of its stages."""
    json: bool = False
    """Print JSON, with the rates."""

    def __post_init__(self) -> None:
        check_bounds("plan", self)
