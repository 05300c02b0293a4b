"""What is made once for all tests: a server that speaks S3, and a dataset that went through every stage."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline import stage, storage
from pipeline.dataset import Dataset
from tests.pipeline import made


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(os, "fsync", lambda descriptor: None)  # tests kill processes, not machines
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server that speaks S3, also in AWS_ENDPOINT_URL, with keys in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        _until_it_answers(address, server)
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            patch.setenv("AWS_ENDPOINT_URL", address)
            patch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTING")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            _forget()
            yield address
        _forget()
    finally:
        server.terminate()
        server.wait(10)


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
    storage._filesystem.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def s3(s3_server: str) -> str:
    """The URL of an empty bucket."""
    bucket = f"test-{secrets.token_hex(6)}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 72 drawn pictures, 12 subjects in six styles, with captions."""
    return made.drawings(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Dataset:
    """The pictures in three shards with embeddings, an index, and neighbours among themselves; not to be changed."""
    from pipeline.embed import Embed, EmbedConfig
    from pipeline.index import Index, IndexConfig
    from pipeline.neighbors import Neighbors, NeighborsConfig
    from pipeline.shard import Shard, ShardConfig
    dataset = Dataset.parse(str(tmp_path_factory.mktemp("root")), "drawn")
    for one in (
        Shard(dataset, ShardConfig(source=str(pictures), samples_per_shard=30, image_size=32, format="png")),
        Embed(dataset, EmbedConfig(batch_size=16)),
        Index(dataset, IndexConfig()),
        Neighbors(dataset, dataset, NeighborsConfig(k=4)),
    ):
        stage.run(one)
    return dataset


@pytest.fixture
def copied(tmp_path: Path, built: Dataset) -> Dataset:
    """A copy of the built dataset that a test may spoil."""
    shutil.copytree(built.root, tmp_path / "root")
    return Dataset(str(tmp_path / "root"), built.name, built.version)
