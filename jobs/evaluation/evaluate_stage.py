"""Does the style follow the database? Measures the finding of Rombach et al. 2022 (arXiv:2207.13038).

The run generates held-out subjects in every style. The database, the prompt, or both name the style. Style classifiers
that were trained on real images tell the style of each sample. There are two stages: the classifiers, and the samples
with their scores.
"""

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from jobs.evaluation import plot, summary
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.held_out import held_out_captions, item_id, rows_with_captions
from jobs.evaluation.judge_stage import StyleClassifierStage, nearest_rows
from jobs.runs.run import Run
from jobs.sampling.config import SampleConfig
from jobs.sampling.generator import check_same_encoder, check_sample_config, open_generator, search_inputs
from model import style_classifier
from model.training.precision import compute_dtype
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.embeddings import clip
from pipeline.embeddings.clip_weights import ClipConfig
from pipeline.formats import arrays
from pipeline.hardware import devices
from pipeline.indices.searcher import Searcher
from pipeline.stages.manifest import read_manifest, sealed_input
from pipeline.stages.stage import Stage, fingerprint
from pipeline.stages.types import Item, Output

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StyleRequest:
    """One way to request a style."""

    id: str
    named: bool
    """Whether the prompt names it."""
    source: str
    """The database of the neighbors: "style", "mixed", or "" for none."""
    k: int = -1
    guidance: float | None = None


WAYS = (StyleRequest("database", False, "style"), StyleRequest("prompt", True, "mixed"),
        StyleRequest("both", True, "style"), StyleRequest("text", True, ""), StyleRequest("neither", False, "mixed"))


def plan_ways(judging: StyleClassifierStage, mixed: Dataset, step: int, encoder: ClipConfig, config: EvaluateConfig,
              how: SampleConfig, prompts: Sequence[str]) -> tuple[Sequence[str], list[tuple[StyleRequest, int]]]:
    """The prompts of an evaluation, and its ways to request a style with their numbers of prompts.

    ValueError if the evaluation is impossible. Nothing of it needs the trained judges.
    """
    if wrong := [way for way in config.ways if way not in summary.NAMES]:
        raise ValueError(f"evaluate.ways = {wrong[0]!r}: must be some of {', '.join(summary.NAMES)}")
    check_sample_config(judging.run, step or judging.run.latest_step(), how)
    check_same_encoder(judging.run, encoder, [mixed, *judging.databases])
    for database in (mixed, *judging.databases):
        search_inputs(database)  # refuses a database that lacks takedown requests, as each search does
    prompts = prompts or held_out_captions(judging.dataset, judging.databases)[:config.prompts]
    if not prompts:
        raise ValueError("the databases have no subject that training has not seen\n"
                         "hint: --prompt 'a red apple', once for each")
    few = min(config.sweep_prompts, len(prompts))
    ways = [(way, len(prompts)) for way in WAYS if (way.source or how.text)
            and (not config.ways or way.id in config.ways)]
    ways += [(StyleRequest(f"k-{k}", False, "style", k=k), few) for k in config.sweep_k]
    ways += [(StyleRequest(f"guidance-{scale:g}", False, "style", guidance=scale), few)
             for scale in config.sweep_guidance]
    if not ways:
        raise ValueError("no way and no sweep is requested\nhint: --ways database, or numbers for --sweep-k")
    return prompts, ways


def count_images(ways: Sequence[tuple[StyleRequest, int]], styles: int, seeds: int) -> int:
    """The images that the ways of `plan_ways` generate for a number of styles."""
    return seeds * sum(count * (styles if _is_for_each_style(way) else 1) for way, count in ways)


def _is_for_each_style(way: StyleRequest) -> bool:
    return way.named or way.source == "style"


