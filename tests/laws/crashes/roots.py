"""Roots to work on, the commands that change them, and the laws that hold afterwards."""

import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from safetensors.numpy import save_file

from pipeline import storage
from pipeline.embeddings.clip_weights import ClipConfig, describe_encoder
from pipeline.storage import is_local
from pipeline.takedowns import takedown_list
from tests.laws.crashes.commands import Commands, Ended
from tests.laws.crashes.states import describe_state, list_uploads
from tests.model.weights import golden_first_stage
from tests.pipeline import synthetic

NAME, MADE_BY_HAND = "art", "plain"
REMOVE_PUBLISHED = "rm-published"
FIRST_STAGE = "first-stage"
FORGOTTEN = "flat/brown-ring.png"
_SETTINGS = ("--image-size", "32", "--format", "png", "--samples-per-shard", "4")
_DOCUMENTED = {0, 1, 2}
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}|probe-[0-9a-f]{16}")


@dataclass(frozen=True)
class Place:
    """A root with its source, a folder for outputs and what runs the commands."""

    commands: Commands
    folder: Path
    root: str
    known: set[tuple[Any, ...]] = field(default_factory=set)
    """The checks that a state has passed, here or at another copy of the same template."""
    writes: dict[tuple[str, bool], int] = field(default_factory=dict)
    """The writes that a verb makes on a copy of the same template, by verb and by whether the root is local."""

    @property
    def source(self) -> Path:
        """The images that `rebuild` publishes."""
        return self.folder / "source"

    @property
    def head(self) -> Path:
        """A model that scores vectors of the bundled encoder."""
        path = self.folder / "head.safetensors"
        if not path.exists():
            save_file({"weight": np.ones((1, describe_encoder(ClipConfig())["dim"]), np.float32)}, path)
        return path

    def arguments(self, verb: str) -> tuple[str, ...]:
        """The command line of a verb of `VERBS` or `RUNS`."""
        return tuple(word.format(source=self.source, forgotten=FORGOTTEN, first_stage=self.folder / FIRST_STAGE,
                                 head=self.head) for word in (VERBS | RUNS)[verb])

    def run(self, arguments: tuple[str, ...], **how: Any) -> Ended:
        """Run a command that must end well."""
        ended = self.commands.run(self.folder, self.root, arguments, **how)
        assert ended.code == 0, ended
        return ended

    def paint(self, name: str, seed: int) -> None:
        """Add an image to the source."""
        synthetic.noise(32, 32, seed).save(self.source / name)


VERBS: dict[str, tuple[str, ...]] = {
    "rebuild": ("rebuild", NAME, "--source", "{source}", *_SETTINGS, "--query-count", "4", "--min-overlap", "0.3",
                "--local"),
    "rollback": ("rollback", NAME, "--to", "v1"),
    "gc": ("gc", NAME, "--keep", "0", "--lease", "0"),
    "forget": ("forget", "--url", "{forgotten}"),
    "repair": ("repair", NAME),
    "repair-requests": ("repair", NAME, "--accept-lost-requests"),
    "repair-list": ("repair", NAME, "--accept-lost-requests"),
    "repair-places": ("repair", NAME),
    "repair-publications": ("repair", NAME, "--accept-lost-publications"),
    "rm": ("rm", MADE_BY_HAND, "--yes"),
    REMOVE_PUBLISHED: ("rm", NAME, "--published", "--yes"),
    "shard": ("shard", MADE_BY_HAND, "--source", "{source}", *_SETTINGS, "--overwrite", "--local"),
    "embed": ("embed", MADE_BY_HAND, "--captions", "--overwrite", "--local"),
    "score": ("score", MADE_BY_HAND, "--head", "warmth={head}", "--overwrite", "--local"),
    "index": ("index", MADE_BY_HAND, "--overwrite", "--local"),
    "neighbors": ("neighbors", MADE_BY_HAND, "--overwrite", "--local"),
}
"""Every kind of command that changes datasets, with its command line. `repair` has one for each kind of damage."""
_TRAIN = ("--dataset", MADE_BY_HAND, "--steps", "4", "--global-batch", "4", "--checkpoint-every", "2", "--precision",
          "fp32", "--image-size", "16", "--model-channels", "32", "--local")
