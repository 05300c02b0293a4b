"""Prompts, images and databases -> images. The style follows the database that the neighbors come from."""

import io
import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from jobs.runs.run import Run
from jobs.sampling.config import QueryConfig, SampleConfig
from jobs.sampling.generator import (
    ImageGenerator,
    check_same_encoder,
    check_sample_config,
    open_generator,
    search_inputs,
)
from jobs.sampling.grid import SHOWN_NEIGHBORS, grid_cell, read_cells, write_cells
from jobs.sampling.mixture import Mixture, as_mixture
from jobs.sampling.queries import Query, build_queries, prompt_flags, read_image
from jobs.sampling.retrieval import RetrievedNeighbors, Retriever, SampledRow, p_d_identity
from model.training.precision import compute_dtype
from pipeline import storage
from pipeline.datasets import lookup
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.lookup import Sample
from pipeline.embeddings import clip
from pipeline.embeddings.clip_weights import ClipConfig
from pipeline.hardware import devices
from pipeline.media.contact_sheet import contact_sheet
from pipeline.media.resize import decode_pixels
from pipeline.releases import published
from pipeline.stages.manifest import sealed_input
from pipeline.stages.stage import Stage, fingerprint
from pipeline.stages.types import Item, Output

_log = logging.getLogger(__name__)
_THUMBNAIL_PIXELS = 256
_GRID_ROWS = 100  # a cell of a large image has megabytes, and all cells of a database are in memory


