"""The runner on Ray gives the results of the runner in one process, even if workers and nodes die."""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.telemetry import logs
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_in_process, run_stage
from pipeline.stages.manifest import read_manifest, without_run_facts
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output, StageFailed

pytestmark = pytest.mark.ray


def _stages(root: str, pictures: Path) -> list[Stage]:
    dataset = Dataset.parse(root, "drawn")
    config = ShardConfig(source=str(pictures), captions=str(pictures / "train.csv"), only_captioned=True,
                         samples_per_shard=25, image_size=32, format="png")
    return [Shard(dataset, config), Embed(dataset, EmbedConfig(batch_size=16))]


def _data_files(root: str) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(Path(root).rglob("*"))
            if path.suffix in {".tar", ".parquet", ".npy", ".jsonl"}}


def test_ray_gives_the_same_bytes_as_one_process(cluster, start_pool, tmp_path: Path, drawn_pictures: Path) -> None:
    roots = {name: str(tmp_path / name) for name in ("local", "one", "three")}
    pools = {"one": start_pool(1), "three": start_pool(3)}
    manifests: dict[str, list[Any]] = {}
    for name, root in roots.items():
        manifests[name] = [without_run_facts(run_stage(stage, pools.get(name, run_in_process)))
                           for stage in _stages(root, drawn_pictures)]
    assert manifests["local"] == manifests["one"] == manifests["three"]
    assert _data_files(roots["local"]) == _data_files(roots["one"]) == _data_files(roots["three"])
    assert len(_data_files(roots["local"])) > 10


@dataclass(frozen=True)
class SlowConfig:
    items: int = 12
    seconds: float = 0.4
    bad: str = ""
    poison: str = ""
    deadly: str = ""
    together: int = 1


