"""The stage that trains style classifiers on the databases of a run."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.evaluation.held_out import held_out_captions, item_id, rows_with_captions
from jobs.runs.run import Run
from model import style_classifier
from model.weights import checkpoint
from pipeline import storage
from pipeline.batches.images import average_down
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings
from pipeline.media import tars
from pipeline.media.resize import decode_pixels
from pipeline.stages.stage import Stage, fingerprint
from pipeline.stages.types import Item, Output
from pipeline.takedowns import hidden_rows

_BLOCK, _ASKED = 1 << 16, 512  # training vectors that are compared at a time, and vectors with them


def load_images(dataset: Dataset, size: int) -> np.ndarray:
    """All images of a dataset, averaged down to `size` pixels a side: (N, S, S, 3) uint8."""
    batches = []
    for record in dataset.manifest("shards")["items"]:
        path = dataset.fetch("shards", file_of(record, ".tar"), check=True)
        pictures = [decode_pixels(tars.sample_image(sample)) for sample in tars.read(path)]
        if len({image.shape for image in pictures}) > 1:
            raise ValueError(f"the images of {dataset.label} have different sizes, a judge needs one\n"
                             f"hint: shard with --resize center_crop")
        if pictures:
            batches.append(average_down(np.stack(pictures), size))
    return np.concatenate(batches)


class StyleClassifierStage(Stage):
    """The stage from the databases of styles to runs/<run>/judges/<hash>: a judge, a probe, and their accuracy."""

    name = "judge"

    def __init__(self, run: Run, dataset: Dataset, databases: Sequence[Dataset], steps: int) -> None:
        if len(databases) < 2:
            raise ValueError(f"to tell styles apart takes two databases at least, not {len(databases)}\n"
                             f"hint: --database noto --database openmoji")
        if len({item_id("", database) for database in databases}) < len(databases):
            raise ValueError(f"a database is named twice: {', '.join(database.label for database in databases)}")
        super().__init__(run.root, f"{run.path}/judges/", None)
        self.run, self.dataset, self.databases, self.steps = run, dataset, tuple(databases), steps
        self.path = f"{run.path}/judges/{fingerprint(self)[:12]}"
        self.folder = storage.join(self.root, self.path)

    @property
    def command(self) -> str:
        return f"python -m jobs evaluate {self.run.name} --root {storage.quote(self.root)}"

    def section(self) -> dict[str, Any]:
        return {"steps": self.steps, "image_size": self.run.image_size,
                "databases": [database.label for database in self.databases]}

    def inputs(self) -> dict[str, dict[str, Any]]:
        inputs = {"shards of the run": self.dataset.identity("shards"),
                 "embeddings of the run": self.dataset.identity("embeddings")}
        for database in self.databases:
            inputs[f"shards of {database.label}"] = database.identity("shards")
            inputs[f"embeddings of {database.label}"] = database.identity("embeddings")
            inputs |= {f"{name} of {database.label}": hidden
                       for name, hidden in hidden_rows.hidden_row_inputs(database).items()}
        return inputs

    def plan(self) -> list[Item]:
        return [Item("judge")]

    def rows(self, item: Item) -> int:
        """Images that the judge sees in training, as in a run."""
        return self.steps * style_classifier.JUDGE_BATCH

    def _report_step(self, step: int) -> None:
        self.report_progress(rows=step * style_classifier.JUDGE_BATCH, samples=0, length=0, skipped=Counter())

    def process(self, item: Item, scratch: Path) -> Output:
        torch.set_num_threads(1)
        size, unseen = self.run.image_size, frozenset(held_out_captions(self.dataset, self.databases))
        pictures, vectors, labels, away = [], [], [], []
        for number, database in enumerate(self.databases):
            images = load_images(database, size)
            rows = np.setdiff1d(np.arange(len(images)), hidden_rows.read_hidden_rows(database))
            pictures.append(images[rows])
            vectors.append(Embeddings(database).all()[rows].astype(np.float32))
            labels.append(np.full(len(rows), number))
            # Without held-out subjects a tenth of what is there has to do.
            away.append(np.isin(rows, rows_with_captions(database, unseen) if unseen else rows[::10]))
        x, v, y, out = map(np.concatenate, (pictures, vectors, labels, away))
        for number, database in enumerate(self.databases):
            if not (out & (y == number)).any() or not (~out & (y == number)).any():
                raise ValueError(f"{database.label} has no images of held-out subjects, or none of others\n"
                                 f"hint: a judge needs both")
        network = style_classifier.train_judge(x[~out], y[~out], len(self.databases), steps=self.steps, seed=0,
                                               on_step=self._report_step)
        probe = style_classifier.train_probe(v[~out], y[~out], len(self.databases))
        checkpoint.save(network.state_dict(), scratch / "judge.safetensors")
        np.save(scratch / "probe.npy", probe, allow_pickle=False)
        right = (style_classifier.classify_images(network, x[out]) == y[out],
                 style_classifier.classify_vectors(probe, v[out]) == y[out])
        similarities = nearest_rows(self.dataset, v[out])[0]
        styles = [{"database": database.label, "seen": int((~out & (y == number)).sum()),
                   "held_out": int((out & (y == number)).sum()),
                   "judge": mean_share(right[0][y[out] == number]), "probe": mean_share(right[1][y[out] == number]),
                   "kid": round(style_classifier.kid(v[out & (y == number)], v[~out & (y == number)]), 6),
                   "nearest": round(float(similarities[y[out] == number].mean()), 4)}
                  for number, database in enumerate(self.databases)]
        info = {"rows": self.rows(item), "judge": mean_share(right[0]), "probe": mean_share(right[1]), "styles": styles,
                "held_out": sorted(unseen), "nearest": round(float(similarities.mean()), 4),
                "nearest_99": round(float(np.quantile(similarities, 0.99)), 4)}
        return Output(samples=len(x), info=info,
                      files={name: scratch / name for name in ("judge.safetensors", "probe.npy")})

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        return Output(info={name: value for name, value in records[0]["info"].items() if name != "rows"})


def nearest_rows(dataset: Dataset, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The similarity of vectors (N, D) to the nearest one of a dataset, and its row: (N,) float32, (N,) int64."""
    best, rows = np.full(len(vectors), -np.inf, np.float32), np.full(len(vectors), -1, np.int64)
    queries = vectors.astype(np.float32)
    for first, block in Embeddings(dataset).blocks(_BLOCK):
        block = block.astype(np.float32)
        for start in range(0, len(queries), _ASKED):
            part = slice(start, start + _ASKED)
            scores = queries[part] @ block.T
            here = scores.argmax(1)
            scores_of_best = scores[np.arange(len(scores)), here]
            rows[part] = np.where(scores_of_best > best[part], first + here, rows[part])
            best[part] = np.maximum(best[part], scores_of_best)
    return best, rows


def mean_share(right: np.ndarray) -> float:
    """The share of true values in a boolean array, rounded."""
    return round(float(right.mean()), 4)