class Evaluation(Stage):
    """The stage from a run, databases and judges to runs/<run>/evaluations/<hash>; an item for each way and style."""

    name = "evaluate"
    workers_need_gpu = True

    def __init__(self, judging: StyleClassifierStage, mixed: Dataset, step: int, encoder: ClipConfig,
                 config: EvaluateConfig, how: SampleConfig, prompts: tuple[str, ...],
                 planned: tuple[Sequence[str], list[tuple[StyleRequest, int]]], name: str = "") -> None:
        """`planned`: what `plan_ways` gives for the arguments before it."""
        self.planned = planned
        self.judging, self.run, self.databases = judging, judging.run, judging.databases
        self.mixed, self.encoder, self.how, self.prompts = mixed, encoder, how, prompts
        self.step = self.run.choose_step(step)
        super().__init__(self.run.root, f"{self.run.path}/evaluations/{name}", config)
        if name:
            Run.parse(self.root, name)  # a name, not a way out of the folder
        else:
            self.path = f"{self.run.path}/evaluations/{fingerprint(self)[:12]}"
            self.folder = storage.join(self.root, self.path)

    @property
    def command(self) -> str:
        return f"python -m jobs evaluate {self.run.name} --root {storage.quote(self.root)}"

    @property
    def alternative(self) -> str:
        return "another --name"

    def section(self) -> dict[str, Any]:
        config = super().section()
        if not config["ways"]:  # what is not used is not in the fingerprint
            del config["ways"]
        return {"evaluate": config, "sample": json.loads(json.dumps(asdict(self.how))),
                "encoder": [self.encoder.model, self.encoder.precision],
                "databases": [database.label for database in self.databases], "mixed": self.mixed.label,
                "prompts": list(self.prompts)}

    def inputs(self) -> dict[str, dict[str, Any]]:
        inputs = {"checkpoint": sealed_input(self.root, f"{self.run.path}/checkpoints/{self.step:07d}",
                                              self.run.command),
                 "judges": sealed_input(self.root, self.judging.path, self.judging.command)}
        for database in (self.mixed, *self.databases):
            inputs |= search_inputs(database)
        return inputs

    def plan(self) -> list[Item]:
        prompts, ways = self.planned
        items = []
        for way, count in ways:
            # A request without a style runs once.
            for number, database in enumerate(self.databases if _is_for_each_style(way) else [None]):
                items.append(Item(item_id(way.id, database), {"way": asdict(way), "style": number,
                                                          "prompts": list(prompts[:count]),
                                                          "count": count * self.config.seeds}))
        return items

    def _judges(self) -> dict[str, Any]:
        return read_manifest(self.judging.folder, self.judging.command)["info"]

    def setup(self) -> None:
        torch.set_num_threads(1)
        check_same_encoder(self.run, self.encoder, [self.mixed, *self.databases])
        clip.load_encoder(self.encoder)
        open_generator(self.run, self.step, self.how.ema)
        self.precision = devices.dtype_name(compute_dtype(self.how.precision, devices.choose_device()))

    def process(self, item: Item, scratch: Path) -> Output:
        torch.set_num_threads(1)
        way, style, prompts = StyleRequest(**item.inputs["way"]), item.inputs["style"], item.inputs["prompts"]
        database, how, encoder = self.databases[style], self.how, clip.load_encoder(self.encoder)
        how = replace(how, k=way.k if way.k >= 0 else how.k,
                      guidance=how.guidance if way.guidance is None else way.guidance)
        plain = encoder.texts(prompts)
        queries = encoder.texts([self.config.template.format(prompt=prompt, style=self._words(database))
                               for prompt in prompts]) if way.named else plain
        context, ids = queries[:, None], np.empty((len(prompts), 0), np.int64)
        if way.source:
            source = database if way.source == "style" else self.mixed
            unseen = frozenset(self._judges()["held_out"]) | set(prompts)
            left_out = frozenset() if self.config.seen else unseen
            searcher = _open_searcher(source, json.dumps(search_inputs(source)), left_out)
            ids, _ = searcher.search(queries, how.k)
            context = np.concatenate([context] * how.text + [searcher.embeddings.rows(ids).astype(np.float32)], 1)
        generator = open_generator(self.run, self.step, self.how.ema)
        images = np.stack([generator.generate(context, range(len(prompts)), replace(how, seed=how.seed + seed))
                          for seed in range(self.config.seeds)], 1)  # (P, seeds, S, S, 3)
        flat = images.reshape(-1, *images.shape[2:])
        vectors = np.concatenate([
            encoder.images(np.stack([encoder.prepared(_encode_png(image)) for image in flat[start:start + 64]]))
            for start in range(0, len(flat), 64)])
        network, probe = _load_classifiers(self.judging.folder, json.dumps(read_manifest(
            self.judging.folder, self.judging.command)["items"][0]["files"]), len(self.databases))
        similarities, rows = nearest_rows(self.judging.dataset, vectors)
        scores = {"judge": style_classifier.classify_images(network, flat),
                  "probe": style_classifier.classify_vectors(probe, vectors),
                  "clip": np.einsum("psd,pd->ps", vectors.reshape(len(prompts), self.config.seeds, -1),
                                    plain).reshape(-1).round(4), "nearest": similarities.round(4), "nearest_row": rows}
        # The distance of the samples to real images of the requested style with other subjects.
        real = Embeddings(database).all().astype(np.float32)
        real = np.delete(real, rows_with_captions(database, frozenset(self._judges()["held_out"])), 0)
        groups = np.repeat(np.arange(len(prompts)), self.config.seeds)
        document = {"way": way.id, "style": style, "prompts": prompts, "neighbors": ids.tolist(),
                    "kid": round(style_classifier.kid(vectors, real, groups), 6),
                    **{name: values.reshape(len(prompts), -1).tolist() for name, values in scores.items()}}
        (scratch / "found.json").write_bytes(storage.json_bytes(document))
        _tile_images(images).save(scratch / "pictures.png")
        return Output(samples=len(flat), files={f"{item.id}.json": scratch / "found.json",
                                                f"{item.id}.png": scratch / "pictures.png"})

    def _words(self, database: Dataset) -> str:
        named = dict(words.split("=", 1) for words in self.config.words)
        return named.get(database.label, database.label.split("@")[0].replace("-", " ").replace("_", " "))

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        results = [json.loads(storage.read_bytes(storage.join(self.folder, f"{record['id']}.json")))
                 for record in records]
        document = summary.summarize(results, [database.label for database in self.databases], self._judges())
        document["unseen"] = set(results[0]["prompts"]) <= set(self._judges()["held_out"])
        document |= {"run": self.run.name, "step": self.step, "settings": self.section()}
        (scratch / "evaluation.json").write_bytes(storage.json_bytes(document))
        (scratch / "table.md").write_text(summary.markdown_table(document))
        plot.write_plot(document, scratch / "plot.png")
        evaluated = {result["way"] for result in results}
        shown = [way.id for way in WAYS if way.id in evaluated and (way.named or way.source == "style")]
        for way in shown:
            self._grid(way, results).save(scratch / f"grid-{way}.png")
        names = ["evaluation.json", "table.md", "plot.png", *(f"grid-{way}.png" for way in shown)]
        return Output(files={name: scratch / name for name in names},
                      info={"step": self.step, **{row["way"]: row["judge"]["mean"] for row in document["ways"]}})

    def _grid(self, way: str, results: list[dict[str, Any]], rows: int = 8) -> Image.Image:
        """The first images of some prompts in every style, as the way has them; rows prompts, columns styles."""
        from pipeline.media.contact_sheet import contact_sheet
        size = self.run.image_size
        styles = [result for result in results if result["way"] == way]
        prompts = styles[0]["prompts"][:rows]
        sheets = [Image.open(io.BytesIO(storage.read_bytes(storage.join(self.folder, (
            f"{item_id(way, self.databases[result['style']])}.png"))))).convert("RGB") for result in styles]
        cells = [_crop_cell(sheet, number, self.config.seeds, size)
                 for number in range(len(prompts)) for sheet in sheets]
        return contact_sheet(cells, len(sheets), cell=max(64, size), row_labels=prompts,
                             column_labels=[self.databases[result["style"]].label for result in styles])


