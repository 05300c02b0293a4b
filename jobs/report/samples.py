"""The samples of a report: rows what was asked for, columns databases, the neighbours beside each picture."""

from collections.abc import Sequence
from typing import Any

from jobs.report.page import Album, Child, amount, note, scrolling, tag
from jobs.report.root import Root
from jobs.runs.run import Run
from jobs.sampling.mixture import Mixture
from jobs.sampling.queries import title
from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.metadata import metadata

_ROWS = 40
_MOST_SEARCHED = 64 << 20
"""Bytes of metadata that are searched for held-out subjects, per database."""


def sample_grid(root: Root, run: Run, name: str, album: Album) -> Child:
    """The sealed samples `name` of a run: rows prompts, columns databases; None if they are not sealed."""
    path = f"{run.path}/samples/{name}"
    if root.manifest(path) is None:
        return None
    folder = storage.join(root.address, path)
    document = storage.read_json(storage.join(folder, "samples.json"))
    labels, pictures = document["databases"], {(one["position"], one["database"]): one for one in document["pictures"]}
    every = sorted({position for position, _ in pictures})
    positions = every[:_ROWS]
    shown = [one for one in document["pictures"] if one["position"] in positions]
    named = sorted({file for one in shown for file in _files(one)})
    data = dict(zip(named, storage.each(_read, [storage.join(folder, file) for file in named]), strict=True))
    asked = {one["position"]: one for one in shown}
    met = _held_out(root, labels, [one["prompt"] for one in shown if _kind(one) == "prompt"])
    head = tag("tr", tag("th", "prompt" if {_kind(one) for one in shown} == {"prompt"} else "drawn from", scope="col"),
               (tag("th", label, scope="col") for label in labels))
    rows = []
    for position in positions:
        cells = [tag("td", _drawn(pictures.get((position, label)), data, album), data_label=label) for label in labels]
        rows.append(tag("tr", tag("th", _asked(asked[position], data, met, album), scope="row"), cells))
    grid = tag("table", tag("thead", head), tag("tbody", rows),
               class_="samples" if len(labels) > 4 else "samples large")
    caption = tag("figcaption", _explained(document, shown),
                  "Training saw no picture of the subjects marked held out. " if any(met.values()) else "",
                  _settings(document, shown), _left_out(len(every) - len(positions), "row"))
    return tag("figure", tag("h3", run.name, tag("small", name), root.mark(path)), scrolling(grid), caption)


def _kind(one: dict[str, Any]) -> str:
    """prompt, image or p_D; older files know prompts alone."""
    return one.get("kind", "prompt")


def _files(one: dict[str, Any]) -> list[str]:
    """The files that a picture of samples.json is shown with."""
    asked = [one["image"]["file"]] if "image" in one else []
    return [one["file"], *(near["file"] for near in one["neighbors"]), *asked]


def _held_out(root: Root, labels: Sequence[str], prompts: Sequence[str]) -> dict[str, bool]:
    """Of each prompt that is a caption in one of the databases, whether its subject was held out of training."""
    met: dict[str, bool] = {}
    for dataset in dict.fromkeys(one for label in labels for one in Mixture.parse(root.address, label).members):
        met |= {prompt: met.get(prompt, False) or held for prompt, held in _subjects(dataset, prompts).items()}
    return met


def _asked(one: dict[str, Any], data: dict[str, bytes | None], met: dict[str, bool], album: Album) -> Child:
    """The heading of a row: what its pictures were drawn from."""
    held = tag("div", tag("span", "held out", class_="mark")) if met.get(one.get("prompt", "")) else None
    heading = title(one)
    if _kind(one) != "image":
        return [heading, held]
    return [album.picture(data[one["image"]["file"]], heading, f"{heading}\nsha256 {one['image']['sha256']}", side=96),
            tag("div", heading)]


