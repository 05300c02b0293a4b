"""GPUs: reserved or not, usable or not, and the messages about them. The tests need no GPU."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from jobs.cluster import connect as clusters
from jobs.cluster.actor_pool import Pool
from jobs.cluster.config import ClusterConfig
from jobs.cluster.gpus import check_gpus
from jobs.training.train_stage import Training
from model.training import flops
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.hardware import devices
from pipeline.indices.config import IndexConfig
from pipeline.indices.index import Index
from pipeline.stages.driver import run_stage
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output, StageFailed

OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver."
FULL = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB."


@pytest.fixture
def root(prepared_root: Path, tmp_path: Path) -> str:
    shutil.copytree(prepared_root, tmp_path / "root")
    return str(tmp_path / "root")


def _commands(root: str) -> dict[str, list[str]]:
    flags = ["--root", root, "--local"]
    return {"embed": ["embed", "drawn", *flags, "--overwrite"],
            "neighbors": ["neighbors", "drawn", *flags, "--method", "exact", "--overwrite"],
            "train": ["train", "run", "--dataset", "drawn", "--steps", "2", *flags]}


@pytest.mark.parametrize("verb", ["embed", "neighbors", "train"])
def test_a_missing_reserved_gpu_is_an_error_with_the_reason_of_torch(root: str, verb: str, capsys: Any) -> None:
    assert main([*_commands(root)[verb], "--gpus", "1"]) == 1
    error = capsys.readouterr().err
    assert "a GPU was reserved" in error and "CUDA_VISIBLE_DEVICES is" in error and "hint: " in error
    assert "NVIDIA" in error or "CUDA GPUs" in error  # torch's own words
    assert "Traceback" not in error


@pytest.mark.parametrize(("text", "sentence"), [
    (OLD, "driver is older than this torch needs"), (FULL, "too little memory"),
    ("CUDA error: invalid device ordinal", "torch sees none"),
    ("CUDA error: uncorrectable ECC error encountered", "The GPU failed")])
def test_each_kind_of_failure_has_a_sentence_a_hint_and_exit_code_1(root: str, text: str, sentence: str, capsys: Any,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(number: int | None) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(devices, "_probe", probe)
    from pipeline.embeddings import clip
    clip.load_encoder_on.cache_clear()
    assert main([*_commands(root)["embed"], "--gpus", "1"]) == 1
    error = capsys.readouterr().err
    assert text[:40] in error and sentence in error and "hint: " in error and "Traceback" not in error
    clip.load_encoder_on.cache_clear()


def test_an_encoder_that_does_not_fit_the_gpu_is_no_fault_of_its_weights(root: str, capsys: Any,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip
    import torch

    from pipeline.embeddings import clip

    def create(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(FULL)

    clip.load_encoder_on.cache_clear()
    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    assert main(_commands(root)["embed"]) == 1
    error = capsys.readouterr().err
    assert "does not get onto the GPU" in error and FULL in error and "too little memory" in error and "hint: " in error


def test_a_network_that_does_not_fit_the_gpu_has_another_hint_than_a_batch(root: str, capsys: Any,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from model.training import train

    def start(*_: Any) -> Any:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(train, "_initial_state", start)
    assert main(_commands(root)["train"]) == 1
    error = capsys.readouterr().err
    assert FULL in error and "hint: --fsdp" in error and "Traceback" not in error


def test_zero_gpus_means_the_cpu_even_if_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    devices._mention_unused.cache_clear()
    with caplog.at_level("INFO"), devices.reserve_temporarily("cpu"):
        assert devices.choose_device().type == devices.choose_device().type == "cpu"
    assert [record.message for record in caplog.records] == [
        "this computes on the CPU, as --gpus 0 says; there is a GPU here: NVIDIA H200"]


class _Lost(Stage):
    """Its device is lost at the second item."""

    name = "lost"

    def __init__(self, root: str, size: int) -> None:
        super().__init__(root, "lost", ClusterConfig())
        self.size = size

    def plan(self) -> list[Item]:
        return [Item(str(number)) for number in range(6)]

    def together(self, gpu: bool | None = None) -> int:
        return self.size

    def process(self, item: Item, scratch: Path) -> Output:
        if item.id == "0":
            return Output(samples=1)
        with Path(self.folder, "tried").open("a") as stream:
            stream.write(f"{item.id}\n")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("size", [1, 3])
def test_a_lost_device_ends_a_process_and_costs_no_other_item(tmp_path: Path, size: int) -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_stage(_Lost(str(tmp_path), size))
    tried = Path(tmp_path, "lost/tried").read_text().split()
    assert "1" in tried and not {"3", "4", "5"} & set(tried)
    assert not Path(tmp_path, "lost/failures").exists()


def test_a_gpu_slice_is_named_once(caplog: Any) -> None:
    devices._mention_slice.cache_clear()
    with caplog.at_level("WARNING"):
        for _ in range(2):
            devices._mention_slice("NVIDIA H100 80GB HBM3 MIG 1g.10gb")
            devices._mention_slice("NVIDIA H100 80GB HBM3")
    assert len(caplog.records) == 1 and "is a slice of a GPU" in caplog.text


def test_a_reservation_ends_with_its_block() -> None:
    before = devices.reserved_device()
    with devices.reserve_temporarily("cuda"):
        assert devices.reserved_device() == "cuda" and os.environ["RDM_DEVICE"] == "cuda"
    assert devices.reserved_device() == before


@pytest.mark.parametrize("count", ["2", "1.5", "-1", "nan"])
def test_gpus_that_embed_cannot_use_are_refused_before_planning(root: str, count: str, capsys: Any,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is removed, planned or started."""
    monkeypatch.setattr(clusters, "connect", lambda: pytest.fail("connected to a cluster"))
    before = sorted(Path(root).rglob("*"))
    with pytest.raises(SystemExit) if count != "2" else contextlib.nullcontext() as stopped:
        assert main(["embed", "drawn", "--root", root, "--gpus", count, "--overwrite"]) == 2
    assert stopped is None or stopped.value.code == 2
    assert "gpus" in capsys.readouterr().err and sorted(Path(root).rglob("*")) == before