_ACROSS = 10  # prompts side by side on a sheet of one way and style


def _tile_images(images: np.ndarray) -> Image.Image:
    """Images (P, seeds, S, S, 3) without gaps: ten prompts side by side, the seeds of each below each other."""
    prompts, seeds, size = images.shape[:3]
    sheet = np.full((-(-prompts // _ACROSS) * seeds * size, min(_ACROSS, prompts) * size, 3), 255, np.uint8)
    for number, of_prompt in enumerate(images):
        for seed, picture in enumerate(of_prompt):
            y, x = (number // _ACROSS * seeds + seed) * size, number % _ACROSS * size
            sheet[y:y + size, x:x + size] = picture
    return Image.fromarray(sheet)


def _crop_cell(sheet: Image.Image, number: int, seeds: int, size: int) -> Image.Image:
    x, y = number % _ACROSS * size, number // _ACROSS * seeds * size
    side = max(64, size)
    return sheet.crop((x, y, x + size, y + size)).resize((side, side), Image.Resampling.NEAREST)


def _encode_png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@lru_cache(maxsize=16)
def _open_searcher(database: Dataset, content: str, away: frozenset[str]) -> Searcher:
    return Searcher(database, rows_with_captions(database, away))


@lru_cache(maxsize=1)
def _load_classifiers(folder: str, files: str, styles: int) -> tuple[style_classifier.Judge, np.ndarray]:
    paths = {entry["name"]: storage.fetch(storage.file_below(folder, entry["name"]), entry, check=True)
             for entry in json.loads(files)}
    network = style_classifier.Judge(styles)
    network.load_state_dict(load_file(paths["judge.safetensors"]))
    return network.eval().requires_grad_(False), arrays.load_array(paths["probe.npy"])


def check_same_data(run: Run, dataset: Dataset) -> None:
    """ValueError unless a run was trained on the present shards of a dataset. Otherwise held out means nothing.

    An imported run only gets a warning: images that were rendered again may differ in a few bits.
    """
    then, now = run.lineage().get("shards", {}).get("digest"), dataset.identity("shards")["digest"]
    if then == now:
        return
    if run.section().get("step"):  # an imported one
        _log.warning("evaluate: %s does not have the bytes that %s was trained on: training may have seen held-out "
                     "images", dataset.label, run.name)
        return
    raise ValueError(f"{dataset.label} was rebuilt after {run.name} was trained: the images of the training are "
                     f"unknown\nhint: train it again, or name subjects with --prompt")
