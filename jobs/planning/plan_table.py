"""`python -m jobs plan`: the costs of builds as a table or as JSON, and where the rates come from."""

import itertools
import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.cluster.config import ClusterConfig
from jobs.config.recipes import PURPOSES, RECIPES
from jobs.config.settings import Settings
from jobs.planning import benchmark, rates, rates_from_manifests
from jobs.planning.benchmark import Trial
from jobs.planning.config import PlanConfig
from jobs.planning.cost_model import Build, Cost, Prices, costs
from jobs.planning.rates import Rates
from jobs.telemetry import tables
from jobs.telemetry.units import format_bytes, format_hours, format_number
from model.training import flops
from pipeline import storage
from pipeline.embeddings import clip
from pipeline.formats.sizes import parse_size

_log = logging.getLogger(__name__)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def make_plan(plan: PlanConfig, settings: Settings, used: Rates) -> str:
    """The output of `plan`: a Markdown table with notes, or one JSON document."""
    costed_builds = []
    prices = Prices(plan.price_gpu_hour, plan.price_cpu_hour, plan.price_gb_month, plan.price_gb_moved,
                    plan.months)
    for build in builds(plan, settings, used):
        costed_builds.append((build, costs(build, used)))
    if plan.json:
        return json.dumps({"builds": [_document(build, stages, prices) for build, stages in costed_builds],
                           "rates": rates.document(used)}, indent=1)
    rows = _totals(costed_builds, prices) if plan.totals else _stages(costed_builds, prices)
    right = [column for column, name in enumerate(rows[0]) if name.startswith("#")]
    shown = tables.render(rows[1:], head=[name.lstrip("#") for name in rows[0]], right=right, markdown=True,
                          whole={0})
    return f"{shown}\n\n{notes(costed_builds[0][0], used, prices)}"


def to_measure(plan: PlanConfig, settings: Settings, root: str) -> dict[str, Any]:
    """The settings that `--measure` would use, if the wanted GPU is there."""
    trial = _trial(plan, settings, root, gpu=_wants_gpu(plan, settings))
    return {"folder": trial.place, "seconds": trial.seconds, "workers": trial.workers, "gpu": trial.gpu}


