"""Datasets that an earlier version of the program and of its libraries wrote are read, continued and extended."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.cli.main import main
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.indices.searcher import Searcher
from pipeline.stages import records
from tests.laws.golden import archives, old_published, old_root, old_run
from tests.pipeline.synthetic import files_below


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return archives.unpack(archives.ROOT, tmp_path)


def run(root: Path, *words: str) -> int:
    return main([*words, "--root", str(root), "--local"])


def manifest(root: Path, place: str) -> dict[str, Any]:
    return json.loads((root / "datasets" / place / "manifest.json").read_text())


def test_sealed_folders_stay_as_they_are(root: Path, tmp_path: Path) -> None:
    before = files_below(root)
    assert main(["verify", "--root", str(root)]) == main(["status", "--root", str(root)]) == 0
    old_root.draw(tmp_path / "art", range(24))
    assert run(root, "shard", "art", "--source", str(tmp_path / "art"), "--samples-per-shard", "8",
               *old_root.SHARDS) == 0
    assert run(root, "embed", "art", "--captions") == run(root, "index", "art", "--key", "IVF4,SQ8") == 0
    assert run(root, "neighbors", "art", "--k", "3") == 0
    assert files_below(root) == before


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_a_root_of_a_later_format_is_refused_and_stays_as_it_is(root: Path, capsys: pytest.CaptureFixture[str],
                                                                name: str) -> None:
    path = root / "datasets/art/v1/embeddings" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    before = files_below(root)
    verb = "index" if name == "manifest.json" else "embed"  # a reader, and the stage itself
    assert run(root, verb, "art", *(["--captions"] if verb == "embed" else ["--key", "IVF4,SQ8"])) == 2
    assert (f"{name} has format 3, and this version reads formats up to 2\n"
            "hint: install the version that wrote it, or a later one") in capsys.readouterr().err
    assert files_below(root) == before


def test_stored_sizes_keep_their_bytes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stored settings say 4G and 512M, which the program that wrote them took for powers of 1024."""
    section = manifest(root, "art/v1/index")["section"]
    assert (section["max_memory"], section["part_memory"]) == ("4G", "512M")
    before = files_below(root)
    assert run(root, "index", "art", "--key", "IVF4,SQ8", "--max-memory", "4Gi", "--part-memory", "512Mi") == 0
    capsys.readouterr()
    assert run(root, "index", "art", "--key", "IVF4,SQ8", "--max-memory", "4G") == 2
    said = capsys.readouterr().err
    assert 'section.max_memory: there "4G", now "4000000000"' in said
    assert "write a size that is stored as 4G as 4Gi" in said
    assert files_below(root) == before


def test_an_unfinished_stage_is_continued(root: Path) -> None:
    folder = root / "datasets/half/v1/embeddings"
    before, planned = files_below(folder), json.loads((folder / "plan.json").read_text())
    assert 0 < len(list((folder / "records").iterdir())) < 4
    assert run(root, "embed", "half") == 0
    after, sealed = files_below(folder), manifest(root, "half/v1/embeddings")
    assert before.items() <= after.items() and sealed["fingerprint"] == planned["fingerprint"]
    old = Embeddings(Dataset.parse(str(root), "half")).all().astype(np.float32)
    assert run(root, "embed", "half", "--overwrite") == 0
    assert manifest(root, "half/v1/embeddings")["fingerprint"] == planned["fingerprint"]
    new = Embeddings(Dataset.parse(str(root), "half")).all().astype(np.float32)
    assert (old * new).sum(1).min() > 0.999


def test_an_old_index_is_extended_and_searched(root: Path) -> None:
    assert run(root, "index", "art@v2", "--extend", "art") == run(root, "neighbors", "art@v2", "--k", "3") == 0
    about = manifest(root, "art/v2/index")["info"]
    assert (about["kept"], about["added"], about["removed"]) == (16, 8, 8) and about["recall_at_10"] > 0.9
    dataset = Dataset.parse(str(root), "art@v2")
    searcher, vectors = Searcher(dataset), Embeddings(dataset).all().astype(np.float32)
    nearest_rows = searcher.search(vectors, 1)[0][:, 0]
    assert ((vectors[nearest_rows] * vectors).sum(1) > 0.999).all()  # itself, or an image that looks the same
    assert main(["verify", "--root", str(root)]) == 0


