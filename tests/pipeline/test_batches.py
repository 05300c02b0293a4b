import io

import numpy as np
import pytest
from PIL import Image

from pipeline import lookup, neighbors, stage, tars
from pipeline.batches import Batches, Order
from pipeline.dataset import Dataset, Embeddings, file_of
from pipeline.embed import Embed, EmbedConfig
from pipeline.neighbors import Neighbors, NeighborsConfig
from pipeline.shard import Shard, ShardConfig
from tests.pipeline import made


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


def test_any_step_can_be_asked_first():
    steps = [Order((30, 30, 12), 8, seed=1).rows(step) for step in range(40)]
    order = Order((30, 30, 12), 8, seed=1)
    for step in [39, 0, 8, 9, 17, 3, 38, 9]:
        np.testing.assert_array_equal(order.rows(step), steps[step])


def test_a_reader_needs_one_window_at_a_time():
    order = Order((10,) * 20, 10, seed=3, window=4)
    for window in range(5):
        rows = np.concatenate([order.rows(4 * window + step) for step in range(4)])
        assert len(set(rows // 10)) == 4


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_same_global_batch(built, world):
    one = batches(built)
    ranks = [batches(built, rank=rank, world=world) for rank in range(world)]
    for step in (0, 8, 20):  # the ninth batch goes over the end of an epoch
        whole, parts = one.at(step), [rank.at(step) for rank in ranks]
        for name in ("image", "rows", "neighbors"):
            np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))


def test_a_batch_has_the_pictures_and_the_exact_vectors_of_its_rows(built):
    batch = batches(built).at(2)
    assert batch["image"].shape == (8, 32, 32, 3) and batch["image"].dtype == np.uint8
    assert batch["neighbors"].shape == (8, 3, 256) and batch["neighbors"].dtype == np.float16
    assert batch["rows"].shape == (8,) and batch["rows"].dtype == np.int64
    pictures = [Image.open(io.BytesIO(tars.picture(sample))) for record in built.manifest("shards")["items"]
                for sample in tars.read(built.fetch("shards", file_of(record, ".tar")))]
    ids, vectors = np.concatenate(neighbors.load(built, built)), Embeddings(built).all()
    for image, row, given in zip(batch["image"], batch["rows"], batch["neighbors"], strict=True):
        np.testing.assert_array_equal(image, np.asarray(pictures[row]))
        np.testing.assert_array_equal(given, vectors[ids[row, :3]])


def test_any_batch_can_be_asked_first(built):
    one, other = batches(built), batches(built)
    expected = [one.at(step) for step in range(12)]
    for step in (11, 2, 5):
        np.testing.assert_array_equal(other.at(step)["image"], expected[step]["image"])


def test_the_control_has_neighbours_of_another_sample(built):
    true, false = batches(built).at(1), batches(built, true_neighbors=False).at(1)
    np.testing.assert_array_equal(true["image"], false["image"])
    ids, vectors = np.concatenate(neighbors.load(built, built)), Embeddings(built).all()
    np.testing.assert_array_equal(false["neighbors"], vectors[ids[(false["rows"] + 36) % 72, :3]])


def test_none_is_zeros(tmp_path, pictures):
    dataset, database = Dataset.parse(str(tmp_path), "x"), Dataset.parse(str(tmp_path), "small")
    few = made.drawings(tmp_path / "few", subjects=1, size=32, styles=["flat", "soft"])
    for one, source in ((dataset, pictures), (database, few)):
        stage.run(Shard(one, ShardConfig(source=str(source), image_size=32)))
        stage.run(Embed(one, EmbedConfig()))
    stage.run(Neighbors(dataset, database, NeighborsConfig(k=4, method="exact", copy_similarity=2.0)))
    batch = Batches(dataset, database, k=4, global_batch=16, seed=0).at(0)
    assert batch["neighbors"][:, :2].any(-1).all() and not batch["neighbors"][:, 2:].any()


def test_what_does_not_fit_is_refused(built):
    with pytest.raises(ValueError, match=r"k = 5 neighbours wanted, drawn has 4 stored.*\nhint"):
        batches(built, k=5)
    with pytest.raises(ValueError, match="a global batch of 9 does not divide among 2"):
        batches(built, global_batch=9, world=2)
    with pytest.raises(ValueError, match="not sealed"):
        Batches(built, Dataset(built.root, "other"), k=1, global_batch=1, seed=0)


@pytest.mark.parametrize("samples_per_shard", [100, 1])
def test_pictures_of_different_sizes_are_refused(tmp_path, samples_per_shard):
    source = tmp_path / "source"
    source.mkdir()
    for number, width in enumerate((20, 30, 40)):
        (source / f"{number}.png").write_bytes(made.encoded(made.noise(width, 20), "PNG"))
    dataset = Dataset.parse(str(tmp_path), "x")
    stage.run(Shard(dataset, ShardConfig(source=str(source), resize="no", samples_per_shard=samples_per_shard)))
    stage.run(Embed(dataset, EmbedConfig()))
    stage.run(Neighbors(dataset, dataset, NeighborsConfig(k=1, method="exact")))
    with pytest.raises(ValueError, match=r"different sizes.*\nhint: shard with --resize center_crop"):
        Batches(dataset, dataset, k=1, global_batch=3, seed=0).at(0)


def test_samples_are_found_by_their_rows(built):
    rows = [71, 0, 30, 29, 0]
    found = lookup.samples(built, rows)
    assert [sample.row for sample in found] == rows
    every = [row for record in built.manifest("shards")["items"] for row in _rows(built, record)]
    for sample in found:
        meta = every[sample.row]
        assert (sample.key, sample.caption, sample.sha256) == (meta["key"], meta["caption"], meta["sha256"])
        assert Image.open(io.BytesIO(sample.picture)).size == (32, 32)
    for row in (-1, 72):
        with pytest.raises(ValueError, match=f"has 72 samples, there is no row {row}"):
            lookup.samples(built, [row])


def _rows(built, record):
    from pipeline.dataset import metadata
    return metadata(built, record)
