"""Rows of a host that is limited or refuses wait. Rows of others do not. `--retry-failed` fetches failed rows again."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata
from pipeline.downloads import host_limits
from pipeline.downloads.config import DownloadConfig
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from tests.pipeline.downloads.strict_server import StrictServer, running

STRICT, FREE = "127.0.0.1", "127.0.0.2"


def shard(folder: Path, urls: list[str], retry: bool = False, **download: Any) -> tuple[dict[str, Any], list[str]]:
    """The manifest, and the URLs of the samples."""
    pq.write_table(pa.table({"url": urls, "caption": [""] * len(urls)}), folder / "list.parquet")
    dataset = Dataset.parse(str(folder / "root"), "web")
    config = ShardConfig(source=(str(folder / "list.parquet"),), image_size=32, samples_per_shard=1000,
                         download=DownloadConfig(allow_hosts=(STRICT, FREE), **download))
    following = dataset.next_version() if retry else dataset
    manifest = run_stage(Shard(following, config, base=dataset if retry else None))
    return manifest, [row["url"] for record in manifest["items"] for row in metadata(following, record)]


def test_rows_of_other_hosts_do_not_wait(tmp_path: Path) -> None:
    with running(StrictServer({STRICT: 15, FREE: 0})) as server:
        urls = server.urls(STRICT, 30) + server.urls(FREE, 300)
        manifest, packed = shard(tmp_path, urls, connections=4, host_rate=(f"{STRICT}=10",))
    assert packed == urls and not manifest["totals"]["skipped"] and not server.refused
    # The rows of the limited host come first, and there are more of them than connections.
    assert server.times[FREE][-1] < server.times[STRICT][20]


def test_rows_of_a_banned_client_are_retried_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_limits, "_PAUSES_S", (0.1, 0.2, 0.4))
    with running(StrictServer({STRICT: 10, FREE: 0}, ban_s=1000, status="429 Slow Down")) as server:
        urls = server.urls(STRICT, 60) + server.urls(FREE, 20)
        manifest, packed = shard(tmp_path, urls, connections=2, host_patience=0.5)
        skipped = manifest["totals"]["skipped"]
        assert packed == [*urls[:10], *urls[60:]] and sum(skipped.values()) == 50
        assert skipped["host_banned"] > 40 and set(skipped) <= {"host_banned", "http_429"}
        assert server.requests[STRICT] < 30
        server.limits = {STRICT: 0, FREE: 0}
        server._banned_until[STRICT] = 0.0
        manifest, packed = shard(tmp_path, urls, retry=True)
    assert sorted(packed) == sorted(urls) and not manifest["totals"]["skipped"]
    assert server.requests[FREE] == 20
