"""A command that only reads asks the store once. Nothing is remembered across a write, or after the command."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiobotocore.client import AioBaseClient

from jobs.cli.main import main
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from tests.pipeline import synthetic

_READS: dict[str, Callable[[str], Any]] = {
    "read_bytes": storage.read_bytes, "exists": storage.exists, "size": storage.size, "stamp": storage.stamp,
    "modified_time": storage.modified_time, "list_names": lambda url: storage.list_names(url.rpartition("/")[0]),
    "list_sizes_and_times": lambda url: storage.list_sizes_and_times(url.rpartition("/")[0])}
_WRITES: dict[str, Callable[[str, Path], Any]] = {
    "put_bytes": lambda url, file: storage.put_bytes(b"second", url),
    "put_file": lambda url, file: storage.put_file(file, url),
    "put_checked": lambda url, file: storage.put_checked(file, url, lambda: None),
    "swap_bytes": lambda url, file: storage.swap_bytes(b"second", url, b"first"),
    "remove_tree": lambda url, file: (storage.remove_tree(url), storage.create_bytes(b"second", url)),
    "remove": lambda url, file: (storage.remove(url), storage.create_bytes(b"second", url))}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts the requests to S3, by operation and key."""
    counts, call = Counter[str](), AioBaseClient._make_api_call

    async def count(client: Any, operation: str, parameters: dict[str, Any]) -> Any:
        counts[f"{operation} {parameters.get('Key') or parameters.get('Prefix', '')}"] += 1
        return await call(client, operation, parameters)
    monkeypatch.setattr(AioBaseClient, "_make_api_call", count)
    yield counts


def test_a_whole_object_is_one_request(s3: str, requests: Counter[str]) -> None:
    storage.put_bytes(b"first", f"{s3}/a")
    requests.clear()
    assert storage.read_bytes(f"{s3}/a") == b"first"
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{s3}/missing")
    assert requests.total() == 2


def test_each_answer_is_requested_once(s3: str, requests: Counter[str]) -> None:
    storage.put_bytes(b"first", f"{s3}/folder/a")
    first = {name: read(f"{s3}/folder/a") for name, read in _READS.items()}
    requests.clear()
    with storage.remember_reads():
        for _ in range(3):
            assert {name: read(f"{s3}/folder/a") for name, read in _READS.items()} == first
            assert not storage.exists(f"{s3}/folder/missing")
            with pytest.raises(FileNotFoundError):
                storage.read_bytes(f"{s3}/folder/missing")
    assert max(requests.values()) == 1, requests


@pytest.mark.parametrize("write", _WRITES.values(), ids=_WRITES)
def test_a_write_is_seen(s3: str, tmp_path: Path, write: Callable[[str, Path], Any]) -> None:
    url = f"{s3}/folder/a"
    (tmp_path / "file").write_bytes(b"second")
    storage.put_bytes(b"first", url)
    with storage.remember_reads():
        before = {name: read(url) for name, read in _READS.items()}
        write(url, tmp_path / "file")
        after = {name: read(url) for name, read in _READS.items()}
        assert storage.read_bytes(url) == b"second"
        assert {name for name in _READS if before[name] != after[name]} >= {"read_bytes", "size", "stamp"}


def test_a_write_of_others_is_seen_by_a_swap_and_after_the_block(s3: str) -> None:
    url = f"{s3}/a"
    storage.put_bytes(b"first", url)
    with storage.remember_reads():
        storage.read_bytes(url)
        storage.files.open_url(url)[0].pipe_file(url, b"of another")
        assert storage.read_bytes(url) == b"first"
        assert not storage.swap_bytes(b"second", url, b"first")
        assert storage.read_bytes(url) == b"of another"
    storage.files.open_url(url)[0].pipe_file(url, b"third")
    assert storage.read_bytes(url) == b"third"


def test_verify_and_status_request_each_document_once(s3: str, tmp_path: Path, requests: Counter[str]) -> None:
    images = synthetic.drawings(tmp_path / "images", subjects=2, size=16)
    run_stage(Shard(Dataset.parse(s3, "x"), ShardConfig(source=str(images), image_size=16, format="png")))
    for verb in ("status", "verify"):
        requests.clear()
        assert main([verb, "--root", s3]) == 0
        documents = {request: count for request, count in requests.items() if request.endswith(".json")}
        assert documents and max(documents.values()) == 1, (verb, documents)
