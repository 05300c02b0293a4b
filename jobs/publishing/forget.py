"""Remove images from every database: hide them immediately, drop their bytes in the next version, keep them out."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from jobs.publishing.consumers import find_consumers, find_exports_showing, find_grids_showing, find_samples_showing
from jobs.publishing.whole_versions import find_replacement, find_sign_option
from jobs.telemetry.output import fit_commands
from jobs.telemetry.units import format_count
from pipeline import storage
from pipeline.datasets.dataset import DEFAULT_VERSION, Dataset, datasets, refuse_unknown
from pipeline.datasets.pointer import DamagedPointer
from pipeline.downloads.urls import clean_url, find_host
from pipeline.neighbors.config import NeighborsConfig
from pipeline.releases import release_files
from pipeline.releases.published import Published
from pipeline.storage import DamagedFile
from pipeline.takedowns import takedown_list, takedowns
from pipeline.takedowns.takedown_list import Forgotten

_log = logging.getLogger(__name__)


class Unread(dict[str, str]):
    """Versions, datasets and `runs` that cannot be read, by label, and the reason."""

    def __init__(self) -> None:
        super().__init__()
        self.denied: list[str] = []
        """Labels of what this user may not read or write. It need not be damaged."""

    def note(self, label: str, error: Exception) -> None:
        """Keep the first error of a label, and log it."""
        if label not in self:
            self[label] = storage.error_reason(error)
            _log.warning("forget: %s cannot be read: %s", label, self[label])
            if isinstance(error, PermissionError):
                self.denied.append(label)


def parse_takedown(root: str, sha256: Sequence[str], urls: Sequence[str], keys: Sequence[str],
          domains: Sequence[str]) -> Forgotten:
    """The images that a request names. Keys become the hashes of their images. ValueError if it names none."""
    hashes = {value.lower() for value in sha256}
    if wrong := [value for value in hashes if len(value) != 64 or set(value) - set("0123456789abcdef")]:
        raise ValueError(f"{wrong[0]!r} is no sha256\nhint: 64 hexadecimal digits, as sha256sum prints them")
    for text in keys:
        name, _, key = text.rpartition("/")
        if not name or not key:
            raise ValueError(f"--key {text}: expected DATASET/KEY, got {'no dataset' if not name else 'no key'}\n"
                             f"hint: python -m jobs show {text.strip('/')}, which prints both")
        dataset = Dataset.parse(root, name)
        unreadable = Unread()
        versions = [version for version in _sealed_datasets(root, unreadable) if version.name == dataset.name
                    and ("@" not in name or version.version == dataset.version)]
        pictures = [row for version in versions
                    for _, row in _read_rows(version, lambda row: row["key"] == key, unreadable)]  # noqa: B023
        if not pictures and unreadable:
            raise DamagedFile(f"{text} was not found, and these cannot be read: {_list_faults(unreadable)}\n"
                              f"hint: --sha256 or --url instead of --key")
        if not pictures:
            refuse_unknown(dataset.root, dataset.name)
            raise ValueError(f"no version of {name} has a sample {key}\nhint: DATASET/KEY, as samples.json and credits "
                             f"name them")
        hashes |= {value for row in pictures for value in (row["sha256"], row.get("original_sha256")) if value}
    if not all(urls):
        raise ValueError("--url '' names nothing\nhint: a URL, or the path of a file below its folder")
    takedown = Forgotten(frozenset(hashes), frozenset(map(storage.redact_url, urls)), frozenset(map(_host, domains)))
    if not takedown:
        raise ValueError("forget needs images\nhint: --sha256, --url, --key DATASET/KEY or --domain")
    return takedown


def _host(text: str) -> str:
    """The host of a domain or of a URL."""
    place = clean_url(text)
    is_url = "//" in place or place.lower().startswith(("http:", "https:"))
    host = find_host(place if is_url else f"//{place.removeprefix('*').lstrip('.')}")
    if not host:
        raise ValueError(f"--domain {text!r} is no host\nhint: as in example.org")
    return host


def forget(root: str, wanted: Forgotten, note: str, *, dry_run: bool = False) -> dict[str, Any]:
    """Add images to the takedown list and hide them in every dataset.

    Returns the datasets, the runs that use them, and what has copies of the images: samples, exports, the report.

    Later rebuilds leave out the images of the list. Other names of the same bytes are found by their hash. A version
    that cannot be read stops nothing: it is listed under `unreadable`, with the reason.
    """
    root = storage.normalize(root)
    takedown_list.refuse_lost_requests(root)
    hashes: set[str] = set()
    unreadable = Unread()
    if not wanted.domains:  # it also covers the bytes of the images, in case other URLs serve them
        for dataset in _sealed_datasets(root, unreadable):
            hashes |= _hashes(_read_rows(dataset, wanted.has, unreadable))
        wanted = Forgotten(wanted.sha256 | hashes, wanted.urls)
    if dry_run:
        touched = []
        for dataset in _sealed_datasets(root, unreadable):
            if rows := _read_rows(dataset, wanted.has, unreadable):
                hashes |= _hashes(rows)
                touched += _touched(dataset, rows, 0, unreadable)
    else:
        takedown_list.add_takedowns(root, wanted, note)  # before anything is hidden: a running rebuild may still see it
        touched = apply_takedowns(root, unreadable, wanted, hashes)
    hashes |= wanted.sha256
    report, samples, grids = storage.join(root, "report.html"), list[str](), list[str]()
    try:
        samples, grids = find_samples_showing(root, wanted, hashes), find_grids_showing(root, wanted, hashes)
    except PermissionError as error:
        unreadable.note("runs", error)
    return {"sha256": sorted(wanted.sha256), "urls": sorted(wanted.urls), "domains": sorted(wanted.domains),
            "dry_run": dry_run, "found": touched, "samples": samples,
            "validation": grids,
            "exports": [_full_label(dataset) for dataset in find_exports_showing(root, hashes)],
            "reports": [report] if (touched or samples or grids) and storage.exists(report) else [],
            "unreadable": unreadable, "denied": unreadable.denied}


def _hashes(rows: Sequence[tuple[int, Mapping[str, Any]]]) -> set[str]:
    """The hashes of the stored and of the fetched bytes of images."""
    return {value for _, row in rows for value in (row["sha256"], row.get("original_sha256")) if value}


def apply_takedowns(root: str, unreadable: Unread, wanted: Forgotten | None = None, hashes: set[str] | None = None
                    ) -> list[dict[str, Any]]:
    """Hide the rows of the whole takedown list in every dataset, and say which of them have rows of `wanted`.

    None means the whole list. It applies earlier requests again, because a killed process may not have applied them.
    `hashes` gets the hashes of the images of these rows.
    `unreadable` gets the versions that cannot be read, or where nothing can be hidden. The list counts as applied: if
    such a published version is restored, searches refuse it until `repair` hides its rows.
    """
    count = takedown_list.count_requests(root)[0]  # first: the list can grow meanwhile
    listed, touched = takedown_list.read_takedowns(root), []
    there = _sealed_datasets(root, unreadable)
    for dataset in there:
        content = ""  # as if of no shards, so readers compare all rows
        with contextlib.suppress(*takedowns.READ_ERRORS):
            content = takedowns.shards_content(dataset)
        rows, fresh = _read_rows(dataset, listed.has, unreadable), 0
        through = 0 if _full_label(dataset) in unreadable else count  # some of its rows are not known
        try:
            if rows or through:
                fresh = takedowns.hide_rows(dataset, [row for row, _ in rows], through, content)
        except PermissionError as error:
            unreadable.note(_full_label(dataset), error)
            continue
        if requested := [(row, sample) for row, sample in rows if wanted is None or wanted.has(sample)]:
            touched.append((dataset, requested, fresh))
            if hashes is not None:
                hashes |= _hashes(requested)
    takedown_list.mark_applied(root, count)
    for name in sorted({dataset.name for dataset in there}):
        try:
            require_requests(root, [name])
        except PermissionError as error:
            unreadable.note(name, error)
    # Last: what the report says of one dataset must not keep the images of another one visible.
    return [entry for dataset, requested, fresh in touched for entry in _touched(dataset, requested, fresh, unreadable)]


def refuse_unreadable(root: str, unreadable: Mapping[str, str], denied: Sequence[str] = (), *, dry_run: bool) -> None:
    """DamagedFile if versions could not be read, with the way to hide what they may have.

    PermissionError if this user may not read them (`denied`).
    """
    if not unreadable:
        return
    done = ("the request would be recorded and hide images elsewhere, but" if dry_run else
            "the request is recorded, and its images are hidden elsewhere, but")
    sentence = (f"{done} {format_count(len(unreadable), 'place')} cannot be read and may still have such images: "
                f"{_list_faults(unreadable)}")
    if denied:
        name, _, version = denied[0].partition("@")
        place = storage.join(root, "runs" if name == "runs" else f"datasets/{name}/{version}".rstrip("/"))
        raise PermissionError(f"{sentence}\nhint: let this user read and write {place}; then the same forget again")
    raise DamagedFile(f"{sentence}\nhint: {_find_way_back(root, next(iter(unreadable)))}; then the same forget again")


def _find_way_back(root: str, label: str) -> str:
    """The command for a damaged version."""
    name, _, version = label.partition("@")
    try:
        published = Published.load(root, name)
    except DamagedPointer:
        return f"python -m jobs repair {name}"
    if published.version:
        return find_replacement(published, version)
    named = name if version == DEFAULT_VERSION else label
    return f"python -m jobs shard {named} --source FOLDER --overwrite; or remove datasets/{name}/{version}"


def _sealed_datasets(root: str, unreadable: Unread) -> list[Dataset]:
    """The versions with sealed shards, as far as this user may look."""
    denied: dict[str, Exception] = {}
    found = []
    for dataset in datasets(root, denied):
        try:
            found += [dataset] if dataset.is_sealed("shards") else []
        except PermissionError as error:
            unreadable.note(_full_label(dataset), error)
    for name, fault in denied.items():
        unreadable.note(name, fault)
    return found


def _read_rows(dataset: Dataset, wanted: Callable[[dict[str, Any]], bool], unreadable: Unread
               ) -> list[tuple[int, dict[str, Any]]]:
    """The wanted samples of a dataset; those that can be read, and an entry in `unreadable`, if it is damaged."""
    faults: list[Exception] = []
    try:
        rows = takedowns.find_matching_rows(dataset, wanted, faults)
    except takedowns.READ_ERRORS as error:
        rows, faults = [], [error]
    if faults and dataset.is_sealed("shards"):  # otherwise gc has removed it meanwhile
        unreadable.note(_full_label(dataset), faults[0])
    return rows


def _full_label(dataset: Dataset) -> str:
    return f"{dataset.name}@{dataset.version}"


def _list_faults(unreadable: Mapping[str, str]) -> str:
    return "; ".join(f"{label} ({fault})" for label, fault in unreadable.items())


def require_requests(root: str, names: Sequence[str], *, replace: bool = False) -> None:
    """Let the pointers of datasets name the count and the hash of the requests that their readers must find.

    `replace`: also where a pointer has another hash of as many requests.
    """
    listed = takedown_list.describe_list(root)
    for name in names:
        try:
            while (current := Published.load(root, name)).version and not current.require_takedowns(
                    listed, replace=replace):
                pass
        except DamagedPointer as error:
            _log.warning("forget: %s", error)


def _touched(dataset: Dataset, rows: list[tuple[int, dict[str, Any]]], fresh: int, unreadable: Unread
             ) -> list[dict[str, Any]]:
    """The entry of a dataset in the report; none if gc removed it meanwhile, or if it is damaged."""
    try:
        return [_describe(dataset, rows, fresh, unreadable)]
    except takedowns.READ_ERRORS as error:
        if dataset.is_sealed("shards"):
            unreadable.note(_full_label(dataset), error)
        else:
            _log.info("forget: %s was removed meanwhile", _full_label(dataset))
        return []


def _describe(dataset: Dataset, rows: list[tuple[int, dict[str, Any]]], fresh: int, unreadable: Unread
              ) -> dict[str, Any]:
    used: list[str] = []
    try:
        used = find_consumers(dataset.root, dataset.name).get(dataset.version, [])
    except PermissionError as error:
        unreadable.note("runs", error)
    own = dataset.path(f"neighbors/{dataset.label}")
    used = [own] * storage.exists(storage.join(dataset.root, own, "plan.json")) + used
    rebuilt = release_files.has_release(dataset) or storage.exists(
        storage.join(dataset.root, dataset.path("rebuild.json")))
    return {"dataset": f"{dataset.name}@{dataset.version}", "pictures": len(rows), "hidden_now": fresh,
            "keys": [row["key"] for _, row in rows][:20],
            "rebuilt": rebuilt,
            "follow": [] if rebuilt else _later_commands(dataset, used),
            "adopted": bool(dataset.manifest("shards").get("section", {}).get("adopted")),
            "neighbors": [consumer for consumer in used if consumer.startswith("datasets/")],
            "runs": [consumer for consumer in used if consumer.startswith("runs/")]}


def _later_commands(dataset: Dataset, used: Sequence[str]) -> list[str]:
    """The commands of the stages that are stale once `shard` has made a version again, with their own settings.

    They have no `--overwrite` and no `--root`. `used`: the neighbor lists of other datasets are among these paths.
    """
    label = f"{dataset.name}@{dataset.version}"
    commands = [command for stage_name, command in (
        ("embeddings", f"embed {label}"), ("text_embeddings", f"embed {label} --captions"), ("index", f"index {label}"))
        if dataset.is_sealed(stage_name)]
    if dataset.is_sealed("latents"):
        source = "FIRST_STAGE"
        with contextlib.suppress(*takedowns.READ_ERRORS):  # damage must not end a takedown half-way
            source = storage.quote(dataset.manifest("latents")["info"]["first_stage"]["source"])
        commands.append(f"latents {label} --first-stage {source}")
    commands += [f"score {label} --head {head}=HEAD" for head in storage.list_folders(dataset.folder("scores"))]
    own = [dataset.path(f"neighbors/{name}") for name in storage.list_folders(dataset.folder("neighbors"))]
    lists = dict.fromkeys([*own, *(path for path in used if path.startswith("datasets/"))])
    return commands + [command for path in lists if (command := _neighbors_command(dataset.root, path))]


def _neighbors_command(root: str, path: str) -> str:
    """The command of a sealed neighbor list, with its settings; "" if it cannot be read."""
    _, name, version, _, database = path.split("/")
    try:
        section = Dataset(root, name, version).manifest(f"neighbors/{database}")["section"]
    except takedowns.READ_ERRORS:
        return ""
    defaults, flags = NeighborsConfig(), ""
    for setting in fields(NeighborsConfig):
        value = section.get(setting.name, getattr(defaults, setting.name))
        if value != getattr(defaults, setting.name):
            flags += f" --{setting.name.replace('_', '-')}" + ("" if value is True else f" {storage.quote(str(value))}")
    database = database if "@" in database else f"{database}@{DEFAULT_VERSION}"
    return f"neighbors {name}@{version} --database {database}{flags}"


def forget_text(root: str, report: dict[str, Any]) -> str:
    """The report of `forget` as text."""
    if not report["found"]:
        readable = "readable dataset" if report["unreadable"] else "dataset"
        leave = "would leave" if report["dry_run"] else "leave"
        return "\n".join([f"no {readable} has such images; later rebuilds {leave} them out",
                          "(the URL of an image is its path below the folder, or its URL as the list has it)",
                          *_copies_text(report)])
    lines = []
    for entry in report["found"]:
        hidden = "would be hidden" if report["dry_run"] else "hidden"
        lines.append(f"{entry['dataset']}: {format_count(entry['pictures'], 'image')}, {hidden} from searches "
                     f"({', '.join(entry['keys'])}{', ...' if entry['pictures'] > len(entry['keys']) else ''})")
        if entry["neighbors"]:
            lines.append(f"  neighbor lists made with it: {', '.join(entry['neighbors'])}")
        if entry["runs"]:
            lines.append(f"  runs that used it: {', '.join(entry['runs'])}")
    lines += _copies_text(report)
    users = {entry["dataset"]: [user for user in (*entry["runs"], *entry["neighbors"])
                                if not user.startswith(f"datasets/{entry['dataset'].replace('@', '/')}/")]
             for entry in report["found"] if entry["rebuilt"]}
    lines.append("copies outside of datasets/ and runs/ are not known, such as those that show and credits --sheet "
                 "wrote")
    lines.append("the shards keep their bytes for now; training leaves them out from its next start, the weights of "
                 "runs do not change")
    lines += _ways_to_remove(root, report["found"])
    lines += [fit_commands(f"  gc keeps {label} while {', '.join(used)} uses it; to remove that: "
                           f"python -m jobs rm {used[0]}") for label, used in users.items() if used]
    return "\n".join(lines)


def _ways_to_remove(root: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The commands that remove the bytes. gc keeps versions that `rebuild` did not make."""
    names = sorted({entry["dataset"].split("@")[0] for entry in entries if entry["rebuilt"]})
    lines = [fit_commands(f"  to remove the bytes: python -m jobs rebuild {name} --source SOURCE{sign_option} && "
                          f"python -m jobs gc {name} --keep 1 --lease 0")
             for name in names for sign_option in [find_sign_option(root, name)]]
    for entry in (entry for entry in entries if not entry["rebuilt"]):
        label, adopt = entry["dataset"], " --adopt" * entry["adopted"]
        follow = "".join(f" && python -m jobs {command} --overwrite" for command in entry["follow"])
        if entry["runs"]:
            lines.append(f"  once shard has made {label} again, you can sample from {', '.join(entry['runs'])}, but no "
                         f"longer train further")
        lines += [f"  to remove the bytes of {label}, which rebuild did not make: remove the images from its source;",
                  fit_commands(f"    then python -m jobs shard {label} --source SOURCE{adopt} --overwrite{follow}; "
                               f"or, to remove the version: {_remove_commands(entry)}")]
    return lines


