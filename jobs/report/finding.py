"""What evaluations found, and what validations saw."""

from jobs.evaluation import summary
from jobs.report.page import Album, Child, brief, number, scrolling, tag
from jobs.report.root import Root
from jobs.runs.metrics import read
from jobs.runs.run import Run
from pipeline import storage

_WIDE = 1700


def evaluation(root: Root, run: Run, name: str, album: Album) -> Child:
    """The table, the plot and some samples of a sealed evaluation; None if it is not sealed."""
    path = f"{run.path}/evaluations/{name}"
    if root.manifest(path) is None:
        return None
    folder = storage.join(root.address, path)
    document = storage.read_json(storage.join(folder, "evaluation.json"))
    head = tag("tr", tag("th", "the style is named by", scope="col"), (
        tag("th", what, scope="col") for what in ("judge", "probe", "CLIP score", "KID", "nearest in training")))
    rows = []
    for row in document["ways"]:
        if row["way"] in summary.NAMES:
            asked = row["way"] != "neither"  # which asks for no style
            shares = [summary.percent(row[judge]) if asked else "–" for judge in ("judge", "probe")]
            cells = (*shares, f"{row['clip']['mean']:.3f}", f"{row['kid']:.4f}" if asked else "–",
                     f"{row['nearest']['mean']:.3f}")
            name_ = tag("th", summary.NAMES[row["way"]], scope="row")
            rows.append(tag("tr", name_, (tag("td", one) for one in cells)))
    real = document["real"]
    what = "Samples of subjects that training never saw" if document["unseen"] else "Samples of given prompts"
    caption = tag("figcaption", f"{what}, at step {number(document['step'])}: the "
                  f"share whose style is that asked for, by a network that judges pixels and by a linear probe on CLIP "
                  f"vectors, with 95 % intervals. Of real pictures of such subjects the judge knows "
                  f"{100 * real['judge']:.0f} %, the probe {100 * real['probe']:.0f} %; chance is "
                  f"{100 / len(document['styles']):.1f} %.")
    asked, shown = {row["way"] for row in document["ways"]}, []
    for way, file, words, below in (
            ("", "plot.png", "style accuracy", ""),
            ("database", "grid-database.png", "swapped databases", "Below: databases swapped."),
            ("prompt", "grid-prompt.png", "the prompt names the style", "Below: the prompt names the style, the "
             "database is that of training.")):
        if not way or way in asked:
            picture = album.picture(storage.read_bytes(storage.join(folder, file)), words, side=_WIDE)
            shown += [tag("p", below) if below else None, picture]
    return tag("figure", tag("h3", run.name, tag("small", name), root.mark(path)),
               scrolling(tag("table", tag("thead", head), tag("tbody", rows))), shown, caption)


def validated(run: Run, album: Album) -> Child:
    """The last validation of a run: its losses, and what was drawn beside the neighbours; None if there was none."""
    lines = read(run, "validation.jsonl")
    if not lines:
        return None
    last = lines[-1]
    said = (f"Held-out pictures at step {number(last['step'])}, by the averaged network: a loss of "
            f"{brief(last['validation_loss'])} with their neighbours, {brief(last['validation_shuffled'])} with those "
            f"of others, {brief(last['validation_nobody'])} with none.")
    try:
        picture = album.picture(storage.read_bytes(run.validated(last["step"])), "drawn in validation", side=900)
    except FileNotFoundError:  # latents that could not be decoded where it trained
        picture = None
    return tag("figure", tag("h3", run.name, tag("small", "validation")), picture, tag("figcaption", said))
