"""The target that a user names in a root: a dataset, a version or stage of it, a run, or a part of a run."""

import difflib
from collections.abc import Iterable

from pipeline import storage
from pipeline.datasets.dataset import refuse_unknown
from pipeline.datasets.names import is_name

_KINDS = ("datasets", "runs", "pictures")


def target_path(root: str, text: str) -> str:
    """The path below a root of NAME, NAME@VERSION, or a path as `status` prints it, such as runs/RUN.

    The path may begin with the root, as a shell completes it. ValueError if it leads out of the folders of a root.
    """
    below = text.rstrip("/")
    if "/" in below and below.partition("/")[0] not in _KINDS:
        below = storage.normalize(below).removeprefix(f"{storage.normalize(root)}/")
    if "/" not in below and below not in _KINDS:
        name, at, version = below.partition("@")
        below = f"datasets/{name}/{version}" if at and is_name(version) else f"datasets/{below}"
    kind, *names = below.split("/")
    # The folder of neighbors in a database is NAME@VERSION.
    if kind not in _KINDS or not names or not all(is_name(name.replace("@", "", number > 2))
                                                  for number, name in enumerate(names)):
        raise ValueError(f"{text!r} is no dataset, run or stage: expected NAME, NAME@VERSION or a path of this root\n"
                         f"hint: python -m jobs ls")
    return below


def is_within(path: str, folder: str) -> bool:
    """Whether a path below a root is a folder or lies in it."""
    return f"{path}/".startswith(f"{folder}/")


def refuse_unknown_target(root: str, path: str) -> None:
    """ValueError if a path below a root is or lies in a dataset that does not exist."""
    kind, name, *_ = path.split("/")
    if kind == "datasets":
        refuse_unknown(root, name)


def suggest(path: str, stages: Iterable[str]) -> str:
    """The hint for a path that does not exist: a folder that is spelled like it, or the command that lists them.

    `stages`: the stage folders below the root.
    """
    kind, _, rest = path.partition("/")
    names = {"/".join(parts[:depth]) for first, *parts in (stage.split("/") for stage in stages) if first == kind
             for depth in range(1, len(parts) + 1)}
    close = difflib.get_close_matches(rest, sorted(names), n=1)
    return f"did you mean {kind}/{close[0]}?" if close else "python -m jobs ls"
