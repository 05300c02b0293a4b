"""The data of an evaluation: what the run was trained on, and the databases of the styles."""

from collections.abc import Sequence

from jobs.evaluation.evaluate_stage import check_same_data
from jobs.evaluation.held_out import held_out_captions
from jobs.evaluation.judge_stage import StyleClassifierStage
from jobs.runs.run import Run
from pipeline.datasets.dataset import Dataset, datasets
from pipeline.embeddings.embed import dataset_encoder
from pipeline.releases import published
from pipeline.releases.signatures import read_release_keys


def evaluation_data(run: Run, names: Sequence[str] = ()) -> tuple[Dataset, Dataset, list[Dataset]]:
    """The dataset and the database of the training, and the databases to evaluate.

    `names`: the databases. Default: the newest version of every other dataset of the root that has an index.
    ValueError if it is not known what the run was trained on.
    """
    root, section = run.root, run.section()
    if "dataset" not in section:
        raise ValueError(f"the run {run.name} was not trained here: what it has seen is not known")
    dataset, database = (published.open_label(root, section[name]) for name in ("dataset", "database"))
    newest = {other.name: other for other in sorted(datasets(root), key=lambda data: (len(data.version), data.version))
              if other.is_sealed("index") and other.name not in {dataset.name, database.name}}
    newest |= {name: published.open_dataset(root, name) for name in newest
               if read_release_keys().accepted or published.Published.load(root, name).version}
    return dataset, database, [published.open_dataset(root, name) for name in names] or list(newest.values())


def can_evaluate(run: Run) -> bool:
    """Whether the root has what `evaluate RUN` needs.

    These are the training data, two databases with the encoder of the run, and captions that training has not seen.
    """
    try:
        dataset, database, databases = evaluation_data(run)
        if not run.section().get("step"):  # an imported run only gets a warning
            check_same_data(run, dataset)
        StyleClassifierStage(run, dataset, databases, 1).inputs()
        return all(dataset_encoder(other) == run.encoder() and other.is_sealed("index")
                   for other in (database, *databases)) and bool(held_out_captions(dataset, databases))
    except (ValueError, OSError):
        return False
