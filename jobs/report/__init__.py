"""One page on everything below a root: what was drawn, learned, found and made, in one file that needs no other."""

import logging
from collections.abc import Callable, Iterable

from jobs.report import finding, pictures, samples, tables
from jobs.report.page import Album, Child, Html, amount, guarded, note, page, size, tag, today, together
from jobs.report.root import Root
from pipeline import storage
from pipeline.stages.manifest import code_revision

TITLE = "Retrieval-augmented diffusion"
_SAMPLES_OF_A_RUN = 4
_LISTS = 3
_log = logging.getLogger(__name__)


def write(root: str, out: str) -> None:
    """Write the report on `root` (a path or s3://) to the address `out`; what is not there is said to be absent."""
    found, album = Root(root), Album()
    parts: list[tuple[str, str, Callable[[], Html]]] = [
        ("samples", "Samples", lambda: _samples(found, album)),
        ("finding", "The finding", lambda: _finding(found, album)),
        ("loss", "Training", lambda: _loss(found, album)),
        ("neighbors", "Neighbours", lambda: _neighbors(found, album)),
        ("datasets", "Datasets", lambda: _sheets(found, album)),
        ("indices", "Indices", lambda: _indices(found)),
        ("stages", "Stages", lambda: _stages(found)),
        ("settings", "Encoder and settings", lambda: _settings(found)),
    ]
    empty = not (found.datasets or found.runs or found.stages or found.broken)
    sections = [] if empty else [tag("section", tag("h2", title), guarded(title, make), id=anchor)
                                 for anchor, title, make in parts]
    contents = None if empty else tag("nav", (tag("a", title, href=f"#{anchor}") for anchor, title, _ in parts),
                                      aria_label="Contents")
    place = storage.without_credentials(found.address)
    lede = ("A diffusion model that is shown, with every picture it learns or draws, the nearest pictures of a "
            "database. Exchange the database, and the same prompt is drawn in another style.")
    header = tag("header", tag("h1", TITLE), tag("p", lede, class_="lede"),
                 tag("p", today(), " · code ", tag("code", code_revision()), " · ", tag("code", place),
                     class_="facts"),
                 guarded("The headline", tables.headline, found), contents)
    if empty:
        sections = [note("Nothing is below this root yet: ", tag("code", "python -m jobs demo"), " fills it.")]
    if album.left_out:
        sections.append(note(f"{album.left_out:,} pictures were left out to keep this page small."))
    data = page(f"{TITLE}: report", [header, sections])
    storage.put_bytes(data, out)
    _log.info("report: %s, %s", out, size(len(data)))


def _samples(root: Root, album: Album) -> Html:
    grids, more = [], 0
    for run in root.runs:
        names = root.samples(run)
        newest = sorted(names, key=lambda name, path=run.path: _sealed(root, f"{path}/samples/{name}"), reverse=True)
        grids += [guarded(f"{run.path}/samples/{name}", samples.sample_grid, root, run, name, album)
                  for name in newest[:_SAMPLES_OF_A_RUN]]
        more += len(newest[_SAMPLES_OF_A_RUN:])
    return _section("The same prompts with different databases: the style comes from the neighbours.", grids,
                    "No samples yet", "sample RUN --prompt 'a red apple' --database NAME",
                    note(f"{amount(more, 'older folder')} of samples in the root.") if more else None)


def _sealed(root: Root, path: str) -> str:
    """When a stage was sealed, "" if it was not."""
    return (root.manifest(path) or {}).get("run", {}).get("sealed", "")


def _finding(root: Root, album: Album) -> Html:
    found = [guarded(f"{run.path}/evaluations/{name}", finding.evaluation, root, run, name, album)
             for run in root.runs for name in root.evaluations(run)]
    return _section("Does the style follow the database, or what the prompt says?", found, "No evaluation yet",
                    "evaluate RUN")


def _loss(root: Root, album: Album) -> Html:
    curves = [one for run in root.runs for one in (guarded(run.path, tables.loss, root, run),
                                                   guarded(run.path, finding.validated, run, album))]
    return _section("How the model learned to take the noise out of pictures.", curves, "No curve yet",
                    "train RUN --dataset NAME")


def _neighbors(root: Root, album: Album) -> Html:
    used = {(section.get("dataset"), section.get("database")) for section in
            ((root.plan(run.path) or {}).get("section", {}) for run in root.runs)}
    every = [(dataset, label) for dataset in root.datasets for label in root.databases(dataset)]
    # Those that a run learned from come first.
    every.sort(key=lambda one: (one[0].label, one[1]) not in used)
    lists = [guarded(dataset.path(f"neighbors/{label}"), pictures.neighbors, root, dataset, label, album)
             for dataset, label in every[:_LISTS]]
    return _section("What retrieval finds: pictures of the training set beside the nearest ones of a database.", lists,
                    "No neighbours yet", "neighbors NAME --database NAME",
                    note(f"{amount(len(every) - _LISTS, 'list')} more in the root.") if len(every) > _LISTS else None)


def _sheets(root: Root, album: Album) -> Html:
    sheets = [guarded(dataset.path("shards"), pictures.contact_sheet, root, dataset, album)
              for dataset in root.datasets]
    return _section("Pictures spread evenly over each dataset, with the captions they have.", sheets,
                    "No dataset yet", "shard NAME --source FOLDER")


def _indices(root: Root) -> Html:
    return _section("The compressed indices that neighbours are looked up in.",
                    [guarded("The indices", tables.indices, root), guarded("The tuning", tables.tuning, root)],
                    "No index yet", "index NAME")


def _stages(root: Root) -> Html:
    return _section("Every folder below the root, how far it is and what it cost.",
                    [guarded("The states", tables.stages, root)], "No stage yet", "shard NAME --source FOLDER")


def _settings(root: Root) -> Html:
    return _section("What turned pictures and prompts into vectors, and what the runs were told.",
                    [guarded("The encoders", tables.encoders, root),
                     guarded("The settings", tables.runs, root)], "Nothing embedded yet", "embed NAME")


def _section(intro: str, parts: Iterable[Child], absent: str, command: str, more: Child = None) -> Html:
    """The body of a section, or where none of its parts is there the command that makes one."""
    there = [part for part in parts if part is not None]
    if not there:
        return note(f"{absent}: ", tag("code", f"python -m jobs {command}"))
    return together([tag("p", intro, class_="intro"), there, more])
