"""Options that several verbs share. A flag is a field of an options class; its help is the text below the field."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro

from jobs.telemetry.output import DEFAULT_ROOT

if TYPE_CHECKING:
    from pipeline.releases.signatures import ReleaseKeys

Section = TypeVar("Section")
Flat = Annotated[Section, tyro.conf.OmitArgPrefixes]
"""Flags of these fields have no prefix."""
Unflagged = Annotated[Section, tyro.conf.Fixed, tyro.conf.Suppress]
"""Settings from the recipe and the TOML file. They have no flags here."""
Words = tyro.conf.UseAppendAction[tuple[str, ...]]
"""A flag that may be repeated."""
STOPPED = 130
"""Exit code after SIGINT, SIGTERM or SIGHUP."""


@dataclass(frozen=True)
class CommonOptions:
    """Options of every verb."""

    root: str = DEFAULT_ROOT
    """Folder or s3:// URL that holds everything."""
    recipe: str = ""
    """Settings to start from: tiny (default), emoji_32, emoji_64, style, imagenet_400m, ffhq_415m or laion_1p3b."""
    config: str = ""
    """TOML file of settings, with the sections of the recipe. Flags override it."""
    local: bool = False
    """Run in this process, without Ray. Under torchrun: in its processes."""
    dry_run: bool = False
    """Print what would be done, and do nothing."""
    log_format: Literal["", "text", "json"] = ""
    """Format of stderr: text lines, or one JSON document for each event. Default: RDM_LOG, otherwise text."""

    @property
    def names_recipe(self) -> bool:
        """Whether the user chose the settings. A TOML file counts, whatever it sets."""
        return bool(self.recipe or self.config)


@dataclass(frozen=True)
class StageOptions:
    """Options of the verbs that write a stage."""

    overwrite: bool = False
    """Empty the folder of this stage first, with everything below it (the samples of a run)."""
    tracker: tyro.conf.UseAppendAction[tuple[Literal["auto", "none", "wandb", "tensorboard", "mlflow"], ...]] = ()
    """Report to a tracker. May be repeated. auto (default): wandb for training, and for other stages only if
    WANDB_API_KEY is set. Without this key wandb works offline."""
    json: bool = False
    """Print the result as JSON. This is the default without a terminal."""


@dataclass(frozen=True)
class TextStageOptions(StageOptions):
    """Options of the verbs that write a stage."""

    json: bool = False
    """Print JSON instead of text, which is the default in a pipe too. A dry run in a pipe prints JSON."""


@dataclass(frozen=True)
class SigningOptions:
    """Options of the verbs that publish."""

    sign: str = ""
    """File with the ed25519 private key that signs the publication. Only its owner may read it."""
    accept_unsigned: bool = False
    """With --sign: accept a published version without a signature, and sign it or the version that follows it."""
    unsigned: bool = False
    """Publish without a signature although the dataset is signed."""

    def keys(self) -> "ReleaseKeys":
        """The keys to publish with; ValueError if the private key cannot be used."""
        from pipeline.releases.signatures import publishing_keys
        return publishing_keys(self.sign, accept_unsigned=self.accept_unsigned, unsigned=self.unsigned)


Dataset = Annotated[str, tyro.conf.Positional,
                    tyro.conf.arg(metavar="DATASET", help="Name of the dataset, NAME or NAME@VERSION.")]
DatasetName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET", help="Name of the dataset.")]
ResultAsJson = Annotated[bool, tyro.conf.arg(help="Print the result as JSON. This is the default without a terminal.")]
TextAsJson = Annotated[bool, tyro.conf.arg(help="Print JSON instead of text, which is the default in a pipe too.")]
RunName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Name of the run.")]
