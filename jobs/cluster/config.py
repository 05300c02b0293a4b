"""Settings of the cluster: workers, CPUs and GPUs."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from pipeline.bounds import check_bounds


@dataclass(frozen=True)
class ClusterConfig:
    """The place of the work. Results do not depend on it."""

    workers: Annotated[int, Ge(1)] = 2
    """Actors of a stage, or processes of a training run."""
    min_workers: Annotated[int, Ge(0)] = 0
    """Number of processes with which a training run continues after it lost a node. 0: it waits for all."""
    resize_every: Annotated[float, Ge(0)] = 60.0
    """Seconds between checks for returned nodes. The run uses them from its newest checkpoint on."""
    cpus: Annotated[float, Ge(0)] = 1.0
    """Cores that each worker reserves."""
    gpus: Annotated[float | None, Ge(0)] = None
    """GPUs that a worker reserves: 1, or a part that workers share, such as 0.5. 0: use the CPU. Default: the CPU on a
    cluster; with --local the GPU if there is one."""
    decoders: Annotated[int, Ge(0)] = 0
    """Actors on nodes without a GPU, with one core each, that decode images for the workers of embed. Use them if the
    cores beside a GPU decode too slowly. 0: the workers decode all images."""
    max_failures: Annotated[int, Ge(0)] = 3
    """Restarts of a training run after the loss of a worker."""

    def __post_init__(self) -> None:
        check_bounds("cluster", self)
        if self.min_workers > self.workers:
            raise ValueError(f"cluster.min_workers = {self.min_workers}: must be at most "
                             f"cluster.workers = {self.workers}\nhint: --workers {self.min_workers}")
        if self.each_gpus > 1 and self.each_gpus % 1:
            raise ValueError(f"cluster.gpus = {self.gpus}: must be a part of one GPU, or a whole number of them\n"
                             f"hint: --gpus 1")

    @property
    def each_gpus(self) -> float:
        """GPUs that each worker on a cluster reserves."""
        return self.gpus or 0.0
