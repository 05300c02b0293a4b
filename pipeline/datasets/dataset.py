"""The address of a dataset, and its sealed folders."""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline import storage
from pipeline.datasets.names import MOST_LETTERS, is_name
from pipeline.datasets.pointer import parse_pointer, read_pointer
from pipeline.stages.manifest import NotSealed, read_manifest, sealed_input
from pipeline.storage import DamagedFile

_T = TypeVar("_T")

DEFAULT_VERSION = "v1"
RELEASED_STAGES = ("shards", "embeddings", "text_embeddings", "index", "tombstones")
"""The stages that a release stands for."""
_MOST_NAMES = 20  # in an error
_CHECKED: set[tuple[str, str]] = set()  # files of published versions, and their hashes


def list_names(root: str) -> list[str]:
    """The names of the datasets below a root, without published ones that `rm` has removed."""
    return [name for name in storage.list_folders(storage.join(root, "datasets"))
            if "removed" not in (parse_pointer(read_pointer(root, name) or b"") or {})]


def refuse_unknown(root: str, name: str, command: str = "python -m jobs ls") -> None:
    """ValueError if there is no dataset `name` below a root. It names the datasets that there are.

    The hint is a name that is spelled like it, or else `command`.
    """
    if any(name in storage.list_folders(storage.join(root, folder)) for folder in ("datasets", "published")):
        return
    names = list_names(root)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    close = difflib.get_close_matches(name, names, n=1)
    raise ValueError(f"there is no dataset {name} in {root}, which has {', '.join(names[:_MOST_NAMES]) or 'none'}{more}"
                     f"\nhint: {f'did you mean {close[0]}?' if close else command}") from None