def _explained(document: dict[str, Any], shown: Sequence[dict[str, Any]]) -> str:
    """What rows, columns and the small pictures are."""
    kinds = {_kind(one) for one in shown}
    what = {frozenset({"prompt"}): "prompt", frozenset({"image"}): "picture that was given",
            frozenset({"prompt", "image"}): "prompt, or a picture that was given in place of one",
            frozenset({"p_D"}): "draw of a row from each database"}.get(frozenset(kinds), "prompt, a picture that was "
                                                                        "given, or a draw of a row from each database")
    text = (f"A row is a {what}, a column the database its neighbours came from. The large picture is what the model "
            f"drew; the small ones beside it are the pictures of that database nearest to the "
            f"{'prompt' if kinds == {'prompt'} else 'vector of what it was drawn from'}, nearest on top: their vectors "
            f"are all that the model was told of the database. A row starts from the same noise in every column. ")
    if "p_D" in kinds:
        top_m = document["top_m"]
        share = "" if top_m == 1 else f", among the {100 * top_m:.3g} % of all rows that are used most"
        text += (f"Where nothing was asked for (from p_D), a row of the database was drawn as often as it is a "
                 f"neighbour in training{share}: it is the topmost of the small pictures. ")
    if "pool" in document:
        text += f"The neighbours were taken at random from the {document['pool']} nearest. "
    if any("database" in near for one in shown for near in one["neighbors"]):
        text += "Databases joined by + share out the neighbours by their weights. "
    return text


def _settings(document: dict[str, Any], shown: Sequence[dict[str, Any]]) -> str:
    steps = sorted({one["checkpoint"]["step"] for one in shown})
    names = {"ddim": "DDIM", "dpm++": "DPM-Solver++", "euler": "Euler", "heun": "Heun"}
    name = names[document.get("sampler", "ddim")]
    return (f"Checkpoint at step {', '.join(f'{step:,}' for step in steps)}; {document['steps']} {name} steps, "
            f"guidance {document['guidance']:g}, seed {document['seed']}, {amount(document['k'], 'neighbour')}.")


def _drawn(one: dict[str, Any] | None, data: dict[str, bytes | None], album: Album) -> Child:
    if one is None:
        return note("none")
    heading = title(one)
    row = f", row {one['drawn']['row']}, used {one['drawn']['used']:,} times" if "drawn" in one else ""
    listed = "\n".join(f"{rank}. {_from(near)}{near['key']} · {near['caption']} · {near['score']:.3f}"
                       for rank, near in enumerate(one["neighbors"], 1))
    about = (f"{heading}{row} · {one['database']}\nseed {one['seed']}, noise {one['position']}, checkpoint step "
             f"{one['checkpoint']['step']}\nneighbours:\n{listed or 'none'}")
    near = [album.picture(data[near["file"]], near["caption"], f"{near['caption']}\n{_from(near)}key {near['key']}, "
                          f"row {near['row']}, score {near['score']:.3f}", side=64) for near in one["neighbors"]]
    picture = album.picture(data[one["file"]], f"{heading}, neighbours from {one['database']}", about)
    return tag("div", picture, tag("div", near, class_="near") if near else None, class_="drawn")


def _from(near: dict[str, Any]) -> str:
    """Which database of several a neighbour is from."""
    return f"{near['database']}, " if "database" in near else ""


def _subjects(dataset: Dataset, prompts: Sequence[str]) -> dict[str, bool]:
    """Of each prompt that is a caption of the dataset, whether its subject was held out of training."""
    wanted, found, budget = set(prompts), {}, _MOST_SEARCHED
    try:
        records = dataset.manifest("shards")["items"]
        for record in records:
            budget -= file_of(record, ".parquet")["bytes"]
            if budget < 0 or found.keys() >= wanted:
                break
            for row in metadata(dataset, record, ["caption", "held_out"]):
                if row["caption"] in wanted:
                    held = str(row["held_out"]).lower() in {"1", "1.0", "true"}
                    found[row["caption"]] = found.get(row["caption"], False) or held
    except (ValueError, OSError):
        # Most corpora have no column held_out; a database may be gone since.
        return {}
    return found


def _read(address: str) -> bytes | None:
    try:
        return storage.read_bytes(address)
    except FileNotFoundError:
        return None


def _left_out(count: int, noun: str) -> str:
    return f" {amount(count, noun)} more in the folder." if count > 0 else ""
