"""A few images of a large dataset take one ranged read each, and equal those from whole tars."""

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.datasets import lookup
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.media import tars
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.storage.hashing import describe_file
from tests.pipeline import synthetic

_COUNT, _IMAGES = 900, 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset with 900 images of noise, of 3 to 110 kB, in three tars of about 13 MB."""
    images, sides = tmp_path_factory.mktemp("noise"), np.random.default_rng(0).integers(30, 190, _COUNT)
    for number, side in enumerate(sides.tolist()):
        image = synthetic.encoded(synthetic.noise(side, side, number), "PNG", compress_level=0)
        (images / f"{number:04d}.png").write_bytes(image)
    dataset = Dataset.parse(str(tmp_path_factory.mktemp("large")), "noise")
    run_stage(Shard(dataset, ShardConfig(source=str(images), samples_per_shard=300, resize="no", format="png")))
    return dataset


@pytest.fixture
def remote(large: Dataset, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """The dataset in a bucket, and an empty cache."""
    monkeypatch.setenv("RDM_CACHE", str(tmp_path / "cache"))
    for name, data in synthetic.files_below(Path(large.root)).items():
        storage.put_bytes(data, storage.join(s3, name))
    return Dataset(s3, large.name, large.version)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each answer to a request for a tar."""
    from s3fs import S3FileSystem
    call, sizes = S3FileSystem._call_s3, []

    async def counted(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        answer = await call(self, method, *arguments, **options)
        if method == "get_object" and options["Key"].endswith(".tar"):
            sizes.append(answer["ContentLength"])
        return answer

    monkeypatch.setattr(S3FileSystem, "_call_s3", counted)
    return sizes


def _all_images(dataset: Dataset) -> list[tuple[str, bytes]]:
    """The key and the image of each row, from whole tars."""
    return [(sample["__key__"], tars.sample_image(sample)) for record in dataset.manifest("shards")["items"]
            for sample in tars.read(dataset.fetch("shards", file_of(record, ".tar")))]


def test_a_few_remote_images_take_few_bytes(large: Dataset, remote: Dataset, answers: list[int]) -> None:
    rows = [*random.Random(0).sample(range(_COUNT), _IMAGES - 2), 0, _COUNT - 1]
    samples, expected = lookup.samples(remote, rows), _all_images(large)
    assert [(sample.row, sample.key, sample.picture) for sample in samples] == [(row, *expected[row]) for row in rows]
    total = sum(file_of(record, ".tar")["bytes"] for record in large.manifest("shards")["items"])
    assert 0 < sum(answers) < 0.2 * total
    assert len(answers) == _IMAGES
    assert not [record for record in large.manifest("shards")["items"]
                if (storage.cache_folder() / file_of(record, ".tar")["sha256"]).exists()]


def test_many_images_of_a_tar_fetch_the_tar_once(large: Dataset, remote: Dataset, answers: list[int]) -> None:
    expected = _all_images(large)
    samples = lookup.samples(remote, range(0, 300, 2))
    assert [(sample.key, sample.picture) for sample in samples] == expected[:300:2]
    first = file_of(large.manifest("shards")["items"][0], ".tar")
    assert sum(answers) == first["bytes"]
    # The copy on this node serves a few images, too.
    answers.clear()
    assert lookup.samples(remote, [7, 250])[1].picture == expected[250][1]
    assert answers == []


def test_local_images_are_the_same(large: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _all_images(large)
    monkeypatch.setattr(tars, "read", None)  # no tar is read whole
    for row in (0, 1, 299, 300, 599, 899, *random.Random(1).sample(range(_COUNT), 40)):
        sample, = lookup.samples(large, [row])
        assert (sample.key, sample.picture) == expected[row]


def _with_metadata(dataset: Dataset, root: Path, change: Callable[[pa.Table], pa.Table]) -> Dataset:
    """A copy of a dataset with changed metadata of its shards."""
    shutil.copytree(dataset.root, root)
    copy = Dataset(str(root), dataset.name, dataset.version)
    manifest = copy.manifest("shards")
    for record in manifest["items"]:
        entry = file_of(record, ".parquet")
        path = Path(copy.folder("shards"), entry["name"])
        pq.write_table(change(pq.read_table(path)), path)
        entry |= describe_file(entry["name"], path)
    storage.put_json(manifest, storage.join(copy.folder("shards"), "manifest.json"))
    return copy


def _shift_positions(table: pa.Table) -> pa.Table:
    column = table["image_offset"]
    return table.set_column(table.column_names.index("image_offset"), "image_offset", pc.add(column, 512))


@pytest.mark.parametrize("change", [
    _shift_positions, lambda table: table.drop_columns(["image_offset", "image_bytes"])], ids=["wrong", "version 0.1"])
def test_without_valid_positions_all_of_the_tar_is_read(
        large: Dataset, tmp_path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    expected = _all_images(large)
    copy = _with_metadata(large, tmp_path / "copy", change)
    sample, = lookup.samples(copy, [412])
    assert (sample.key, sample.picture) == expected[412]
    assert hashlib.sha256(sample.picture).hexdigest() == sample.sha256


def test_a_sample_without_caption_has_the_name_of_its_file(large: Dataset) -> None:
    assert [sample.name for sample in lookup.samples(large, [7, 899])] == ["0007.png", "0899.png"]
    assert lookup.row_name("", "https://site.org/a%20tree.jpg/", 3) == "a tree.jpg"
    assert (lookup.row_name("a tree", "b.png", 3), lookup.row_name("", "", 3)) == ("a tree", "row 3")