def test_rebuilt_folders_have_the_same_fingerprints(root: Path) -> None:
    places = ("art/v1/embeddings", "art/v1/text_embeddings", "art/v1/index", "art/v1/neighbors/art")
    before = [manifest(root, place) for place in places]
    assert run(root, "index", "art", "--key", "IVF4,SQ8", "--overwrite") == 0
    again = manifest(root, "art/v1/index")
    assert again["fingerprint"] == before[2]["fingerprint"]
    assert again["info"]["recall"] == before[2]["info"]["recall"]
    assert [manifest(root, place)["fingerprint"] for place in places] == [sealed["fingerprint"] for sealed in before]


def seal_again(folder: Path) -> None:
    """Give the manifest and the record of an index the hashes that its files have now."""
    sealed = json.loads((folder / "manifest.json").read_text())
    for entry in sealed["items"][0]["files"]:
        entry["sha256"] = storage.sha256_file(folder / entry["name"])
    sealed["content"] = records.content(sealed["fingerprint"], sealed["files"], sealed["items"])
    (folder / "records/index.json").write_bytes(storage.json_bytes(sealed["items"][0]))
    (folder / "manifest.json").write_bytes(storage.json_bytes(sealed))


@pytest.mark.parametrize(("first", "newer"), [(b"IwZZ", True), (b"IwZZ", False), (b"\0" * 64, False)])
def test_an_index_unreadable_for_this_faiss_has_a_hint(root: Path, first: bytes, newer: bool,
                                                       capfd: pytest.CaptureFixture[str]) -> None:
    path = root / "datasets/art/v1/index/knn.index"
    data = path.read_bytes()
    path.write_bytes(first + data[len(first):])
    if newer:  # as a program with a newer faiss would have sealed it
        seal_again(path.parent)
    why = "another version of faiss wrote it" if newer else "it is damaged"
    commands = ["index", "art@v2", "--extend", "art"], ["neighbors", "art@v2", "--database", "art"]
    for words in commands:
        assert run(root, *words) == 1
        said = capfd.readouterr().err
        assert f"the index of art cannot be read: the file is {'' if newer else 'not '}as it was sealed: {why}" in said
        assert f"hint: python -m jobs index art --overwrite --root {root}" in said and "Traceback" not in said
    assert main(["verify", "--root", str(root)]) == 1
    assert "datasets/art/v1/index/knn.index" in capfd.readouterr().out
    assert run(root, "index", "art", "--key", "IVF4,SQ8", "--overwrite") == 0
    # A processor with other instructions gives the new index other bytes. Then the list made with it is stale.
    for words in (*commands, ["neighbors", "art", "--k", "3"]):
        assert run(root, *words, "--overwrite") == 0
    assert main(["verify", "--root", str(root)]) == 0


@pytest.fixture
def published_root(tmp_path: Path) -> Path:
    return archives.unpack(archives.PUBLISHED, tmp_path)


def rebuild(root: Path, source: Path, *words: str) -> int:
    return run(root, "rebuild", "styles", "--source", str(source), *old_published.GATES, *old_root.SHARDS, *words)


