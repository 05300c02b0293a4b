"""The stage `score`: sealed shards and embeddings -> a parquet file of scores for each shard."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.metadata import metadata
from pipeline.datasets.row_columns import SCORES, metadata_columns
from pipeline.embeddings.embed import dataset_encoder
from pipeline.formats import arrays
from pipeline.media import tars
from pipeline.scores.config import ScoreConfig
from pipeline.scores.heads import Head, ScoredShard, Scores, is_name, load_head, parse_spec
from pipeline.stages.stage import Stage
from pipeline.stages.timers import Times
from pipeline.stages.types import Entry, Item, Output, StageFailed


class Score(Stage):
    """The stage from the embeddings of a dataset to scores/NAME/: a number or several for each sample."""

    name = "score"

    def __init__(self, dataset: Dataset, spec: str, config: ScoreConfig) -> None:
        """`spec`: NAME=HEAD; `load_head` says what a head is."""
        self.score_name, head = parse_spec(spec)
        self.head = head if is_name(head) else storage.normalize(head)
        super().__init__(dataset.root, dataset.path(f"{SCORES}/{self.score_name}"), config)
        self.dataset = dataset

    @property
    def command(self) -> str:
        return self.dataset.command(f"{SCORES}/{self.score_name}").replace("=HEAD", f"={self.head}")

    @property
    def alternative(self) -> str:
        return "choose another name for the score"

    def section(self) -> dict[str, Any]:
        return {"head": self._load().description}

    def inputs(self) -> dict[str, dict[str, Any]]:
        return {name: self.dataset.identity(name) for name in ("shards", "embeddings")}

    def plan(self) -> Iterator[Item]:
        self._check()
        for shard, vectors in zip(self.dataset.manifest("shards")["items"],
                                  self.dataset.manifest("embeddings")["items"], strict=True):
            yield Item(shard["id"], {"shard": shard, "embeddings": vectors, "count": shard["samples"],
                                     "head": storage.digest(self.section())})

    def process(self, item: Item, scratch: Path) -> Output:
        if storage.digest(self.section()) != item.inputs["head"]:
            raise ValueError(f"{self.head} is not the head of the plan on this machine\n"
                             f"hint: the same file on every machine")
        times, record = Times(), item.inputs["shard"]
        with times("read"):
            vectors = arrays.load_array(self.dataset.fetch("embeddings", file_of(item.inputs["embeddings"], ".npy")))
            rows = metadata(self.dataset, record, ["key", "caption"])
        if len(vectors) != len(rows):
            raise ValueError(f"shard {record['id']} has {len(rows)} samples, its embeddings {len(vectors)} rows\n"
                             f"hint: python -m jobs verify")
        there = np.flatnonzero(vectors.any(1))
        shard = ScoredShard(vectors[there].astype(np.float32), [rows[row]["key"] for row in there],
                            [rows[row].get("caption") or "" for row in there], lambda: self._images(record, there))
        with times("forward"):
            columns = self._columns(self._load().function(shard), len(there))
        keys = [row["key"] for row in rows]
        ledger = [Entry(keys[row], "no_vector", "its scores are null", kept=True)
                  for row in np.setdiff1d(np.arange(len(rows)), there)]
        table, info = {"key": pa.array(keys, pa.string())}, {}
        for name, values in columns.items():
            cells = np.full(len(rows), np.nan, np.float32)
            cells[there] = values
            ledger += [Entry(keys[row], "not_finite", f"{name} is null", kept=True)
                       for row in there[~np.isfinite(values)]]
            good = np.isfinite(cells)
            table[name] = pa.array(np.where(good, cells, 0), pa.float32(), mask=~good)
            info[name] = {"count": int(good.sum()), "sum": float(cells[good].sum(dtype=np.float64)),
                          "least": float(cells[good].min()) if good.any() else None,
                          "most": float(cells[good].max()) if good.any() else None}
        path = scratch / "scores.parquet"
        pq.write_table(pa.table(table), path)
        return Output(len(rows), {f"{item.id}.parquet": path}, ledger, {"columns": info}, times=dict(times.seconds))

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        infos = [record["info"]["columns"] for record in records]
        names = list(infos[0]) if infos else [self.score_name]
        if other := next((record for record in records if list(record["info"]["columns"]) != names), None):
            raise StageFailed(f"score: {self.head} must give the same columns for all shards: expected "
                              f"{', '.join(names)}, got {', '.join(other['info']['columns'])} for shard {other['id']}\n"
                              f"hint: --overwrite, with a function that always gives the same")
        summary = {}
        for name in names:
            own = [info[name] for info in infos if info[name]["count"]]
            count, total = (sum(each[what] for each in own) for what in ("count", "sum"))
            summary[name] = {"count": count, "mean": round(total / count, 4) if count else None,
                             "least": min((each["least"] for each in own), default=None),
                             "most": max((each["most"] for each in own), default=None)}
        return Output(info={"columns": names, "scores": summary, "head": self.head.rpartition("/")[2]})

    def _load(self) -> Head:
        return load_head(self.head, self.config)

    def _check(self) -> None:
        """ValueError if the head was trained on other vectors, or if its name is that of a column of metadata."""
        head, encoder = self._load(), dataset_encoder(self.dataset)
        if head.width not in {0, encoder["dim"]}:
            raise ValueError(f"{self.head} scores vectors of another encoder: expected vectors of {head.width} "
                             f"numbers, got {encoder['dim']} ({encoder['model']})\n"
                             f"hint: embed with the encoder of the head; vectors of 768 numbers are those of ViT-L-14")
        name = f"{encoder['model']} {encoder.get('pretrained', '')}".strip()
        if head.encoder and head.encoder != name:
            raise ValueError(f"{self.head} scores vectors of another encoder: expected {head.encoder}, got {name}\n"
                             f"hint: embed with the encoder of the head")
        if self.score_name in (columns := metadata_columns(self.dataset)):
            raise ValueError(f"the metadata of {self.dataset.label} have a column {self.score_name} already: expected "
                             f"a name other than {', '.join(columns)}\nhint: --head NAME=HEAD with another name")

    def _columns(self, scores: Scores, count: int) -> dict[str, np.ndarray]:
        """The scores of a shard by column, (n,) float32 each; ValueError if there is not one for each sample."""
        named = ({f"{self.score_name}_{name}": values for name, values in scores.items()} if isinstance(scores, dict)
                 else {self.score_name: scores})
        columns = {name: np.asarray(values) for name, values in named.items()}
        for name, values in columns.items():
            if values.shape != (count,) or values.dtype.kind not in "fiub":
                raise ValueError(f"{self.head} gives no score for each sample: expected numbers ({count},), got "
                                 f"{values.dtype} {values.shape} for {name}\nhint: docs/guides/score.md")
        if not columns:
            raise ValueError(f"{self.head} gives no scores: expected at least one column, got none\n"
                             f"hint: docs/guides/score.md")
        with np.errstate(over="ignore"):  # scores beyond float32 are noted as those that are not finite
            return {name: values.astype(np.float32) for name, values in columns.items()}

    def _images(self, record: dict[str, Any], rows: np.ndarray) -> Iterator[bytes]:
        wanted = set(rows.tolist())
        path = self.dataset.fetch("shards", file_of(record, ".tar"), check=True)
        for row, sample in enumerate(tars.read(path)):
            if row in wanted:
                yield tars.sample_image(sample)
