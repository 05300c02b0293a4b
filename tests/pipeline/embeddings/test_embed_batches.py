"""Batches of the embed stage: across shards, out of memory, and bounded memory."""

import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings
from pipeline.embeddings import clip
from pipeline.embeddings.clip_weights import ClipConfig
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed, EmbedCaptions
from pipeline.embeddings.encode_shards import MemoryPlan, plan_memory
from pipeline.hardware import devices
from pipeline.media import tars
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from pipeline.stages.plan import prepare
from pipeline.stages.stage import fingerprint
from pipeline.stages.types import StageFailed
from pipeline.stages.worker import process_and_commit
from pipeline.versions.reuse_embeddings import Reuse

pytestmark = pytest.mark.usefixtures("fresh_encoder")


@pytest.fixture
def encoded_batches(monkeypatch):
    """The encoder takes whole batches, as on a GPU; the count and padded size of each batch that it got."""
    batches, launch = [], clip.Encoder.launch
    monkeypatch.setattr(clip.Encoder, "whole", True)

    def counted(self, batch, size=0):
        batches.append((len(batch), size))
        return launch(self, batch, size)

    monkeypatch.setattr(clip.Encoder, "launch", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads would wait for each other on a busy machine
    yield batches
    torch.set_num_threads(before)


def files_of(dataset: Dataset) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in storage.local_path(dataset.folder("embeddings")).glob("*.npy")}


@pytest.mark.parametrize("size", [25, 80])
def test_batches_span_shards_and_files_do_not(size, copied, built, encoded_batches):
    """72 images are in shards of 30, 30 and 12. All batches but the last are full, across shards."""
    shutil.rmtree(copied.folder("embeddings"))
    sealed = run_stage(Embed(copied, EmbedConfig(batch_size=size)))
    assert [count for count, _ in encoded_batches] == [size] * (72 // size) + [72 % size] * (72 % size > 0)
    assert {padded for _, padded in encoded_batches} == {size}
    assert [(item["id"], item["samples"]) for item in sealed["items"]] == [
        ("000000", 30), ("000001", 30), ("000002", 12)]
    expected, vectors = Embeddings(built).all().astype(np.float32), Embeddings(copied).all().astype(np.float32)
    assert (expected * vectors).sum(1).min() > 1 - 1e-3
    files = files_of(copied)
    shutil.rmtree(copied.folder("embeddings"))
    stage = Embed(copied, EmbedConfig(batch_size=size))
    for item in prepare(stage):
        process_and_commit(stage, item)
    assert files_of(copied) == files


def test_a_shard_that_fails_among_others_fails_alone(copied, encoded_batches):
    shutil.rmtree(copied.folder("embeddings"))
    stage = Embed(copied, EmbedConfig(batch_size=25))
    undisturbed = without_run_facts(run_stage(stage))
    shutil.rmtree(copied.folder("embeddings"))
    path = storage.local_path(storage.join(copied.folder("shards"), "000001.tar"))
    whole_tar = path.read_bytes()
    path.write_bytes(whole_tar[:-2000])
    with pytest.raises(StageFailed, match=r"1 of 3 items failed, the first is 000001: .*not the file its manifest"):
        run_stage(stage)
    assert storage.list_files(storage.join(stage.folder, "records")) == ["000000.json", "000002.json"]
    path.write_bytes(whole_tar)
    encoded_batches.clear()
    assert without_run_facts(run_stage(stage)) == undisturbed
    assert encoded_batches == [(25, 25), (5, 25)]  # items with a record are not processed again


def test_undecodable_images_take_no_place_in_a_batch(copied, encoded_batches):
    shutil.rmtree(copied.folder("embeddings"))
    folder = copied.folder("shards")
    manifest = storage.read_json(storage.join(folder, "manifest.json"))
    for record, rows in zip(manifest["items"], ([0, 29], range(30), [3]), strict=True):
        entry = file_of(record, ".tar")
        path = storage.local_path(storage.join(folder, entry["name"]))
        samples = list(tars.read(path))
        for row in rows:
            samples[row]["png"] = b"spoiled"
        tars.write(path, [{key: value for key, value in sample.items() if key != "__url__"} for sample in samples])
        entry |= storage.describe_file(entry["name"], path)
    storage.put_json(manifest, storage.join(folder, "manifest.json"))
    sealed = run_stage(Embed(copied, EmbedConfig(batch_size=20)))
    assert [count for count, _ in encoded_batches] == [20, 19] and sealed["totals"]["noted"] == {"undecodable": 33}
    assert np.flatnonzero(~Embeddings(copied).all().any(1)).tolist() == [0, *range(29, 60), 63]


@pytest.fixture
def small_memory(monkeypatch):
    """Limits how many images or texts the device of the encoder has memory for."""
    encoder = clip.load_encoder(ClipConfig())
    encode, texts = encoder.encode, clip.Encoder.texts

    def limit(limit_of_device: int) -> list[int]:
        passes: list[int] = []

        def limited(compute):
            def run(*args):
                passes.append(len(args[-1]))
                if len(args[-1]) > limit_of_device:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
                                                 "capacity of 79.11 GiB of which 1.02 GiB is free.")
                return compute(*args)
            return run

        monkeypatch.setattr(encoder, "fit", devices.BatchFit())
        monkeypatch.setattr(encoder, "encode", limited(encode))
        monkeypatch.setattr(clip.Encoder, "texts", limited(texts))
        return passes

    return limit


