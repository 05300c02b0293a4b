"""Copies and near copies of the query are left out of its neighbors."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings
from pipeline.datasets.metadata import labels
from pipeline.stages.driver import run_stage
from tests.pipeline import synthetic
from tests.pipeline.neighbors.neighbor_runs import brute_force, find_neighbors, index_database


@pytest.mark.parametrize("method", ["exact", "index"])
def test_copies_are_left_out_and_others_move_up(tmp_path, method):
    """Row 0 has 40 near copies, and 40 rows with the same image in very different places."""
    rng = np.random.default_rng(0)
    vectors = synthetic.clustered(300, 16)
    near_copies = vectors[:1] + 0.01 * rng.normal(size=(40, 16))
    vectors[1:41] = near_copies / np.linalg.norm(near_copies, axis=1, keepdims=True)
    hashes = [storage.short_hash(str(row)).ljust(64, "0") for row in range(300)]
    for row in range(200, 240):
        hashes[row] = hashes[0]
    dataset = synthetic.vector_dataset(tmp_path, "x", [vectors[:150], vectors[150:]], hashes)
    database = index_database(dataset, key="Flat")
    ids, scores, _ = find_neighbors(database, database, k=10, method=method, candidates=11)
    stored = Embeddings(database).all().astype(np.float32)
    same_hash = np.array(hashes)[:, None] == np.array(hashes)
    excluded = same_hash | (stored @ stored.T >= 0.98) | np.eye(300, dtype=bool)
    np.testing.assert_allclose(scores, brute_force(stored, stored, 10, excluded), atol=1e-5)
    assert (ids >= 0).all() and not np.isin(ids[0], [*range(41), *range(200, 240)]).any()
    assert scores.max() < 0.98


def test_copies_in_another_database_are_left_out_too(tmp_path):
    vectors = synthetic.clustered(60, 16)
    hashes = [storage.short_hash(str(row)).ljust(64, "0") for row in range(60)]
    dataset = synthetic.vector_dataset(tmp_path, "one", [vectors[:20]], hashes[:20])
    database = synthetic.vector_dataset(tmp_path, "other", [np.roll(vectors, 16 // 2, axis=1)], hashes)
    ids, _, _ = find_neighbors(dataset, database, k=59, method="exact", copy_similarity=2.0)
    assert all(row not in ids[row] and set(ids[row]) == set(range(60)) - {row} for row in range(20))


def add_column(dataset: Dataset, name: str, values: list) -> None:
    """Put another column into the metadata of a dataset made of given vectors, and seal it so."""
    start, tables = 0, {}
    for record in dataset.manifest("shards")["items"]:
        table = pq.read_table(dataset.fetch("shards", file_of(record, ".parquet")))
        buffer = io.BytesIO()
        column_type = pa.uint64() if isinstance(values[0], int) else pa.string()
        pq.write_table(table.append_column(name, pa.array(values[start:start + len(table)], column_type)), buffer)
        tables[record["id"]] = record["samples"], {f"{record['id']}.parquet": buffer.getvalue()}
        start += len(table)
    run_stage(synthetic.FixedStage(dataset, "shards", "shard", tables), overwrite=True)


def test_patches_of_the_same_image_are_left_out(tmp_path):
    """Every third row is a patch of the same image, and these rows are the nearest."""
    vectors = synthetic.clustered(90, 16)
    pictures = [storage.short_hash(str(row // 3)).ljust(64, "0") for row in range(90)]
    for row in range(90):
        vectors[row] = vectors[row // 3 * 3] + 0.02 * synthetic.clustered(1, 16, seed=row)[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    database = synthetic.vector_dataset(tmp_path, "x", [vectors[:40], vectors[40:]])
    add_column(database, "original_sha256", pictures)
    ids, scores, _ = find_neighbors(database, database, k=6, method="exact", copy_similarity=2.0)
    stored = Embeddings(database).all().astype(np.float32)
    same_picture = np.array(pictures)[:, None] == np.array(pictures)
    np.testing.assert_allclose(scores, brute_force(stored, stored, 6, same_picture), atol=1e-5)
    assert (ids // 3 != np.arange(90)[:, None] // 3).all() and scores.max() < 2


def test_similar_images_are_left_out_if_configured(tmp_path):
    vectors = synthetic.clustered(60, 16)
    database = synthetic.vector_dataset(tmp_path, "x", [vectors[:20], vectors[20:]])
    with pytest.raises(ValueError, match=r"no perceptual hashes\nhint: shard it with --duplicates near"):
        find_neighbors(database, database, k=3, method="exact", copy_bits=2)
    hashes = [int(value) for value in np.random.default_rng(0).integers(1 << 62, size=60)]
    for row in range(30, 60):
        hashes[row] = hashes[row - 30] ^ (1 << row % 60 | 1)  # two bits apart
    add_column(database, "phash", hashes)
    ids, _, manifest = find_neighbors(database, database, k=58, method="exact", copy_bits=2, copy_similarity=2.0)
    for row in range(60):
        assert set(ids[row]) == set(range(60)) - {row, (row + 30) % 60}
    assert manifest["section"]["copy_bits"] == 2


@pytest.mark.parametrize("method", ["index", "exact"])
def test_copies_beyond_the_candidate_list_are_left_out(tmp_path, method):
    """Row 0 has two thousand copies with the same image. The other rows are still found."""
    vectors = synthetic.clustered(3000, 16, clusters=3)
    hashes = [storage.short_hash("same" if row < 2001 else str(row)).ljust(64, "0") for row in range(3000)]
    dataset = synthetic.vector_dataset(tmp_path, "x", [vectors], hashes)
    database = index_database(dataset, key="IVF16,Flat", target_recall=0.0)
    ids, scores, _ = find_neighbors(database, database, k=5, method=method, copy_similarity=2.0)
    stored = Embeddings(database).all().astype(np.float32)
    expected = brute_force(stored[:20], stored, 5, np.broadcast_to(np.arange(3000) < 2001, (20, 3000)))
    if method == "exact":
        np.testing.assert_allclose(scores[:20], expected, atol=1e-5)
    assert (ids[:2001] >= 2001).all()


def test_labels_distinguish_images_without_a_known_hash(tmp_path):
    dataset = synthetic.vector_dataset(tmp_path, "x", [synthetic.clustered(4, 16)])
    path = Path(dataset.folder("shards")) / "000000.parquet"
    table = pq.read_table(path)
    original_hashes = pa.array(["", None, "ab" * 32, "not a hash"], pa.string())
    buffer = io.BytesIO()
    pq.write_table(table.append_column("original_sha256", original_hashes), buffer)
    stage = synthetic.FixedStage(dataset, "shards", "shard", {"000000": (4, {"000000.parquet": buffer.getvalue()})})
    run_stage(stage, overwrite=True)
    row_labels = labels(dataset, dataset.manifest("shards")["items"][0])
    assert (row_labels[:2, 0] == row_labels[:2, 1]).all() and len(set(row_labels[:, 1].tolist())) == 4
    assert row_labels[2, 1] == int.from_bytes(bytes.fromhex("ab" * 8), "little")
    assert (row_labels[2:, 0] != row_labels[2:, 1]).all()
