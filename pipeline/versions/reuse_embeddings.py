"""The stage that embeds changed images and keeps the vectors of the others."""

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.datasets.dataset import Dataset, file_of
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed, EmbedCaptions
from pipeline.formats import arrays
from pipeline.stages.stage import Stage
from pipeline.stages.types import Entry, Item, Output
from pipeline.versions.listing import read_metadata, reference, succeeded_rows


class Reuse(Embed):
    """The stage that embeds a version, and takes from the last one the vectors of shards that stayed."""

    def __init__(self, dataset: Dataset, config: EmbedConfig, last: Dataset | None) -> None:
        super().__init__(dataset, config)
        self.last = last

    def plan(self) -> list[Item]:
        items = super().plan()
        if not self.last or not self.last.is_sealed(self.output_folder):
            return items
        manifest = self.last.manifest(self.output_folder)
        if manifest["section"] != self.section():
            return items
        vectors = {record["id"]: record for record in manifest["items"]}
        shards = {file_of(record, ".tar")["sha256"]: record for record in self.last.manifest("shards")["items"]}
        return [self._reusing(item, shards, vectors) for item in items]

    def _reusing(self, item: Item, shards: dict[str, Any], vectors: dict[str, Any]) -> Item:
        assert self.last
        record = item.inputs["shard"]
        tar = file_of(record, ".tar")["sha256"]
        theirs = shards.get(record["info"].get("of", tar))
        if theirs is None:
            return item
        return Item(item.id, item.inputs | {"last": self.last.version, "vectors": vectors[theirs["id"]],
                                            **({"of": theirs} if "of" in record["info"] else {})})

    def setup(self) -> None:
        """Nothing yet: where everything stays, no encoder is needed."""

    def together(self, gpu: bool | None = None) -> int:
        return super().together(gpu) if gpu else 1

    def process_together(self, work: Sequence[tuple[Item, Path]]) -> Generator[Output | Exception, None, None]:
        new = [(item, scratch) for item, scratch in work if "vectors" not in item.inputs]
        with closing(super().process_together(new)) as embedded:
            for pair in work:
                yield from [next(embedded)] if pair in new else Stage.process_together(self, [pair])

    def process(self, item: Item, scratch: Path) -> Output:
        if "vectors" not in item.inputs:
            return super().process(item, scratch)
        theirs, base = item.inputs["vectors"], self.dataset.other_version(item.inputs["last"])
        if "of" not in item.inputs:
            return Output(theirs["samples"], info={"reused": theirs["samples"]},
                          counts=(theirs["skipped"], theirs["noted"]),
                          external_files=[reference(base, self.output_folder, self.dataset, entry)
                                     for entry in theirs["files"]])
        rows = arrays.load_array(base.fetch(self.output_folder, file_of(theirs, ".npy"), check=True))
        old = succeeded_rows(read_metadata(base, item.inputs["of"], ["key", "status"]))
        place = {key: row for row, key in enumerate(old["key"].to_pylist())}
        keys = succeeded_rows(read_metadata(self.dataset, item.inputs["shard"], ["key", "status"]))["key"].to_pylist()
        vectors = rows[[place[key] for key in keys]]
        np.save(scratch / "vectors.npy", vectors, allow_pickle=False)
        ledger = [Entry(key, "no_vector", "row of zeros", kept=True) for key, vector in zip(keys, vectors, strict=True)
                  if not vector.any()]
        return Output(len(vectors), {f"{item.id}.npy": scratch / "vectors.npy"}, ledger, {"reused": len(vectors)})

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        output = super().finish(records, scratch)
        output.info["reused"] = sum(record["info"].get("reused", 0) for record in records)
        return output


class ReuseCaptions(Reuse, EmbedCaptions):
    """The same of captions."""
