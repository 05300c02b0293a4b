"""A root in Python: `from jobs.api import open_root`.

Each method calls the functions of a verb, in this process and without Ray. Packages such as torch are imported at the
first call that needs them.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import storage

if TYPE_CHECKING:
    from PIL.Image import Image

    from jobs.sampling.config import SampleConfig
    from jobs.sampling.search import Match
    from pipeline.batches.batches import Batches
    from pipeline.embeddings.clip_weights import ClipConfig


@dataclass(frozen=True)
class DatasetVersion:
    """A version of a dataset, as `ls` lists it."""

    name: str
    version: str
    published: bool
    """Readers that name no version get this one."""
    samples: int | None
    """None if its shards are not there yet."""
    bytes: int | None
    state: str
    """sealed, stale, damaged, or which stage is not finished."""


@dataclass(frozen=True)
class SampledImage:
    """An image that a run generated, and where it is."""

    prompt: str
    database: str
    address: str
    """The path or URL of the PNG file."""
    neighbors: tuple[dict[str, Any], ...]
    """The rows of the database that the network saw, nearest first: key, caption, score, sha256 and more."""

    def image(self) -> "Image":
        """The image, read from its file."""
        from PIL import Image
        return Image.open(io.BytesIO(storage.read_bytes(self.address))).convert("RGB")


@dataclass(frozen=True)
class Root:
    """A folder or s3:// URL with datasets and runs."""

    address: str

    def datasets(self) -> list[DatasetVersion]:
        """Every version of every dataset, with its count of samples."""
        from jobs.inspection.contents import list_contents
        entries = [(entry["path"].split("/"), entry) for entry in list_contents(self.address)]
        return [DatasetVersion(path[1], path[2], entry.get("published", False), entry["rows"], entry["bytes"],
                               entry["state"]) for path, entry in entries if path[0] == "datasets"]

    def search(self, database: str, words: str = "", *, image: str = "", like: str = "", minus: str = "",
               count: int = 10, encoder: "ClipConfig | None" = None) -> "list[Match]":
        """The `count` rows of a database that are nearest to words, an image file or a sample, nearest first.

        A row has `key`, `caption`, `score` (cosine similarity), `distance` (1 - score) and `image()`. `like` is a key.
        `encoder` is that of the database; it is needed if its weights are in a file. ValueError without a query.
        """
        from jobs.sampling.search import SearchQuery, search_databases
        from pipeline.embeddings.clip_weights import encoder_of
        from pipeline.embeddings.embed import dataset_encoder
        from pipeline.releases.published import open_dataset
        dataset = open_dataset(self.address, database)
        query = SearchQuery(*(tuple(filter(None, [part])) for part in (words, image, like, minus)))
        return search_databases([dataset], query, encoder or encoder_of(dataset.label, dataset_encoder(dataset)), count)

    def sample(self, prompts: str | Sequence[str], database: str, *, run: str = "",
               config: "SampleConfig | None" = None, encoder: "ClipConfig | None" = None) -> list[SampledImage]:
        """An image of each prompt, whose style follows the database (NAME, or a mixture as noto:3+openmoji:1).

        `run` is by default the newest finished run with its encoder, or else the bundled model. The images are
        written below the run; the same call again returns the files that are there. ValueError if nothing can sample.
        """
        import torch

        from jobs.runs.run import Run
        from jobs.sampling.config import SampleConfig
        from jobs.sampling.default_run import default_run
        from jobs.sampling.mixture import Mixture
        from jobs.sampling.sample_stage import Sampling
        from pipeline.embeddings.clip_weights import encoder_of
        from pipeline.stages.driver import run_stage
        texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        databases = (Mixture.parse(self.address, database),)
        chosen = Run.parse(self.address, run) if run else default_run(databases, texts)
        assert chosen  # it is None on dry runs only
        stage = Sampling(chosen, 0, texts, databases, encoder or encoder_of(f"the run {chosen.name}", chosen.encoder()),
                         config or SampleConfig())
        threads = torch.get_num_threads()
        try:
            run_stage(stage)
        finally:
            torch.set_num_threads(threads)  # the stage computes with one
        document = storage.read_json(storage.join(stage.folder, "samples.json"))
        return [SampledImage(entry["prompt"], entry["database"], storage.join(stage.folder, entry["file"]),
                             tuple(entry["neighbors"])) for entry in document["pictures"]]

    def batches(self, dataset: str, database: str = "", *, k: int = 4, batch_size: int = 16,
                image_size: int = 0, seed: int = 0) -> "Batches":
        """The training batches of a dataset with its neighbors in a database (by default in itself).

        `batches.at(step)` is a dict of arrays: image (B, H, W, 3) uint8, neighbors (B, k, D) float16, rows (B,) int64.
        `batch_size` is B. `image_size` is the side H = W of the images in pixels; 0: as they are stored. ValueError if
        the neighbors are missing, or were made from other shards than the dataset has now.
        """
        from pipeline.batches.batches import Batches
        from pipeline.releases.published import open_dataset
        images, source = open_dataset(self.address, dataset), open_dataset(self.address, database or dataset)
        for owner, stage_name in ((images, "shards"), (images, f"neighbors/{source.label}"), (source, "embeddings")):
            owner.identity(stage_name)
        return Batches(images, source, k=k, global_batch=batch_size, seed=seed, size=image_size)


def open_root(address: str) -> Root:
    """The root at a path or an s3:// URL. ValueError if it holds no datasets and no runs."""
    root = storage.normalize(address)
    if not any(storage.list_folders(storage.join(root, folder)) for folder in ("datasets", "runs")):
        raise ValueError(f"{storage.redact_credentials(root)} holds no datasets and no runs\n"
                         f"hint: python -m jobs style NAME --source FOLDER --root {storage.quote(root)}")
    return Root(root)
