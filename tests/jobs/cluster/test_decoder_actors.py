"""Nodes without a GPU decode images for a worker. The bytes are those of one process, even if nodes die."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError

from jobs.cluster import decoder_actors
from jobs.cluster.actor_pool import Pool
from jobs.cluster.config import ClusterConfig
from jobs.cluster.decoder_actors import Decoders
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings import decode_batch
from pipeline.embeddings.clip_weights import ClipConfig, describe_encoder
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.hardware import devices
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from pipeline.stages.types import Item, Output
from tests.pipeline import synthetic
from tests.pipeline.media.sample_images import photo

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("pickle_by_value")]


@pytest.fixture
def gpu_node(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A node that says it has a GPU, where the worker goes. There is none, so `Killing` encodes on its core."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # the tests hide GPUs
    node = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 << 20)
    yield node.node_id
    cluster.remove_node(node)


class Killing(Embed):
    """Kills a decoder once the second shard is done. Computes on the CPU, although its worker reserved a GPU."""

    def __init__(self, dataset: Dataset, config: EmbedConfig, victims: list[int]) -> None:
        super().__init__(dataset, config)
        self.victims = victims

    def setup(self) -> None:
        devices.reserve("cpu")
        super().setup()

    def _output(self, item: Item, *arguments: Any) -> Output:
        output = super()._output(item, *arguments)
        if item.id == "000001":
            for pid in self.victims:
                os.kill(pid, signal.SIGKILL)
        return output


def _shards(root: Path, pictures: Path) -> Dataset:
    dataset = Dataset.parse(str(root), "drawn")
    run_stage(Shard(dataset, ShardConfig(source=str(pictures), samples_per_shard=25, image_size=48, format="png")))
    return dataset


def _files(dataset: Dataset) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(dataset.folder("embeddings")).glob("*.npy")}


@pytest.mark.slow
@pytest.mark.parametrize("all_die", [False, True])
def test_remote_decoders_give_the_same_bytes_even_if_they_die(all_die, gpu_node, tmp_path, drawn_pictures) -> None:
    local_dataset, remote_dataset = (_shards(tmp_path / name, drawn_pictures) for name in ("alone", "lent"))
    expected = without_run_facts(run_stage(Embed(local_dataset, EmbedConfig(batch_size=8))))
    pool = Pool(ClusterConfig(workers=1, gpus=1, decoders=2))
    try:
        pool.decoders = decoder_actors.start_decoders(2)
        processes = ray.get([decoder.ping.remote() for decoder in pool.decoders])
        assert len({pid for pid, _ in processes}) == 2 and gpu_node not in {node for _, node in processes}
        victims = [pid for pid, _ in processes][:1 + all_die]
        manifest = run_stage(Killing(remote_dataset, EmbedConfig(batch_size=8), victims), pool)
        assert without_run_facts(manifest) == expected and _files(remote_dataset) == _files(local_dataset)
        times = [record["run"]["times"] for record in manifest["items"]]
        # Nothing is decoded here until a portion is lost; what the killed ones had is.
        assert all(item_times["elsewhere"] > 0 and "decode" not in item_times for item_times in times[:2])
        assert {"wait", "forward", "read", "write"} <= times[0].keys()
        assert sum(item_times.get("decode", 0) for item_times in times[2:]) > 0
        assert all_die or sum(item_times.get("elsewhere", 0) for item_times in times[2:]) > 0
        assert _ping_after_restart(pool.decoders[0])[0] != processes[0][0]
    finally:
        pool.close()


def _ping_after_restart(handle: Any) -> tuple[int, str]:
    """The answer of the decoder that Ray starts in place of a killed one."""
    for _ in range(100):
        try:
            return ray.get(handle.ping.remote())
        except ray.exceptions.RayError:
            time.sleep(0.2)
    raise AssertionError("the decoder is not started again")


@pytest.mark.slow
def test_a_worker_uses_a_bounded_number_of_decoders_that_answer(cluster) -> None:
    handles = decoder_actors.start_decoders(3)
    try:
        decoders = Decoders(handles, workers=2)
        assert decoders.at_once == 3 and Decoders([], workers=2).at_once == 2
        data = [synthetic.encoded(photo(90, 70), "PNG"), b"no picture", synthetic.encoded(photo(70, 90, 1), "JPEG")]
        settings = describe_encoder(ClipConfig())["preprocessing"]
        ray.get([handle.ping.remote() for handle in handles])
        for description in (settings, settings | {"resize": "longest", "fill_color": 9}):  # the second by open_clip
            local, remote = decode_batch.decode_by_description(data, description), decoders(data, description)
            assert remote.there == local.there == [0, 2] and remote.pictures.flags.writeable
            np.testing.assert_array_equal(remote.pictures, local.pictures)
        assert decoders([b"none"], settings).pictures is None
        for handle in handles:
            ray.kill(handle)
            with pytest.raises(RayActorError):
                while True:  # it may answer a little longer
                    ray.get(handle.ping.remote())
        assert decoders(data, settings) is None
    finally:
        for handle in handles:
            ray.kill(handle)
