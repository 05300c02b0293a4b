"""Prompts, pictures and databases -> pictures: the style follows the database that the neighbours come from."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs.runs.run import Run
from jobs.sampling.config import QueryConfig, SampleConfig
from jobs.sampling.generator import Drawer, check_fit, open_generator, same_encoder, searched_database
from jobs.sampling.grid import SHOWN_NEIGHBORS, grid_cell, read_cells, write_cells
from jobs.sampling.mixture import Mixture, mixture
from jobs.sampling.queries import Query, queries, read
from jobs.sampling.retrieval import Drawn, Near, Retriever, p_d_identity
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
from pipeline.stages.manifest import sealed_input
from pipeline.stages.stage import Stage, fingerprint
from pipeline.stages.types import Item, Output

_SHOWN = 256  # pixels of a side of what was asked for by a picture


class Sampling(Stage):
    """The stage from a run and databases to runs/<run>/samples/<fingerprint>; one item a database or mixture."""

    name = "sample"
    workers_need_gpu = True

    def __init__(self, run: Run, step: int, prompts: tuple[str, ...], databases: Sequence[Dataset | Mixture],
                 encoder: ClipConfig, config: SampleConfig, name: str = "", *, pictures: tuple[str, ...] = (),
                 asked: QueryConfig | None = None) -> None:
        self.asked = asked or QueryConfig()
        if not (prompts or pictures or self.asked.unconditional) or not databases:
            raise ValueError("sample needs prompts, pictures or rows to draw, and databases\n"
                             "hint: --prompt 'a red apple', --image apple.png or --unconditional 4; --database noto")
        if name:
            Run.parse(run.root, name)  # a name, not a way out of the folder
        self.databases = tuple(map(mixture, databases))
        labels = [one.label for one in self.databases]
        if len({one.item for one in self.databases}) < len(labels):
            raise ValueError(f"a database is given twice: {', '.join(map(repr, labels))}")
        if step < 0:
            raise ValueError(f"checkpoint {step}: must be a step, or 0 for the newest")
        _fitting(self.asked, config)
        self.queries = queries(prompts, pictures, self.asked.unconditional)
        self.run, self.prompts, self.pictures, self.encoder = run, prompts, pictures, encoder
        self.step = step or run.latest_step()
        super().__init__(run.root, f"{run.path}/samples/{name}", config)
        if not name:
            self.path = f"{run.path}/samples/{fingerprint(self)[:12]}"
            self.folder = storage.join(self.root, self.path)

    @property
    def command(self) -> str:
        asked = "".join(f" --prompt {one!r}" for one in self.prompts)
        asked += "".join(f" --image {one!r}" for one in self.pictures)
        asked += f" --unconditional {self.asked.unconditional}" if self.asked.unconditional else ""
        return f"python -m jobs sample {self.run.name}{asked} --root {self.root}"

    def section(self) -> dict[str, Any]:
        # What was before there was a choice.
        later = {"sampler": "ddim", "eta": 0.0, "text_guidance": -1.0, "precision": "fp32", "ema": 0.0, "text": True}
        settings = {name: value for name, value in super().section().items() if value != later.get(name, ...)}
        settings |= {"prompts": list(self.prompts), "databases": [one.label for one in self.databases]}
        if self.pictures:
            settings["images"] = [{"name": one.title, "sha256": one.sha256} for one in self.queries
                                  if one.kind == "image"]
        if self.asked.unconditional:
            settings |= {"unconditional": self.asked.unconditional, "top_m": self.asked.top_m}
        return settings | ({"pool": self.asked.pool} if self.asked.pool else {})

    def inputs(self) -> dict[str, dict[str, Any]]:
        found = {"checkpoint": sealed_input(self.root, f"{self.run.path}/checkpoints/{self.step:07d}",
                                              self.run.command)}
        for database in self._members():
            found |= searched_database(database)
            if self.asked.unconditional:
                found[f"p_D of {database.label}"] = p_d_identity(self._train(), database)
        return found

    def _members(self) -> list[Dataset]:
        return list(dict.fromkeys(one for database in self.databases for one in database.members))

    def _train(self) -> Dataset:
        """The dataset whose pictures' neighbours are counted in p_D."""
        trained = self.run.section()
        if "dataset" not in trained:
            raise ValueError(f"the run {self.run.name} was not trained here: how often it has met which row (p_D) is "
                             f"not known\nhint: --prompt or --image instead of --unconditional")
        return Dataset.parse(self.root, trained["dataset"])

    def plan(self) -> list[Item]:
        check_fit(self.run, self.step, self.config)
        same_encoder(self.run, self.encoder, self._members())
        carried = tuple((one.carried, read(path)) for one, path in
                        zip((one for one in self.queries if one.kind == "image"), self.pictures, strict=True))
        return [Item(database.item, {"number": number}, () if number else carried)
                for number, database in enumerate(self.databases)]

    def setup(self) -> None:
        # On a CPU the bytes of a picture depend on how a sum is split among threads.
        torch.set_num_threads(1)
        same_encoder(self.run, self.encoder, self._members())
        clip.load_encoder(self.encoder)
        self.precision = devices.dtype_name(compute_dtype(self.config.precision, devices.choose_device()))

    def process(self, item: Item, scratch: Path) -> Output:
        database = self.databases[item.inputs["number"]]
        retriever, generator = Retriever(database), open_generator(self.run, self.step, self.config.ema)
        drawn = self._drawn(retriever)
        vectors = self._vectors(retriever, drawn)
        near = retriever.nearest(vectors, [one.position for one in self.queries], self.config.k, self.asked.pool,
                                 self.config.seed, drawn)
        images = self._draw(generator, vectors, near)
        samples = _samples(database, near)
        output, entries, cells = Output(samples=len(self.queries)), [], []
        for number, query in enumerate(self.queries):
            neighbors = [(member, samples[member, row], float(score)) for member, row, score in
                         zip(near.members[number], near.rows[number], near.scores[number], strict=True) if row >= 0]
            name, image = f"{item.id}/{query.name}", images[number]
            squares = [_square(neighbor.picture, image.width) for _, neighbor, _ in neighbors]
            files = {f"{name}.png": image} | {_neighbor_file(name, rank): square for rank, square in enumerate(squares)}
            for file, content in files.items():
                (scratch / file).parent.mkdir(exist_ok=True)
                content.save(scratch / file)
                output.files[file] = scratch / file
            cells.append(grid_cell(image, squares))
            about = _neighbor_entries(name, database, neighbors)
            entries.append({"file": f"{name}.png", **query.about(), **_of_p_d(drawn[number], about),
                            "database": database.label, "seed": self.config.seed, "position": query.position,
                            "checkpoint": generator.about, "neighbors": about})
        output.info = {"pictures": entries}
        write_cells(scratch / "cells.tar", cells)
        # The driver makes the grid from the cells, so it need not read the images again.
        output.run_files = {_cells_file(item.id): (scratch / "cells.tar").read_bytes()}
        return output

    def _drawn(self, retriever: Retriever) -> list[Drawn | None]:
        """The row of p_D that each query stands for, None for those that have a vector of their own."""
        positions = [one.position for one in self.queries if one.kind == "p_D"]
        found: list[Drawn | None] = [None] * (len(self.queries) - len(positions))
        return found + (retriever.likely(self._train(), positions, self.config.k, self.asked.top_m, self.config.seed)
                        if positions else [])

    def _vectors(self, retriever: Retriever, drawn: Sequence[Drawn | None]) -> np.ndarray:
        """The vectors that neighbours are looked for, (Q, D) float32: of prompts, of pictures, of drawn rows."""
        encoder = clip.load_encoder(self.encoder)
        vectors = [encoder.texts(self.prompts)] if self.prompts else []
        # One by one, so that none depends on what else is asked for.
        vectors += [encoder.images(np.stack([encoder.prepared(self._bytes(one))])) for one in self.queries
                    if one.kind == "image"]
        if rows := [one for one in drawn if one]:
            vectors.append(retriever.vectors(rows))
        return np.concatenate(vectors)

    def _bytes(self, query: Query) -> bytes:
        return storage.read_bytes(storage.join(self.folder, query.carried))

    def _draw(self, drawer: Drawer, vectors: np.ndarray, near: Near) -> list[Image.Image]:
        """The pictures of all queries; those of p_D, or all, see their neighbours alone, as in training."""
        own = sum(one.kind != "p_D" for one in self.queries) if self.config.text else 0
        positions = [one.position for one in self.queries]
        context = np.concatenate([vectors[:own, None], near.vectors[:own]], 1)  # (queries, 1 + k, D)
        drawn = [drawer.draw(context, positions[:own], self.config),
                 # No vector comes first here that could have a guidance of its own.
                 drawer.draw(near.vectors[own:], positions[own:], replace(self.config, text_guidance=-1.0))]
        return [Image.fromarray(one) for one in np.concatenate(drawn)]

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
                _small(self._bytes(query)).save(files[query.shown])
        return Output(files=files, info={"prompts": list(self.prompts), "step": self.step,
                                         "databases": [database.label for database in self.databases]})

    def _grid(self, records: Sequence[dict[str, Any]], scratch: Path) -> Image.Image:
        """The grid: rows are queries, columns are databases."""
        columns = [self._cells(record, scratch) for record in records]
        cells = [cell for row in zip(*columns, strict=True) for cell in row]
        return contact_sheet(cells, len(columns), cell=max(cell.width for cell in cells),
                             row_labels=[query.title for query in self.queries],
                             column_labels=[database.label.replace("+", " + ") for database in self.databases])

    def _cells(self, record: dict[str, Any], scratch: Path) -> list[Image.Image]:
        """The cells of one database, in the order of the queries."""
        url = storage.join(self.folder, _cells_file(record["id"]))
        try:
            return list(read_cells(storage.download(url, scratch / f"{record['id']}.tar")))
        except FileNotFoundError:  # an earlier version of the program, which wrote no cells, processed this item
            return [grid_cell(self._read(entry["file"]), [self._read(neighbor["file"]) for neighbor in
                                                          entry["neighbors"][:SHOWN_NEIGHBORS]])
                    for entry in record["info"]["pictures"]]

    def _read(self, name: str) -> Image.Image:
        return Image.open(io.BytesIO(storage.read_bytes(storage.join(self.folder, name)))).convert("RGB")


