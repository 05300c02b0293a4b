"""The readers of files that others wrote, each as a function of a path. A child process runs them under limits."""

import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from store_readers import STORE_READERS  # this file runs as a script, so its folder is on the path

from jobs.config import toml
from jobs.runs.metrics import read_metrics
from jobs.runs.run import Run
from model.weights import checkpoint, compvis
from pipeline.embeddings import compvis_archive
from pipeline.embeddings.vectors_by_name import VectorsByName
from pipeline.formats.arrays import map_array
from pipeline.indices.faiss_door import open_index
from pipeline.media import tars
from pipeline.media.foreign_tars.samples import TarFaults, read_foreign_tar
from pipeline.media.types import BadImage
from pipeline.rows.rows import ReadReport, hashable_cells, row_line
from pipeline.sources.captions import read_captions
from pipeline.sources.config import ShardConfig
from pipeline.sources.open_lists import open_lists
from pipeline.sources.tars import TarSource, read_column_types
from pipeline.stages import records
from pipeline.stages.types import StageFailed
from pipeline.tables import text_tables

MEMORY = 1 << 30  # bytes of address space beyond that of the imports
REFUSALS = (ValueError, StageFailed, BadImage)


def _text_list(path: Path) -> None:
    for row in text_tables.read_rows(str(path)):
        json.dumps([row.cells, list(row.remarks), row.problem])


def _list_source(path: Path, **settings: Any) -> None:
    source = open_lists(ShardConfig(source=(str(path),), **settings), [str(path)])
    source.identity()
    source.column_types()
    stage = path.parent / "stage"
    for part in source.parts():
        for name, data in part.carries:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).write_bytes(data)
        for row in source.rows(str(stage), part.inputs, path.parent, ReadReport()):
            row_line(row)


def _filtered_list(path: Path) -> None:
    _list_source(path, where="width > 3")


def _captions(path: Path) -> None:
    for row in read_captions(str(path), ""):
        json.dumps([hashable_cells(row.cells), list(row.remarks), row.problem])


def _tar(path: Path) -> None:
    for sample in read_foreign_tar(path, TarFaults()):
        assert sample["__key__"]


def _tar_source(path: Path) -> None:
    source = TarSource(ShardConfig(source=(str(path),)), [str(path)])
    read_column_types([str(path)])
    for part in source.parts():
        for row in source.rows(str(path.parent), part.inputs, path.parent, ReadReport()):
            json.dumps([row.name, row.caption, row.columns])


def _tar_images(path: Path) -> None:
    images = tars.TarImages(path)
    for number in range(len(images)):
        images[number]


def _array(path: Path) -> None:
    array = map_array(path)
    np.asarray(array.reshape(-1)[:16]).tolist()


def _clip_retrieval(vectors: Path, metadata: Path) -> None:
    root = vectors.parent / "clip"
    for file, name in ((vectors, "img_emb/img_emb_0.npy"), (metadata, "metadata/metadata_0.parquet")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / name)
    read = VectorsByName(str(root))
    for key in ("000000", "zz"):
        for place in read.find(key)[0]:
            read.vector(place), read.sha256(place)


def _embedding_folder(path: Path) -> None:
    _clip_retrieval(path, path.parent / "good.parquet")


def _embedding_metadata(path: Path) -> None:
    _clip_retrieval(path.parent / "good.npy", path)


def _archive(path: Path) -> None:
    archives = compvis_archive.Archives(str(path.parent))
    for number in range(len(archives.files)):
        archives.vectors(number)


def _weights(path: Path) -> None:
    root = path.parent / "checkpoint"
    root.mkdir()
    shutil.copy(path, root / "ema.safetensors")
    shutil.copy(path.parent / "good.json", root / "checkpoint.json")
    checkpoint.load_denoiser(root)


def _checkpoint_json(path: Path) -> None:
    root = path.parent / "checkpoint"
    root.mkdir()
    shutil.copy(path, root / "checkpoint.json")
    shutil.copy(path.parent / "good.safetensors", root / "ema.safetensors")
    checkpoint.load_denoiser(root)


def _index(path: Path) -> None:
    try:
        index = open_index(path)
    except (RuntimeError, MemoryError) as error:  # open_dataset_index gives these two a message
        raise ValueError(f"{path}: {error}") from error
    assert index.ntotal >= 0


def _settings(path: Path) -> None:
    toml.resolve_settings("", str(path))


def _records(path: Path) -> None:
    data = path.read_bytes()
    listed = records.reference(path.name, data, 3)
    loaded = records.load(str(path.parent), listed, records.records)
    list(loaded), records.totals(loaded), records.seconds(loaded), records.devices(loaded), list(records.infos(loaded))


def _metrics(path: Path) -> None:
    run = path.parent / "root/runs/x"
    run.mkdir(parents=True)
    shutil.copy(path, run / "metrics.jsonl")
    for line in read_metrics(Run(str(path.parent / "root"), "x")):
        line["step"]


READERS: dict[str, Callable[[Path], None]] = {
    "text_list": _text_list, "list_source": _list_source, "filtered_list": _filtered_list, "captions": _captions,
    "tar": _tar, "tar_source": _tar_source, "tar_images": _tar_images, "array": _array,
    "embedding_folder": _embedding_folder, "embedding_metadata": _embedding_metadata, "archive": _archive,
    "weights": _weights, "checkpoint_json": _checkpoint_json, "compvis": compvis.read, "index": _index,
    "settings": _settings, "records": _records, "metrics": _metrics, **STORE_READERS,
}


def read(name: str, path: Path) -> dict[str, str]:
    """The result of reading a file: read, refused with a sentence, or broken with a traceback."""
    try:
        READERS[name](path)
    except REFUSALS as error:
        return {"result": "refused", "text": str(error), "kind": type(error).__name__}
    except BaseException:
        return {"result": "broken", "text": traceback.format_exc()}
    return {"result": "read", "text": ""}


def _commands() -> Iterator[Any]:
    for line in sys.stdin:
        yield json.loads(line)


def serve() -> None:
    """Read one file after another, as lines of JSON on stdin say, and answer each with a line on the old stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    logging.disable()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answers.write("ready\n")
    answers.flush()
    for command in _commands():
        with tempfile.TemporaryDirectory(dir=command["folder"]) as scratch:
            here = Path(scratch)
            for file in command["files"]:
                shutil.copy(file, here / Path(file).name)
            answer = read(command["reader"], here / Path(command["files"][0]).name)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
