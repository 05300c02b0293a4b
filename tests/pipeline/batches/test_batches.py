import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.batches.batches import Batches
from pipeline.batches.images import average_down
from pipeline.batches.order import Order
from pipeline.datasets import lookup
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.media import tars
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.files import load_neighbors, neighbor_files
from pipeline.neighbors.neighbors import Neighbors
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.storage import cache
from tests.pipeline import synthetic


def batches(built, **options) -> Batches:
    return Batches(built, built, **{"k": 3, "global_batch": 8, "seed": 5} | options)


@pytest.mark.parametrize("counts", [(30, 30, 12), (1,), (5, 0, 3), (7,) * 40])
@pytest.mark.parametrize("size", [1, 8, 72, 100])
def test_every_row_once_in_every_epoch(counts, size):
    total, order = sum(counts), Order(counts, size, seed=1, window=3)
    stream = np.concatenate([order.rows(step) for step in range(-(-4 * total // size))])
    for epoch in range(4):
        assert sorted(stream[epoch * total:(epoch + 1) * total]) == list(range(total))


def test_epochs_and_seeds_differ():
    order = Order((30, 30, 12), 72, seed=1)
    assert (order.rows(0) != order.rows(1)).any()
    assert (order.rows(0) != Order((30, 30, 12), 72, seed=2).rows(0)).any()


def test_any_step_can_be_read_first():
    steps = [Order((30, 30, 12), 8, seed=1).rows(step) for step in range(40)]
    order = Order((30, 30, 12), 8, seed=1)
    for step in [39, 0, 8, 9, 17, 3, 38, 9]:
        np.testing.assert_array_equal(order.rows(step), steps[step])


def test_a_reader_needs_one_window_at_a_time():
    order = Order((10,) * 20, 10, seed=3, window=4)
    for window in range(5):
        rows = np.concatenate([order.rows(4 * window + step) for step in range(4)])
        assert len(set(rows // 10)) == 4


def test_prefetch_opens_the_shards_of_the_next_window():
    order = Order((10, 3, 0, 25, 7, 11) * 3, 8, seed=3, window=4)
    offsets, rows = np.cumsum([0, *order.counts]), np.concatenate([order.rows(step) for step in range(80)])
    shards = np.searchsorted(offsets, rows, side="right") - 1  # of the samples in the stream, 168 in an epoch
    for step in range(50):
        positions, opened_shards = order.ahead(8 * step, 8 * step + 7)
        following, _ = order.ahead(positions.stop, positions.stop)
        assert 8 * step in positions and 8 * step + 7 in positions and following.start == positions.stop
        used_shards = shards[positions.start:following.stop]
        assert set(used_shards) <= set(opened_shards) <= set(used_shards) | {2, 8, 14}  # those without a sample


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_same_global_batch(built, world):
    all_ranks = batches(built)
    ranks = [batches(built, rank=rank, world=world) for rank in range(world)]
    for step in (0, 8, 20):  # the ninth batch spans two epochs
        whole, parts = all_ranks.at(step), [rank.at(step) for rank in ranks]
        for name in ("image", "rows", "neighbors"):
            np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))


def test_a_batch_has_the_images_and_the_exact_vectors_of_its_rows(built):
    batch = batches(built).at(2)
    assert batch["image"].shape == (8, 32, 32, 3) and batch["image"].dtype == np.uint8
    assert batch["neighbors"].shape == (8, 3, 256) and batch["neighbors"].dtype == np.float16
    assert batch["rows"].shape == (8,) and batch["rows"].dtype == np.int64
    pictures = [Image.open(io.BytesIO(tars.sample_image(sample))) for record in built.manifest("shards")["items"]
                for sample in tars.read(built.fetch("shards", file_of(record, ".tar")))]
    ids, vectors = np.concatenate(load_neighbors(built, built)), Embeddings(built).all()
    for image, row, neighbor_vectors in zip(batch["image"], batch["rows"], batch["neighbors"], strict=True):
        np.testing.assert_array_equal(image, np.asarray(pictures[row]))
        np.testing.assert_array_equal(neighbor_vectors, vectors[ids[row, :3]])


@pytest.mark.parametrize("options", [{"decoded_bytes": 0}, {"decoded_bytes": 0, "threads": 1}, {"threads": 3},
                                     {"decoded_bytes": 72 * 32 * 32 * 3}])
def test_a_cache_of_decoded_images_changes_no_batch(built, options):
    expected, with_options = batches(built), batches(built, **options)
    for step in [0, 1, 8, 9, 2, 20]:
        np.testing.assert_array_equal(expected.at(step)["image"], with_options.at(step)["image"])


@pytest.mark.parametrize("decoded_bytes", [0, 1 << 30])
def test_large_images_are_averaged_down(built, decoded_bytes):
    whole, small = batches(built), batches(built, size=8, decoded_bytes=decoded_bytes)
    for step in (0, 8, 0):
        image = small.at(step)["image"]
        assert image.shape == (8, 8, 8, 3)
        np.testing.assert_array_equal(image, average_down(whole.at(step)["image"], 8))
    with pytest.raises(ValueError, match=r"cannot be averaged to 5 x 5\nhint"):
        batches(built, size=5).at(0)


def test_cached_images_need_no_tars(copied):
    reader = batches(copied)
    epoch = [reader.at(step)["image"] for step in range(9)]
    for path in Path(copied.root).rglob("*.tar"):
        path.unlink()
    kept_pictures = {row: picture for step in range(9, 18)
                     for row, picture in zip(reader.at(step)["rows"], reader.at(step)["image"], strict=True)}
    for step, pictures in enumerate(epoch):
        for row, picture in zip(reader.order.rows(step), pictures, strict=True):
            np.testing.assert_array_equal(picture, kept_pictures[row])


def test_a_batch_of_one_sample_more_than_all(built):
    batch = batches(built, global_batch=73, decoded_bytes=0).at(0)
    assert sorted(set(batch["rows"])) == list(range(72))
    kept = batches(built, global_batch=73).at(0)
    np.testing.assert_array_equal(batch["image"], kept["image"])


def test_any_batch_can_be_read_first(built):
    in_order, out_of_order = batches(built), batches(built)
    expected = [in_order.at(step) for step in range(12)]
    for step in (11, 2, 5):
        np.testing.assert_array_equal(out_of_order.at(step)["image"], expected[step]["image"])


def test_the_control_has_neighbors_of_another_sample(built):
    true, false = batches(built).at(1), batches(built, true_neighbors=False).at(1)
    np.testing.assert_array_equal(true["image"], false["image"])
    ids, vectors = np.concatenate(load_neighbors(built, built)), Embeddings(built).all()
    np.testing.assert_array_equal(false["neighbors"], vectors[ids[(false["rows"] + 36) % 72, :3]])


def test_a_missing_neighbor_is_a_vector_of_zeros(tmp_path, pictures):
    dataset, database = Dataset.parse(str(tmp_path), "x"), Dataset.parse(str(tmp_path), "small")
    few = synthetic.drawings(tmp_path / "few", subjects=1, size=32, styles=["flat", "soft"])
    for target, source in ((dataset, pictures), (database, few)):
        run_stage(Shard(target, ShardConfig(source=str(source), image_size=32)))
        run_stage(Embed(target, EmbedConfig()))
    run_stage(Neighbors(dataset, database, NeighborsConfig(k=4, method="exact", copy_similarity=2.0)))
    batch = Batches(dataset, database, k=4, global_batch=16, seed=0).at(0)
    assert batch["neighbors"][:, :2].any(-1).all() and not batch["neighbors"][:, 2:].any()


def test_settings_that_do_not_fit_the_data_are_refused(built):
    with pytest.raises(ValueError, match=r"k = 5 neighbors wanted, drawn has 4 stored.*\nhint"):
        batches(built, k=5)
    with pytest.raises(ValueError, match=r"a global batch of 1 leaves some of 2 workers without a sample\nhint"):
        batches(built, global_batch=1, world=2)
    with pytest.raises(ValueError, match="not sealed"):
        Batches(built, Dataset(built.root, "other"), k=1, global_batch=1, seed=0)


@pytest.mark.parametrize("samples_per_shard", [100, 1])
def test_images_of_different_sizes_are_refused(tmp_path, samples_per_shard):
    source = tmp_path / "source"
    source.mkdir()
    for number, width in enumerate((20, 30, 40)):
        (source / f"{number}.png").write_bytes(synthetic.encoded(synthetic.noise(width, 20), "PNG"))
    dataset = Dataset.parse(str(tmp_path), "x")
    run_stage(Shard(dataset, ShardConfig(source=str(source), resize="no", samples_per_shard=samples_per_shard)))
    run_stage(Embed(dataset, EmbedConfig()))
    run_stage(Neighbors(dataset, dataset, NeighborsConfig(k=1, method="exact")))
    with pytest.raises(ValueError, match=r"different sizes.*\nhint: shard with --resize center_crop"):
        Batches(dataset, dataset, k=1, global_batch=3, seed=0).at(0)


def _overwrite_in_first_tar(dataset: Dataset, at: int, data: bytes) -> None:
    """Write into the first tar."""
    with open(dataset.fetch("shards", file_of(dataset.manifest("shards")["items"][0], ".tar")), "r+b") as tar:
        tar.seek(at)
        tar.write(data)


def test_a_tar_with_other_samples_than_its_manifest_is_refused(copied):
    _overwrite_in_first_tar(copied, 0, b"#")  # its first header, so no sample can be read
    with pytest.raises(ValueError, match=r"000000\.tar has 0 samples, its manifest says 30\nhint"):
        [batches(copied).at(step) for step in range(9)]


def test_an_undecodable_image_is_named(copied):
    path = copied.fetch("shards", file_of(copied.manifest("shards")["items"][0], ".tar"))
    start = path.read_bytes().index(tars.TarImages(path)[3])
    _overwrite_in_first_tar(copied, start, bytes(8))
    with pytest.raises(ValueError, match=r"sample 3 of .*000000\.tar does not decode \(not_a_picture.*\nhint"):
        [batches(copied).at(step) for step in range(9)]


def test_neighbors_of_other_samples_are_refused(copied):
    manifest = copied.manifest("neighbors/drawn")
    files = [storage.join(copied.folder("neighbors/drawn"), entry["name"])
             for entry in neighbor_files(manifest["items"], ".ids.npy")]
    rows = [np.load(path) for path in files]
    for path, shard_rows in zip(files, (rows[0], np.concatenate([rows[1], rows[2]])[:12], rows[1]), strict=True):
        np.save(path, shard_rows)
        for record in manifest["items"]:
            for entry in record["files"]:
                if path.endswith(entry["name"]):
                    entry["bytes"] = os.path.getsize(path)
    storage.put_json(manifest, storage.join(copied.folder("neighbors/drawn"), "manifest.json"))
    with pytest.raises(ValueError, match=r"shards and neighbors of drawn have different samples\nhint: .*--overwrite"):
        [batches(copied).at(step) for step in range(9)]


@pytest.fixture
def remote(built, s3, tmp_path, monkeypatch) -> Dataset:
    """The built dataset in a bucket, and an empty cache."""
    monkeypatch.setenv("RDM_CACHE", str(tmp_path / "cache"))
    for name, data in synthetic.files_below(Path(built.root)).items():
        storage.put_bytes(data, storage.join(s3, name))
    return Dataset(s3, built.name, built.version)


def _cached(dataset: Dataset) -> set[int]:
    """The shards whose tars are in the cache."""
    return {number for number, record in enumerate(dataset.manifest("shards")["items"])
            if (storage.cache_folder() / file_of(record, ".tar")["sha256"]).exists()}


def test_the_next_window_is_fetched_while_this_one_is_read(built, remote):
    local_batches, remote_batches = batches(built, global_batch=2), batches(remote, global_batch=2)
    for reader in (local_batches, remote_batches):
        reader.order = Order(reader.order.counts, 2, 5, window=1)
    first, second, third = [shards[0] for _, shards in remote_batches.order.windows(0)]
    assert _cached(remote) == set()
    remote_batches.at(0)
    _wait_until(lambda: _cached(remote) == {first, second})
    for step in range(remote_batches.order.counts[first] // 2, 36):
        np.testing.assert_array_equal(remote_batches.at(step)["image"], local_batches.at(step)["image"])
    assert _cached(remote) == {first, second, third}


def test_a_cache_too_small_for_the_corpus_changes_no_batch(built, remote, monkeypatch):
    monkeypatch.setenv("RDM_CACHE_BYTES", "1Ki")
    monkeypatch.setattr(cache, "_IN_USE_S", 0.0)
    local_batches, remote_batches = batches(built), batches(remote, decoded_bytes=0)
    for reader in (local_batches, remote_batches):
        reader.order = Order(reader.order.counts, 8, 5, window=1)
    for step in range(12):
        local_batch, remote_batch = local_batches.at(step), remote_batches.at(step)
        for name in local_batch:
            np.testing.assert_array_equal(local_batch[name], remote_batch[name])
    assert len(_cached(remote)) < 3


def _wait_until(condition) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it does not come to pass")


def test_samples_are_found_by_their_rows(built):
    rows = [71, 0, 30, 29, 0]
    samples = lookup.samples(built, rows)
    assert [sample.row for sample in samples] == rows
    metadata_rows = [row for record in built.manifest("shards")["items"] for row in _rows(built, record)]
    for sample in samples:
        expected = metadata_rows[sample.row]
        assert (sample.key, sample.caption, sample.sha256) == (expected["key"], expected["caption"], expected["sha256"])
        assert Image.open(io.BytesIO(sample.picture)).size == (32, 32)
    for row in (-1, 72):
        with pytest.raises(ValueError, match=f"has 72 samples, there is no row {row}"):
            lookup.samples(built, [row])


def _rows(built, record):
    from pipeline.datasets.metadata import metadata
    return metadata(built, record)
