"""Which GPUs a command reserves, checked before anything is planned. Without Ray."""

from dataclasses import dataclass

from jobs.cluster.config import ClusterConfig
from pipeline.hardware import devices
from pipeline.stages.driver import run_in_process
from pipeline.stages.stage import Stage


@dataclass(frozen=True)
class InProcess:
    """`run_in_process` as a runner that checks GPUs before anything is planned."""

    config: ClusterConfig

    __call__ = staticmethod(run_in_process)

    def check(self, stage: Stage, idle: bool) -> None:
        """ValueError for GPUs that the stage cannot use, DeviceUnavailable for a reserved one that is not usable.

        `idle`: the stage is finished, so no device is needed.
        """
        check_gpus(stage, self.config)
        if devices.reserved_device() == "cuda" and not idle:
            stage.check_device()


def local_device(config: ClusterConfig) -> devices.Choice:
    """The device of a process without Ray. Without --gpus the environment may name it."""
    if config.gpus is None:
        return devices.reserved_device()
    return "cuda" if config.gpus else "cpu"


def check_gpus(stage: Stage | type[Stage], config: ClusterConfig) -> None:
    """ValueError if a worker of the stage cannot use the GPUs that it would reserve."""
    each = config.each_gpus if stage.workers_need_gpu else 0.0
    if each > stage.most_gpus:
        raise ValueError(f"--gpus {each:g}: a worker of {stage.name} computes on {stage.most_gpus} GPU\n"
                         f"hint: --workers {round(config.workers * each)} --gpus {stage.most_gpus} uses as many")
    if 0 < each < 1 and not stage.shares_gpus:
        raise ValueError(f"--gpus {each:g}: each process of {stage.name} takes a whole GPU: NCCL refuses two on one\n"
                         f"hint: --gpus 1 with fewer --workers")
