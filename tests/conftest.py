"""Fixtures of all tests: a private home folder, no trackers, synthetic images, a Ray cluster, an S3 server."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.expression import Expression

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # started with nohup: the tests of signals send it too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Before anything imports Ray or wandb: both write into the home folder.
_HOME = tempfile.mkdtemp(prefix="rdm-tests-home-")
os.environ.update(HOME=_HOME, WANDB_MODE="disabled", RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0",
                  RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5", RDM_CACHE=f"{_HOME}/cache",
                  RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
os.environ.pop("RAY_ADDRESS", None)
# A shell's background jobs are born deaf to Ctrl-C, which some tests send to what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

_FAST_DEATH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_timeout_ms": 1000,
               "health_check_failure_threshold": 3, "metrics_report_interval_ms": 1000}


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs unless `-m` selects only tests that need one: the others must pass on any machine."""
    expression = Expression.compile(config.option.markexpr or "not none")
    if not expression.evaluate(lambda name, **_: name == "gpu") or expression.evaluate(lambda name, **_: False):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where GPUs are hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="GPUs are hidden; make gpu, or pytest -m gpu, runs it"))


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def drawn_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 144 synthetic images of 24 subjects in six styles, with captions; read only."""
    from pipeline.corpora.config import DemoCorpusConfig
    from pipeline.corpora.demo_corpus import DemoCorpus
    from pipeline.stages.driver import run_stage
    root = tmp_path_factory.mktemp("drawn")
    config = DemoCorpusConfig(corpus="drawn", subjects=24, size=32, pictures_per_item=50)
    stage = DemoCorpus(str(root), config, root / "cache")
    run_stage(stage)
    return Path(stage.folder)


@pytest.fixture(scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A new cache folder for this session. Files are not synced to disk: tests kill processes, not machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A Ray cluster with a head without CPUs and two nodes of two CPUs. A test that kills a node adds one first."""
    import ray
    from ray.cluster_utils import Cluster
    ray.shutdown()
    ray_cluster = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 0, "object_store_memory": 100 << 20, "_system_config": _FAST_DEATH, "include_dashboard": False})
    for _ in range(2):
        ray_cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    os.environ["RAY_ADDRESS"] = ray_cluster.address
    yield ray_cluster
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()
    ray_cluster.shutdown()


@pytest.fixture(scope="session")
def s3_process() -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The address and the process of a server that speaks S3."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("s3_server.py")), str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env={**os.environ, "S3_UPLOAD_PART_MIN_SIZE": "1"})  # small objects can have parts
    address = f"http://127.0.0.1:{port}"
    try:
        _until_it_answers(address, server)
        yield address, server
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(scope="session")
def s3_server(s3_process: tuple[str, "subprocess.Popen[bytes]"]) -> Iterator[str]:
    """The address of a server that speaks S3, also in AWS_ENDPOINT_URL, with keys in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", s3_process[0])
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTING")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        _forget()
        yield s3_process[0]
    _forget()


def _until_it_answers(address: str, server: subprocess.Popen) -> None:
    for _ in range(300):
        assert server.poll() is None, "the S3 server ended"
        try:
            urllib.request.urlopen(address, timeout=5).read()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise AssertionError("the S3 server does not answer")


def _forget() -> None:
    """Connections remember the environment of their making."""
    import fsspec

    from pipeline.storage import files
    files._filesystem.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def s3(s3_server: str) -> str:
    """The URL of an empty bucket."""
    import fsspec
    bucket = f"test-{secrets.token_hex(6)}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}"
