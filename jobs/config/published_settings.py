"""The settings of the next version: those of the published version, where the command names no others."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from jobs.config.settings import Settings
from jobs.config.toml import override
from jobs.runs.newest_run import find_newest_run
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.pointer import DamagedPointer, read_pointer
from pipeline.datasets.row_columns import list_scores
from pipeline.embeddings.clip_weights import ClipConfig, encoder_of
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import dataset_encoder
from pipeline.formats.sizes import read_stored_size
from pipeline.indices.config import SIZES, IndexConfig
from pipeline.releases.published import Published
from pipeline.releases.signatures import ReleaseKeys
from pipeline.sources.config import ShardConfig

_log = logging.getLogger(__name__)
_FLAG_PREFIXES = {"shard": "", "embed": "embed.", "index": "index.", "rebuild": ""}
_SPEED_ONLY = {"batch_size", "compile", "max_memory"}
"""Settings of `embed` that fit the machine and not the vectors."""


@dataclass(frozen=True)
class PublishedSettings:
    """The settings that a published version was made with."""

    label: str
    values: dict[str, dict[str, Any]]
    """Section -> setting -> value, as JSON has it. An encoder that the command names is left out."""
    encoder: dict[str, Any]
    """The description of the encoder."""

    def apply(self, settings: Settings) -> Settings:
        """The settings with those of the version in their place."""
        return replace(settings, **{section: override(getattr(settings, section), values, self.label)
                                    for section, values in self.values.items()})

    def log_differences(self, verb: str, without: Any, options: Any) -> None:
        """Log in one line which settings stay, and in one line which the command sets to another value.

        `without`: the options as the command line would have them if nothing were published.
        """
        kept, changed = [], []
        for section, values in self.values.items():
            now, plain = _as_flags(getattr(options, section), section), _as_flags(getattr(without, section), section)
            then = now | _as_flags(override(getattr(options, section), values, self.label), section)
            kept += [f"{flag} {then[flag]}" for flag in now if now[flag] == then[flag] != plain[flag]]
            changed += [f"{flag} {now[flag]} (was {then[flag]})" for flag in now if now[flag] != then[flag]]
        if "model" not in self.values["embed"]:
            now = _as_flags(options.embed, "embed")
            changed += [f"{flag} {now[flag]} (was {then})" for name in ("model", "pretrained")
                        if now[flag := f"--{_FLAG_PREFIXES['embed']}{name}"] != (then := self.encoder[name])
                        and then not in {"local-dir", "file"}]  # the description does not say where these are
        if kept:
            _log.info("%s: these settings of %s stay, for the command names no others: %s", verb, self.label,
                      " ".join(kept))
        if changed:
            _log.warning("%s: the command has other settings than %s: %s", verb, self.label, ", ".join(changed))


def _as_flags(section: Any, name: str) -> dict[str, str]:
    return dict(_flags(asdict(section), _FLAG_PREFIXES[name]))


def _flags(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flags(value, f"{prefix}{name}.")
        else:
            items = value if isinstance(value, tuple) else (value,)
            text = " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in items)  # 100.0 is 100
            yield f"--{prefix}{name.replace('_', '-')}", text if text and " " not in text else repr(text)


def read_published_settings(root: str, name: str, settings: EmbedConfig, *, scores: bool = False,
                            keys: ReleaseKeys | None = None) -> PublishedSettings | None:
    """The settings of the published version of a dataset; None if nothing is published.

    `settings`: those of the command. An encoder that they name is taken as it is. `scores`: the command names scores.
    ValueError if the version has an encoder in a file, or hides rows by scores, and the command does not name these.
    A damaged version gives None and a warning, because a rebuild replaces it.
    """
    if read_pointer(storage.normalize(root), name) is None:
        return None
    try:
        published = Published.load(root, name, keys)
    except DamagedPointer:  # the command refuses it later, with the way back
        return None
    if published.is_removed:
        return None
    try:
        dataset = published.open()
        sections = {stage: dataset.manifest(stage) for stage in ("shards", "embeddings", "index")}
        hide = dataset.manifest("tombstones")["section"].get("hide", "") if dataset.is_sealed("tombstones") else ""
    except ValueError as error:
        _log.warning("the settings of the published %s cannot be read, so those of the recipe are used: %s", name,
                     storage.first_line(error))
        return None
    label = f"{name}@{published.version}"
    if hide and not scores and (found := [score for score in list_scores(dataset) if score in hide]):
        raise ValueError(f"{label} hides rows by scores ({hide}), and the command does not name the heads of "
                         f"{', '.join(found)}\nhint: --scores NAME=HEAD as then; or --hide '' --recipe NAME")
    index = sections["index"]
    return PublishedSettings(label, {
        "shard": _known(ShardConfig, sections["shards"]["section"]),
        "embed": _embedding(label, dataset, settings),
        "index": {key: read_stored_size(value) if key in SIZES else value for key, value in _known(
            IndexConfig, index["info"].get("training_settings", {}) | index["section"]).items()},
        "rebuild": {"hide": hide}}, dataset_encoder(dataset))


def _known(kind: type, section: dict[str, Any]) -> dict[str, Any]:
    """The settings of a stored section that this program has."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in section.items() if name in names}


def _embedding(label: str, dataset: Dataset, settings: EmbedConfig) -> dict[str, Any]:
    """Encoder and precision of a version; only what the command does not name."""
    section = dataset.manifest("embeddings")["section"]
    values = {name: value for name, value in _known(EmbedConfig, section).items() if name not in _SPEED_ONLY}
    if _names_encoder(settings):
        return values
    encoder = encoder_of(label, dataset_encoder(dataset), settings.clip())
    return values | {"model": encoder.model, "pretrained": encoder.pretrained}


def _names_encoder(settings: ClipConfig) -> bool:
    return (settings.model, settings.pretrained) != (ClipConfig.model, ClipConfig.pretrained)


def choose_encoder(root: str, name: str, settings: EmbedConfig) -> ClipConfig:
    """The encoder of the settings if they name one, or else of the published version or of the newest finished run.

    Then this run can sample. ValueError if the weights of the encoder are in a file that no flag names.
    """
    default = settings.clip()
    if _names_encoder(settings):
        return default
    published = Published.load(root, Dataset.parse(root, name).name)
    if published.version:
        return encoder_of(published.name, dataset_encoder(published.open()), default)
    run = find_newest_run(root)
    return encoder_of(f"the run {run.name}", run.encoder(), default) if run else default
