"""The cost model: a measured run is estimated as it was, and each formula follows its inputs."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.config.recipes import PURPOSES, RECIPES
from jobs.planning import plan_table, rates, rates_from_manifests
from jobs.planning.config import PlanConfig
from jobs.planning.cost_model import Build, Cost, compared_rows, exact_amounts, index, training_flop
from jobs.planning.rates import Rates
from jobs.runs.metrics import read_metrics
from jobs.runs.run import Run
from model.config import UNetConfig
from model.training import flops
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings import clip
from pipeline.embeddings.clip_weights import ClipConfig
from pipeline.indices.config import IndexConfig
from pipeline.indices.index import Index, build_index
from pipeline.neighbors.config import NeighborsConfig
from pipeline.stages.driver import run_stage
from pipeline.stages.stage import Stage
from tests.jobs.planning.planned_run import NETWORK, SETTINGS, costs_by_stage, make_build
from tests.pipeline import synthetic


def test_the_estimate_of_the_measured_run_is_exact(planned_root: Path, known: Rates):
    costs, dataset = costs_by_stage(make_build(), known), Dataset.parse(str(planned_root), "drawn")
    folders = {"shard": "shards", "embed": "embeddings", "index": "index", "neighbors, index": "neighbors/drawn",
               "neighbors, exact": "neighbors/twin"}
    for name, folder in folders.items():
        manifest = dataset.manifest(folder)
        assert costs[name].worker_seconds == pytest.approx(manifest["run"]["seconds"], rel=1e-9), name
        stored = manifest["totals"]["bytes"] + sum(file["bytes"] for file in manifest["files"])
        assert costs[name].bytes_written == pytest.approx(stored, rel=1e-9), name
    run = Run.parse(str(planned_root), "run")
    assert costs["train"].worker_seconds == pytest.approx(read_metrics(run)[-1]["seconds"], rel=1e-9)
    stored = sum(file["bytes"] for step in run.steps() for file in run.checkpoint(step)["files"])
    assert costs["train"].bytes_written == pytest.approx(stored, rel=0.1)
    assert costs["train"].bytes_kept == costs["train"].bytes_written
    assert known.defaults == ("storage",)


def test_the_estimate_is_exact_for_neighbors_without_times_in_their_records(planned_root: Path, tmp_path: Path):
    shutil.copytree(planned_root / "datasets", tmp_path / "datasets")
    for label in ("drawn", "twin"):
        file = tmp_path / f"datasets/drawn/v1/neighbors/{label}/manifest.json"
        document = json.loads(file.read_text())
        for record in document["items"]:
            assert record["run"].pop("times")["products"] >= 0
        document["run"]["seconds"] = 7.0
        file.write_text(json.dumps(document))
    base = rates.built_in()
    known = rates_from_manifests.rates(str(tmp_path), base)
    costs = costs_by_stage(make_build(), known)
    for name, section, base_section in (("neighbors, index", known.approximate, base.approximate),
                                        ("neighbors, exact", known.exact, base.exact)):
        assert costs[name].worker_seconds == pytest.approx(7.0)
        slower = {getattr(section, rate) / getattr(base_section, rate) for rate in vars(base_section)
                  if rate.endswith("_per_s")}
        assert max(slower) == pytest.approx(min(slower)), name  # as they would divide elsewhere


def test_a_stage_reads_the_bytes_that_earlier_stages_wrote(planned_root: Path, known: Rates):
    costs, dataset = costs_by_stage(make_build(), known), Dataset.parse(str(planned_root), "drawn")
    tars = sum(file["bytes"] for record in dataset.manifest("shards")["items"] for file in record["files"]
               if file["name"].endswith(".tar"))
    vectors = dataset.manifest("embeddings")["totals"]["bytes"] - 3 * 128
    assert costs["embed"].bytes_read == pytest.approx(tars) and costs["index"].bytes_read == pytest.approx(vectors)
    parquet = dataset.manifest("shards")["totals"]["bytes"] - tars
    assert costs["neighbors, exact"].bytes_read == pytest.approx(2 * vectors + 2 * parquet)
    index = dataset.manifest("index")["totals"]["bytes"]
    assert costs["neighbors, index"].bytes_read == pytest.approx(2 * vectors + 2 * parquet + index)


def test_twice_as_many_images_are_twice_the_work(known: Rates):
    settings = replace(SETTINGS, neighbors=replace(SETTINGS.neighbors, at_once=1))
    single, double, triple = (costs_by_stage(make_build(count, rows=1000, settings=settings), known)
                              for count in (100_000, 200_000, 300_000))
    for name in ("neighbors, exact", "neighbors, index"):  # what the database takes besides, it takes once
        for field in ("worker_seconds", "bytes_read", "bytes_written"):
            first, second, third = (getattr(costs[name], field) for costs in (single, double, triple))
            assert third - second == pytest.approx(second - first) and second > first
    assert double["index"] == single["index"] and double["train"] == single["train"]
    single, double = (costs_by_stage(make_build(count), known) for count in (100_000, 200_000))
    for name in ("shard", "embed"):
        assert double[name].worker_seconds == pytest.approx(2 * single[name].worker_seconds)
        assert double[name].bytes_read == pytest.approx(2 * single[name].bytes_read)
        assert double[name].bytes_written == pytest.approx(2 * single[name].bytes_written)


def test_exact_search_costs_products_choices_and_reads(known: Rates):
    def exact_seconds(pictures: int, rows: int) -> float:
        return costs_by_stage(make_build(pictures, rows), known)["neighbors, exact"].worker_seconds

    rate = known.exact
    assert exact_seconds(1000, 0) == pytest.approx(exact_seconds(1000, 1000))
    assert exact_seconds(1000, 500) == pytest.approx(
        2 * 1000 * 500 * 256 / rate.flop_per_s + 1000 * 500 / rate.chosen_per_s + 1000 / rate.queries_per_s
        + (20 + 1) * 500 / rate.rows_per_s)  # twenty shards are searched alone, by one worker
    # Few rows of later blocks enter the k best. The work of choosing grows with the logarithm of the blocks.
    small, large = (exact_amounts(1, 8192 * blocks, 1, 1, 1, False)["chosen_per_s"] for blocks in (1, 1000))
    assert small == 8192 and large == pytest.approx(8192 * (1 + math.log(1000)))


def test_an_index_without_lists_is_searched_like_all_rows(known: Rates):
    flat = replace(SETTINGS, index=IndexConfig(key="SQ8"))
    costs = costs_by_stage(make_build(1000, 500, settings=flat), known)
    assert costs["neighbors, index"] == replace(costs["neighbors, exact"], stage="neighbors, index")
    costs = costs_by_stage(make_build(1000, 500), known)
    rate, lists = known.approximate, 2 * 20 * 8 * (1 - (7 / 8) ** 50)  # of twenty searches, each in two turns
    assert costs["neighbors, index"].worker_seconds == pytest.approx(
        (2 * 1000 / 8 * 500 * 256 + lists * 2 ** 21) / rate.flop_per_s + 500 / rate.laid_per_s
        + 20 * 500 / rate.checked_per_s + (lists / 2 / 8 * 500 + lists * 256) / rate.read_per_s
        + 1000 / rate.queries_per_s)
    vectors, shards = 500 * 256 * 2, 20
    cached, uncached = (costs_by_stage(make_build(1000, 500, memory=memory), known)["neighbors, index"].bytes_read
                        for memory in (vectors, vectors - 1))
    assert uncached - cached == pytest.approx(shards * vectors * (1 - (7 / 8) ** 50))


def test_a_separate_database_needs_shards_and_embeddings_too(known: Rates):
    without_database = costs_by_stage(make_build(3000), known)
    with_database = costs_by_stage(make_build(1000, 2000), known)
    for name in ("shard", "embed"):
        assert with_database[name].worker_seconds == pytest.approx(without_database[name].worker_seconds)


def test_workers_share_items_and_wait_for_single_work(known: Rates):
    one_worker, many_workers = (costs_by_stage(make_build(1000, workers=count), known) for count in (1, 8))
    for name in ("shard", "embed"):
        assert many_workers[name].seconds == pytest.approx(one_worker[name].seconds / 8)
        assert many_workers[name].worker_seconds == one_worker[name].worker_seconds
    assert costs_by_stage(make_build(1000, workers=50), known)["embed"].workers == 20  # shards there are
    cost = Cost("index", worker_seconds=100, workers=10, bytes_read=0, bytes_written=0, bytes_kept=0, serial_seconds=40)
    assert cost.seconds == 46


def test_a_gpu_does_the_stages_with_gpu_rates(known: Rates):
    on_gpus = replace(known, embed=replace(known.embed, gpu=True))
    costs = costs_by_stage(make_build(10_000, workers=50, gpus=3), on_gpus)
    assert costs["embed"].workers == 3 and costs["embed"].gpu and not costs["shard"].gpu
    assert costs["shard"].workers == 50


def test_larger_images_cost_more_per_pixel_work(known: Rates):
    pixels = replace(known, shard=replace(known.shard, seconds_per_pixel=1e-6))
    large = replace(SETTINGS, shard=replace(SETTINGS.shard, image_size=64))
    small_costs = costs_by_stage(make_build(1000), pixels)
    large_costs = costs_by_stage(make_build(1000, settings=large), pixels)
    extra_seconds = 1000 * 3 * 1024 * 1e-6
    assert large_costs["shard"].worker_seconds - small_costs["shard"].worker_seconds == pytest.approx(extra_seconds)
    assert large_costs["embed"].bytes_read == pytest.approx(4 * small_costs["embed"].bytes_read)
    extra_seconds = 1000 * 3 * 1024 * known.embed.preparing_s_per_pixel
    assert large_costs["embed"].worker_seconds - small_costs["embed"].worker_seconds == pytest.approx(extra_seconds)


def test_slow_storage_bounds_a_stage(known: Rates):
    slow = replace(known, storage=rates.StorageRates(bytes_per_s=1000.0))
    costs = costs_by_stage(make_build(1000), slow)
    cost = costs["shard"]
    assert cost.worker_seconds == pytest.approx((cost.bytes_read + cost.bytes_written) / 1000)


@pytest.mark.parametrize("at_once, searches", [(1, 100), (7, 15), (0, 50)])
def test_a_database_beyond_memory_is_read_once_per_group_of_shards(known: Rates, at_once, searches):
    vectors = 1000 * 256 * 2
    together = replace(SETTINGS, neighbors=replace(SETTINGS.neighbors, at_once=at_once))
    cached, uncached = (costs_by_stage(make_build(5000, 1000, settings=together, workers=4, memory=memory), known)
                        ["neighbors, exact"].bytes_read for memory in (vectors, vectors - 1))
    assert uncached - cached == pytest.approx((searches - 4) * vectors)


def test_training_is_planned_by_steps_or_by_epochs(known: Rates):
    config = SETTINGS.train
    cost = costs_by_stage(make_build(1000, epochs=2), known)["train"]
    network = make_build().network
    assert cost.worker_seconds == pytest.approx(2000 * network.training(False) / known.train.flop_per_s)
    assert cost.bytes_written == 334 * 16 * network.parameters and cost.bytes_kept == 3 * 16 * network.parameters
    assert costs_by_stage(make_build(1000), known)["train"].worker_seconds == pytest.approx(
        config.steps * config.global_batch * network.training(False) / known.train.flop_per_s)


@pytest.mark.parametrize(("key", "operations", "compared"), [
    ("SQ8", 0, None),
    ("IVF100,SQ8", 2 * 100 * 256 * 100 * 64 * 10, 3000 * 40_000),
    ("IVF16,SQ8", 2 * 16 * 256 * 16 * 64 * 10, None),  # four lists are a quarter of them
    ("IVF100,PQ16x8", 2 * 100 * 256 * 100 * 64 * 10 + 2 * 50_000 * 256 * 64 * 25, 3000 * 40_000),
    ("OPQ16_32,IVF4000_HNSW32,PQ16x8", 2 * 50_000 * 4000 * 32 * 10 + 2 * 50_000 * 256 * 32 * (25 + 36 + 250)
     + 4 * 50_000 * 64 * 32 * 50, 3000 * 1000),
    ("PQ8x4", 2 * 256 * 16 * 16 * 64 * 25, None),
    ("HNSW15", 0, 3000 * 60),
])
def test_the_formulas_of_an_index_hold(key: str, operations: float, compared: float | None):
    assert training_flop(key, 1_000_000, 64, 50_000) == operations
    rows = compared_rows(key, 3000, 1_000_000, NeighborsConfig(checked=10), nprobe=4)
    assert rows == (compared if compared is None else pytest.approx(compared))


def test_the_estimate_of_an_index_in_parts_is_exact(tmp_path: Path):
    vectors = synthetic.clustered(4000, 16)
    dataset = synthetic.vector_dataset(tmp_path, "some", [vectors[:2000], vectors[2000:]])
    config = IndexConfig(key="IVF16,SQ8", part_memory="100Ki", queries=50)
    parts: dict[str, float] = {}

    def seal(stage: Stage) -> dict:
        manifest = run_stage(stage)
        parts[stage.name] = manifest["run"]["seconds"]
        return manifest

    build_index(Index(dataset, config), seal)
    known = rates_from_manifests.rates(str(tmp_path), rates.built_in())
    assert known.index.in_parts and known.index.key == "IVF16,SQ8" and "embed" in known.defaults
    settings = replace(SETTINGS, index=config)
    cost = index(Build(settings, 4000, 0, 16, 1e6, NETWORK, workers=9), known)
    assert parts.keys() == {"index_training", "index_parts", "index"} and cost.workers == 3
    assert cost.worker_seconds == pytest.approx(sum(parts.values()), rel=1e-6)
    assert cost.serial_seconds == pytest.approx(parts["index_training"] + parts["index"], rel=1e-6)
    assert cost.bytes_kept == pytest.approx(dataset.manifest("index")["totals"]["bytes"])


def test_the_cost_of_encoders_is_that_of_open_clip():
    """Twice the multiply-adds in its table of models (docs/model_profile.csv)."""
    assert clip.flop_per_image(ClipConfig("ViT-B-32-quickgelu", "openai")) == (pytest.approx(8.82e9, rel=0.005), 512)
    assert clip.flop_per_image(ClipConfig("ViT-L-14-quickgelu", "openai")) == (pytest.approx(162.0e9, rel=0.005), 768)
    with pytest.raises(ValueError, match="RN50 is no vision transformer"):
        clip.flop_per_image(ClipConfig("RN50", "openai"))


def test_the_cost_of_the_network_is_that_of_its_layers():
    import torch
    from torch import nn

    from model.network.unet import UNet
    config = UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_downsampling=(),
                        context_dim=16)
    network, products = UNet(config), []

    def count(module, inputs, output) -> None:
        # Every number of the output is a product with a row of the weights.
        products.append(2 * output.numel() * module.weight[0].numel())

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    network(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 2, 16))
    size = flops.size(config, 8, 2)
    attention = 4 * 64 * (64 + 2) * 32  # scores and values of 64 places, among themselves and with two vectors
    assert size.forward == sum(products) + attention
    assert size.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert size.training(False) == 3 * size.forward and size.training(True) == 4 * size.forward


def test_recipes_have_a_corpus():
    assert PURPOSES.keys() == RECIPES.keys()
    for name, corpus in PURPOSES.items():
        builds = plan_table.builds(PlanConfig(), RECIPES[name](), rates.built_in())
        assert [(build.pictures, build.rows) for build in builds] == [(corpus.images, corpus.rows)]
        assert bool(builds[0].sample_bytes) == (corpus.downsampling > 1)
    assert builds[0].sample_bytes == 48 * 48 * 16 * 2  # latents of KL-f16
