"""The stages from tars to neighbors while workers are killed, and while embeddings are damaged.

Afterwards the files have the bytes of an undisturbed run. Damaged input is refused or counted.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from jobs.cli.main import main
from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.embeddings.clip_weights import BUNDLED
from pipeline.stages import records
from pipeline.stages.manifest import without_run_facts
from pipeline.versions import verify
from tests.pipeline import synthetic

SHARDS, PER_SHARD = 16, 18


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a dataset of small shards. One image is damaged."""
    folder = tmp_path_factory.mktemp("corpus")
    source = synthetic.drawings(folder / "pictures", subjects=SHARDS * PER_SHARD // 6)
    assert main(["shard", "x", "--source", str(source), "--root", str(folder / "root"), "--local", "--image-size", "32",
                 "--format", "png", "--samples-per-shard", str(PER_SHARD)]) == 0
    return folder / "root"


@pytest.fixture
def root(corpus: Path, tmp_path: Path) -> Path:
    """A copy of it to work in."""
    return Path(shutil.copytree(corpus, tmp_path / "root"))


def embed(root: Path, *more: str) -> list[str]:
    return ["embed", "x", "--root", str(root), *more]


def dataset(root: Path) -> Dataset:
    return Dataset.parse(str(root), "x")


def _working_pids() -> list[int]:
    """The processes started here that Ray calls at work on an item."""
    pids = []
    for pid in _descendants(os.getpid()):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Worker.work"):
                pids.append(pid)
        except OSError:  # it ended meanwhile
            continue
    return pids


def _descendants(pid: int) -> Iterator[int]:
    try:
        children = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children")
                    for child in task.read_text().split()]
    except OSError:
        return
    for child in children:
        yield child
        yield from _descendants(child)


# Killed workers.


@contextlib.contextmanager
def kill_workers(seed: int) -> Iterator[list[int]]:
    """At most four workers are killed at random, because an item fails after five lost workers."""
    chance, killed, ended = random.Random(seed), [], threading.Event()

    def kill() -> None:
        while len(killed) < 4 and not ended.is_set():
            time.sleep(chance.uniform(0, 1))
            if pids := _working_pids():
                killed.append(chance.choice(pids))
                os.kill(killed[-1], signal.SIGKILL)
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(("before", "command", "folder"), [
    ([], ["embed", "x", "--batch-size", "16"], "embeddings"),
    (["embed"], ["index", "x", "--part-memory", "60Ki"], "index"),
    (["embed"], ["neighbors", "x", "--method", "exact", "--vectors"], "neighbors/x"),
    (["embed", "index"], ["neighbors", "x", "--probes", "1"], "neighbors/x"),
])
def test_workers_killed_at_random_leave_the_bytes_of_an_undisturbed_run(before: list[str], command: list[str],
                                                                        folder: str, cluster: Any, root: Path,
                                                                        tmp_path: Path, caplog: Any) -> None:
    for verb in before:
        more = ["--key", "IVF8,Flat", "--bytes-per-vector", "0"] if verb == "index" else []
        assert main([verb, "x", "--root", str(root), "--local", *more]) == 0
    quiet = Path(shutil.copytree(root, tmp_path / "quiet"))
    with kill_workers(len(folder) + len(before)) as killed:
        assert main([*command, "--root", str(root), "--workers", "3"]) == 0
    lost = [record.getMessage() for record in caplog.records if "was lost" in record.getMessage()]
    assert len(killed) >= 2 and lost, (killed, lost)
    assert main([*command, "--root", str(quiet), "--local"]) == 0
    disturbed, undisturbed = dataset(root), dataset(quiet)
    assert content(disturbed, folder) == content(undisturbed, folder) and len(content(disturbed, folder)) > 1
    assert without_run_facts(disturbed.manifest(folder)) == without_run_facts(undisturbed.manifest(folder))
    assert list(verify.find_faults(str(root), disturbed.path(folder))) == []
    assert storage.list_files(storage.join(disturbed.folder(folder), "failures")) == []


def content(dataset: Dataset, folder: str) -> dict[str, bytes]:
    """The files that a sealed stage made."""
    manifest = dataset.manifest(folder)
    return {entry["name"]: dataset.fetch(folder, entry, check=True).read_bytes()
            for part in [manifest, *manifest["items"]] for entry in part["files"]}


# Changed shards.


def test_overwritten_shards_make_embeddings_stale_for_index_and_neighbors(root: Path, tmp_path: Path,
                                                                          capsys: Any) -> None:
    assert main(embed(root, "--local")) == 0
    assert main(["index", "x", "--root", str(root), "--local"]) == 0
    other = synthetic.drawings(tmp_path / "other", subjects=4)
    assert main(["shard", "x", "--source", str(other), "--root", str(root), "--local", "--image-size", "32",
                 "--samples-per-shard", str(PER_SHARD), "--overwrite"]) == 0
    capsys.readouterr()
    for verb in ("index", "neighbors"):
        for more in ([], ["--overwrite"]):
            assert main([verb, "x", "--root", str(root), "--local", *more]) == 2
            text = capsys.readouterr().err
            assert "embeddings is stale: shards changed since\nhint: " in text and "embed x" in text
    # The failed command lost no file.
    assert dataset(root).is_sealed("index") and not dataset(root).is_sealed("neighbors/x")
    for verb in ("embed", "index"):
        assert main([verb, "x", "--root", str(root), "--local", "--overwrite"]) == 0
    assert main(["neighbors", "x", "--root", str(root), "--local"]) == 0