@dataclass(frozen=True)
class Dataset:
    """The address of a dataset: root, name and version."""

    root: str
    name: str
    version: str = DEFAULT_VERSION
    trusted: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)
    """The sha256 of the manifest of each stage of a published version. Readers check it."""
    takedowns: int = field(default=0, compare=False, repr=False)
    """The least number of requests in the takedown list, according to the pointer of a published version."""
    takedown_list: tuple[int, str] = field(default=(0, ""), compare=False, repr=False)
    """The requests of the takedown list that the pointer has a hash of, and that; "" without one."""
    signed: bool = field(default=False, compare=False, repr=False)
    """The release has an accepted signature: stages that it does not name are refused."""

    @classmethod
    def parse(cls, root: str, text: str) -> "Dataset":
        """`name` or `name@version` below `root`."""
        name, _, version = text.partition("@")
        for part in (name, version or DEFAULT_VERSION):
            if len(part) > MOST_LETTERS:
                raise ValueError(f"{part[:20]}... has {len(part)} letters: expected at most {MOST_LETTERS}\n"
                                 f"hint: a shorter dataset name, as in ukiyo-e")
            if not is_name(part):
                raise ValueError(f"{text!r} is not a dataset name\nhint: letters, digits, '.', '_' and '-', "
                                 f"as in ukiyo-e or ukiyo-e@v2")
        return cls(storage.normalize(root), name, version or DEFAULT_VERSION)

    @property
    def label(self) -> str:
        """The name as the user writes it."""
        return self.name if self.version == DEFAULT_VERSION else f"{self.name}@{self.version}"

    @property
    def name_in_commands(self) -> str:
        """The label, with the version where the bare name means another one that is published."""
        if self.version != DEFAULT_VERSION:
            return self.label
        data = b""
        with contextlib.suppress(ValueError, OSError):  # this is for a hint about something else
            data = read_pointer(self.root, self.name) or b""
        published = parse_pointer(data) if data else None
        return f"{self.name}@{self.version}" if published and published["version"] != self.version else self.label

    def next_version(self) -> "Dataset":
        """The next version: v2 after v1."""
        stem, number = re.fullmatch(r"(.*?)(\d*)", self.version).groups()  # type: ignore[union-attr]
        return Dataset(self.root, self.name, f"{stem}{int(number or 1) + 1}")

    def other_version(self, version: str) -> "Dataset":
        """Another version of the dataset, as a plan names it; DamagedFile if that is no name of a version."""
        if not is_name(version):
            raise DamagedFile(f"a plan of {self.label} takes files from {version!r}, which is no version\n"
                              f"hint: python -m jobs verify --only datasets/{self.name}")
        return Dataset(self.root, self.name, version)

    def path(self, stage_name: str) -> str:
        """The folder of a stage, below the root."""
        return f"datasets/{self.name}/{self.version}/{stage_name}"

    def folder(self, stage_name: str) -> str:
        """The address of the folder of a stage."""
        return storage.join(self.root, self.path(stage_name))

    def command(self, stage_name: str) -> str:
        """The command that would finish a stage of this dataset, for hints."""
        verb, _, database = stage_name.partition("/")
        verb, more = {"shards": ("shard", " --source FOLDER"), "embeddings": ("embed", ""),
                      "text_embeddings": ("embed", " --captions"),
                      "tombstones": ("index", " --tombstone KEYS_FILE"),
                      "scores": ("score", f" --head {database}=HEAD"),
                      "neighbors": ("neighbors", " --database ")}.get(verb, (verb, ""))
        if verb == "neighbors":
            more += Dataset.parse(self.root, database).name_in_commands
        return f"python -m jobs {verb} {self.name_in_commands}{more} --root {storage.quote(self.root)}"

    def manifest(self, stage_name: str) -> dict[str, Any]:
        """The manifest of a sealed stage; ValueError with the command that would finish it."""
        with self._unsealed_explained(stage_name):
            return read_manifest(self.folder(stage_name), partial(self.command, stage_name),
                                 self._published_hash(stage_name))

    def is_sealed(self, stage_name: str) -> bool:
        """Whether a stage has ended; ValueError if it is missing though it was published."""
        sealed = storage.exists(storage.join(self.folder(stage_name), "manifest.json"))
        if sealed:
            self._published_hash(stage_name)
        else:
            self._refuse_lost(stage_name)
        return sealed

    def _refuse_lost(self, stage_name: str) -> None:
        """DamagedFile if a stage that has no manifest is part of the release."""
        if stage_name in dict(self.trusted):
            raise DamagedFile(f"{self.folder(stage_name)} is part of the published {self.name}@{self.version} and has "
                              f"no manifest.json\nhint: python -m jobs verify --quick --only datasets/{self.name}")

    def identity(self, stage_name: str) -> dict[str, Any]:
        """How a later stage names this one among its inputs."""
        with self._unsealed_explained(stage_name):
            return sealed_input(self.root, self.path(stage_name), partial(self.command, stage_name),
                                self._published_hash(stage_name))

    @contextlib.contextmanager
    def _unsealed_explained(self, stage_name: str) -> Iterator[None]:
        """If a published stage is missing, say so. If the dataset is missing, name the datasets that there are."""
        try:
            yield
        except NotSealed:
            self._refuse_lost(stage_name)
            refuse_unknown(self.root, self.name, self.command("shards"))
            raise

    def _published_hash(self, stage_name: str) -> str | None:
        """The sha256 under which the manifest of a stage was published; None if it is not part of the release.

        ValueError if a stage was added to a signed release.
        """
        sha256 = dict(self.trusted).get(stage_name)
        if sha256 is None and self.signed and stage_name in RELEASED_STAGES:
            raise DamagedFile(f"{self.folder(stage_name)} is not part of the signed release of "
                              f"{self.name}@{self.version}\nhint: remove it, or publish a version that has it")
        return sha256

    def fetch(self, stage_name: str, entry: dict[str, Any], *, check: bool = False) -> Path:
        """A local path of a file in the manifest of a stage."""
        url = storage.manifest_file_url(self.folder(stage_name), entry["name"])
        return storage.fetch(url, entry, check=check or self._suspect(url, entry))

    def open_file(self, stage_name: str, entry: dict[str, Any], open_local: Callable[[Path], _T]) -> _T:
        """Open the local path of a file in the manifest of a stage."""
        url = storage.manifest_file_url(self.folder(stage_name), entry["name"])
        return storage.fetch_and_open(url, entry, open_local, check=self._suspect(url, entry))

    def _suspect(self, url: str, entry: dict[str, Any]) -> bool:
        """Whether a published file must still be checked against its hash, once in each process."""
        if not self.trusted or (url, entry["sha256"]) in _CHECKED:
            return False
        _CHECKED.add((url, entry["sha256"]))
        return True


def datasets(root: str, denied: dict[str, Exception] | None = None) -> list[Dataset]:
    """Every version of every dataset that has a folder below a root, sealed or not.

    Datasets that this user may not list are left out if `denied` is a dict, which gets the errors by name.
    """
    root, found = storage.normalize(root), []
    for name in storage.list_folders(storage.join(root, "datasets")):
        try:
            found += [Dataset(root, name, version)
                      for version in storage.list_folders(storage.join(root, "datasets", name))]
        except PermissionError as error:
            if denied is None:
                raise
            denied[name] = error
    return found


def file_of(record: dict[str, Any], suffix: str) -> dict[str, Any]:
    """The one file of a record or manifest whose name ends so."""
    entries = [entry for entry in record["files"] if entry["name"].endswith(suffix)]
    assert len(entries) == 1, (suffix, record["files"])
    return entries[0]
