"""Verbs that make a dataset: shard, embed, score, index, neighbors, latents."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jobs.cli.options import CommonOptions, Dataset, Flat, StageOptions, Words
from jobs.cli.run_stage import (
    check_unpublished,
    open_runner,
    print_forecast,
    print_result,
    seal_and_print,
    suggest_once,
)
from jobs.cluster.config import ClusterConfig
from jobs.training.config import LatentsConfig
from pipeline import storage
from pipeline.embeddings.config import EmbedConfig
from pipeline.indices.config import IndexConfig
from pipeline.neighbors.config import NeighborsConfig
from pipeline.scores.config import ScoreConfig
from pipeline.sources.config import ShardConfig

if TYPE_CHECKING:
    from pipeline.datasets.dataset import Dataset as DatasetPlace
    from pipeline.shards.deduplicate import Deduplicate
    from pipeline.stages.stage import Stage

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardOptions:
    """Pack a corpus (a folder, lists of URLs, parquet with images, tars) into tars."""

    examples: ClassVar = ("shard mine --source ~/images",
                          "shard laion --source 's3://lists/part-*.parquet' --where 'punsafe < 0.1' --root "
                          "s3://bucket/rdm --workers 64")

    dataset: Dataset
    shard: Flat[ShardConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[CommonOptions]
    stage: Flat[StageOptions]
    adopt: bool = False
    """The source is existing tars: seal them in place, without a copy."""
    retry_failed: bool = False
    """Retry only the rows that failed. Before the version is sealed, they go into more shards of it. Afterwards, they
    go into the next version, which reuses the shards of this one."""
    max_failed: float = 1.0
    """Stop if a larger share of the rows fails."""


def run_shard(options: ShardOptions) -> int:
    from pipeline.datasets import dataset as datasets
    from pipeline.shards.adopt import Adopt
    from pipeline.shards.deduplicate import Deduplicate
    from pipeline.shards.shard import Shard
    dataset = datasets.Dataset.parse(options.common.root, options.dataset)
    if not 0 <= options.max_failed <= 1:
        raise ValueError(f"--max-failed {options.max_failed}: a share of the rows, within 0 and 1")
    if options.adopt:
        if options.retry_failed:
            raise ValueError("--adopt takes tars as they are: there is nothing to try again")
        return seal_and_print(Adopt(dataset, options.shard), options, max_failed=options.max_failed)
    if options.retry_failed and storage.exists(storage.join(dataset.folder("shards"), "manifest.json")):
        following = dataset.next_version()
        _log.info("shard: %s is sealed; failed rows are retried for %s", dataset.label, following.label)
        return seal_and_print(Shard(following, options.shard, base=dataset), options, max_failed=options.max_failed)
    if options.shard.duplicates != "keep" and not options.common.dry_run:
        return _shard_and_deduplicate(Deduplicate(dataset, options.shard), options)
    return seal_and_print(Shard(dataset, options.shard), options, retry=options.retry_failed,
                          max_failed=options.max_failed)


def _shard_and_deduplicate(sift: "Deduplicate", options: ShardOptions) -> int:
    from jobs.telemetry.observe import run_observed
    from pipeline.shards import deduplicate
    with open_runner(options.common, options.cluster) as runner:
        def seal(stage: "Stage") -> dict[str, Any]:
            whole = stage is sift.whole
            return run_observed(stage, runner, name="shard" if whole else "sift", trackers=options.stage.tracker,
                                retry=options.retry_failed and whole, max_failed=options.max_failed)

        manifest = deduplicate.deduplicate_shards(sift, seal, overwrite=options.stage.overwrite)
    print_result(sift, manifest, options)
    return 0


@dataclass(frozen=True)
class EmbedOptions:
    """Compute the CLIP embeddings of the images of a dataset."""

    examples: ClassVar = ("embed mine",
                          "embed art --model ViT-L-14 --pretrained openai --captions --gpus 1")

    dataset: Dataset
    embed: Flat[EmbedConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[CommonOptions]
    stage: Flat[StageOptions]
    captions: bool = False
    """Also embed captions, into text_embeddings/."""
    adopt: str = ""
    """Import embeddings from this folder: of clip-retrieval, or a retrieval database of CompVis (.npz)."""
    export: Literal["", "clip-retrieval"] = ""
    """Also write the embeddings in this layout, into a folder of the same name, without hidden rows. A name without a
    version is then the published version."""


def run_embed(options: EmbedOptions) -> int:
    from jobs.checks.demo_defaults import mention_demo_defaults
    from jobs.config.settings import Settings
    sealed = _open_embedded(options).is_sealed("embeddings")
    if not (options.common.names_recipe or options.adopt or sealed):
        mention_demo_defaults(Settings(embed=options.embed), embeds=True, trains=False)
    return embed(options)


def embed(options: EmbedOptions) -> int:
    """Embed a dataset, without a word on the encoder of the demo."""
    from pipeline.embeddings.clip_retrieval import AdoptEmbeddings, Export
    from pipeline.embeddings.embed import Embed, EmbedCaptions
    dataset = _open_embedded(options)
    stages: list[Stage] = [AdoptEmbeddings(dataset, options.embed, options.adopt) if options.adopt
                           else Embed(dataset, options.embed)]
    if options.captions:
        stages.append(EmbedCaptions(dataset, options.embed))
    for stage in stages[1:]:
        check_unpublished(stage, options.stage.overwrite)
    with suggest_once():
        for stage in stages:
            seal_and_print(stage, options)
        if options.export and not options.common.dry_run:
            seal_and_print(Export(dataset, options.embed), options)
    return 0


def _open_embedded(options: EmbedOptions) -> "DatasetPlace":
    """The dataset to embed: v1 of a bare name, or the published version if it is exported."""
    from pipeline.datasets.dataset import Dataset as DatasetPlace
    from pipeline.releases import published
    find = published.open_dataset if options.export else DatasetPlace.parse
    return find(options.common.root, options.dataset)


@dataclass(frozen=True)
class ScoreOptions:
    """Score the samples of a dataset by small models: aesthetics, safety, watermarks."""

    examples: ClassVar = ("score mine --head aesthetic=aesthetic.safetensors",
                          "score art --head nsfw=hf-hub:ORGANISATION/NAME --head sharp=my_scores:sharpness")

    dataset: Dataset
    score: Flat[ScoreConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[CommonOptions]
    stage: Flat[StageOptions]
    head: Words = ()
    """NAME=HEAD adds the column NAME. HEAD is a safetensors file of linear layers on CLIP vectors (a path, a URL or
    hf-hub:ORGANISATION/NAME), or your function (module:function). Repeat the flag for more."""


def run_score(options: ScoreOptions) -> int:
    from pipeline.releases import published
    from pipeline.scores.score import Score
    if not options.head:
        raise ValueError("score needs a head: expected --head NAME=HEAD, got none\n"
                         "hint: --head aesthetic=heads/aesthetic.safetensors")
    dataset = published.open_dataset(options.common.root, options.dataset)
    with suggest_once():
        for stage in [Score(dataset, spec, options.score) for spec in options.head]:
            seal_and_print(stage, options)
    return 0


@dataclass(frozen=True)
class IndexOptions:
    """Build the compressed index that makes a dataset a database."""

    examples: ClassVar = ("index mine",
                          "index art --max-memory 8Gi --min-recall 0.9")

    dataset: Dataset
    index: Flat[IndexConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[CommonOptions]
    stage: Flat[StageOptions]
    extend: str = ""
    """Do not train: take over the index of this version (NAME@VERSION), and add and remove the rows that changed."""
    adopt: str = ""
    """Do not build: import this index file of faiss or autofaiss. Its vectors have the order of the embeddings."""
    tombstone: str = ""
    """Do not build: searches leave out the samples whose keys are in this text file, one on each line."""
    hide: str = ""
    """Do not build: hide rows from searches. A row filter over metadata and scores, such as "nsfw > 0.5". With
    --tombstone: both."""


def run_index(options: IndexOptions) -> int:
    from jobs.telemetry.observe import run_observed
    from pipeline.datasets import dataset as datasets
    from pipeline.indices.adopt import AdoptIndex
    from pipeline.indices.extend import Extension
    from pipeline.indices.index import Index, build_index
    from pipeline.takedowns.hidden_rows import Tombstones
    dataset = datasets.Dataset.parse(options.common.root, options.dataset)
    chosen = [f"--{name}" for name in ("tombstone", "hide", "extend", "adopt") if getattr(options, name)]
    if chosen[:2] == ["--tombstone", "--hide"]:
        del chosen[0]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)}: expected one of them, for each is another command\n"
                         f"hint: --extend and --adopt make an index, --tombstone and --hide leave it as it is")
    if options.tombstone or options.hide:
        return seal_and_print(Tombstones(dataset, options.tombstone, options.hide), options)
    index = Index(dataset, options.index)
    if options.extend:
        base = datasets.Dataset.parse(options.common.root, options.extend)
        index = Extension(dataset, base, options.index)
        if base.is_sealed("tombstones") and not dataset.is_sealed("tombstones"):
            _log.warning("index: the tombstones of %s do not hold for %s: name those keys that are still in it once "
                         "more, with --tombstone", base.label, dataset.label)
    if options.adopt:
        index = AdoptIndex(dataset, options.index, options.adopt)
    check_unpublished(index, options.stage.overwrite)
    if options.common.dry_run:
        return print_forecast(index, options)
    with open_runner(options.common, options.cluster) as runner:
        manifest = build_index(index, lambda stage: run_observed(stage, runner, name=stage.name.replace("_", " "),
                                                                 trackers=options.stage.tracker),
                               overwrite=options.stage.overwrite)
    print_result(index, manifest, options)
    return 0


@dataclass(frozen=True)
class NeighborsOptions:
    """Find the nearest images of a database for every sample of a dataset."""

    examples: ClassVar = ("neighbors mine",
                          "neighbors train --database art --method exact --gpus 1")

    dataset: Dataset
    neighbors: Flat[NeighborsConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[CommonOptions]
    stage: Flat[StageOptions]
    database: str = ""
    """The database. Default: the dataset itself."""


def run_neighbors(options: NeighborsOptions) -> int:
    from pipeline.neighbors.neighbors import Neighbors
    from pipeline.releases import published
    dataset = published.open_dataset(options.common.root, options.dataset)
    database = published.open_dataset(options.common.root, options.database or options.dataset)
    return seal_and_print(Neighbors(dataset, database, options.neighbors), options)


@dataclass(frozen=True)
class LatentsOptions:
    """Compute the latents of the images of a dataset, for training in the space of a first stage."""

    examples: ClassVar = ("latents art --first-stage vae --flips",
                          "latents art --first-stage vae --workers 8 --gpus 1")

    dataset: Dataset
    latents: Flat[LatentsConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[CommonOptions]
    stage: Flat[StageOptions]


def run_latents(options: LatentsOptions) -> int:
    from jobs.training.latents import Latents
    from pipeline.releases import published
    dataset = published.open_dataset(options.common.root, options.dataset)
    return seal_and_print(Latents(dataset, options.latents), options)