class Sampling(Stage):
    """The stage from a run and databases to runs/<run>/samples/<fingerprint>. Each database or mixture is one item."""

    name = "sample"
    record_info: ClassVar[dict[str, Any]] = {"pictures": [{
        "position": int, "database": str, "file": str, "neighbors": [{"file": str}]}]}
    workers_need_gpu = True

    def __init__(self, run: Run, step: int, prompts: tuple[str, ...], databases: Sequence[Dataset | Mixture],
                 encoder: ClipConfig, config: SampleConfig, name: str = "", *, pictures: tuple[str, ...] = (),
                 query_config: QueryConfig | None = None) -> None:
        self.query_config = query_config or QueryConfig()
        if not (prompts or pictures or self.query_config.unconditional) or not databases:
            raise ValueError("sample needs databases, and prompts, images or --unconditional\n"
                             "hint: --prompt 'a red apple', --image apple.png or --unconditional 4; --database noto")
        if name:
            Run.parse(run.root, name)  # a name, not a way out of the folder
        self.databases = tuple(map(as_mixture, databases))
        labels = [database.label for database in self.databases]
        if len({database.item for database in self.databases}) < len(labels):
            raise ValueError(f"a database is given twice: {', '.join(map(repr, labels))}")
        if step < 0:
            raise ValueError(f"checkpoint {step}: must be a step, or 0 for the newest")
        _check_neighbor_count(self.query_config, config)
        self.queries = build_queries(prompts, pictures, self.query_config.unconditional, self.query_config.count)
        self.run, self.prompts, self.pictures, self.encoder = run, prompts, pictures, encoder
        self.step = run.choose_step(step)
        super().__init__(run.root, f"{run.path}/samples/{name}", config)
        if not name:
            self.path = f"{run.path}/samples/{fingerprint(self)[:12]}"
            self.folder = storage.join(self.root, self.path)

    @property
    def command(self) -> str:
        options = f" {prompt_flags(self.prompts)}" if self.prompts else ""
        options += "".join(f" --image {shlex.quote(image)}" for image in self.pictures)
        options += "".join(f" --database {shlex.quote(database.label)}" for database in self.databases)
        options += "".join(f" --{name} {value}" for name, value, usual in (
            ("unconditional", self.query_config.unconditional, 0), ("count", self.query_config.count, 1))
                           if value != usual)
        return f"python -m jobs sample {self.run.name}{options} --root {storage.quote(self.root)}"

    @property
    def alternative(self) -> str:
        return "another --name"

    def section(self) -> dict[str, Any]:
        # Settings with these values have no key: folders from before the settings existed keep their fingerprint.
        later = {"sampler": "ddim", "eta": 0.0, "text_guidance": -1.0, "precision": "fp32", "ema": 0.0, "text": True}
        settings = {name: value for name, value in super().section().items() if value != later.get(name, ...)}
        settings |= {"prompts": list(self.prompts), "databases": [database.label for database in self.databases]}
        if self.pictures:
            settings["images"] = [{"name": query.title, "sha256": query.sha256} for query in self._image_queries()]
        if self.query_config.count > 1:
            settings["count"] = self.query_config.count
        if self.query_config.unconditional:
            settings |= {"unconditional": self.query_config.unconditional, "top_m": self.query_config.top_m}
        return settings | ({"pool": self.query_config.pool} if self.query_config.pool else {})

    def inputs(self) -> dict[str, dict[str, Any]]:
        inputs = {"checkpoint": sealed_input(self.root, f"{self.run.path}/checkpoints/{self.step:07d}",
                                              self.run.command)}
        for database in self._members():
            inputs |= search_inputs(database)
            if self.query_config.unconditional:
                inputs[f"p_D of {database.label}"] = p_d_identity(self._train(), database)
        return inputs

    def _image_queries(self) -> list[Query]:
        """The first query of each image."""
        queries = [query for query in self.queries if query.kind == "image"]
        return queries[::self.query_config.count]

    def _members(self) -> list[Dataset]:
        return list(dict.fromkeys(dataset for database in self.databases for dataset in database.members))

    def _train(self) -> Dataset:
        """The training dataset, whose neighbors p_D counts."""
        section = self.run.section()
        if "dataset" not in section:
            raise ValueError(f"the run {self.run.name} was not trained here: how often it has met which row (p_D) is "
                             f"not known\nhint: --prompt or --image instead of --unconditional")
        return published.open_label(self.root, section["dataset"])

    def plan(self) -> list[Item]:
        check_sample_config(self.run, self.step, self.config)
        check_same_encoder(self.run, self.encoder, self._members())
        carried = tuple((query.carried, read_image(path)) for query, path in
                        zip(self._image_queries(), self.pictures, strict=True))
        return [Item(database.item, {"number": number}, () if number else carried)
                for number, database in enumerate(self.databases)]

    def setup(self) -> None:
        # On a CPU the bytes of an image depend on how a sum is split among threads.
        torch.set_num_threads(1)
        check_same_encoder(self.run, self.encoder, self._members())
        clip.load_encoder(self.encoder)
        self.precision = devices.dtype_name(compute_dtype(self.config.precision, devices.choose_device()))

    def process(self, item: Item, scratch: Path) -> Output:
        database = self.databases[item.inputs["number"]]
        retriever, generator = Retriever(database), open_generator(self.run, self.step, self.config.ema)
        sampled_rows = self._sample_rows(retriever)
        vectors = self._vectors(retriever, sampled_rows)
        retrieved = retriever.nearest(vectors, [query.position for query in self.queries], self.config.k,
                                      self.query_config.pool, self.config.seed, sampled_rows)
        images = self._generate(generator, vectors, retrieved)
        samples = _load_samples(database, retrieved)
        output, entries, cells = Output(samples=len(self.queries)), [], []
        for number, query in enumerate(self.queries):
            places = zip(retrieved.members[number], retrieved.rows[number], retrieved.scores[number], strict=True)
            neighbors = [(member, samples[member, row], float(score)) for member, row, score in places if row >= 0]
            name, image = f"{item.id}/{query.name}", images[number]
            squares = [_fit_into_square(neighbor.picture, image.width) for _, neighbor, _ in neighbors]
            files = {f"{name}.png": image} | {_neighbor_file(name, rank): square for rank, square in enumerate(squares)}
            for file, content in files.items():
                (scratch / file).parent.mkdir(exist_ok=True)
                content.save(scratch / file)
                output.files[file] = scratch / file
            cells += [grid_cell(image, squares)] if number < _GRID_ROWS else []
            about = _neighbor_entries(name, database, neighbors)
            entries.append({"file": f"{name}.png", **query.about(), **_p_d_field(sampled_rows[number], about),
                            "database": database.label, "seed": self.config.seed, "position": query.position,
                            "checkpoint": generator.about, "neighbors": about})
        output.info = {"pictures": entries}
        write_cells(scratch / "cells.tar", cells)
        # The driver makes the grid from the cells, so it need not read the images again.
        output.run_files = {_cells_file(item.id): (scratch / "cells.tar").read_bytes()}
        return output

    def _sample_rows(self, retriever: Retriever) -> list[SampledRow | None]:
        """The row sampled from p_D for each query, None for queries with a vector of their own."""
        positions = [query.position for query in self.queries if query.kind == "p_D"]
        rows: list[SampledRow | None] = [None] * (len(self.queries) - len(positions))
        if positions:
            rows += retriever.sample_rows(self._train(), positions, self.config.k, self.query_config.top_m,
                                          self.config.seed)
        return rows

    def _vectors(self, retriever: Retriever, sampled_rows: Sequence[SampledRow | None]) -> np.ndarray:
        """The query vectors, (Q, D) float32: prompts, then images, then sampled rows."""
        encoder = clip.load_encoder(self.encoder)
        vectors = [encoder.texts(self.prompts)] if self.prompts else []
        # One by one: in a batch, a vector would depend on the other queries.
        vectors += [encoder.images(np.stack([encoder.prepared(self._bytes(query))])) for query in self._image_queries()]
        vectors = [np.repeat(group, self.query_config.count, axis=0) for group in vectors]
        if rows := [row for row in sampled_rows if row]:
            vectors.append(retriever.vectors(rows))
        return np.concatenate(vectors)

    def _bytes(self, query: Query) -> bytes:
        return storage.read_bytes(storage.file_below(self.folder, query.carried))

    def _generate(self, generator: ImageGenerator, vectors: np.ndarray, retrieved: RetrievedNeighbors
                  ) -> list[Image.Image]:
        """The images of all queries. Rows from p_D, and all queries without `text`, have only neighbors as context."""
        own = sum(query.kind != "p_D" for query in self.queries) if self.config.text else 0
        positions = [query.position for query in self.queries]
        context = np.concatenate([vectors[:own, None], retrieved.vectors[:own]], 1)  # (queries, 1 + k, D)
        parts = [generator.generate(context, positions[:own], self.config),
                 # The context has no text vector, so there is no separate guidance for it.
                 generator.generate(retrieved.vectors[own:], positions[own:], replace(self.config, text_guidance=-1.0))]
        return [Image.fromarray(pixels) for pixels in np.concatenate(parts)]

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        self._grid(records, scratch).save(scratch / "grid.png")
        entries = {(entry["position"], entry["database"]): entry
                   for record in records for entry in record["info"]["pictures"]}
        document = self.section() | {"run": self.run.name, "pictures": [
            entries[query.position, database.label] for query in self.queries for database in self.databases]}
        (scratch / "samples.json").write_bytes(storage.json_bytes(document))
        files = {name: scratch / name for name in ("grid.png", "samples.json")}
        for query in self.queries:
            if query.kind == "image":
                files[query.shown] = scratch / query.shown
                files[query.shown].parent.mkdir(exist_ok=True)
                _thumbnail(self._bytes(query)).save(files[query.shown])
        return Output(files=files, info={"prompts": list(self.prompts), "step": self.step,
                                         "databases": [database.label for database in self.databases]})

    def _grid(self, records: Sequence[dict[str, Any]], scratch: Path) -> Image.Image:
        """The grid: rows are queries, columns are databases. It has the first queries if there are many."""
        if len(self.queries) > _GRID_ROWS:
            _log.info("sample: grid.png shows the first %d of %d rows", _GRID_ROWS, len(self.queries))
        columns = [self._cells(record, scratch) for record in records]
        cells = [cell for row in zip(*columns, strict=True) for cell in row]
        return contact_sheet(cells, len(columns), cell=max(cell.width for cell in cells),
                             row_labels=[query.title for query in self.queries[:_GRID_ROWS]],
                             column_labels=[database.label.replace("+", " + ") for database in self.databases])

    def _cells(self, record: dict[str, Any], scratch: Path) -> list[Image.Image]:
        """The cells of one database, in the order of the queries."""
        url = storage.join(self.folder, _cells_file(record["id"]))
        try:
            return list(islice(read_cells(storage.download(url, scratch / f"{record['id']}.tar")), _GRID_ROWS))
        except FileNotFoundError:  # an earlier version of the program, which wrote no cells, processed this item
            return [grid_cell(self._read(entry["file"]), [self._read(neighbor["file"]) for neighbor in
                                                          entry["neighbors"][:SHOWN_NEIGHBORS]])
                    for entry in record["info"]["pictures"][:_GRID_ROWS]]

    def _read(self, name: str) -> Image.Image:
        return Image.open(io.BytesIO(storage.read_bytes(storage.file_below(self.folder, name)))).convert("RGB")


