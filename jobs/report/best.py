"""The best images of the best run, which open the report."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from jobs.evaluation import summary
from jobs.report.collect import RootContents
from jobs.report.render import Album, InlineImage, render
from jobs.report.samples import read_images, read_samples
from jobs.runs.run import Run
from jobs.sampling import queries
from pipeline import storage

_UNKNOWN = -1.0, 0.0  # accuracy and chance
_REQUESTS = 3
_MOST_IMAGES = 8
"""Images of one request, or requests if there is one database."""


def best_run_first(root: RootContents) -> list[Run]:
    """The runs: first those with the best style accuracy in an evaluation, then those with the most steps."""
    return sorted(root.runs, key=lambda run: (_accuracy(root, run)[0], _steps(root, run)), reverse=True)


def _accuracy(root: RootContents, run: Run) -> tuple[float, float]:
    """The best style accuracy of a run, and that of chance; (-1, 0) without one.

    An evaluation with a judge near chance does not count.
    """
    return max((_evaluated(root, f"{run.path}/evaluations/{name}") for name in root.evaluations(run)),
               default=_UNKNOWN)


def _evaluated(root: RootContents, path: str) -> tuple[float, float]:
    manifest = root.manifest(path)
    if not manifest or "database" not in manifest["info"]:
        return _UNKNOWN
    try:
        document = root.evaluation(path)
        if summary.is_weak(document, "judge"):
            return _UNKNOWN
        return manifest["info"]["database"], 1 / len(document["styles"])
    except (ValueError, OSError, LookupError, TypeError):  # its own section names the damage
        return _UNKNOWN


def _steps(root: RootContents, run: Run) -> int:
    return max((int(name) for name in root.checkpoints(run) if name.isdigit()), default=0)


def best_images(root: RootContents, album: Album) -> Markup | None:
    """Images of the best run that has samples: the requests whose neighbors are nearest. None without samples.

    They are of the samples with the most databases, the newest of equal ones.
    """
    for run in best_run_first(root):
        folders = [storage.join(root.address, run.path, "samples", name) for name in root.newest_samples(run)]
        if sets := [(folder, read_samples(root, folder)["pictures"]) for folder in folders]:
            folder, entries = max(sets, key=lambda samples: _extent(samples[1]))
            return _render(root, run, folder, entries, album)
    return None


def _extent(entries: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """The databases and requests of samples, as far as the report shows them at its top."""
    return (min(len({entry["database"] for entry in entries}), _MOST_IMAGES),
            min(len({entry["position"] for entry in entries}), _REQUESTS))


def _render(root: RootContents, run: Run, folder: str, entries: list[dict[str, Any]], album: Album) -> Markup:
    by_request: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        by_request[entry["position"]].append(entry)
    nearest = sorted(by_request.values(), key=_similarity, reverse=True)
    if len(nearest[0]) == 1:
        chosen = [entry for request in nearest[:_MOST_IMAGES] for entry in request]
        groups = [("", [(queries.query_title(entry), entry) for entry in chosen])]
    else:
        # A prompt may have several requests, each with its own noise. The nearest of them stands for it.
        by_title = {queries.query_title(request[0]): request for request in reversed(nearest)}
        groups = [(title, [(entry["database"], entry) for entry in request[:_MOST_IMAGES]])
                  for title, request in list(reversed(by_title.items()))[:_REQUESTS]]
    data = read_images(folder, [entry | {"neighbors": []} for _, tiles in groups for _, entry in tiles])
    rows = [(title, [(label, _tile(entry, data[entry["file"]], album)) for label, entry in tiles])
            for title, tiles in groups]
    accuracy, chance = _accuracy(root, run)
    several = sum(bool(root.newest_samples(other)) for other in root.runs) > 1
    return render("best.html", run=run.name, rows=rows, steps=_steps(root, run), requests=len(by_request),
                  accuracy=accuracy if accuracy >= 0 else None, chance=chance, several=several)


def _tile(entry: dict[str, Any], data: bytes | None, album: Album) -> InlineImage:
    alt = f"{queries.query_title(entry)}, neighbors from {entry['database']}"
    return album.image(data, alt, f"{alt}\nseed {entry['seed']}, checkpoint step {entry['checkpoint']['step']}")


def _similarity(request: Sequence[dict[str, Any]]) -> float:
    """The mean similarity of the neighbors of a request, over all databases."""
    scores = [neighbor["score"] for entry in request for neighbor in entry["neighbors"]]
    return sum(scores) / len(scores) if scores else -1.0