@pytest.mark.parametrize("whole_batches", [True, False], ids=["gpu", "cpu"])
def test_out_of_memory_halves_the_batch_and_says_so(whole_batches, copied, built, small_memory, monkeypatch, caplog):
    monkeypatch.setattr(clip.Encoder, "whole", whole_batches)
    shutil.rmtree(copied.folder("embeddings"))
    passes = small_memory(9)
    sealed = run_stage(Embed(copied, EmbedConfig(batch_size=40)))
    # 40 images on a GPU, and 15 in each thread of a CPU, are halved until they fit.
    first = 40 if whole_batches else 15
    assert max(passes) == first and set(passes) - {first} and sealed["totals"]["samples"] == 72
    expected, vectors = Embeddings(built).all().astype(np.float32), Embeddings(copied).all().astype(np.float32)
    assert (expected * vectors).sum(1).min() > 1 - 1e-3
    last = 5 if whole_batches else 7
    assert passes[-1] <= last and sum(size > 9 for size in passes) < 8  # later batches begin with the smaller size
    notes = [item["run"]["times"][devices.HALVED] for item in sealed["items"]]
    assert len(notes) == 3 and notes[-1].startswith(f"batch from {first} to {last} after out of memory on ")
    assert sealed["run"]["items_with_halved_batches"] == 3
    lines = [record.getMessage() for record in caplog.records if "halved from" in record.getMessage()]
    assert lines[0].startswith(f"batch halved from {first} to {first // 2} after out of memory on ")
    stage = Embed(copied, EmbedConfig(batch_size=40))
    assert sealed["fingerprint"] == fingerprint(stage)


def test_one_image_that_does_not_fit_is_an_error_with_a_hint(copied, encoded_batches, small_memory):
    shutil.rmtree(copied.folder("embeddings"))
    small_memory(0)
    with pytest.raises(StageFailed, match=r"OutOfDeviceMemory: a batch of 1 does not fit the memory of .*CUDA out of "
                                          r"memory(.|\n)*\nhint: nvidia-smi"):
        run_stage(Embed(copied, EmbedConfig(batch_size=4)))


def test_out_of_memory_halves_batches_of_captions_too(copied, small_memory):
    plain = run_stage(EmbedCaptions(copied, EmbedConfig()))
    before = Embeddings(copied, "text_embeddings").all().astype(np.float32)
    passes = small_memory(4)
    sealed = run_stage(EmbedCaptions(copied, EmbedConfig()), overwrite=True)
    after = Embeddings(copied, "text_embeddings").all().astype(np.float32)
    assert (before * after).sum(1).min() > 1 - 1e-3 and max(passes) > 4
    assert "items_with_halved_batches" not in plain["run"] and sealed["run"]["items_with_halved_batches"] > 0