def workers_here(plan: PlanConfig, settings: Settings, root: str, *, local: bool) -> ClusterConfig:
    """The workers of `--measure`: as large as those of the recipe, with a GPU if they have one and there is any."""
    wanted = _wants_gpu(plan, settings)
    _trial(plan, settings, root, gpu=wanted)  # refuses bad settings before anything starts
    if local:
        import torch
        there = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.is_available())}
    else:
        from jobs.cluster import connect
        there = connect.cluster_resources()
    return replace(settings.cluster, workers=plan.measure_workers, min_workers=0,
                   gpus=1.0 if wanted and there.get("GPU", 0) >= 1 else 0.0,
                   cpus=min(settings.cluster.cpus, max(1.0, there["CPU"] // plan.measure_workers)))


def measure(plan: PlanConfig, settings: Settings, root: str, workers: ClusterConfig, run: benchmark.Run) -> None:
    """Measure the rates, and write them to the file that `plan.measure` names."""
    measured_rates = benchmark.rates(_trial(plan, settings, root, gpu=bool(workers.gpus)), _base(plan), run)
    Path(plan.measure).write_text(json.dumps(rates.document(measured_rates), indent=1) + "\n")
    _log.info("plan: the rates are in %s", plan.measure)


def _wants_gpu(plan: PlanConfig, settings: Settings) -> bool:
    return bool(plan.gpus or settings.cluster.gpus)


def _trial(plan: PlanConfig, settings: Settings, root: str, *, gpu: bool) -> Trial:
    """The measurement for the first build. ValueError if it is not possible here."""
    if plan.gpus and not gpu:
        raise ValueError(f"--gpus {plan.gpus}: there is no GPU here to measure on\nhint: run it on a machine with a "
                         f"GPU, or --rates FILE with rates of a GPU")
    if not Path(plan.measure).absolute().parent.is_dir():
        raise ValueError(f"--measure {plan.measure}: there is no such folder to write rates into")
    build = builds(replace(plan, gpus=0), settings, _base(plan))[0]
    return Trial(storage.normalize(root), replace(build, gpus=plan.gpus or build.gpus), plan.source,
                 plan.seconds, plan.measure_workers, gpu)


def _base(plan: PlanConfig) -> Rates:
    return rates.read(plan.rates) if plan.rates else rates.built_in()


def resolve_rates(plan: PlanConfig, measured_root: str = "", *, gpu: bool = False) -> Rates:
    """Rates of the sealed stages below `measured_root`, of a file, or built in. `gpu`: those stages ran on GPUs."""
    base = _base(plan)
    return rates_from_manifests.rates(measured_root, base, gpu=gpu) if measured_root else base


def builds(plan: PlanConfig, settings: Settings, used: Rates) -> list[Build]:
    """A build for each combination of images and rows. ValueError if GPUs and rates do not fit each other."""
    if plan.gpus and not (used.embed.gpu or used.exact.gpu or used.train.gpu):
        raise ValueError("--gpus: the rates are those of workers without a GPU\n"
                         "hint: python -m jobs plan --measure FILE, where there are GPUs; or run a sample on them, "
                         "then python -m jobs plan --from ROOT --from-gpu; or rates of your own with \"gpu\": true: "
                         "--rates FILE")
    corpus = next((PURPOSES[name] for name, recipe in RECIPES.items() if recipe().train.unet == settings.train.unet),
                  PURPOSES["tiny"])
    kept = parse_size(plan.memory, "--memory")
    if not kept:
        raise ValueError(f"--memory {plan.memory}: a worker keeps some of a database\nhint: --memory 16Gi")
    pictures = [count(text, "--pictures") for text in plan.pictures] or [corpus.images]
    if not all(pictures):
        raise ValueError("--pictures 0: there is nothing to plan")
    rows = [count(text, "--database-rows") for text in plan.database_rows] or [corpus.rows]
    operations, dim = clip.flop_per_image(settings.embed.clip())
    factor, unet = plan.downsampling or corpus.downsampling, settings.train.unet
    side = max(1, (settings.train.image_size or settings.shard.image_size) // factor)
    seen = -(-side // unet.stride) * unet.stride
    network = flops.size(unet, seen, settings.train.k)
    workers = plan.workers or settings.cluster.workers
    return [Build(settings, image_count, database_rows, dim, operations, network,
                  sample_bytes=2 * unet.in_channels * side ** 2 if factor > 1 else 0, side=seen, workers=workers,
                  gpus=plan.gpus or workers, memory=kept, epochs=plan.epochs)
            for image_count, database_rows in itertools.product(pictures, rows)]


def count(text: str, flag: str) -> int:
    """A number like 1M, 2.5B or 20000; ValueError if it is none."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([KMGB]?)", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{flag} {text!r}: must be a number\nhint: with K, M or B, as in 100M")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def stages_in_total(build: Build, stage_costs: list[Cost]) -> list[Cost]:
    """The stages of a build, with the neighbor search of its settings."""
    other = {"index": "neighbors, exact", "exact": "neighbors, index"}[build.settings.neighbors.method]
    return [cost for cost in stage_costs if cost.stage != other]


def notes(build: Build, used: Rates, prices: Prices) -> str:
    """Notes on the table: the source of the rates, and the assumptions."""
    method, config = build.settings.neighbors.method, build.settings
    base = rates.built_in()
    own = [name for name in rates.SECTIONS if name not in used.defaults and name != "storage"]
    said = []
    if own:
        said.append(f"Rates of {', '.join(own)}: {used.machine}, {used.measured}.")
    if defaults := [name for name in used.defaults if name != "storage"]:
        said.append(f"Default rates ({', '.join(defaults)}): {base.machine}, {base.measured}; `--measure FILE` "
                    f"measures them where you are.")
    said.append(f"{config.embed.model}, vectors of {build.dim}, images of {config.shard.image_size} pixels, "
                f"{config.shard.rows_per_shard} a shard, k = {config.neighbors.k}. The total has neighbors by "
                f"{'the index' if method == 'index' else 'exact search'}, and not by the other way.")
    if build.sample_bytes:
        said.append("Training reads latents; making them is not counted.")
    if prices.has_any:
        said.append(f"Money: what has no price is free; bytes are kept for {prices.months:g} months.")
    return "\n".join(said)


def _document(build: Build, stages: list[Cost], prices: Prices) -> dict[str, Any]:
    def describe(cost: Cost) -> dict[str, Any]:
        return {"stage": cost.stage, "workers": cost.workers, "gpu": cost.gpu, "hours": cost.seconds / 3600,
                "worker_hours": cost.worker_seconds / 3600, "read": round(cost.bytes_read),
                "written": round(cost.bytes_written), "kept": round(cost.bytes_kept),
                **({"money": round(prices.price_of(cost), 2)} if prices.has_any else {})}

    counted = [describe(cost) for cost in stages_in_total(build, stages)]
    names = ("hours", "read", "written", "kept", *(("money",) if prices.has_any else ()))
    total = {name: sum(each[name] for each in counted) for name in names}
    for name, gpu in (("worker_hours", False), ("gpu_hours", True)):
        total[name] = sum(each["worker_hours"] for each in counted if each["gpu"] == gpu)
    return {"pictures": build.pictures, "database_rows": build.database, "own_database": bool(build.rows),
            "stages": [describe(cost) for cost in stages], "total": total}


def _stages(costed_builds: list[tuple[Build, list[Cost]]], prices: Prices) -> list[list[str]]:
    """A row for each stage; of several builds, with the numbers that tell them apart in front."""
    several = len(costed_builds) > 1
    rows = [[*(("images", "database") if several else ()), "stage", "on", "#hours", "#worker hours", "#read",
             "#written", "#kept", *(("#money",) if prices.has_any else ())]]
    for build, stages in costed_builds:
        front = [[_count(build.pictures), _count(build.rows) if build.rows else "itself"], *[["", ""]] * len(stages)]
        lines = [[cost.stage, f"{cost.workers} {'GPU' if cost.gpu else 'worker'}{'s' if cost.workers > 1 else ''}",
                  format_hours(cost.seconds), format_hours(cost.worker_seconds),
                  *map(format_bytes, (cost.bytes_read, cost.bytes_written, cost.bytes_kept)),
                  *([format_number(prices.price_of(cost), 2)] if prices.has_any else [])] for cost in stages]
        counted = stages_in_total(build, stages)
        lines.append(["total", "", format_hours(sum(cost.seconds for cost in counted)), _worker_hours(counted),
                      format_bytes(sum(cost.bytes_read for cost in counted)),
                      format_bytes(sum(cost.bytes_written for cost in counted)),
                      format_bytes(sum(cost.bytes_kept for cost in counted)),
                      *([format_number(sum(map(prices.price_of, counted)), 2)] if prices.has_any else [])])
        rows += [[*(head if several else []), *line] for head, line in zip(front, lines, strict=True)]
    return rows


def _worker_hours(counted: list[Cost]) -> str:
    """Hours of workers, those with a GPU apart."""
    sums = [sum(cost.worker_seconds for cost in counted if cost.gpu == gpu) for gpu in (False, True)]
    return format_hours(sums[0]) + (f" + {format_hours(sums[1])} GPU" if sums[1] else "")


def _totals(costed_builds: list[tuple[Build, list[Cost]]], prices: Prices) -> list[list[str]]:
    """A row for each build, with the worker hours of its stages."""
    rows = [["images", "database", *(f"#{cost.stage}" for cost in costed_builds[0][1]), "#hours in all",
             "#read", "#written", *(("#money",) if prices.has_any else ())]]
    for build, stages in costed_builds:
        counted = stages_in_total(build, stages)
        rows.append([_count(build.pictures), _count(build.rows) if build.rows else "itself",
                     *(format_hours(cost.worker_seconds) for cost in stages),
                     format_hours(sum(cost.seconds for cost in counted)),
                     format_bytes(sum(cost.bytes_read for cost in counted)),
                     format_bytes(sum(cost.bytes_written for cost in counted)),
                     *([format_number(sum(map(prices.price_of, counted)), 2)] if prices.has_any else [])])
    return rows


def _count(value: int) -> str:
    for unit, factor in (("B", 10**9), ("M", 10**6)):
        if value >= factor and round(value / factor, 1) * factor == value:
            return f"{value / factor:g} {unit}"
    return f"{value:,}"