RUNS: dict[str, tuple[str, ...]] = {
    "latents": ("latents", MADE_BY_HAND, "--first-stage", "{first_stage}", "--local"),
    "train": ("train", "run", *_TRAIN),
    "sample": ("sample", "trained", "--prompt", "a red circle", "--database", MADE_BY_HAND, "--steps", "2", "--local"),
}
"""Commands that need what `make_trained` adds to a root."""
PUBLISHING = ("rebuild", "rollback", "gc", "forget", "repair")
STAGES = ("shard", "embed", "score", "index", "neighbors")


def make_template(commands: Commands, folder: Path) -> Place:
    """A dataset with two published versions and a source that has changed since, and a dataset made by hand."""
    place = Place(commands, folder, str(folder / "root"))
    synthetic.drawings(place.source, subjects=8, size=32, styles=("flat",))
    place.run(place.arguments("rebuild"))
    place.paint("second.png", 2)
    place.run((*place.arguments("rebuild"), "--full"))
    for verb in STAGES:
        place.run(place.arguments(verb))
    place.paint("third.png", 3)
    return place


def make_trained(template: Place, commands: Commands, folder: Path) -> Place:
    """A copy of a template with a first stage beside its root, and with a training run of four steps."""
    place = replace(copy_place(template, folder), commands=commands)
    golden_first_stage.save(folder / FIRST_STAGE)
    place.run(("train", "trained", *_TRAIN))
    return place


def copy_place(template: Place, folder: Path, bucket: str = "") -> Place:
    """A copy of a template with the times of its files, or with its root in a bucket."""
    if not bucket:
        shutil.copytree(template.folder, folder, ignore=shutil.ignore_patterns("output-*", "cache", "scratch"))
        return replace(template, folder=folder, root=str(folder / "root"))
    shutil.copytree(template.folder, folder, ignore=shutil.ignore_patterns("output-*", "cache", "scratch", "root"))
    root = f"{bucket}/{folder.name}"
    fsspec.filesystem("s3").put(template.root, root, recursive=True)
    return replace(template, folder=folder, root=root)


def prepare_place(template: Place, folder: Path, verb: str, bucket: str = "") -> Place:
    """A copy of a template in which a verb has something to do: `repair` has what it restores or accepts."""
    place = copy_place(template, folder, bucket)
    if damage := _DAMAGE.get(verb):
        damage(place)
    return place


def _damage_pointer(place: Place) -> None:
    storage.put_bytes(b"", f"{place.root}/datasets/{NAME}/current.json")


def _lose_requests(place: Place) -> None:
    place.run(place.arguments("forget"))
    storage.remove_tree(f"{place.root}/takedowns")
    storage.remove(f"{place.root}/{takedown_list.NAME}")


def _change_list(place: Place) -> None:
    """Neither the list nor the copy of its request is what the pointer counts."""
    place.run(place.arguments("forget"))
    for url in (f"{place.root}/{takedown_list.NAME}", f"{place.root}/takedowns/000001.json"):
        storage.put_bytes(storage.read_bytes(url).replace(FORGOTTEN.encode(), b"flat/other.png"), url)


def _swap_entries(place: Place) -> None:
    """Each of the two entries of the history is in the place of the other."""
    first, second = (f"{place.root}/published/{NAME}/{number:06d}.json" for number in (1, 2))
    entries = storage.read_bytes(first), storage.read_bytes(second)
    storage.put_bytes(entries[1], first)
    storage.put_bytes(entries[0], second)


def _lose_publication(place: Place) -> None:
    """The pointer names the first publication again, and this machine has seen the second one."""
    place.run(("search", NAME))
    history = f"{place.root}/published/{NAME}"
    storage.put_bytes(storage.read_bytes(f"{history}/000001.json"), f"{place.root}/datasets/{NAME}/current.json")
    storage.remove(f"{history}/000002.json")


_DAMAGE: dict[str, Callable[[Place], None]] = {"repair": _damage_pointer, "repair-requests": _lose_requests,
                                               "repair-list": _change_list, "repair-publications": _lose_publication,
                                               "repair-places": _swap_entries}


