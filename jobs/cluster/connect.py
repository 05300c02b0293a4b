"""The Ray cluster: the one that is there, or one of this machine's own."""

import contextlib
import json
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Any

import ray

from jobs.cluster.config import ClusterConfig
from jobs.telemetry import heartbeat, interrupts
from pipeline.stages.stage import Stage
from pipeline.stages.types import StageFailed

_log = logging.getLogger(__name__)


def connect() -> None:
    """Connect to the cluster at RAY_ADDRESS, or start one here; once per process."""
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _check_reachable(address)
            with heartbeat.doing(f"connecting to the Ray cluster at {address}"), interrupts.defer_interrupts():
                ray.init(**options)
        except OSError as error:  # ConnectionError is one
            raise ValueError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}\n"
                             f"hint: start one, unset RAY_ADDRESS to use one on this machine, or --local for none"
                             ) from error
        return
    # Other users of this machine must not run code here: Ray switches tokens on for a cluster that it
    # starts. A token of this cluster stays in memory, instead of a readable file.
    if "RAY_AUTH_MODE" not in os.environ and not _has_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # With as many logical CPUs as cores an actor, its driver and Train's controller starve each other.
    # "local": without it Ray would join any cluster of another user on this machine.
    with heartbeat.doing("starting Ray"), interrupts.defer_interrupts():
        context: Any = ray.init("local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False,
                           object_store_memory=200 << 20, **options)
    write_prometheus_targets(Path(context.address_info["session_dir"]).parent)


def write_prometheus_targets(folder: Path) -> None:
    """Write the hosts and ports of the metrics of all nodes, in the place and format of Ray's dashboard."""
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    with contextlib.suppress(OSError):
        own = folder / f".prometheus-{os.getpid()}"
        own.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": targets}]))
        own.replace(folder / "prom_metrics_service_discovery.json")


def cluster_resources() -> dict[str, float]:
    """Total resources of the cluster: CPU, GPU, memory, ..."""
    connect()
    return ray.cluster_resources()


def check_gpus_exist(stage: Stage, config: ClusterConfig) -> None:
    """StageFailed if the cluster of this command has too few GPUs. Other clusters may still add nodes."""
    each, there = config.each_gpus, ray.cluster_resources().get("GPU", 0)
    if not stage.workers_need_gpu or there >= each:
        return
    if not os.environ.get("RAY_ADDRESS"):
        raise StageFailed(f"{stage.name}: a worker reserves {each:g} GPU, and this machine has {there:g}\n"
                          f"hint: --gpus 0 computes on the CPU; RAY_ADDRESS names a cluster with GPUs")
    _log.warning("%s: a worker reserves %g GPU, and the cluster has %g now. It waits 5 minutes for nodes\n"
                 "hint: --gpus 0 computes on the CPU", stage.name, each, there)


def mention_unused_gpus(stage: Stage, config: ClusterConfig) -> None:
    """Log if a stage that could use GPUs reserves none on a cluster that has some."""
    there = ray.cluster_resources().get("GPU", 0)
    if stage.workers_need_gpu and there and not config.each_gpus:
        _log.warning("%s computes on CPUs, and the cluster has %g GPU%s\nhint: --gpus 1 reserves one for each worker",
                     stage.name, there, "s" * (there != 1))


def _check_reachable(address: str) -> None:
    """ConnectionError if no process listens. Ray itself retries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _has_token() -> bool:
    return bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
                or (Path.home() / ".ray" / "auth_token").exists())
