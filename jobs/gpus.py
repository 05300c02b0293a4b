"""Which GPUs a command reserves, checked before anything is planned. Without Ray."""

from jobs.settings import ClusterConfig
from pipeline import devices
from pipeline.stage import Stage


def local_device(config: ClusterConfig) -> devices.Choice:
    """The device of a process without Ray."""
    if config.gpus is None:
        return "auto"
    return "cuda" if config.gpus else "cpu"


def check_gpus(stage: Stage, config: ClusterConfig) -> None:
    """ValueError if a worker of the stage cannot use the GPUs that it would reserve."""
    each = config.each_gpus if stage.workers_need_gpu else 0.0
    if each > stage.most_gpus:
        raise ValueError(f"--gpus {each:g}: a worker of {stage.name} computes on {stage.most_gpus} GPU\n"
                         f"hint: --workers {round(config.workers * each)} --gpus {stage.most_gpus} uses as many")
    if 0 < each < 1 and not stage.shares_gpus:
        raise ValueError(f"--gpus {each:g}: each process of {stage.name} takes a whole GPU, for NCCL refuses two on one"
                         f"\nhint: --gpus 1 with fewer --workers")