def count_writes(template: Place, folder: Path, verb: str, bucket: str = "") -> int:
    """How many writes a verb makes when it is alone. Counted once for each template."""
    if (verb, not bucket) not in template.writes:
        place = prepare_place(template, folder, verb, bucket)
        template.writes[verb, not bucket] = place.run(place.arguments(verb)).writes
    return template.writes[verb, not bucket]


def sweep(check: Callable[[int], bool], *, stride: int = 1) -> None:
    """Check the laws at every write of a command, or at every third one with a `stride` of 3.

    The sweep ends when `check` says that there is no write of that number. RDM_SWEEP_STRIDE replaces the stride.
    AssertionError with all faults, and how many writes were checked.
    """
    stride = int(os.environ.get("RDM_SWEEP_STRIDE") or stride)
    failed = []
    for number in itertools.count(0, stride):
        try:
            if not check(number):
                break
        except AssertionError as error:
            failed.append(f"{number}: {error}")
    checked = f"{number // stride} writes, from 0 to {number - stride} in steps of {stride}"
    print(f"checked: {checked}")
    assert number, "the command writes nothing"
    assert not failed, f"{len(failed)} of {checked}:\n" + "\n".join(failed)


def check_end(ended: Ended) -> None:
    """A command that was not killed ends with a documented exit code, and with a message if that is not 0."""
    assert ended.code in _DOCUMENTED, ended
    assert "Traceback" not in ended.output, ended
    assert not ended.code or "error: " in ended.output, ended


def check_published(place: Place, *, unfinished: str = "") -> None:
    """The published version is whole, and verify finds no fault in it. `unfinished`: the verb that was killed.

    A published dataset that was removed says so. A state that was checked before is not checked again.
    """
    check = ("published", unfinished, is_local(place.root), describe_state(place.root, place.folder))
    if check in place.known:
        return
    searched = place.commands.run(place.folder, place.root, ("search", NAME))
    if unfinished == REMOVE_PUBLISHED and searched.code and f"{NAME} was removed on " in searched.output:
        place.run(("verify",))
        return
    if unfinished.startswith("repair") and searched.code == 1 and f"repair {NAME}" in searched.output:
        return  # the pointer is not repaired yet, and readers say so
    assert searched.code == 0, searched
    verified = place.commands.run(place.folder, place.root, ("verify", "--only", f"datasets/{NAME}"))
    faults = [line for line in verified.output.splitlines() if line.startswith("datasets/")]
    assert verified.code == 0 or (unfinished == "forget" and faults and all(
        "images of the takedown list" in fault for fault in faults)), verified
    place.known.add(check)


def settle(place: Place, *, stages: bool) -> None:
    """The next rebuild and gc work, and then no fault is found. No temporary file is left after an hour.

    A state that settled before is not settled again.
    """
    check = ("settled", stages, is_local(place.root), describe_state(place.root, place.folder))
    if check in place.known:
        return
    place.paint("settled.png", 9)
    rebuilt = place.run(place.arguments("rebuild"))
    assert '"published"' in rebuilt.output and '"superseded"' not in rebuilt.output, rebuilt
    if stages:
        for verb in STAGES:
            place.run(place.arguments(verb))
    _age_temporary_files(place)
    place.run(place.arguments("gc"), all_abandoned=not is_local(place.root))
    place.run(("search", NAME))
    place.run(("verify",))
    assert not list(temporary_files(place)), list(temporary_files(place))
    place.known.add(check)


def temporary_files(place: Place) -> Iterator[str]:
    """Files that are no part of a result: unfinished files and uploads, leases, and scratch files."""
    file_system, path = fsspec.core.url_to_fs(place.root)
    file_system.invalidate_cache()
    for file in file_system.find(path):
        name = file.rpartition("/")[2]
        if "/leases/" in file or _TEMPORARY.fullmatch(name):
            yield file
    yield from list_uploads(place.root)
    for scratch in (place.folder / "scratch").glob("*"):
        yield str(scratch)


def _age_temporary_files(place: Place) -> None:
    two_hours_ago = time.time() - 7200
    for folder in (place.root, str(place.folder / "scratch")):
        for path in Path(folder).rglob("*") if is_local(folder) else ():
            if _TEMPORARY.fullmatch(path.name) or path.parent.name == "leases" or folder != place.root:
                os.utime(path, (two_hours_ago, two_hours_ago))