class Slow(Stage):
    """Slow items that log their worker. Some fail, and some kill their worker, once or always."""

    name = "slow"

    def __init__(self, root: str, config: SlowConfig, diary: Path) -> None:
        super().__init__(root, "slow", config)
        self.diary = str(diary)

    def plan(self) -> list[Item]:
        return [Item(f"{number:06d}") for number in range(self.config.items)]

    def together(self, gpu: bool | None = None) -> int:
        return self.config.together

    def process(self, item: Item, scratch: Path) -> Output:
        with open(self.diary, "a") as file:
            file.write(f"{item.id} {os.getpid()}\n")
        tries = Path(self.diary).read_text().count(f"{item.id} ")
        time.sleep(self.config.seconds)
        if item.id == self.config.bad and tries == 1:
            raise RuntimeError("the first try fails")
        if item.id == self.config.poison or (item.id == self.config.deadly and tries == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        path = scratch / "out.txt"
        path.write_text(f"{item.id}\n" * 1000)
        return Output(samples=1, files={f"{item.id}.txt": path})


def _undisturbed_result(tmp_path: Path, config: SlowConfig) -> dict[str, Any]:
    quick_config = SlowConfig(config.items, 0.0)
    return _result(run_stage(Slow(str(tmp_path / "plain"), quick_config, tmp_path / "plain.txt")))


def _result(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that is equal for slow and quick runs: all but the plan, which names the seconds."""
    manifest = without_run_facts(manifest)
    return {"items": [record | {"plan": ""} for record in manifest["items"]], "totals": manifest["totals"]}


def _has_result(manifest: dict[str, Any], expected: dict[str, Any]) -> bool:
    return _result(manifest) == expected


def test_a_killed_worker_costs_nothing(cluster, start_pool, tmp_path: Path) -> None:
    config, diary = SlowConfig(), tmp_path / "diary.txt"
    killed: list[int] = []

    def kill() -> None:
        while not diary.exists() or len(diary.read_text().splitlines()) < 5:
            time.sleep(0.05)
        pid = int(diary.read_text().splitlines()[-1].split()[1])
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    manifest = run_stage(Slow(str(tmp_path / "root"), config, diary), start_pool(3))
    thread.join()
    assert killed and _has_result(manifest, _undisturbed_result(tmp_path, config))


def test_a_killed_node_costs_nothing(cluster, start_pool, tmp_path: Path) -> None:
    config, diary = SlowConfig(items=16), tmp_path / "diary.txt"
    node = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)

    def kill() -> None:
        while not diary.exists() or len(diary.read_text().splitlines()) < 6:
            time.sleep(0.05)
        for processes in node.all_processes.values():
            for process_info in processes:
                os.kill(process_info.process.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    manifest = run_stage(Slow(str(tmp_path / "root"), config, diary), start_pool(6))
    thread.join()
    cluster.remove_node(node, allow_graceful=False)
    assert _has_result(manifest, _undisturbed_result(tmp_path, config))


def test_a_failed_item_is_retried_on_another_worker(cluster, start_pool, tmp_path: Path) -> None:
    config, diary = SlowConfig(items=6, seconds=0.1, bad="000002"), tmp_path / "diary.txt"
    manifest = run_stage(Slow(str(tmp_path / "root"), config, diary), start_pool(2))
    pids = [line.split()[1] for line in diary.read_text().splitlines() if line.startswith("000002")]
    assert len(pids) == 2 and pids[0] != pids[1]
    assert _has_result(manifest, _undisturbed_result(tmp_path, config))
    assert storage.list_files(str(tmp_path / "root" / "slow" / "failures")) == []


def test_an_item_that_kills_its_workers_does_not_stop_the_rest(cluster, start_pool, tmp_path: Path) -> None:
    config, diary = SlowConfig(items=4, seconds=0.05, poison="000001"), tmp_path / "diary.txt"
    stage = Slow(str(tmp_path / "root"), config, diary)
    with pytest.raises(StageFailed, match=r"1 of 4 items failed.*000001.*its worker died 5 times"):
        run_stage(stage, start_pool(2))
    assert storage.list_files(str(tmp_path / "root" / "slow" / "records")) == [
        "000000.json", "000002.json", "000003.json"]
    assert storage.list_files(str(tmp_path / "root" / "slow" / "failures")) == ["000001.json"]
    with pytest.raises(ValueError, match="not sealed"):
        read_manifest(stage.folder, "python -m jobs slow")


def test_items_of_a_group_fail_and_are_retried_alone(
        cluster, start_pool, tmp_path: Path) -> None:
    config, diary = SlowConfig(items=8, seconds=0.05, bad="000001", deadly="000006", together=4), tmp_path / "diary.txt"
    manifest = run_stage(Slow(str(tmp_path / "root"), config, diary), start_pool(2))
    assert _has_result(manifest, _undisturbed_result(tmp_path, config))
    lines = [line.split() for line in diary.read_text().splitlines()]
    pids_by_item = {item: [pid for tried_item, pid in lines if tried_item == item] for item, _ in lines}
    assert [len(pids_by_item[f"{number:06d}"]) for number in range(8)] == [1, 2, 1, 1, 1, 1, 2, 1]
    assert len({pids_by_item[f"00000{number}"][0] for number in range(4)}) == 1  # one worker had all four
    assert pids_by_item["000006"][0] != pids_by_item["000006"][1]


class Talking(Stage):
    """Items that write to the log."""

    name = "talking"

    def __init__(self, root: str) -> None:
        super().__init__(root, "datasets/some/v3/talking", SlowConfig())

    def plan(self) -> list[Item]:
        return [Item("000000"), Item("000001")]

    def process(self, item: Item, scratch: Path) -> Output:
        logging.getLogger("pipeline.talking").warning("at work on %s", item.id)
        path = scratch / "out.txt"
        path.write_text(item.id)
        return Output(samples=1, files={f"{item.id}.txt": path})


@pytest.fixture
def json_logging() -> Iterator[None]:
    logs.configure_logging("json")
    yield
    logs.configure_logging("text")


def test_workers_log_in_the_format_of_their_driver(cluster, start_pool, tmp_path: Path, json_logging: None) -> None:
    import ray

    run_stage(Talking(str(tmp_path / "root")), start_pool(1))
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    records: list[dict[str, Any]] = []
    deadline = time.monotonic() + 20
    while len(records) < 2 and time.monotonic() < deadline:
        records = [json.loads(line) for file in folder.glob("worker-*.err") for line in file.read_text().splitlines()
                   if '"pipeline.talking"' in line]
        time.sleep(0.2)
    assert [(record["message"], record["item"], record["dataset"], record["version"], record["stage"], record["level"])
            for record in records] == [(f"at work on {item}", item, "some", "v3", "talking", "warning")
                                       for item in ("000000", "000001")]