def test_an_old_published_database_is_rebuilt(published_root: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    root, source = published_root, tmp_path / "source"
    old_published.draw_first(source)
    old_published.change(source)
    before = files_below(root / "datasets")
    assert rebuild(root, source) == 0  # the source is unchanged
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["unchanged"]
    (source / "005.png").unlink()
    (source / "005.txt").unlink()
    (source / "006.png").write_bytes((source / "007.png").read_bytes())
    (source / "008.png").touch()  # only its time is new
    old_root.draw(source / "further", range(30, 32))
    assert rebuild(root, source) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    counts = {name: done[name] for name in ("published", "kept", "added", "changed", "removed", "embedded")}
    assert counts == {"published": "v3", "kept": 22, "added": 2, "changed": 1, "removed": 1, "embedded": 3}
    after = files_below(root / "datasets")
    assert {name for name in before if after[name] != before[name]} == {"styles/current.json"}
    assert main(["verify", "--root", str(root), "--only", "datasets/styles"]) == 0
    assert main(["verify", "--against", "current", "--root", str(root)]) == 0
    assert main(["rollback", "styles", "--root", str(root)]) == 0


def test_old_samples_have_their_credits(published_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = published_root / "runs/small/samples/first"
    assert main(["verify", "--root", str(published_root), "--only", "runs/small/samples"]) == 0
    capsys.readouterr()
    assert main(["credits", str(folder / "samples.json"), "--json"]) == 0
    credits = json.loads(capsys.readouterr().out)
    assert [sample["prompt"] for sample in credits] == ["a red disc", "a blue box"]
    assert all(len(sample["pictures"]) == 2 for sample in credits)
    assert all("note" not in image and image["database"] == "styles@v2" for sample in credits
               for image in sample["pictures"])


@pytest.fixture
def run_root(published_root: Path) -> Path:
    """A root with a finished run of one step. Beside it is `continued`: what the old program made of it in 4 steps."""
    return archives.unpack(archives.RUN, published_root.parent)


def pixels(samples: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in samples.glob("*/*.png")}


def assert_same_images(samples: Path, old: Path) -> None:
    """The images and the neighbors of two folders of samples differ by at most one level, and are not uniform."""
    ours, theirs = pixels(samples), pixels(old)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * (1 + 2)
    for name, image in theirs.items():
        assert image.shape == (8, 8, 3) and image.std() > 3 and np.abs(image - ours[name]).max() <= 1


def test_an_old_run_is_sampled(run_root: Path, tmp_path: Path) -> None:
    sample = ("sample", "tiny", *old_run.SAMPLE, "--name", "first")
    folder, place = run_root / "runs/tiny/samples/first", "../runs/tiny/samples/first"
    before, sealed = files_below(folder), manifest(run_root, place)
    folder.rename(tmp_path / "old")
    assert run(run_root, *sample) == 0
    assert_same_images(folder, tmp_path / "old")
    assert manifest(run_root, place)["fingerprint"] == sealed["fingerprint"]
    assert main(["verify", "--root", str(run_root), "--only", "runs/tiny"]) == 0
    images = {name: data for name, data in files_below(folder).items() if name.endswith(".png")}
    assert run(run_root, *sample, "--overwrite") == 0
    assert {name: data for name, data in files_below(folder).items() if name.endswith(".png")} == images
    assert main(["verify", "--root", str(run_root), "--only", "runs/tiny"]) == 0
    shutil.rmtree(folder)
    (tmp_path / "old").rename(folder)
    assert run(run_root, *sample) == 0
    assert files_below(folder) == before  # sealed files of the old program stay unchanged


def test_an_old_run_is_continued_and_sampled(run_root: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the old program ran: sums depend on the number of threads
    folder, continued = run_root / "runs/tiny", tmp_path / "continued"
    plan, before = (folder / "plan.json").read_bytes(), (folder / "metrics.jsonl").read_bytes()
    checkpoint = files_below(folder / "checkpoints/0000001")
    assert run(run_root, "train", "tiny", *old_run.TRAIN, "--steps", "4") == 0
    assert (folder / "plan.json").read_bytes() == plan
    assert files_below(folder / "checkpoints/0000001") == checkpoint
    assert (folder / "metrics.jsonl").read_bytes().startswith(before)  # it did not start again
    ours, theirs = ([json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
                    for place in (folder, continued))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3, 4]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)
    assert run(run_root, "sample", "tiny", *old_run.SAMPLE, "--name", "fourth") == 0
    assert_same_images(folder / "samples/fourth", continued / "fourth")
    assert run(run_root, "sample", "tiny", *old_run.SAMPLE, "--name", "alone", "--k", "0") == 0
    alone, fourth = pixels(folder / "samples/alone"), pixels(folder / "samples/fourth")
    assert all(np.abs(image - fourth[name]).max() > 3 for name, image in alone.items())  # the neighbors count
    assert main(["verify", "--root", str(run_root), "--only", "runs/tiny"]) == 0