def _fitting(asked: QueryConfig, config: SampleConfig) -> None:
    """ValueError where what is asked for does not go with the number of neighbours."""
    if asked.pool and asked.pool < config.k:
        raise ValueError(f"{config.k} neighbours cannot be taken of the {asked.pool} nearest\n"
                         f"hint: --pool {4 * config.k}, or a smaller --k")
    if asked.unconditional and not config.k:
        raise ValueError("--unconditional with --k 0 leaves nothing to draw from\nhint: --k 4")


def _samples(database: Mixture, near: Near) -> dict[tuple[int, int], Sample]:
    """The samples that are neighbours, by database and row."""
    found = {}
    for member, one in enumerate(database.members):
        rows = sorted({int(row) for row in near.rows[near.members == member] if row >= 0})
        found |= {(member, sample.row): sample for sample in lookup.samples(one, rows)}
    return found


def _of(database: Mixture, member: int) -> dict[str, str]:
    """Which database of several something comes from."""
    return {"database": database.members[member].label} if len(database.members) > 1 else {}


def _of_p_d(drawn: Drawn | None, neighbors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What samples.json says of a row that was drawn, which is the first of the neighbours."""
    if drawn is None:
        return {}
    return {"drawn": {name: neighbors[0][name] for name in ("row", "key", "caption", "sha256", "database")
                      if name in neighbors[0]} | {"used": drawn.used}}


def _neighbor_entries(name: str, database: Mixture, neighbors: Sequence[tuple[int, Sample, float]]
                      ) -> list[dict[str, Any]]:
    """The entries of samples.json for the neighbors of one image, which are (database, sample, score)."""
    return [{"key": sample.key, "row": sample.row, "score": round(score, 6), "caption": sample.caption,
             "sha256": sample.sha256, "file": _neighbor_file(name, rank), **_of(database, member)}
            for rank, (member, sample, score) in enumerate(neighbors)]


def _neighbor_file(name: str, rank: int) -> str:
    return f"{name}-neighbor-{rank}.png"


def _cells_file(item: str) -> str:
    """The file with the cells of the grid that the worker of an item made."""
    return f"cells/{item}.tar"


def _small(data: bytes) -> Image.Image:
    image = Image.fromarray(decode_pixels(data))
    image.thumbnail((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    return image


def _square(data: bytes, size: int) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (size, size), "white")
    sheet.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return sheet
