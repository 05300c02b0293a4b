"""The evaluations and the last validation of each run."""

from typing import Any

from markupsafe import Markup

from jobs.evaluation import summary
from jobs.report.collect import RootContents
from jobs.report.render import Album, render
from jobs.runs.metrics import read_metrics
from jobs.runs.run import Run, read_shown_rows
from pipeline import storage

_WIDE = 1700
"""Pixels of the plot, enough for twice the width of the page's column on a phone and more on a desktop."""
_IMAGES = (("", "plot.png", "style accuracy", ""),
           ("database", "grid-database.png", "swapped databases", "Below: databases swapped."),
           ("prompt", "grid-prompt.png", "the prompt names the style",
            "Below: the prompt names the style. The database is that of training."))
"""For each image: the way that it shows ("" for all), its file, its alternative text, the line above it."""


def evaluation(root: RootContents, run: Run, name: str, album: Album) -> Markup | None:
    """The table, the plot and some samples of a sealed evaluation. None if it is not sealed."""
    path = f"{run.path}/evaluations/{name}"
    if root.manifest(path) is None:
        return None
    folder = storage.join(root.address, path)
    document = root.evaluation(path)
    ways = {row["way"] for row in document["ways"]}
    images = [(line, album.image(storage.read_bytes(storage.join(folder, file)), alt, side=_WIDE))
              for way, file, alt, line in _IMAGES if not way or way in ways]
    rows = [_row(row) for row in document["ways"] if row["way"] in summary.NAMES]
    return render("evaluation.html", run=run.name, name=name, changed=root.changed_inputs(path), rows=rows,
                  album=album, images=images, document=document,
                  weak=summary.describe_weak_judges(document))


def _row(row: dict[str, Any]) -> list[str]:
    styled = row["way"] != "neither"  # that way names no style
    shares = [summary.format_percent(row[judge]) if styled else "–" for judge in ("judge", "probe")]
    return [summary.NAMES[row["way"]], *shares, f"{row['clip']['mean']:.3f}", f"{row['kid']:.4f}" if styled else "–",
            f"{row['nearest']['mean']:.3f}"]


def validation(root: RootContents, run: Run, album: Album) -> Markup | None:
    """The losses and the images of a run's last validation. None if there was none.

    The images are left out if one of them must not be shown.
    """
    lines = read_metrics(run, "validation.jsonl")
    if not lines:
        return None
    last = lines[-1]
    try:
        data = storage.read_bytes(run.validated(last["step"]))
        shown = None if _shows_hidden(root, data) else data
        image = album.image(shown, "drawn in validation", side=900)
    except FileNotFoundError:  # the machine that trained could not decode the latents
        image = None
    return render("validation.html", run=run.name, last=last, image_=image)


def _shows_hidden(root: RootContents, data: bytes) -> bool:
    """Whether the grid of a validation has a row that must not be shown; an older grid does not name its rows."""
    shown = read_shown_rows(data)
    if shown is None:
        return bool(root.forgotten)
    return any(root.is_hidden(row, row["database"]) for row in shown)