def test_a_tar_that_differs_from_its_manifest_is_not_embedded(root: Path, capsys: Any) -> None:
    folder = Path(dataset(root).folder("shards"))
    shutil.copy(folder / "000003.tar", folder / "000005.tar")
    assert main(embed(root, "--local")) == 1
    text = capsys.readouterr().err
    assert "1 of 16 items failed, the first is 000005: " in text and "is not the file its manifest describes" in text
    assert main(["verify", "--root", str(root)]) == 1
    assert "000005.tar: has " in capsys.readouterr().out


# Invalid vectors.


def spoil_vectors(root: Path, change: Any) -> None:
    """Change a file of vectors, and every record of its content."""
    folder = dataset(root).folder("embeddings")
    manifest = storage.read_json(storage.join(folder, "manifest.json"))
    record = manifest["items"][2]
    entry = file_of(record, ".npy")
    path = Path(folder) / entry["name"]
    np.save(path, change(np.load(path)))
    entry |= storage.describe_file(entry["name"], path)
    storage.put_json(record, storage.join(folder, "records", f"{record['id']}.json"))
    manifest["content"] = records.content(manifest["fingerprint"], manifest["files"], manifest["items"])
    manifest["totals"] = records.totals(manifest["items"])
    storage.put_json(manifest, storage.join(folder, "manifest.json"))


def nan(vectors: np.ndarray) -> np.ndarray:
    vectors[[1, 4], 7] = np.nan
    return vectors


def zeros(vectors: np.ndarray) -> np.ndarray:
    vectors[3] = 0
    return vectors


def narrow(vectors: np.ndarray) -> np.ndarray:
    return vectors[:, :100]


def short(vectors: np.ndarray) -> np.ndarray:
    return vectors[:-1]


@pytest.mark.parametrize(("change", "refusal", "fault"), [
    (nan, " are not finite", "000002.npy: 2 rows are not of unit length"),
    (narrow, "shard 000002 has vectors of shape (100,), the first one (256,)",
     "000002.npy: has vectors of shape (100,), its encoder makes 256"),
    (short, f"shard 000002 has {PER_SHARD - 1} rows, its manifest says {PER_SHARD}",
     f"000002.npy: has {PER_SHARD - 1} rows, its shard {PER_SHARD} samples"),
])
def test_embeddings_that_are_damaged_are_refused(change: Any, refusal: str, fault: str, root: Path,
                                                 capsys: Any) -> None:
    assert main(embed(root, "--local")) == 0
    spoil_vectors(root, change)
    for command in (["index", "x"], ["index", "x", "--part-memory", "60Ki", "--overwrite"],
                    ["neighbors", "x", "--method", "exact"]):
        assert main([*command, "--root", str(root), "--local"]) == 1, command
        text = capsys.readouterr().err
        assert refusal in text and "hint: " in text and "Traceback" not in text, text
    assert main(["verify", "--root", str(root), "--only", "datasets/x/v1/embeddings"]) == 1
    assert fault in capsys.readouterr().out


def test_a_vector_of_zeros_is_no_neighbor(root: Path) -> None:
    assert main(embed(root, "--local")) == 0
    spoil_vectors(root, zeros)
    zero = 2 * PER_SHARD + 3
    assert main(["index", "x", "--root", str(root), "--local"]) == 0
    assert main(["neighbors", "x", "--root", str(root), "--local", "--k", "300", "--copy-similarity", "1.1"]) == 0
    manifest = dataset(root).manifest("neighbors/x")
    ids = np.concatenate([np.load(dataset(root).fetch("neighbors/x", file_of(record, ".ids.npy")))
                          for record in manifest["items"]])
    assert (ids[zero] == -1).all() and zero not in ids and (ids[0] >= 0).sum() > 250
    assert manifest["info"]["missing"] == int((ids < 0).sum()) > 0


def weights(path: Path, value: float) -> Path:
    """The bundled weights, but for the last matrix of the image's encoder."""
    tensors = load_file(BUNDLED / "tiny_clip.safetensors")
    tensors["visual.proj"] = tensors["visual.proj"] * 0 + value
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_an_encoder_with_invalid_vectors_is_named(value: float, root: Path, tmp_path: Path, capsys: Any) -> None:
    code = main(embed(root, "--local", "--pretrained", str(weights(tmp_path / "w.safetensors", value))))
    text = capsys.readouterr()
    if value == 0:  # which could be true of an image, if not of all
        assert code == 0
        assert json.loads(text.out)["noted"] == {"no_direction": SHARDS * PER_SHARD}
        return
    assert code == 1 and f"{PER_SHARD} vectors of shard 0000" in text.err and "are not finite" in text.err
    assert "hint: " in text.err and not dataset(root).is_sealed("embeddings")


def test_shards_without_samples_pass_all_stages(tmp_path: Path) -> None:
    source, root = synthetic.drawings(tmp_path / "source", subjects=6), ["--root", str(tmp_path / "root"), "--local"]
    for number in range(2 * PER_SHARD):
        (source / f"a{number:02d}.png").write_bytes(b"no picture")
    assert main(["shard", "x", "--source", str(source), "--samples-per-shard", str(PER_SHARD), *root]) == 0
    for command in (["embed", "x"], ["index", "x"], ["neighbors", "x"]):
        assert main([*command, *root]) == 0
    sparse_dataset = dataset(tmp_path / "root")
    counts = [record["samples"] for record in sparse_dataset.manifest("shards")["items"]]
    assert counts == [0, 0, PER_SHARD, PER_SHARD]
    for name in ("embeddings", "neighbors/x"):
        assert [record["samples"] for record in sparse_dataset.manifest(name)["items"]] == counts
        assert list(verify.find_faults(sparse_dataset.root, sparse_dataset.path(name))) == []
