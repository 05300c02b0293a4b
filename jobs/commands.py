"""What each verb of the command line takes: flags are the fields of these dataclasses."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from jobs.cluster.config import ClusterConfig
from jobs.evaluation.config import EvaluateConfig
from jobs.publishing.config import RebuildConfig
from jobs.publishing.releases import GcConfig
from jobs.sampling.config import QueryConfig, SampleConfig
from jobs.training.config import ConvertConfig, LatentsConfig
from model.config import TrainConfig
from pipeline.embeddings.embed import EmbedConfig
from pipeline.indices.config import IndexConfig
from pipeline.neighbors.config import NeighborsConfig
from pipeline.sources.config import ShardConfig

Flat = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class Common:
    """What every verb takes."""

    root: str = "data"
    """Folder or s3:// address that holds everything."""
    recipe: str = ""
    """Settings to begin with: tiny (default), emoji_32, emoji_64, imagenet_400m, ffhq_415m or laion_1p3b."""
    config: str = ""
    """TOML file of settings; sections as in the recipe, flags override it."""
    local: bool = False
    """Without Ray, in this process (under torchrun: in its processes)."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    log_format: Literal["", "text", "json"] = ""
    """Of stderr: lines for people, or a JSON document for each event; by default RDM_LOG says, or else text."""


@dataclass(frozen=True)
class Rebuild:
    """For the verbs that write a stage."""

    rebuild: bool = False
    """Empty the folder of this stage first, with what lies below it (the samples of a run)."""
    tracker: Literal["auto", "none", "wandb"] = "auto"
    """Who follows it beside the files here: wandb (offline without WANDB_API_KEY), or none; auto: wandb, for stages
    other than training only where there is a key."""


Dataset = Annotated[str, tyro.conf.Positional,
                    tyro.conf.arg(metavar="DATASET", help="Name of the dataset, NAME or NAME@VERSION.")]
RunName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Name of the run.")]


@dataclass(frozen=True)
class ShardCommand:
    """Pack a corpus (a folder, lists of addresses, parquet with pictures, tars) into tars."""

    dataset: Dataset
    shard: Flat[ShardConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[Common]
    stage: Flat[Rebuild]
    adopt: bool = False
    """The source is tars that are there already: seal them where they lie, without a copy."""
    retry_failed: bool = False
    """Try only the rows that failed once more: in more shards of this version while it is not sealed, or else in
    the next version, which takes over the shards of this one."""
    max_failed: float = 1.0
    """Stop when a larger share of the rows has failed."""


@dataclass(frozen=True)
class EmbedCommand:
    """Compute the CLIP embeddings of a dataset's pictures."""

    dataset: Dataset
    embed: Flat[EmbedConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[Common]
    stage: Flat[Rebuild]
    captions: bool = False
    """Those of the captions too, in text_embeddings/."""
    adopt: str = ""
    """Take the embeddings from this folder: clip-retrieval's, or a retrieval database of CompVis (.npz)."""
    export: Literal["", "clip-retrieval"] = ""
    """Write them in that layout too, into a folder of that name."""


@dataclass(frozen=True)
class IndexCommand:
    """Build the compressed index that makes a dataset a database."""

    dataset: Dataset
    index: Flat[IndexConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[Common]
    stage: Flat[Rebuild]
    extend: str = ""
    """Train nothing: take over the index of this version (NAME@VERSION), with the rows that came and went."""
    tombstone: str = ""
    """Build nothing: searches leave out the samples whose keys this text file names, a line each."""


@dataclass(frozen=True)
class RebuildCommand:
    """Bring a published database up to its source: make what changed, judge it, swap it in."""

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET", help="Name of the dataset.")]
    shard: Flat[ShardConfig]
    embed: EmbedConfig
    index: IndexConfig
    rebuild: Flat[RebuildConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[Common]


@dataclass(frozen=True)
class VersionsCommand:
    """List the versions of a published database: what changed in each, and who is bound to it."""

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET", help="Name of the dataset.")]
    common: Flat[Common]
    json: bool = False
    """As JSON."""


@dataclass(frozen=True)
class RollbackCommand:
    """Publish an earlier version of a database again."""

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET", help="Name of the dataset.")]
    common: Flat[Common]
    to: str = ""
    """The version, as in v2; by default the one before the published one."""


@dataclass(frozen=True)
class GcCommand:
    """Remove versions of a published database that nobody needs any more."""

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET", help="Name of the dataset.")]
    common: Flat[Common]
    gc: Flat[GcConfig] = field(default_factory=GcConfig)
    json: bool = False
    """As JSON."""


@dataclass(frozen=True)
class CreditsCommand:
    """Name the pictures that a sample drew on, with source and licence."""

    drawn: Annotated[str, tyro.conf.Positional,
                     tyro.conf.arg(metavar="SAMPLE", help="Picture or samples.json in runs/RUN/samples/.")]
    common: Flat[Common]
    sheet: str = ""
    """Write a contact sheet of them to this file (.png)."""
    json: bool = False
    """As JSON."""


@dataclass(frozen=True)
class ForgetCommand:
    """Take pictures out of every database, and keep them out; say what used them."""

    common: Flat[Common]
    sha256: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Hash of a picture, as it was fetched or as it is stored; repeat the flag for more."""
    url: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Address of a picture, or its name in the folder that it came from; repeat the flag for more."""
    key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """DATASET/KEY of a sample, or DATASET@VERSION/KEY; repeat the flag for more."""
    domain: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Every picture from this host and those below it; repeat the flag for more."""
    note: str = ""
    """Why, or who asked; it is kept with the request."""
    json: bool = False
    """As JSON."""


@dataclass(frozen=True)
class NeighborsCommand:
    """Find the nearest database pictures of every sample of a dataset."""

    dataset: Dataset
    neighbors: Flat[NeighborsConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[Common]
    stage: Flat[Rebuild]
    database: str = ""
    """The database; by default the dataset itself."""


@dataclass(frozen=True)
class LatentsCommand:
    """Compute the latents of every picture of a dataset, for training in a first stage's space."""

    dataset: Dataset
    latents: Flat[LatentsConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[Common]
    stage: Flat[Rebuild]


@dataclass(frozen=True)
class ConvertCommand:
    """Make a run to draw with of a checkpoint of the CompVis release (model.ckpt), or of a folder that export wrote."""

    run: RunName
    checkpoint: str
    """The file or folder; a pickle is read as weights alone, none of its code runs."""
    common: Flat[Common]
    stage: Flat[Rebuild]
    database: str = ""
    """Any dataset that was embedded by the encoder which the released network was trained with."""
    convert: Flat[ConvertConfig] = field(default_factory=ConvertConfig)


@dataclass(frozen=True)
class ExportCommand:
    """Write the weights of a run, in half precision, into a folder that convert makes a run of elsewhere."""

    run: RunName
    out: str
    """The folder, not there yet or empty."""
    common: Flat[Common]
    checkpoint: int = 0
    """Step of the checkpoint; 0 is the newest."""


@dataclass(frozen=True)
class TrainCommand:
    """Train a retrieval-augmented diffusion model on a dataset and its neighbours."""

    run: RunName
    dataset: str
    """Dataset with shards and neighbours."""
    train: Flat[TrainConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[Common]
    stage: Flat[Rebuild]
    database: str = ""
    """Database that the neighbours come from; by default the dataset itself."""
    on_latents: Annotated[bool, tyro.conf.arg(name="latents")] = False
    """Train on the dataset's latents instead of its pictures."""
    validation: str = ""
    """Dataset that the run is looked at with from time to time: its losses with the neighbours that it has in the
    database, with those of others and with none, and pictures."""


@dataclass(frozen=True)
class SampleCommand:
    """Draw pictures of prompts, or of pictures, each with the neighbours that a database has for it."""

    run: RunName
    sample: Flat[SampleConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[Common]
    stage: Flat[Rebuild]
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to draw; repeat the flag for more."""
    image: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """File of a picture on this machine that stands where a prompt would; repeat the flag for more."""
    asked: Flat[QueryConfig] = field(default_factory=QueryConfig)
    database: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Database to take neighbours from; repeat the flag for more. noto:3+openmoji:1 shares them out by weight."""
    checkpoint: int = 0
    """Step of the checkpoint; 0 is the newest."""
    name: str = ""
    """Name of the folder below the run's samples; by default a hash of these settings."""
    model: str = ""
    """Name of the open_clip model that embeds the prompts; by default the recipe's."""
    pretrained: str = ""
    """Its pretrained tag or file of weights; by default the recipe's."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure whether the style follows the database: samples of held-out subjects, judged."""

    run: RunName
    evaluate: Flat[EvaluateConfig]
    sample: Flat[SampleConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[Common]
    stage: Flat[Rebuild]
    database: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Database of one style; repeat the flag. By default every other dataset of the root that has an index."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to draw; by default the subjects that training has not seen."""
    checkpoint: int = 0
    """Step of the checkpoint; 0 is the newest."""
    name: str = ""
    """Name of the folder below the run's evaluations; by default a hash of these settings."""
    json: bool = False
    """Print everything that was found as JSON instead of the table."""


@dataclass(frozen=True)
class ReportCommand:
    """Write report.html: pictures, neighbours, loss, samples, stages; one file that needs no other."""

    common: Flat[Common]
    out: str = ""
    """Where to; by default report.html in the root."""


@dataclass(frozen=True)
class StatusCommand:
    """Say of every stage whether it is absent, planned, i of n, sealed or stale."""

    common: Flat[Common]
    json: bool = False
    """As JSON instead of a table."""
    watch: bool = False
    """Again and again, until Ctrl-C (exit 0): in place on a terminal, elsewhere a block or a line of JSON each time."""
    serve: str = ""
    """To Prometheus instead, at PORT of this machine or at HOST:PORT, until Ctrl-C (exit 0)."""


@dataclass(frozen=True)
class VerifyCommand:
    """Read everything again: sizes, hashes, counts and alignment; exit 1 if anything is wrong."""

    common: Flat[Common]
    only: str = ""
    """Only folders below this path of the root, as in datasets/noto."""
    against: Literal["", "current"] = ""
    """current: only the published versions, and against the hashes under which they were published."""
    quick: bool = False
    """Only the manifests, not the files they name."""
    json: bool = False
    """Faults as JSON lines."""


@dataclass(frozen=True)
class PlanCommand:
    """Say what a full build would cost, stage by stage: hours, bytes, money."""

    common: Flat[Common]
    corpus: Annotated[tuple[str, ...], tyro.conf.arg(name="pictures")] = ()
    """Training pictures, as in 1M 100M 1B; several make a table of all combinations. By default the recipe's."""
    database_rows: tuple[str, ...] = ()
    """Rows of a database of its own, several as well; 0: the training pictures are the database. By default the
    recipe's."""
    workers: int = 0
    """Workers without a GPU; by default the recipe's."""
    gpus: int = 0
    """Workers with a GPU each, for the stages whose rates are those of GPUs; by default as many as others."""
    memory: str = "16Gi"
    """What a worker may keep of a database that is compared row by row."""
    epochs: float = 0.0
    """How often training sees each picture; by default it takes the recipe's steps."""
    downsampling: int = 0
    """Pixels a side for each of a latent's; 1: the network sees pictures. By default the recipe's."""
    rates: str = ""
    """JSON file of rates (jobs/rates.py has its form); what it does not name keeps its default."""
    measure: str = ""
    """Run a sample of each stage first, with these settings, on the cluster that there is, below --root; write the
    rates that it had into this file, and take them."""
    source: tuple[str, ...] = ()
    """What to shard for that, as for `shard`; by default pictures that it draws itself."""
    seconds: float = 60.0
    """How long each of its stages may take, about."""
    measure_workers: int = 1
    """Workers that share them; several tell how they slow each other down."""
    measured: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Take the rates from what is sealed below this root."""
    from_gpu: bool = False
    """There, embed, train and exact neighbours had a GPU in each worker."""
    price_gpu_hour: float | None = None
    """Money for an hour of a worker with a GPU."""
    price_cpu_hour: float | None = None
    """Money for an hour of any other worker."""
    price_gb_month: float | None = None
    """Money for a GB that is kept for a month."""
    price_gb_moved: float | None = None
    """Money for a GB that is read or written."""
    months: float = 1.0
    """How long everything is kept."""
    totals: bool = False
    """A row for each combination, with the worker hours of its stages."""
    json: bool = False
    """As JSON, with the rates."""


@dataclass(frozen=True)
class PipelineCommand:
    """Bring a dataset through all stages: shards, embeddings, index; neighbours and a run where asked."""

    dataset: Dataset
    shard: Flat[ShardConfig]
    embed: EmbedConfig
    index: IndexConfig
    neighbors: NeighborsConfig
    train: TrainConfig
    cluster: Flat[ClusterConfig]
    common: Flat[Common]
    database: str = ""
    """Find the neighbours of its pictures in this database too."""
    trained: Annotated[str, tyro.conf.arg(name="train", metavar="RUN")] = ""
    """Train this run on it, with its neighbours in the database or, without one, in the dataset itself."""


@dataclass(frozen=True)
class SubmitCommand:
    """Send a verb to a Ray cluster as a job: submit [flags] VERB ...; its paths are those of the nodes."""

    words: Annotated[tuple[str, ...], tyro.conf.Positional,
                     tyro.conf.arg(metavar="VERB ...", help="The verb and what it takes.")] = ()
    address: str = ""
    """The cluster's dashboard, http://HEAD:8265; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine's."""
    wait: bool = False
    """Show the log, and end as the verb ends: 0, 1, 2, or 130 if it was stopped. Whoever stops waiting stops no job."""
    retries: int = 0
    """With --wait, how many more attempts there are where one fails or is lost; misuse is not tried again."""
    installed: bool = False
    """Send no code: the nodes have it, in an image."""
    env: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Variable of this environment that the job gets, beside AWS_*, WANDB_* and RDM_* without secrets; repeat the
    flag."""
    secret: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Name of a variable that the nodes must have of their own; the job looks for it before it begins; repeat the
    flag."""
    dry_run: bool = False
    """Say what would be submitted, and submit nothing."""


@dataclass(frozen=True)
class DemoCommand:
    """The whole way on real pictures: eight style databases, a trained model, samples and a report."""

    common: Flat[Common]
    cluster: Flat[ClusterConfig]
    drawn: bool = False
    """Take the corpus drawn by the program instead of the emoji."""
    steps: int = 0
    """Training steps; 0: the recipe's, or 600 where a trained model comes along."""
    subjects: int = 300
    """Subjects of the drawn corpus."""
