"""Rates from the manifests below a root, by the formulas of cost_model.py solved for the rates.

Every record has its seconds, so a small run on some machines gives the time of a larger one on them. Several folders of
a stage count together. Rates that no folder gives keep their first value. Folders of a rebuild that reuse those of the
version before do not count: their samples are more than their seconds made.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from jobs.planning.cost_model import duration, exact_amounts, listed_amounts, training_flop
from jobs.planning.rates import ApproximateRates, EmbedRates, ExactRates, IndexRates, Rates, ShardRates, TrainRates
from jobs.runs.metrics import read_metrics
from jobs.runs.run import Run
from model.config import UNetConfig
from model.training import flops
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings import clip
from pipeline.embeddings.clip_weights import ClipConfig
from pipeline.neighbors.config import NeighborsConfig

_log = logging.getLogger(__name__)
_PREPARING = ("read", "decode", "write")
# The rate of each time in the records of neighbors. All other seconds count for the rate of queries.
_EXACT = {"open": "rows_per_s", "read": "rows_per_s", "products": "flop_per_s", "choose": "chosen_per_s"}
_LISTED = {"open": "laid_per_s", "read": "read_per_s", "products": "flop_per_s", "check": "checked_per_s"}


def rates(root: str, base: Rates, *, gpu: bool = False) -> Rates:
    """The rates of the sealed stages below `root`, over `base`.

    `gpu`: each worker of embed, exact search and train had a GPU. ValueError if no manifest has rates.
    """
    root = storage.normalize(root)
    datasets = [Dataset(root, name, version) for name in storage.list_folders(storage.join(root, "datasets"))
                for version in storage.list_folders(storage.join(root, "datasets", name))]
    exact, approximate = _neighbors(datasets, base, gpu)
    by_section = {"shard": _shard(datasets, base), "embed": _embed(datasets, gpu), "index": _index(datasets, base),
                  "exact": exact, "approximate": approximate, "train": _train(root, gpu)}
    sections = {name: rates for name, rates in by_section.items() if rates is not None}
    if not sections:
        raise ValueError(f"nothing sealed below {root} tells how long a stage takes\n"
                         f"hint: run the stages on a sample there first")
    return base.with_sections(sections, f"what made {storage.redact_credentials(root)}", "there")


def _sealed(datasets: list[Dataset], folder: str, name: str) -> Iterator[tuple[Dataset, dict[str, Any]]]:
    """The datasets whose `folder` was sealed by the stage `name`, and made whole, with its manifest."""
    for dataset in datasets:
        # Skip a folder whose inputs are gone.
        if dataset.is_sealed(folder) and (folder == "shards" or dataset.is_sealed("embeddings")):
            manifest = dataset.manifest(folder)
            if manifest["stage"] == name and manifest["totals"]["samples"] and not _reuses(manifest):
                yield dataset, manifest


def _reuses(manifest: dict[str, Any]) -> bool:
    """Whether a stage of a rebuild took over a part from the version before."""
    return bool(manifest["inputs"].keys() & {"last", "base"} or manifest["info"].get("reused"))


def _shard(datasets: list[Dataset], base: Rates) -> ShardRates | None:
    """The rates of the most frequent image size. A second size gives the seconds of a pixel."""
    sums: dict[int, Counter[str]] = defaultdict(Counter)
    for _, manifest in _sealed(datasets, "shards", "shard"):
        if "image_size" not in manifest["section"]:  # written by something else
            continue
        totals = sums[manifest["section"]["image_size"]]
        totals.update({"samples": manifest["totals"]["samples"], "seconds": manifest["run"]["seconds"]})
        for record in manifest["items"]:
            for file in record["files"]:
                totals[file["name"].rpartition(".")[2]] += file["bytes"]
    if not sums:
        return None
    size = max(sums, key=lambda size: sums[size]["samples"])
    each = {side: sums[side]["seconds"] / sums[side]["samples"] for side in sums}
    slope = base.shard.seconds_per_pixel
    if other := max((other for other in sums if other != size), default=0):
        slope = max(0.0, (each[other] - each[size]) / (other ** 2 - size ** 2))
    count = sums[size]["samples"]
    return ShardRates(1 / each[size], size, slope, base.shard.source_bytes, sums[size]["tar"] / count,
                      sums[size]["parquet"] / count)


def _embed(datasets: list[Dataset], gpu: bool) -> EmbedRates | None:
    """Divide the seconds of each record as its threads spent them: in the encoder, or with images."""
    operations = pixels = encoding = preparing = 0.0
    for dataset, manifest in _sealed(datasets, "embeddings", "embed"):
        try:
            each, _ = clip.flop_per_image(ClipConfig(manifest["info"]["encoder"]["model"]))
        except ValueError as error:
            _log.warning("plan: %s is skipped: %s", dataset.folder("embeddings"), storage.first_line(error))
            continue
        side = dataset.manifest("shards")["section"].get("image_size", 0)
        operations += manifest["totals"]["samples"] * each
        pixels += manifest["totals"]["samples"] * side ** 2
        for record in manifest["items"]:
            times = record["run"].get("times", {})
            spent = {name: times.get(name, 0.0) for name in ("forward", *_PREPARING)}
            share = spent["forward"] / sum(spent.values()) if spent["forward"] and side else 1.0
            encoding += record["run"]["seconds"] * share
            preparing += record["run"]["seconds"] * (1 - share)
    if not operations:
        return None
    return EmbedRates(operations / max(encoding, 1e-9), preparing / pixels if pixels else 0.0, gpu)


def _index(datasets: list[Dataset], base: Rates) -> IndexRates | None:
    """The rates of the largest index, and of others of its kind."""
    every = [(dataset, manifest) for dataset, manifest in _sealed(datasets, "index", "index")]
    if not every:
        return None
    dataset, largest = max(every, key=lambda entry: entry[1]["totals"]["samples"])
    key, rows, in_parts = largest["info"]["key"], largest["totals"]["samples"], "parts" in largest["info"]
    dim = _dim(dataset)
    operations = training_flop(key, rows, dim, largest["section"]["train_points"])
    speed, merged, seconds = base.index.training_flop_per_s, base.index.merged_per_s, largest["run"]["seconds"]
    if in_parts:
        training = dataset.manifest("index-training")
        if operations:
            speed = operations / max(training["run"]["seconds"], 1e-9)
        merged = rows / max(seconds, 1e-9)
        filling = largest["items"][0]["run"]["times"].get("seconds of the parts") or rows / base.index.vectors_per_s
    else:
        alike = [manifest for _, manifest in every
                 if manifest["info"]["key"] == key and "parts" not in manifest["info"]]
        if not operations:
            rows, seconds = (sum(manifest["totals"]["samples"] for manifest in alike),
                             sum(manifest["run"]["seconds"] for manifest in alike))
        # Its record does not divide its seconds: training gets its usual time, at most half of them.
        speed = max(speed, 2 * operations / max(seconds, 1e-9))
        filling = seconds - operations / speed
    size = largest["totals"]["bytes"] / largest["totals"]["samples"]
    return IndexRates(speed, rows / max(filling, 1e-9), merged, key, size, in_parts)


def _neighbors(datasets: list[Dataset], base: Rates, gpu: bool) -> tuple[ExactRates | None, ApproximateRates | None]:
    """The rates of both kinds of search. A search by an index without lists compares all rows."""
    exact, listed, nprobe = _Sums(base.exact, _EXACT), _Sums(base.approximate, _LISTED), base.approximate.nprobe
    for dataset in datasets:
        for label in storage.list_folders(dataset.folder("neighbors")):
            database = Dataset.parse(dataset.root, label)
            if not database.is_sealed("embeddings"):
                continue
            for _, manifest in _sealed([dataset], f"neighbors/{label}", "neighbors"):
                section, searches = manifest["section"], manifest["totals"]["items"]
                count, dim = manifest["totals"]["samples"], _dim(dataset)
                rows = database.manifest("embeddings")["totals"]["samples"]
                config = NeighborsConfig(**{name: section[name] for name in ("k", "method", "probes", "checked")})
                if config.method == "index" and not database.is_sealed("index"):
                    continue
                info = database.manifest("index")["info"] if config.method == "index" else {"key": "", "parameter": ""}
                probes = config.probes or int(info["parameter"].partition("=")[2] or nprobe)
                times = [record["run"].get("times", {}) for record in manifest["items"]]
                workers = sum("open" in record for record in times) if all(times) else 1
                amounts = listed_amounts(info["key"], count, rows, dim, searches, workers, config, probes)
                if amounts is None:
                    exact.add(exact_amounts(count, rows, dim, searches, workers, gpu), manifest, times)
                else:
                    listed.add(amounts, manifest, times)
                    nprobe = probes
    return (ExactRates(**exact.rates(), gpu=gpu) if exact.seconds else None,
            ApproximateRates(**listed.rates(), nprobe=nprobe) if listed.seconds else None)


class _Sums:
    """Amounts of work and seconds of some searches, by the names of rates."""

    def __init__(self, base: Any, names: dict[str, str]) -> None:
        self.base, self.names = base, names
        self.amounts, self.seconds = Counter[str](), Counter[str]()

    def add(self, amounts: dict[str, float], manifest: dict[str, Any], times: list[dict[str, Any]]) -> None:
        """Count a manifest with the times of its records."""
        rest = seconds = max(manifest["run"]["seconds"], 1e-9)
        self.amounts.update(amounts)
        if not all(times):  # the record does not divide its seconds: use the usual shares
            share = seconds / duration(amounts, self.base)
            self.seconds.update({name: share * amount / getattr(self.base, name) for name, amount in amounts.items()})
            return
        for what, name in self.names.items():
            if amounts[name]:  # no work, no time
                spent = sum(record.get(what, 0.0) for record in times)
                self.seconds[name] += spent
                rest -= spent
        self.seconds["queries_per_s"] += max(rest, 0.0)

    def rates(self) -> dict[str, float]:
        """The amount a second, or the base rate without an amount."""
        return {name: amount / max(self.seconds[name], 1e-12) if amount else getattr(self.base, name)
                for name, amount in self.amounts.items()}


def _train(root: str, gpu: bool) -> TrainRates | None:
    """The rate by the seconds in the last lines of the curves, and the numbers of processes."""
    operations = seconds = 0.0
    for name in storage.list_folders(storage.join(root, "runs")):
        run = Run(root, name)
        lines = read_metrics(run)
        if not lines or not storage.exists(storage.join(run.folder, "plan.json")):
            continue
        section = run.section()
        config, unet = section["train"], dict(section["train"]["unet"])
        for sizes in ("channel_mult", "attention_downsampling"):
            unet[sizes] = tuple(unet[sizes])
        network = flops.size(UNetConfig(**unet), section["image_size"], config["k"])
        operations += lines[-1]["step"] * config["global_batch"] * network.training(unet["checkpointing"])
        seconds += lines[-1]["seconds"] * lines[-1].get("world_size", 1)
    return TrainRates(operations / seconds, gpu) if seconds else None


def _dim(dataset: Dataset) -> int:
    return int(dataset.manifest("embeddings")["info"]["encoder"]["dim"])