def _remove_commands(entry: Mapping[str, Any]) -> str:
    """The commands that remove a version, and first what was made from it elsewhere."""
    version = f"datasets/{entry['dataset'].replace('@', '/')}"
    users = [path for path in (*entry["runs"], *entry["neighbors"]) if not path.startswith(f"{version}/")]
    return " && ".join(f"python -m jobs rm {path}" for path in (*users, version))


def _copies_text(report: dict[str, Any]) -> list[str]:
    """A line for each kind of files that have copies of the images, and the command that removes or replaces them."""
    lines = []
    if report["samples"]:
        lines.append(f"samples that show them beside the generated images: {', '.join(report['samples'])}")
        lines += _removals(report["samples"])
    if report["validation"]:
        lines.append(f"validation images that show them: {', '.join(report['validation'])}")
        lines += _removals(report["validation"])
    for label in report["exports"]:
        folder = f"datasets/{label.replace('@', '/')}/clip-retrieval"
        lines.append(f"an export that has them: {folder}")
        lines.append(fit_commands(f"  to make it again: python -m jobs rm {folder} && "
                                  f"python -m jobs embed {label} --export clip-retrieval"))
    if report["reports"]:
        lines.append(f"a report that may show them: {report['reports'][0]}")
        lines.append(fit_commands("  to make it again: python -m jobs report"))
    return lines


def _removals(folders: Sequence[str]) -> list[str]:
    return [fit_commands(f"  to remove it: python -m jobs rm {folder}") for folder in folders]