def _check_neighbor_count(queries: QueryConfig, config: SampleConfig) -> None:
    """ValueError if the query settings do not fit the number of neighbors."""
    if queries.pool and queries.pool < config.k:
        raise ValueError(f"--pool {queries.pool} has fewer neighbors than --k {config.k}\n"
                         f"hint: --pool {4 * config.k}, or a smaller --k")
    if queries.unconditional and not config.k:
        raise ValueError("--unconditional with --k 0 has no neighbors to generate from\nhint: --k 4")


def _load_samples(database: Mixture, neighbors: RetrievedNeighbors) -> dict[tuple[int, int], Sample]:
    """The samples of the neighbors by (database, row)."""
    samples: dict[tuple[int, int], Sample] = {}
    for member, dataset in enumerate(database.members):
        rows = sorted({int(row) for row in neighbors.rows[neighbors.members == member] if row >= 0})
        samples |= {(member, sample.row): sample for sample in lookup.samples(dataset, rows)}
    return samples


def _database_field(database: Mixture, member: int) -> dict[str, str]:
    """The database of a neighbor, if the mixture has several."""
    return {"database": database.members[member].label} if len(database.members) > 1 else {}


def _p_d_field(sampled_row: SampledRow | None, neighbors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The field of samples.json for a row sampled from p_D. The row is the first of the neighbors."""
    if sampled_row is None:
        return {}
    return {"drawn": {name: neighbors[0][name] for name in ("row", "key", "caption", "sha256", "database")
                      if name in neighbors[0]} | {"used": sampled_row.used}}


def _neighbor_entries(name: str, database: Mixture, neighbors: Sequence[tuple[int, Sample, float]]
                      ) -> list[dict[str, Any]]:
    """The entries of samples.json for the neighbors of one image, which are (database, sample, score)."""
    return [{"key": sample.key, "row": sample.row, "score": round(score, 6), "caption": sample.caption,
             "sha256": sample.sha256, "url": sample.url, "file": _neighbor_file(name, rank),
             **_database_field(database, member)}
            for rank, (member, sample, score) in enumerate(neighbors)]


def _neighbor_file(name: str, rank: int) -> str:
    return f"{name}-neighbor-{rank}.png"


def _cells_file(item: str) -> str:
    """The file with the cells of the grid that the worker of an item made."""
    return f"cells/{item}.tar"


def _thumbnail(data: bytes) -> Image.Image:
    image = Image.fromarray(decode_pixels(data))
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    return image


def _fit_into_square(data: bytes, size: int) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (size, size), "white")
    sheet.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return sheet
