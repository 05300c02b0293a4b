"""Compare the estimates of `python -m jobs plan` with measured times; measure the rates that are bundled with it.

    python tests/bench/plan.py [--images 2000] [--times 3] [--work FOLDER]
    python tests/bench/plan.py --vectors 60000 [--each 20] [--times 3]
    python tests/bench/plan.py --rates jobs/rates.json

1. Runs all stages on a synthetic corpus and takes the rates from its manifests. Estimates a corpus `--times` as large,
   runs it, and prints the seconds of both for each stage. Exit 1 if the sum over the stages of more than two seconds
   is off by more than a quarter.
2. Does that only for the two searches among `--vectors` synthetic vectors, with a query for each twenty (`--each`).
   Exit 1 if one of the two is off by more than a quarter.
3. Measures with photographs, a ViT-B-32 with random weights, synthetic vectors and a middle-sized network. Writes the
   file of rates for machines that have measured nothing.

The first two run in one process on one core and count processor seconds: the clock's seconds times the share of the
core that the stage got. So other load on the machine changes the figures little.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import photographs
from harness import CHECKOUT, machine

sys.path.insert(0, str(CHECKOUT / "tests/pipeline"))
import synthetic

from jobs.config.recipes import tiny
from jobs.config.settings import Settings
from jobs.planning import rates, rates_from_manifests
from jobs.planning.cost_model import Build, costs, neighbors_exact, neighbors_index
from jobs.planning.rates import Rates
from jobs.runs.metrics import read_metrics
from jobs.runs.run import Run
from jobs.training.train_stage import Job, Training
from jobs.training.worker import train_in_processes
from model.config import TrainConfig, UNetConfig
from model.training import flops
from pipeline.corpora.config import DemoCorpusConfig
from pipeline.corpora.demo_corpus import DemoCorpus
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings import clip
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.indices.choose import choose_key
from pipeline.indices.config import IndexConfig
from pipeline.indices.index import Index, build_index
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.neighbors import Neighbors
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage

_ROWS, _DIM, _KEY, _SEARCHED = 160_000, 512, "IVF4096_HNSW32,PQ128x8", "IVF512,SQ8"
_LOG_EVERY = 5
_NPROBE = 64  # an assumption: how many lists true vectors take, made ones do not tell
_LEAST_S = 2.0
_MOST_OFF = 0.25
_FOLDERS = {"shard": "shards", "embed": "embeddings", "index": "index", "neighbors, index": "neighbors/drawn",
            "neighbors, exact": "neighbors/twin"}


Shares = dict[str, float]
"""The share of the core that each stage got."""


def timed(shares: Shares, name: str, act: Callable[[], Any]) -> None:
    """Run `act` and record the share of the core that it had."""
    clock, processor = time.perf_counter(), time.process_time()
    act()
    shares[name] = min(1.0, (time.process_time() - processor) / (time.perf_counter() - clock))
    logging.info("%s had %.2f of the core", name, shares[name])


def build(root: Path, pictures: int, settings: Settings) -> Shares:
    """All stages on synthetic images, one after another in this process; both kinds of neighbor search."""
    shutil.rmtree(root, ignore_errors=True)
    demo_corpus = DemoCorpus(str(root), DemoCorpusConfig(corpus="drawn", subjects=-(-pictures // 6)), root / "cache")
    run_stage(demo_corpus)
    dataset, twin = Dataset.parse(str(root), "drawn"), Dataset.parse(str(root), "twin")
    shares: Shares = {}
    for name, stage in {
        "shard": Shard(dataset, replace(settings.shard, source=demo_corpus.folder)),
        "embed": Embed(dataset, settings.embed),
        "index": Index(dataset, settings.index), "neighbors, index": Neighbors(dataset, dataset, settings.neighbors),
    }.items():
        timed(shares, name, lambda stage=stage: run_stage(stage))
    # The same images again: a list is kept for each database, and these are two ways to one.
    shutil.copytree(root / "datasets" / "drawn", root / "datasets" / "twin",
                    ignore=shutil.ignore_patterns("index*", "neighbors"))
    exact = Neighbors(dataset, twin, replace(settings.neighbors, method="exact"))
    timed(shares, "neighbors, exact", lambda: run_stage(exact))
    job = Job(Run.parse(str(root), "run"), dataset, dataset, settings.train)
    timed(shares, "train", lambda: train_in_processes(job))
    run_stage(Training(job))
    return shares


def seconds(root: Path, shares: Shares) -> dict[str, float]:
    """Processor seconds of each stage."""
    dataset = Dataset.parse(str(root), "drawn")
    stage_seconds = {name: dataset.manifest(folder)["run"]["seconds"] for name, folder in _FOLDERS.items()}
    stage_seconds["train"] = read_metrics(Run.parse(str(root), "run"))[-1]["seconds"]
    return {name: shares[name] * elapsed_s for name, elapsed_s in stage_seconds.items()}


def predicted_seconds(known: Rates, pictures: int, settings: Settings) -> dict[str, float]:
    """Worker seconds of each stage for the images, which are their own database."""
    operations, dim = clip.flop_per_image(settings.embed.clip())
    network = flops.size(settings.train.unet, settings.shard.image_size, settings.train.k)
    planned = Build(settings, pictures, 0, dim, operations, network)
    return {cost.stage: cost.worker_seconds for cost in costs(planned, known)}


def compare(work: Path, pictures: int, times: int) -> int:
    """Estimate all stages, run them, and print how far off the estimate was."""
    # An index with lists: an index without lists is searched like all rows.
    base, shares = replace(tiny(), index=IndexConfig(key="IVF64,SQ8"), neighbors=NeighborsConfig(probes=4)), {}
    # A small build comes first, because a process loads its libraries only once, and that takes seconds.
    for name, size in (("first", 120), ("small", pictures), ("large", pictures * times)):
        steps = max(_LOG_EVERY, size // 20 // _LOG_EVERY * _LOG_EVERY)
        settings = replace(base, train=replace(base.train, steps=steps, checkpoint_every=steps, log_every=_LOG_EVERY))
        shares[name] = build(work / name, size, settings)
    count = Dataset.parse(str(work / "large"), "drawn").manifest("shards")["totals"]["samples"]
    small, actual = (seconds(work / name, shares[name]) for name in ("small", "large"))
    known = rates_from_manifests.rates(str(work / "small"), rates.built_in())
    predicted = {name: predicted_s * shares["small"][name]
                 for name, predicted_s in predicted_seconds(known, count, settings).items()}
    print(f"{machine()}; {pictures} images, then {count}; processor seconds\n")
    print("| stage | small | estimate | took | estimate / took | share of the core |\n"
          "| --- | --: | --: | --: | --: | --: |")
    for name in actual:
        print(f"| {name} | {small[name]:.2f} | {predicted[name]:.2f} | {actual[name]:.2f} "
              f"| {predicted[name] / actual[name]:.2f} | {shares['small'][name]:.2f}, {shares['large'][name]:.2f} |")
    counted = [name for name in actual if actual[name] > _LEAST_S]
    if not counted:
        print(f"\nno stage took {_LEAST_S} s\nhint: more --images", file=sys.stderr)
        return 1
    ratio = sum(predicted[name] for name in counted) / max(sum(actual[name] for name in counted), 1e-9)
    print(f"\nsum of {', '.join(counted)}: estimate / took = {ratio:.2f}")
    return 0 if abs(ratio - 1) <= _MOST_OFF else 1


def search(root: Path, rows: int, each: int, settings: Settings) -> dict[str, float]:
    """Processor seconds of both searches for the neighbors of a share, 1 / `each`, of `rows` synthetic vectors."""
    shutil.rmtree(root, ignore_errors=True)
    size, encoder = settings.shard.samples_per_shard, {"model": "given", "weights_sha256": "00", "dim": _DIM}
    parts = [synthetic.clustered(size, _DIM, clusters=100, seed=number, spread=0.8) for number in range(rows // size)]
    listed, scanned = (synthetic.vector_dataset(root, name, parts, encoder=encoder) for name in ("drawn", "twin"))
    queries = synthetic.vector_dataset(root, "asked", parts[:len(parts) // each], encoder=encoder)
    build_index(Index(listed, settings.index), run_stage)
    shares: Shares = {}
    for name, stage in (("neighbors, index", Neighbors(queries, listed, settings.neighbors)),
                        ("neighbors, exact", Neighbors(queries, scanned, replace(settings.neighbors, method="exact")))):
        timed(shares, name, lambda stage=stage: run_stage(stage))
    return {name: queries.manifest(_FOLDERS[name])["run"]["seconds"] * share for name, share in shares.items()}


def compare_searches(work: Path, rows: int, each: int, times: int) -> int:
    """Estimate both searches, run them, and print how far off each estimate was."""
    base = tiny()
    settings = replace(base, shard=replace(base.shard, samples_per_shard=1000), neighbors=NeighborsConfig(probes=8),
                       index=IndexConfig(key="IVF256,SQ8", max_memory="100Gi", queries=200))
    search(work / "first", 20_000, 20, settings)  # a process loads its libraries once
    small = search(work / "small", rows, each, settings)
    known = rates_from_manifests.rates(str(work / "small"), rates.built_in())
    actual = search(work / "large", rows * times, each, settings)
    before = Build(settings, rows // each, rows, _DIM, clip.flop_per_image(settings.embed.clip())[0],
                   flops.size(settings.train.unet, settings.shard.image_size, settings.train.k))
    planned = replace(before, pictures=rows // each * times, rows=rows * times)
    print(f"{machine()}; {before.pictures} samples among {rows} x {_DIM}, then {planned.pictures} among "
          f"{planned.rows}; processor seconds\n")
    print("| stage | small | estimate | took | estimate / took |\n| --- | --: | --: | --: | --: |")
    worst = 0.0
    for name, cost in (("neighbors, index", neighbors_index), ("neighbors, exact", neighbors_exact)):
        # Rates come from the clock, so the estimate is the small run's processor seconds times the ratio of the costs.
        predicted_s = small[name] * cost(planned, known).worker_seconds / cost(before, known).worker_seconds
        worst = max(worst, abs(predicted_s / actual[name] - 1))
        print(f"| {name} | {small[name]:.2f} | {predicted_s:.2f} | {actual[name]:.2f} "
              f"| {predicted_s / actual[name]:.2f} |")
    return 0 if worst <= _MOST_OFF else 1


def default_rates(work: Path, out: Path) -> int:
    """Measure a root that has every stage, and write its rates."""
    root, folder, shares = work / "rates", work / "some", Shares()
    shutil.rmtree(root, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    originals = photographs.make(work)
    for number, path in enumerate(originals):
        shutil.copyfile(path, folder / f"{number:06d}.jpg")
    for side in (256, 768):
        stage = Shard(Dataset.parse(str(root), f"photographs{side}"),
                      ShardConfig(source=str(folder), image_size=side, samples_per_shard=100))
        timed(shares, f"shard {side}", lambda stage=stage: run_stage(stage))
    pictures = Dataset.parse(str(root), "photographs256")
    encoding = Embed(pictures, EmbedConfig("ViT-B-32-quickgelu", _random_weights(work), batch_size=64))
    encoding.setup()
    timed(shares, "embed", lambda: run_stage(encoding))
    _vectors(root, shares)
    known = rates_from_manifests.rates(str(root), rates.built_in())
    run_stage(Index(pictures, IndexConfig()))
    run_stage(Neighbors(pictures, pictures, NeighborsConfig()))
    unet = UNetConfig(model_channels=128, channel_mult=(1, 2, 4), attention_downsampling=(4, 2), context_dim=512,
                      patch=4)
    job = Job(Run.parse(str(root), "run"), pictures, pictures,
              TrainConfig(steps=6, global_batch=2, log_every=2, checkpoint_every=6, unet=unet))
    timed(shares, "train", lambda: train_in_processes(job))
    # Neighbors of so few images were found for the training alone.
    known = _of_the_processor(replace(known, train=rates_from_manifests.rates(str(root), known).train), shares)
    size = sum(path.stat().st_size for path in originals) / len(originals)
    document = rates.document(replace(
        known, shard=replace(known.shard, source_bytes=size), measured=time.strftime("%Y-%m-%d"),
        machine=f"a worker is one core of {machine().split(',')[0]} without a GPU, processor seconds"))
    del document["defaults"]
    out.write_text(json.dumps(_rounded(document), indent=1) + "\n")
    print(out.read_text(), shares)
    return 0


def _of_the_processor(known: Rates, shares: Shares) -> Rates:
    """Rates by the clock, corrected to those of an idle core."""
    def alone(section: Any, share: float) -> Any:
        speeds = {name: value / share for name, value in asdict(section).items() if name.endswith("_per_s")}
        return replace(section, **speeds | {name: value * share for name, value in asdict(section).items()
                                            if name.endswith("_per_pixel")})

    return replace(
        known,
        shard=replace(known.shard, pictures_per_s=known.shard.pictures_per_s / shares["shard 256"],
                      seconds_per_pixel=known.shard.seconds_per_pixel * shares["shard 768"]),
        **{name: alone(getattr(known, name), shares[name])
           for name in ("embed", "index", "exact", "approximate", "train")})


def _vectors(root: Path, shares: Shares) -> None:
    """A database of synthetic vectors with an index in parts, as tens of millions have, and both searches.

    The search by list uses a smaller index. With the lists of the large index each list would have less than a tenth of
    the rows that it has there.
    """
    choose_key(20_000_000, _DIM, IndexConfig())  # loads what loads once
    encoder = {"model": "given", "weights_sha256": "00", "dim": _DIM}
    vectors = synthetic.clustered(_ROWS, _DIM, clusters=100, spread=0.8)
    parts = [vectors[start:start + 10_000] for start in range(0, _ROWS, 10_000)]
    database, searched = (synthetic.vector_dataset(root, name, vector_parts, encoder=encoder)
                          for name, vector_parts in (("vectors", parts), ("searched", parts[:-1])))
    # No rotation: then clustering is nearly all of the training, as it is with tens of millions. autofaiss estimates a
    # larger size for this kind than it has, hence the large limit of memory.
    config = IndexConfig(key=_KEY, max_memory="100Gi", part_memory="64Mi", train_points=100_000, queries=200,
                         target_recall=0.4)
    timed(shares, "index", lambda: build_index(Index(database, config), run_stage))
    build_index(Index(searched, replace(config, key=_SEARCHED)), run_stage)
    queries = synthetic.vector_dataset(root, "asked", [synthetic.clustered(10_000, _DIM, clusters=100, seed=1)],
                                       encoder=encoder)
    for name, stage in (("approximate", Neighbors(queries, searched, NeighborsConfig(probes=_NPROBE))),
                        ("exact", Neighbors(queries, database, NeighborsConfig(method="exact")))):
        timed(shares, name, lambda stage=stage: run_stage(stage))


def _random_weights(work: Path) -> str:
    """A file of random weights for ViT-B-32. Its speed does not depend on the weights."""
    path = work / "vit-b-32.pt"
    if not path.exists():
        import open_clip
        import torch
        torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), path)
    return str(path)


def _rounded(values: dict) -> dict:
    return {name: _rounded(value) if isinstance(value, dict)
            else float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in values.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--vectors", type=int, default=0, help="the searches alone, among so many made vectors")
    parser.add_argument("--each", type=int, default=20, help="with --vectors: vectors of the database for each sample")
    parser.add_argument("--rates", default="", help="measure the default rates, and write them to this file")
    parser.add_argument("--work", default="", help="default: rdm-bench in the temporary folder")
    args = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:  # before anything counts the cores: again, on one
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        os.execve(sys.executable, [sys.executable, *sys.argv],
                  os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"})
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    work = photographs.work_folder(args.work) / "plan"
    work.mkdir(exist_ok=True)
    if args.rates:
        return default_rates(work, Path(args.rates))
    if args.vectors:
        return compare_searches(work, args.vectors, args.each, args.times)
    return compare(work, args.images, args.times)


if __name__ == "__main__":
    raise SystemExit(main())
