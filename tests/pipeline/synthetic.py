"""Small sealed datasets for tests: from synthetic images by the real stages, or with given vectors."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline import storage
from pipeline.corpora import drawn
from pipeline.datasets.dataset import Dataset
from pipeline.stages.driver import run_stage
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output

ENCODER = {"model": "given", "weights_sha256": "00", "dim": 16}


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """The bytes of `image` as Pillow writes them."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def drawings(folder: Path, subjects: int = 12, size: int = 32, styles: Sequence[str] = ()) -> Path:
    """A folder of synthetic images with captions.csv."""
    catalog = drawn.catalog(subjects)
    lines = ["file,caption,style,subject"]
    for picture in catalog.pictures:
        if not styles or picture.style in styles:
            path = folder / f"{picture.key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(drawn.render(catalog, picture, size))
            lines.append(f"{picture.key}.png,{picture.caption},{picture.style},{picture.subject}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


class FixedStage(Stage):
    """A stage whose items have the files and the facts that a test gives."""

    def __init__(self, dataset: Dataset, folder: str, name: str, items: dict[str, tuple[int, dict[str, bytes]]],
                 info: dict[str, Any] | None = None) -> None:
        super().__init__(dataset.root, dataset.path(folder), None)
        self.name = name  # type: ignore[misc]
        self.items, self.info = items, info or {}

    def section(self) -> dict[str, Any]:
        return {"content": storage.digest([[name, storage.short_hash(repr(data))] for _, files in self.items.values()
                                         for name, data in files.items()])}

    def plan(self) -> list[Item]:
        return [Item(name) for name in self.items]

    def process(self, item: Item, scratch: Path) -> Output:
        samples, files = self.items[item.id]
        for name, data in files.items():
            (scratch / name).write_bytes(data)
        return Output(samples=samples, files={name: scratch / name for name in files})

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        return Output(info=self.info)


def npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def vector_dataset(root: Path, name: str, shards: Sequence[np.ndarray], hashes: Sequence[str] | None = None,
                   encoder: dict[str, Any] | None = None) -> Dataset:
    """A dataset with sealed embeddings of these vectors (as float16), and shards that have metadata only."""
    dataset = Dataset.parse(str(root), name)
    count = sum(map(len, shards))
    hashes = hashes or [storage.short_hash(f"{name} {row}").ljust(64, "0") for row in range(count)]
    tables, arrays, offset = {}, {}, 0
    for number, vectors in enumerate(shards):
        table = io.BytesIO()
        pq.write_table(pa.table({"sha256": pa.array(hashes[offset:offset + len(vectors)], pa.string()),
                                 "key": pa.array([f"{number:03d}-{row:05d}" for row in range(len(vectors))]),
                                 "status": pa.array(["success"] * len(vectors), pa.string())}), table)
        tables[f"{number:06d}"] = len(vectors), {f"{number:06d}.parquet": table.getvalue()}
        arrays[f"{number:06d}"] = len(vectors), {f"{number:06d}.npy": npy(vectors.astype(np.float16))}
        offset += len(vectors)
    run_stage(FixedStage(dataset, "shards", "shard", tables))
    run_stage(FixedStage(dataset, "embeddings", "embed", arrays, {"encoder": encoder or ENCODER}))
    return dataset


def clustered(count: int, dim: int, clusters: int = 20, seed: int = 0, spread: float = 0.5) -> np.ndarray:
    """Unit vectors (count, dim) float32 around random centers, as float16 holds them."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim))
    vectors = centres[rng.integers(clusters, size=count)] + spread * rng.normal(size=(count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by relative name, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def in_child(action: Callable[[], Any]) -> int:
    """Run `action` in a forked process and return the wait status: 0, or how it ended."""
    import os
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]
