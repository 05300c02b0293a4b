"""The data of an evaluation: what the run was trained on, and the databases of the styles."""

from collections.abc import Sequence
from typing import Any

from jobs.evaluation.evaluate_stage import check_same_data
from jobs.evaluation.held_out import has_unseen_and_seen, held_out_captions
from jobs.evaluation.judge_stage import StyleClassifierStage
from jobs.runs.run import Run
from pipeline.datasets.dataset import Dataset, datasets
from pipeline.embeddings.embed import dataset_encoder
from pipeline.releases import published
from pipeline.releases.signatures import read_release_keys


def evaluation_data(run: Run, names: Sequence[str] = ()
                    ) -> tuple[Dataset, Dataset, list[Dataset], list[tuple[Dataset, str]]]:
    """The dataset and the database of the training, the databases to evaluate, and those left out with the reasons.

    `names`: the databases. Default: the newest version of every other dataset of the root. It needs an index,
    the encoder of the run, and images that a judge can be tested on. ValueError if it is not known what the run was
    trained on, or if a named database lacks such images.
    """
    root, section = run.root, run.section()
    if "dataset" not in section:
        raise ValueError(f"the run {run.name} was not trained here: what it has seen is not known")
    _refuse_foreign_run(run, section)
    dataset, database = (published.open_label(root, section[name]) for name in ("dataset", "database"))
    newest = {other.name: other for other in sorted(datasets(root), key=lambda data: (len(data.version), data.version))
              if other.is_sealed("index") and other.name not in {dataset.name, database.name}}
    newest |= {name: published.open_dataset(root, name) for name in newest
               if read_release_keys().accepted or published.Published.load(root, name).version}
    candidates = [published.open_dataset(root, name) for name in names] or list(newest.values())
    unfit = [] if names else [(other, f"it was not embedded by the encoder of {run.name}") for other in candidates
                              if dataset_encoder(other) != run.encoder()]
    fitting = [other for other in candidates if other not in dict(unfit)]
    judged = [other for other in fitting if has_unseen_and_seen(dataset, other)]
    if not judged:  # then the judge tests itself on a tenth of the images of each
        return dataset, database, fitting, unfit
    unfit += [(other, "a judge needs images of subjects that training has seen, and of others")
              for other in fitting if other not in judged]
    if names and unfit:
        raise ValueError(f"{unfit[0][0].label} cannot be evaluated with the others: {unfit[0][1]}\n"
                         f"hint: name two or more of the databases with both: "
                         f"{', '.join(other.label for other in judged)}; or leave out --database")
    return dataset, database, judged, unfit


def _refuse_foreign_run(run: Run, section: dict[str, Any]) -> None:
    """ValueError if what the run was trained with is not in its root, as for an imported run."""
    here = {dataset.name for dataset in datasets(run.root)}
    labels = {section["dataset"], section["database"]}
    if missing := sorted(label for label in labels if Dataset.parse(run.root, label).name not in here):
        raise ValueError(f"the run {run.name} was trained with {' and '.join(missing)}: not in {run.root}, so what it "
                         f"has seen is not known\n"
                         f"hint: evaluate it in the root of its training; for the bundled model: python -m jobs demo")


def can_evaluate(run: Run) -> bool:
    """Whether the root has what `evaluate RUN` needs.

    These are the training data, two databases with the encoder of the run, and captions that training has not seen.
    """
    try:
        dataset, database, databases, _ = evaluation_data(run)
        if not run.section().get("step"):  # an imported run only gets a warning
            check_same_data(run, dataset)
        StyleClassifierStage(run, dataset, databases, 1).inputs()
        return all(dataset_encoder(other) == run.encoder() and other.is_sealed("index")
                   for other in (database, *databases)) and bool(held_out_captions(dataset, databases))
    except (ValueError, OSError):
        return False