@pytest.mark.parametrize(("count", "hint"), [("2", "--workers 8 --gpus 1"), ("0.5", "--gpus 1 with fewer")])
def test_a_process_of_training_takes_one_whole_gpu(root: str, count: str, hint: str, capsys: Any,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "connect", lambda: pytest.fail("connected to a cluster"))
    assert main(["train", "run", "--dataset", "drawn", "--root", root, "--workers", "4", "--gpus", count]) == 2
    error = capsys.readouterr().err
    assert f"--gpus {count}" in error and hint in error and not Path(root, "runs/run").exists()


def test_workers_of_embed_share_a_gpu_and_those_of_index_take_several(root: str) -> None:
    dataset = Dataset.parse(root, "drawn")
    check_gpus(Embed(dataset, EmbedConfig()), ClusterConfig(gpus=0.25))

    class OnGpus(Index):
        workers_need_gpu = True

    check_gpus(OnGpus(dataset, IndexConfig()), ClusterConfig(gpus=4))
    assert not Training.shares_gpus


@pytest.mark.parametrize(("verb", "count"), [("embed", "2"), ("neighbors", "2"), ("train", "2"), ("train", "0.5")])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_gpus_that_cannot_be_used_are_refused_without_ray_too(root: str, verb: str, count: str, dry: list[str],
                                                              capsys: Any) -> None:
    before = sorted(Path(root).rglob("*"))
    assert main([*_commands(root)[verb], "--gpus", count, *dry]) == 2
    assert f"--gpus {count}" in capsys.readouterr().err and sorted(Path(root).rglob("*")) == before


def test_a_missing_gpu_leaves_no_plan(root: str) -> None:
    """A plan would refuse other settings afterwards."""
    for command in (["embed", "drawn@v2"], ["neighbors", "drawn", "--method", "exact", "--k", "3", "--overwrite"],
                    ["train", "run", "--dataset", "drawn", "--steps", "2"]):
        shutil.copytree(Path(root, "datasets/drawn/v1/shards"), Path(root, "datasets/drawn/v2/shards"),
                        dirs_exist_ok=True)
        before = sorted(Path(root).rglob("*"))
        assert main([*command, "--root", root, "--local", "--gpus", "1"]) == 1
        assert sorted(Path(root).rglob("*")) == before


