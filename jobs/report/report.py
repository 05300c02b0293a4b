"""Write the report of a root: samples, evaluations, losses, neighbors, datasets and stages on one HTML page."""

import logging
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from markupsafe import Markup

from jobs.report import evaluations, images, samples, tables
from jobs.report.best import best_images, best_run_first
from jobs.report.collect import RootContents
from jobs.report.render import Album, render, render_page
from jobs.telemetry.units import format_bytes, format_count
from pipeline import storage
from pipeline.stages.manifest import code_revision

TITLE = "Retrieval-augmented diffusion"
_SAMPLES_PER_RUN = 4
_NEIGHBOR_LISTS = 3
_log = logging.getLogger(__name__)


def write_report(root: str, out: str) -> None:
    """Write the report on `root` (a path or s3:// URL) to `out`. It has sections only for existing results.

    DamagedFile if parts of it could not be read. The report is written then, too, and has the reasons.
    """
    collected, album = RootContents(root), Album()
    # This part opens the page, so its images are added to the size limit of the page first.
    best = collected.try_part("The best images", best_images, collected, album)
    parts: list[tuple[str, str, Callable[[], Markup | None]]] = [
        ("samples", "Samples", lambda: _samples(collected, album)),
        ("finding", "The finding", lambda: _evaluations(collected, album)),
        ("loss", "Training", lambda: _training(collected, album)),
        ("neighbors", "Neighbors", lambda: _neighbors(collected, album)),
        ("datasets", "Datasets", lambda: _datasets(collected, album)),
        ("indices", "Indices", lambda: _indices(collected)),
        ("stages", "Stages", lambda: _stages(collected)),
        ("settings", "Encoder and settings", lambda: _settings(collected)),
    ]
    is_empty = not (collected.datasets or collected.runs or collected.stages or collected.broken)
    sections = [{"anchor": anchor, "title": title, "body": body}
                for anchor, title, make in parts if (body := collected.try_part(title, make))]
    now = datetime.now(UTC)
    data = render_page(title=TITLE, written=f"{now.day} {now:%B %Y}, {now:%H:%M} UTC", code=code_revision(),
                       root=storage.redact_credentials(collected.address), is_empty=is_empty, sections=sections,
                       best=best, failures=collected.try_part("The failures", tables.failures, collected),
                       headline=collected.try_part("The headline", tables.headline, collected), left_out=album.left_out)
    storage.put_bytes(data, out)
    _log.info("report: %s, %s", out, format_bytes(len(data)))
    if collected.unreadable:
        raise storage.DamagedFile(f"{out} is written, but {format_count(len(collected.unreadable), 'part')} of it "
                                  f"could not be read: {collected.unreadable[0]}\nhint: python -m jobs verify")


def _samples(root: RootContents, album: Album) -> Markup | None:
    grids, more = [], 0
    for run in best_run_first(root):
        newest = root.newest_samples(run)
        grids += [root.try_part(f"{run.path}/samples/{name}", samples.sample_grid, root, run, name, album)
                  for name in newest[:_SAMPLES_PER_RUN]]
        more += len(newest[_SAMPLES_PER_RUN:])
    return _section("The same prompts with different databases: the style comes from the neighbors.", grids,
                    f"The root has {format_count(more, 'older folder')} of samples." if more else "")


def _evaluations(root: RootContents, album: Album) -> Markup | None:
    figures = [root.try_part(f"{run.path}/evaluations/{name}", evaluations.evaluation, root, run, name, album)
               for run in root.runs for name in root.evaluations(run)]
    return _section("Does the style follow the database, or what the prompt says?", figures)


def _training(root: RootContents, album: Album) -> Markup | None:
    figures = [figure for run in root.runs
               for figure in (root.try_part(run.path, tables.loss, root, run, album),
                              root.try_part(run.path, evaluations.validation, root, run, album))]
    return _section("How the model learned to remove noise from images.", figures)


def _neighbors(root: RootContents, album: Album) -> Markup | None:
    used = {(section.get("dataset"), section.get("database")) for section in
            ((root.plan(run.path) or {}).get("section", {}) for run in root.runs)}
    every = [(dataset, label) for dataset in root.datasets for label in root.databases(dataset)]
    # The lists that a run was trained with come first.
    every.sort(key=lambda pair: (pair[0].label, pair[1]) not in used)
    lists = [root.try_part(dataset.path(f"neighbors/{label}"), images.neighbors, root, dataset, label, album)
             for dataset, label in every[:_NEIGHBOR_LISTS]]
    more = len(every) - _NEIGHBOR_LISTS
    return _section("The results of retrieval: images of a dataset beside the nearest images of a database.", lists,
                    f"The root has {format_count(more, 'more list')}." if more > 0 else "")


def _datasets(root: RootContents, album: Album) -> Markup | None:
    sheets = [root.try_part(dataset.path("shards"), images.contact_sheet, root, dataset, album)
              for dataset in root.current]
    more = len(root.datasets) - len(root.current)
    return _section("Images spread evenly over each dataset, with their captions.", sheets,
                    f"The root has {format_count(more, 'other version')} of these datasets." if more else "")


def _indices(root: RootContents) -> Markup | None:
    return _section("The compressed indices that the searches for neighbors use.",
                    [root.try_part("The indices", tables.indices, root),
                     root.try_part("The tuning", tables.tuning, root)])


def _stages(root: RootContents) -> Markup | None:
    return _section("Every folder below the root, with its progress and its cost.",
                    [root.try_part("The states", tables.stages, root)])


def _settings(root: RootContents) -> Markup | None:
    return _section("The encoder of images and prompts, and the settings of the runs.",
                    [root.try_part("The encoders", tables.encoders, root),
                     root.try_part("The settings", tables.runs, root)])


def _section(intro: str, parts: Iterable[Markup | None], more: str = "") -> Markup | None:
    """The body of a section. None if it has no part."""
    there = [part for part in parts if part is not None]
    return render("section.html", intro=intro, parts=there, more=more) if there else None
