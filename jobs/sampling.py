"""Prompts and databases -> pictures: the style follows the database that the neighbours come from."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs import drawing
from jobs.drawing import same_encoder
from jobs.runs import Run
from jobs.settings import SampleConfig
from pipeline import clip, lookup, stage, storage
from pipeline.contact_sheet import contact_sheet
from pipeline.dataset import Dataset
from pipeline.index import Searcher
from pipeline.stage import Item, Output, Stage


class Sampling(Stage):
    """The stage from a run and databases to runs/<run>/samples/<fingerprint>; one item a database."""

    name = "sample"
    workers_need_gpu = True

    def __init__(self, run: Run, step: int, prompts: tuple[str, ...], databases: tuple[Dataset, ...],
                 encoder: clip.ClipConfig, config: SampleConfig, name: str = "") -> None:
        if not prompts or not databases:
            raise ValueError("sample needs prompts and databases\nhint: --prompt 'a red apple' --database noto")
        if name:
            Run.parse(run.root, name)  # a name, not a way out of the folder
        for what, given in (("prompt", prompts), ("database", [one.label for one in databases])):
            if len(set(given)) < len(given) or not all(one.strip() for one in given):
                raise ValueError(f"a {what} is empty or given twice: {', '.join(map(repr, given))}")
        if step < 0:
            raise ValueError(f"checkpoint {step}: must be a step, or 0 for the newest")
        self.run, self.prompts, self.databases, self.encoder = run, prompts, databases, encoder
        self.step = step or run.latest_step()
        super().__init__(run.root, f"{run.path}/samples/{name}", config)
        if not name:
            self.path = f"{run.path}/samples/{stage.fingerprint(self)[:12]}"
            self.folder = storage.join(self.root, self.path)

    @property
    def command(self) -> str:
        prompts = "".join(f" --prompt {prompt!r}" for prompt in self.prompts)
        return f"python -m jobs sample {self.run.name}{prompts} --root {self.root}"

    def section(self) -> dict[str, Any]:
        # What was before there was a choice.
        later = {"sampler": "ddim", "eta": 0.0, "text_guidance": -1.0, "precision": "fp32"}
        settings = {name: value for name, value in super().section().items() if value != later.get(name, ...)}
        return settings | {"prompts": list(self.prompts), "databases": [one.label for one in self.databases]}

    def inputs(self) -> dict[str, dict[str, Any]]:
        found = {"checkpoint": stage.identity(self.root, f"{self.run.path}/checkpoints/{self.step:07d}",
                                              self.run.command)}
        for database in self.databases:
            found[f"index of {database.label}"] = database.identity("index")
            found[f"embeddings of {database.label}"] = database.identity("embeddings")
            found[f"shards of {database.label}"] = database.identity("shards")
        return found

    def plan(self) -> list[Item]:
        same_encoder(self.run, self.encoder, self.databases)
        return [Item(database.label.replace("@", "-"), {"number": number})
                for number, database in enumerate(self.databases)]

    def setup(self) -> None:
        # On a CPU the bytes of a picture depend on how a sum is split among threads.
        torch.set_num_threads(1)
        clip.load(self.encoder)

    def process(self, item: Item, scratch: Path) -> Output:
        database = self.databases[item.inputs["number"]]
        encoder, searcher = clip.load(self.encoder), Searcher(database)
        texts = encoder.texts(self.prompts)
        ids, scores = searcher.search(texts, max(1, self.config.k))
        ids, scores = ids[:, :self.config.k], scores[:, :self.config.k]
        neighbors = searcher.embeddings.rows(ids).astype(np.float32)
        drawer = drawing.opened(self.run, self.step)
        context = np.concatenate([texts[:, None], neighbors], 1)  # (prompts, 1 + k, D)
        pictures = [Image.fromarray(one) for one in drawer.draw(context, range(len(context)), self.config)]
        rows = sorted({int(row) for row in ids.ravel() if row >= 0})
        found = {one.row: one for one in lookup.samples(database, rows)}
        output, drawn = Output(samples=len(self.prompts)), []
        for number, prompt in enumerate(self.prompts):
            name = f"{item.id}/{number:02d}-{_slug(prompt)}"
            beside = [(rank, found[int(row)], float(scores[number, rank]))
                      for rank, row in enumerate(ids[number]) if row >= 0]
            files = {f"{name}.png": pictures[number]}
            files |= {f"{name}-neighbor-{rank}.png": _square(one.picture, pictures[number].width)
                      for rank, one, _ in beside}
            for file, picture in files.items():
                (scratch / file).parent.mkdir(exist_ok=True)
                picture.save(scratch / file)
                output.files[file] = scratch / file
            drawn.append({"file": f"{name}.png", "prompt": prompt, "database": database.label,
                          "seed": self.config.seed, "position": number, "checkpoint": drawer.about,
                          "neighbors": [{"key": one.key, "row": one.row, "score": round(score, 6),
                                         "caption": one.caption, "sha256": one.sha256,
                                         "file": f"{name}-neighbor-{rank}.png"} for rank, one, score in beside]})
        output.info = {"pictures": drawn}
        return output

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        pictures = {(one["prompt"], one["database"]): one for record in records for one in record["info"]["pictures"]}
        self._grid(pictures).save(scratch / "grid.png")
        document = self.section() | {"run": self.run.name, "pictures": [pictures[prompt, database.label] for prompt in
                                                                        self.prompts for database in self.databases]}
        (scratch / "samples.json").write_bytes(storage.json_bytes(document))
        return Output(files={name: scratch / name for name in ("grid.png", "samples.json")},
                      info={"prompts": list(self.prompts), "databases": [one.label for one in self.databases],
                            "step": self.step})

    def _grid(self, pictures: dict[tuple[str, str], dict[str, Any]]) -> Image.Image:
        """Rows prompts, columns databases; beside each picture its first neighbours, small."""
        cells = []
        for prompt in self.prompts:
            for database in self.databases:
                one = pictures[prompt, database.label]
                picture = self._read(one["file"])
                cells.append(_with_neighbors(picture, [self._read(near["file"]) for near in one["neighbors"][:4]]))
        return contact_sheet(cells, len(self.databases), cell=max(one.width for one in cells),
                             row_labels=list(self.prompts), column_labels=[one.label for one in self.databases])

    def _read(self, name: str) -> Image.Image:
        return Image.open(io.BytesIO(storage.read_bytes(storage.join(self.folder, name)))).convert("RGB")


def _with_neighbors(picture: Image.Image, neighbors: list[Image.Image]) -> Image.Image:
    """The picture at twice its size, and up to four of its neighbours in a column beside it at half size."""
    size = picture.width
    sheet = Image.new("RGB", (2 * size + 4 + size // 2, 2 * size), "white")
    sheet.paste(picture.resize((2 * size, 2 * size), Image.Resampling.LANCZOS), (0, 0))
    for rank, one in enumerate(neighbors):
        sheet.paste(one.resize((size // 2, size // 2), Image.Resampling.LANCZOS), (2 * size + 4, rank * size // 2))
    return sheet


def _square(data: bytes, size: int) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (size, size), "white")
    sheet.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return sheet


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "prompt"