def test_the_environment_names_the_device_without_a_flag(root: str, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: Any ) -> None:
    monkeypatch.setenv("RDM_DEVICE", "banana")
    assert main(_commands(root)["embed"]) == 2 and "RDM_DEVICE = 'banana'" in capsys.readouterr().err
    assert main([*_commands(root)["embed"], "--gpus", "0"]) == 0


def test_a_dry_run_refuses_gpus_that_cannot_be_used(root: str, capsys: Any) -> None:
    assert main(["embed", "drawn@v2", "--root", root, "--gpus", "2", "--dry-run"]) == 2
    assert "computes on 1 GPU" in capsys.readouterr().err


def test_records_manifest_status_and_report_name_device_and_precision(root: str, capsys: Any) -> None:
    assert main([*_commands(root)["embed"], "--gpus", "0", "--precision", "fp32"]) == 0
    manifest = json.loads(Path(root, "datasets/drawn/v1/embeddings/manifest.json").read_text())
    names = {record["run"]["device"] for record in manifest["items"]}
    assert len(names) == 1 and (name := names.pop()).startswith("CPU") and name.endswith(", fp32")
    assert manifest["run"]["devices"] == {name: len(manifest["items"])}
    capsys.readouterr()
    assert main(["status", "--root", root]) == 0
    assert f"on {name}" in capsys.readouterr().out
    assert main(["report", "--root", root]) == 0
    assert f"on {name}" in Path(root, "report.html").read_text()


def test_a_run_names_the_device_of_its_processes(root: str) -> None:
    assert main([*_commands(root)["train"], "--precision", "fp32", "--log-every", "1"]) == 0
    manifest = json.loads(Path(root, "runs/run/manifest.json").read_text())
    (name,) = manifest["run"]["devices"]
    assert name.startswith("CPU") and name.endswith(", fp32")


class _Look(Stage):
    """A stage that records which GPUs a worker sees."""

    name = "look"

    def __init__(self, root: str) -> None:
        super().__init__(root, "look", ClusterConfig())

    def plan(self) -> list[Item]:
        return [Item("0")]

    def process(self, item: Item, scratch: Path) -> Output:
        return Output(samples=1, info={"reserved": devices.reserved_device(),
                                       "visible": os.environ.get("CUDA_VISIBLE_DEVICES")})


@pytest.mark.ray
def test_a_worker_without_a_gpu_sees_none(cluster: Any, pickle_by_value: None, tmp_path: Path) -> None:
    pool = Pool(ClusterConfig(workers=1))
    try:
        manifest = run_stage(_Look(str(tmp_path)), pool)
    finally:
        pool.close()
    assert manifest["items"][0]["info"] == {"reserved": "cpu", "visible": ""}


@pytest.mark.slow
@pytest.mark.ray
def test_every_record_of_a_worker_names_its_precision(cluster: Any, root: str) -> None:
    """A worker sets its stage up once, and each item brings a new copy of the stage."""
    dataset, pool = Dataset.parse(root, "drawn"), Pool(ClusterConfig(workers=1))
    try:
        manifest = run_stage(Embed(dataset, EmbedConfig(precision="fp32")), pool, overwrite=True)
    finally:
        pool.close()
    assert len(manifest["items"]) > 1
    assert all(record["run"]["device"].endswith(", fp32") for record in manifest["items"])


@pytest.mark.ray
def test_a_local_cluster_without_the_gpu_is_an_error_immediately(cluster: Any, root: str, caplog: Any,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    clusters.connect()
    embed = Embed(Dataset.parse(root, "drawn"), EmbedConfig())
    clusters.check_gpus_exist(embed, ClusterConfig(gpus=1))
    assert "waits 5 minutes for nodes" in caplog.text
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(StageFailed, match=r"(?s)reserves 1 GPU, and this machine has 0.*hint: --gpus 0"):
        clusters.check_gpus_exist(embed, ClusterConfig(gpus=1))
    clusters.check_gpus_exist(embed, ClusterConfig(gpus=0))


def test_a_gpu_slice_has_its_share_of_the_rate() -> None:
    whole = flops.peak("NVIDIA H100 80GB HBM3")
    assert whole and flops.peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb") == whole / 7
    assert flops.peak("NVIDIA H100 80GB HBM3 MIG 3g.40gb") == whole * 3 / 7
