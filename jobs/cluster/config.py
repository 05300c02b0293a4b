"""Settings of the cluster: workers, CPUs and GPUs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ClusterConfig:
    """Where the work runs; results do not depend on it."""

    workers: int = 2
    """Actors of a stage, or processes of a training run."""
    min_workers: int = 0
    """Processes that a training run goes on with where a node was lost, until there are more again; 0: it waits for
    all of them."""
    resize_every: float = 60.0
    """Seconds from one look for nodes that came (back) to the next, of such a run; it takes them in from its newest
    checkpoint on."""
    cpus: float = 1.0
    """Cores that each of them reserves."""
    gpus: float | None = None
    """GPUs that each worker of a stage with tensors reserves: 1, or a part of one that workers share. 0: the CPU, on
    any machine. Not given: the CPU on a cluster; with --local the GPU, if there is one."""
    decoders: int = 0
    """Actors of a core each, on nodes without a GPU, that decode pictures for the workers of embed: where the cores
    beside a GPU do not keep it busy; 0: each worker decodes its own."""
    max_failures: int = 3
    """Restarts of a training run after the loss of a worker."""

    def __post_init__(self) -> None:
        if self.min_workers > self.workers:
            raise ValueError(f"cluster.min_workers = {self.min_workers}: there are {self.workers} workers at most")
        for name, least in (("workers", 1), ("min_workers", 0), ("resize_every", 0), ("cpus", 0), ("gpus", 0),
                            ("decoders", 0), ("max_failures", 0)):
            if not (getattr(self, name) or 0) >= least:  # not a number is not enough either
                raise ValueError(f"cluster.{name} = {getattr(self, name)}: must be at least {least}\n"
                                 f"hint: --{name.replace('_', '-')} {max(least, 1)}")
        if self.each_gpus > 1 and self.each_gpus % 1:
            raise ValueError(f"cluster.gpus = {self.gpus}: must be a part of one GPU, or a whole number of them\n"
                             f"hint: --gpus 1")

    @property
    def each_gpus(self) -> float:
        """GPUs that each worker on a cluster reserves."""
        return self.gpus or 0.0
