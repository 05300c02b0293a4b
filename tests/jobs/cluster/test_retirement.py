"""A worker that fails everything is retired. An item that fails everywhere fails and retires no worker."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster import actor_pool, connect
from jobs.cluster.retirement import REFUTED, TRIES, Blame, Failed, Place, Task, WorkerState
from jobs.inspection import status
from pipeline import storage
from pipeline.hardware import devices
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output, StageFailed

CUDA = Failed("AcceleratorError: CUDA error: device-side assert triggered", "", "device lost")
MEMORY = Failed("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "", "out of memory")
DISK = Failed("OSError: [Errno 5] Input/output error", "")
INVALID = Failed("the tar is damaged", "", invalid=True)


# The decisions, without Ray.


def make_worker(number: int = 0, *, finished: int = 1, visible: str = "") -> WorkerState:
    return WorkerState(None, Place(f"node{number}", "host", visible), finished)


def make_task(number: int) -> Task:
    return Task([Item(f"{number:06d}")])


def test_a_failed_device_retires_its_worker_and_the_second_time_its_place() -> None:
    blame = Blame(4)
    first, second = make_worker(finished=0), make_worker(finished=0)
    assert blame.failed(first, make_task(0), CUDA) == f"{devices.describe_failure('device lost')}: {CUDA.error}"
    assert not blame.broken(first.place)
    assert blame.failed(second, make_task(0), CUDA) and blame.broken(first.place)
    assert not blame.broken(make_worker(1).place) and not blame.broken(make_worker(0, visible="1").place)
    assert CUDA.error in blame.why(blame.broken_places())


def test_a_device_that_breaks_after_it_worked_gets_one_new_worker() -> None:
    blame = Blame(4)
    old, new = make_worker(), make_worker(finished=0)
    assert blame.failed(old, make_task(0), CUDA) and not blame.broken(old.place)
    assert blame.failed(new, make_task(1), CUDA) and blame.broken(old.place)


def test_a_device_that_works_in_between_is_abandoned_the_third_time() -> None:
    blame = Blame(4)
    for number in range(3):
        worker = make_worker(finished=0)
        list(blame.finished(worker, make_task(100 + number), 1))
        assert not blame.broken(worker.place)
        blame.failed(worker, make_task(number), CUDA)
    assert blame.broken(make_worker().place)


def test_failures_of_devices_that_never_worked_do_not_count_against_an_item() -> None:
    blame, item = Blame(40), make_task(0)
    for number in range(20):
        blame.failed(make_worker(number, finished=0), item, CUDA)
    assert not blame.hopeless(item) and not blame.exhausted(item)
    places = {make_worker(number).place.key for number in range(40)}
    assert blame.fits(make_worker(30), item, places) and blame.fits(make_worker(31, finished=0), item, places)
    assert not blame.fits(make_worker(3), item, places)
    # If no other place is left, one that works may have it again.
    assert blame.fits(make_worker(3), item, item.broke) and not blame.fits(make_worker(3, finished=0), item, item.broke)


def test_an_item_that_breaks_working_devices_fails_and_their_places_stay() -> None:
    blame, item = Blame(4), make_task(0)
    for _ in range(TRIES):
        assert not blame.hopeless(item)
        blame.failed(make_worker(0), item, CUDA)
    assert blame.hopeless(item) and blame.broken_places() == []
    blame.failed(make_worker(0), make_task(1), CUDA)  # the place has only this one to its account
    assert blame.broken_places() == []


def test_items_that_others_finish_retire_a_worker_and_its_failures_do_not_count() -> None:
    blame, bad, good = Blame(3), make_worker(0), make_worker(1)
    tasks = [make_task(number) for number in range(REFUTED)]
    for task in tasks:
        assert blame.failed(bad, task, DISK) == ""
    retirements_by_task = [list(blame.finished(good, task, 1)) for task in tasks]
    assert [len(retirements) for retirements in retirements_by_task] == [0] * (REFUTED - 1) + [1]
    assert retirements_by_task[-1][0][0] is bad and DISK.error in retirements_by_task[-1][0][1]
    bad.retired = True
    assert not blame.exhausted(Task([Item("x")], failures=[bad] * 5, last=DISK))


def test_a_worker_that_finishes_something_in_between_is_kept() -> None:
    blame, flaky, good = Blame(3), make_worker(0), make_worker(1)
    for number in range(5 * REFUTED):
        task = make_task(number)
        blame.failed(flaky, task, DISK)
        assert list(blame.finished(flaky, make_task(1000 + number), 1)) == []
        assert list(blame.finished(good, task, 1)) == []


def test_items_that_fail_everywhere_retire_no_worker() -> None:
    blame, workers = Blame(3), [make_worker(number) for number in range(3)]
    for failure in (DISK, MEMORY):
        for number in range(3):
            task = make_task(number)
            assert [blame.failed(worker, task, failure) for worker in workers] == ["", "", ""] and blame.hopeless(task)
    assert blame.broken_places() == [] and not any(worker.refuted for worker in workers)


def test_out_of_memory_twice_in_a_row_retires_a_worker_once_others_finish_an_item() -> None:
    blame, full, good = Blame(3), make_worker(0), make_worker(1)
    first, second = make_task(0), make_task(1)
    blame.failed(full, first, MEMORY)
    assert list(blame.finished(good, first, 1)) == []  # once is no pattern
    blame.failed(full, second, MEMORY)
    [(retired, reason)] = blame.finished(good, second, 1)
    assert retired is full and reason.startswith(devices.describe_failure("out of memory"))


def test_failures_on_idle_workers_count_only_if_no_worker_finishes_an_item() -> None:
    blame, item, fresh_workers = Blame(4), make_task(0), [make_worker(number, finished=0) for number in range(3)]
    for worker in fresh_workers:
        blame.failed(worker, item, DISK)
    assert blame.exhausted(item) and not blame.hopeless(item)
    failing = make_worker(7, finished=0)
    assert blame.fits(make_worker(7), item, set()) and blame.fits(failing, item, set())
    blame.failed(failing, make_task(1), DISK)
    assert not blame.fits(failing, item, set())
    for worker in fresh_workers:
        worker.finished = 1
    assert blame.hopeless(item)


def test_a_value_error_is_confirmed_by_a_second_worker_if_there_is_one() -> None:
    blame, item = Blame(2), make_task(0)
    blame.failed(make_worker(0), item, INVALID)
    assert not blame.hopeless(item)
    blame.failed(make_worker(1), item, INVALID)
    assert blame.hopeless(item)
    blame, item = Blame(1), make_task(0)
    blame.failed(make_worker(0), item, INVALID)
    assert blame.hopeless(item)


# On Ray.


@dataclass(frozen=True)
class FaultyConfig:
    items: int = 40
    seconds: float = 0.05
    error: str = ""
    bad: tuple[str, ...] = ()
    together: int = 1


class Faulty(Stage):
    """Items that fail immediately on poisoned nodes or GPUs, and some that fail everywhere."""

    name = "faulty"
    workers_need_gpu = True

    def __init__(self, root: str, config: FaultyConfig, folder: Path) -> None:
        super().__init__(root, "datasets/x/v1/embeddings", config)
        self.notes = str(folder)
        folder.mkdir(exist_ok=True)

    def section(self) -> dict[str, Any]:
        return {"items": self.config.items}

    def plan(self) -> list[Item]:
        return [Item(f"{number:06d}") for number in range(self.config.items)]

    def together(self, gpu: bool | None = None) -> int:
        return self.config.together

    def setup(self) -> None:
        if self.config.error in {"cuda", "memory"}:
            import torch  # noqa: F401 (takes seconds, which are not those of an item)
        if self.config.error == "setup" and self._poisoned():
            raise RuntimeError("No CUDA GPUs are available")

    def process(self, item: Item, scratch: Path) -> Output:
        with open(Path(self.notes) / "diary", "a") as diary:
            diary.write(f"{item.id} {os.getpid()}\n")
        if item.id in self.config.bad:
            raise RuntimeError("CUDA error: device-side assert triggered" if self.config.error == "bad for devices"
                               else "no worker can do this")
        if self._poisoned():
            _raise(self.config.error)
        time.sleep(self.config.seconds)
        path = scratch / "out.txt"
        path.write_text(item.id)
        return Output(samples=1, files={f"{item.id}.txt": path})

    def _poisoned(self) -> bool:
        import ray
        if not ray.is_initialized():
            return False
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        poison = Path(self.notes) / "poison"
        return poison.exists() and {ray.get_runtime_context().get_node_id(), f"GPU {visible}"} & set(
            poison.read_text().split("\n")) != set()


def _raise(error: str) -> None:
    if error in {"disk", "value"}:
        raise OSError(5, "Input/output error") if error == "disk" else ValueError("this is not the manifest's file")
    import torch
    if error == "cuda":
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might "
                                     "be asynchronously reported at some other API call")
    if error == "wrapped":
        try:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        except RuntimeError as cause:
            raise ValueError("open_clip cannot load this model") from cause
    if error == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    raise AssertionError(error)


@pytest.fixture
def nodes(cluster: Any) -> Iterator[list[str]]:
    """Ids of four nodes with six CPUs in all: two of two CPUs, two of one."""
    import ray
    added_nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    cluster.wait_for_nodes()
    connect.connect()
    cpus_by_node = {node["NodeID"]: node["Resources"]["CPU"] for node in ray.nodes()
                    if node["Alive"] and node["Resources"].get("CPU")}
    assert sum(cpus_by_node.values()) == 6
    yield sorted(cpus_by_node, key=lambda node_id: -cpus_by_node[node_id])
    for node in added_nodes:
        cluster.remove_node(node)


def poison(folder: Path, *places: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "poison").write_text("\n".join(places))


def undisturbed_manifest(root: Path, config: FaultyConfig) -> dict[str, Any]:
    return without_run_facts(run_stage(Faulty(str(root), FaultyConfig(config.items, 0.0), root)))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("error", ["disk", "cuda", "wrapped", "setup", "value", "memory"])
def test_three_healthy_workers_of_six_finish_everything(error: str, nodes: list[str], start_pool: Any, tmp_path: Path,
                                                        caplog: Any) -> None:
    config, root = FaultyConfig(200 if error == "cuda" else 60, 0.05, error), tmp_path / "root"
    poison(tmp_path / "notes", nodes[0], nodes[3])
    status_tables = []

    def watch(tally: Any) -> None:
        if tally.retired and not status_tables:
            status_tables.append(status.status_table(str(root), status.read_status(str(root))))

    manifest = run_stage(Faulty(str(root), config, tmp_path / "notes"), start_pool(6), watch=watch)
    assert without_run_facts(manifest) == undisturbed_manifest(tmp_path / "plain", config)
    assert manifest["totals"]["samples"] == config.items
    retired = manifest["run"]["retired"]
    assert {worker["node"] for worker in retired} == {nodes[0], nodes[3]}
    assert all(worker["items"] > 0 and worker["host"] and worker["reason"] for worker in retired)
    # Each place is given up after its second failure. A worker that runs there by then may fail later.
    assert [sum(worker["replaced"] for worker in retired if worker["node"] == node)
            for node in (nodes[0], nodes[3])] == [1, 1]
    assert len(retired) <= 6
    lines = [record.getMessage() for record in caplog.records if "is retired: " in record.getMessage()]
    assert len(lines) == len(retired) and all("node " in line and "it failed " in line for line in lines)
    assert " retired after " in status_tables[0] and " items, " in status_tables[0]
    [sealed] = [stage for stage in status.read_status(str(root)) if stage["path"].endswith("embeddings")]
    assert sealed["state"] == "sealed" and sealed["retired"] == retired
    assert f"{len(retired)} workers retired" in status.status_table(str(root), [sealed])


@pytest.mark.slow
@pytest.mark.ray
def test_a_device_that_fails_items_taken_together_retires_its_worker(cluster: Any, start_pool: Any, tmp_path: Path
                                                                     ) -> None:
    import ray
    connect.connect()
    node = next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    config = FaultyConfig(120, 0.1, "cuda", together=4)
    poison(tmp_path / "notes", node)
    manifest = run_stage(Faulty(str(tmp_path / "root"), config, tmp_path / "notes"), start_pool(4))
    assert without_run_facts(manifest) == undisturbed_manifest(tmp_path / "plain", config)
    assert {worker["node"] for worker in manifest["run"]["retired"]} == {node}
    assert manifest["run"]["retired"][0]["items"] == 4
    lines = [line.split() for line in (tmp_path / "notes" / "diary").read_text().splitlines()]
    assert max(sum(name == f"{number:06d}" for name, _ in lines) for number in range(120)) <= 4


@pytest.mark.ray
def test_items_that_fail_everywhere_fail_on_three_workers_and_retire_none(cluster: Any, start_pool: Any, tmp_path: Path,
                                                                          caplog: Any) -> None:
    bad = ("000050", "000051", "000052")  # when every worker has finished something
    stage = Faulty(str(tmp_path / "root"), FaultyConfig(80, 0.1, bad=bad), tmp_path / "notes")
    with pytest.raises(StageFailed, match=r"3 of 80 items failed.*no worker can do this"):
        run_stage(stage, start_pool(4))
    lines = [line.split() for line in (tmp_path / "notes" / "diary").read_text().splitlines()]
    for item in bad:
        assert len([pid for name, pid in lines if name == item]) == TRIES
        assert len({pid for name, pid in lines if name == item}) == TRIES
    assert len(storage.list_files(storage.join(stage.folder, "records"))) == 77
    assert not [record for record in caplog.records if "is retired" in record.getMessage()]
    assert storage.read_json(storage.join(stage.folder, "progress.json"))["retired"] == []


@pytest.mark.slow
@pytest.mark.ray
def test_an_item_that_breaks_every_device_fails_and_the_others_are_finished(cluster: Any, start_pool: Any,
                                                                            tmp_path: Path) -> None:
    stage = Faulty(str(tmp_path / "root"), FaultyConfig(40, 0.05, "bad for devices", ("000010",)), tmp_path / "notes")
    with pytest.raises(StageFailed, match=r"1 of 40 items failed.*000010: .*device-side assert"):
        run_stage(stage, start_pool(4))
    assert len(storage.list_files(storage.join(stage.folder, "records"))) == 39


@pytest.mark.slow
@pytest.mark.ray
def test_a_stage_with_only_broken_places_ends_and_the_same_command_resumes(cluster: Any, start_pool: Any,
                                                                           tmp_path: Path, monkeypatch: Any,
                                                                           caplog: Any) -> None:
    import ray
    connect.connect()
    monkeypatch.setattr(actor_pool, "BROKEN_TIMEOUT_S", 1.0)
    poison(tmp_path / "notes", *(node["NodeID"] for node in ray.nodes()))
    config = FaultyConfig(10, 0.0, "cuda")
    stage = Faulty(str(tmp_path / "root"), config, tmp_path / "notes")
    with pytest.raises(StageFailed, match=r"only broken places are left(.|\n)*got .*node .*illegal memory access"
                                          r"(.|\n)*\nhint: "):
        run_stage(stage, start_pool(2))
    retired = storage.read_json(storage.join(stage.folder, "progress.json"))["retired"]
    assert len(retired) >= 4
    assert " retired after " in status.status_table(stage.root, status.read_status(stage.root))
    (tmp_path / "notes" / "poison").unlink()
    manifest = run_stage(stage, start_pool(2))
    assert manifest["run"]["retired"] == retired  # of the run before
    assert without_run_facts(manifest) == undisturbed_manifest(tmp_path / "plain", config)


@pytest.mark.slow
@pytest.mark.ray
def test_a_broken_gpu_is_held_and_the_others_of_its_node_continue(cluster: Any, start_pool: Any, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray reserves GPUs by number whether there are any or not."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # the tests hide GPUs
    node = cluster.add_node(num_cpus=4, num_gpus=3, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    try:
        poison(tmp_path / "notes", "GPU 1")
        pool, config = start_pool(3, gpus=1.0), FaultyConfig(60, 0.1, "cuda")
        manifest = run_stage(Faulty(str(tmp_path / "root"), config, tmp_path / "notes"), pool)
        assert without_run_facts(manifest) == undisturbed_manifest(tmp_path / "plain", config)
        retired = manifest["run"]["retired"]
        assert [(worker["node"], worker["card"], worker["replaced"]) for worker in retired] == [
            (node.node_id, "CUDA_VISIBLE_DEVICES=1", True), (node.node_id, "CUDA_VISIBLE_DEVICES=1", False)]
        # The next stage of the same command does not use that GPU either.
        next_manifest = run_stage(Faulty(str(tmp_path / "again"), config, tmp_path / "notes"), pool)
        assert "retired" not in next_manifest["run"]
        assert [worker.place.visible for worker in pool.holding] == ["1"]
    finally:
        cluster.remove_node(node)