def test_after_an_error_of_the_encoder_each_shard_is_tried_alone(copied, encoded_batches, monkeypatch):
    """One error ends all shards of a group. Then each shard is tried alone."""
    shutil.rmtree(copied.folder("embeddings"))
    encoder = clip.load_encoder(ClipConfig())
    encode, passes = encoder.encode, []

    def failing(batch):
        passes.append(len(batch))
        if len(passes) == 3:
            raise RuntimeError("the encoder failed")
        return encode(batch)

    monkeypatch.setattr(encoder, "encode", failing)
    run_stage(Embed(copied, EmbedConfig(batch_size=20)))
    monkeypatch.setattr(encoder, "encode", encode)
    before = files_of(copied)
    shutil.rmtree(copied.folder("embeddings"))
    run_stage(Embed(copied, EmbedConfig(batch_size=20)))
    assert files_of(copied) == before and len(passes) > 5


def test_batches_have_only_the_shards_that_changed(copied, encoded_batches):
    folder, following = copied.folder("shards"), copied.next_version()
    shutil.copytree(folder, following.folder("shards"))
    manifest = storage.read_json(storage.join(following.folder("shards"), "manifest.json"))
    for record in manifest["items"][:2]:  # the third stays as it is
        entry = file_of(record, ".tar")
        path = storage.local_path(storage.join(following.folder("shards"), entry["name"]))
        samples = list(tars.read(path))
        samples[5]["png"] = samples[6]["png"]
        tars.write(path, [{key: value for key, value in sample.items() if key != "__url__"} for sample in samples])
        entry |= storage.describe_file(entry["name"], path)
    storage.put_json(manifest, storage.join(following.folder("shards"), "manifest.json"))
    stage = Reuse(following, EmbedConfig(batch_size=16), copied)
    stage.together = lambda gpu=None: 3
    sealed = run_stage(stage)
    assert [record["info"] for record in sealed["items"]] == [{}, {}, {"reused": 12}]
    assert [count for count, _ in encoded_batches] == [16, 16, 16, 12]  # of 60 samples
    vectors, earlier_vectors = (np.concatenate([np.asarray(shard, np.float32) for shard in Embeddings(version).shards])
                                for version in (following, copied))
    assert np.flatnonzero((vectors * earlier_vectors).sum(1) < 0.99).tolist() == [5, 35]
    np.testing.assert_array_equal(vectors[60:], earlier_vectors[60:])


def least_memory(dataset: Dataset, config: EmbedConfig) -> str:
    with pytest.raises(ValueError, match="a worker takes") as caught:
        Embed(dataset, replace(config, max_memory="1Mi")).plan()
    return str(caught.value).rpartition("--max-memory ")[2]


def test_memory_bounds_the_images_in_progress_and_changes_no_byte(copied, built, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    shutil.rmtree(copied.folder("embeddings"))
    least = least_memory(copied, EmbedConfig(batch_size=16))
    under_way, most, lock = [0], [0], threading.Lock()
    encoder = clip.load_encoder(ClipConfig())
    encode = encoder.encode

    def counted(batch):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        try:
            return encode(batch)
        finally:
            with lock:
                under_way[0] -= 1

    monkeypatch.setattr(encoder, "encode", counted)
    run_stage(Embed(copied, EmbedConfig(batch_size=16, max_memory=least)))
    assert most[0] == 1
    assert without_run_facts(copied.manifest("embeddings")) == without_run_facts(built.manifest("embeddings"))
    smaller = f"{int(least[:-2]) - 1}Mi"
    with pytest.raises(ValueError, match=rf"(?s)embed\.max_memory = {smaller}: .*hint: --max-memory {least}$"):
        Embed(copied, EmbedConfig(batch_size=16, max_memory=smaller)).plan()


@pytest.mark.parametrize("whole_batches", [False, True])
def test_more_memory_means_more_images_in_progress_up_to_their_number(whole_batches):
    shards, before = [(10_000, 10_000 * 30_000)], None
    for megabytes in range(100, 6000, 37):
        try:
            plan = plan_memory(megabytes << 20, ClipConfig(), shards, 256, whole=whole_batches, parts_in_flight=6,
                               threads=8)
        except ValueError:
            assert before is None
            continue
        assert 1 <= plan.threads <= 8 and 2 <= plan.ahead <= (4 if whole_batches else 2) * 8 + 6
        if before:
            assert plan.threads >= before.threads and (plan.ahead >= before.ahead or plan.threads > before.threads)
        before = plan
    assert before == MemoryPlan(8, 38 if whole_batches else 22)
