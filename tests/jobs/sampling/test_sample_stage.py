"""Samples of prompts, of images and of rows of p_D; neighbors from a pool, and from several databases."""

import contextlib
import hashlib
import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.cli.main import main
from jobs.report import report
from jobs.runs.run import Run
from jobs.sampling.config import QueryConfig, SampleConfig
from jobs.sampling.generator import open_generator
from jobs.sampling.mixture import Mixture
from jobs.sampling.queries import query_title
from jobs.sampling.retrieval import RowDistribution, neighbor_counts
from jobs.sampling.sample_stage import Sampling
from pipeline import storage
from pipeline.datasets import lookup
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings import clip
from pipeline.embeddings.clip_weights import ClipConfig
from pipeline.indices.searcher import Searcher
from pipeline.media.contact_sheet import contact_sheet
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.neighbors import Neighbors
from pipeline.stages.documents import FORMAT
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import sealed_input
from pipeline.storage import files
from tests.pipeline import synthetic

PROMPTS = ("a red circle", "a blue square")
CONFIG = SampleConfig(k=3, steps=2)


@pytest.fixture(scope="module")
def root(trained_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained root, where p_D is known of two of its style databases."""
    root = tmp_path_factory.mktemp("sampling") / "root"
    shutil.copytree(trained_root, root)
    for style in ("flat", "hatched"):
        run_stage(Neighbors(_dataset(root, "drawn"), _dataset(root, style), NeighborsConfig(k=5)))
    return root


@pytest.fixture(scope="module")
def picture(root: Path, drawn_pictures: Path) -> Path:
    """An image of the database `flat`, in another format, with a transparent border."""
    inside = Image.open(sorted((drawn_pictures / "flat").glob("*.png"))[3]).convert("RGBA")
    padded = Image.new("RGBA", (inside.width + 2, inside.height + 2))
    padded.paste(inside, (1, 1))
    path = root.parent / "My Apple.webp"
    path.write_bytes(synthetic.encoded(padded, "WEBP", lossless=True))
    return path


def _dataset(root: Path, name: str) -> Dataset:
    return Dataset.parse(str(root), name)


def _sample(root: Path, *arguments: str) -> int:
    return main(["sample", "small", "--root", str(root), "--local", "--steps", "2", *arguments])


def _sample_records(root: Path, name: str, *arguments: str) -> list[dict[str, Any]]:
    """Sample, and return the records of images in samples.json."""
    assert _sample(root, "--name", name, "--k", "3", *arguments) == 0
    return json.loads((root / f"runs/small/samples/{name}/samples.json").read_text())["pictures"]


def _png(root: Path, name: str, record: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(root / f"runs/small/samples/{name}" / record["file"]))


def _rows(record: dict[str, Any]) -> list[int]:
    return [neighbor["row"] for neighbor in record["neighbors"]]


def test_without_the_new_flags_a_folder_is_unchanged(root: Path) -> None:
    flat = _dataset(root, "flat")
    sampling = Sampling(Run.parse(str(root), "small"), 0, PROMPTS, (flat,), ClipConfig(), CONFIG)
    section = {"k": 3, "guidance": 2.0, "seed": 0, "steps": 2, "batch_size": 16, "prompts": list(PROMPTS),
               "databases": ["flat"]}
    inputs = {"checkpoint": sealed_input(str(root), "runs/small/checkpoints/0000003", "")} | {
        f"{name} of flat": flat.identity(name) for name in ("index", "embeddings", "shards")}
    assert sampling.path == f"runs/small/samples/{storage.digest([FORMAT, 'sample', section, inputs])[:12]}"
    manifest = run_stage(sampling)
    assert {entry["name"] for entry in manifest["items"][0]["files"]} == {
        f"flat/{name}{end}" for name in ("00-a-red-circle", "01-a-blue-square")
        for end in (".png", "-neighbor-0.png", "-neighbor-1.png", "-neighbor-2.png")}
    records = json.loads(Path(sampling.folder, "samples.json").read_text())["pictures"]
    ids, _ = Searcher(flat).search(clip.load_encoder(ClipConfig()).texts(PROMPTS), 3)
    assert [_rows(record) for record in records] == ids.tolist()
    assert [(record["kind"], record["prompt"], record["position"]) for record in records] == [
        ("prompt", prompt, number) for number, prompt in enumerate(PROMPTS)]
    assert not any("database" in neighbor for record in records for neighbor in record["neighbors"])


def test_the_driver_makes_the_grid_without_reading_the_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    databases = [Mixture.parse(str(root), "flat+hatched"), _dataset(root, "flat")]
    sampling = Sampling(Run.parse(str(root), "small"), 0, PROMPTS, databases, ClipConfig(), replace(CONFIG, k=6),
                        "grid", query_config=QueryConfig(unconditional=1))
    folder, reads = Path(sampling.folder), []
    finish, storage_errors = Sampling.finish, files.storage_errors

    def finish_without_images(stage: Sampling, *arguments: Any) -> Any:
        """Finish while the images are elsewhere, and note what is read."""
        images = [path for path in folder.rglob("*.png") if path.parent.name != "asked"]
        assert len(images) == 2 * 3 * 7
        for path in images:
            path.rename(path.with_suffix(".moved"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "storage_errors", lambda url, doing, **more: (
                reads.append(url) if doing == "read" else None, storage_errors(url, doing, **more))[1])
            output = finish(stage, *arguments)
        for path in images:
            path.with_suffix(".moved").rename(path)
        return output

    monkeypatch.setattr(Sampling, "finish", finish_without_images)
    manifest = run_stage(sampling)
    assert reads == [storage.join(sampling.folder, f"cells/{record['id']}.tar") for record in manifest["items"]]
    assert not [entry for record in manifest["items"] for entry in record["files"] if "cells" in entry["name"]]
    expected = _grid_of_files(folder)
    assert (folder / "grid.png").read_bytes() == expected
    # A folder that an earlier version of the program left unfinished has no cells.
    monkeypatch.setattr(Sampling, "finish", finish)
    shutil.rmtree(folder / "cells")
    for name in ("manifest.json", "grid.png"):
        (folder / name).unlink()
    assert run_stage(sampling)["content"] == manifest["content"]
    assert (folder / "grid.png").read_bytes() == expected


def _grid_of_files(folder: Path) -> bytes:
    """The grid, made from the image files: each 128 pixels wide beside its first four neighbors of 32 pixels."""
    document = json.loads((folder / "samples.json").read_text())
    cells = []
    for entry in document["pictures"]:
        image = Image.open(folder / entry["file"])
        cell = Image.new("RGB", (164, 128), "white")
        cell.paste(image.resize((128, 128), Image.Resampling.LANCZOS), (0, 0))
        for rank, neighbor in enumerate(entry["neighbors"][:4]):
            small = Image.open(folder / neighbor["file"]).resize((32, 32), Image.Resampling.LANCZOS)
            cell.paste(small, (132, rank * 32))
        cells.append(cell)
    labels = document["databases"]
    sheet = contact_sheet(cells, len(labels), cell=cells[0].width,
                          row_labels=[query_title(entry) for entry in document["pictures"][::len(labels)]],
                          column_labels=[label.replace("+", " + ") for label in labels])
    file = io.BytesIO()
    sheet.save(file, "png")
    return file.getvalue()


def test_rows_are_sampled_as_often_as_they_are_used() -> None:
    usage = np.array([0, 5, 1, 3, 0, 1])
    counts = Counter(RowDistribution(usage, 1.0).sample_row(Random(f"{position}")) for position in range(4000))
    assert set(counts) == {1, 2, 3, 5}
    assert all(abs(counts[row] / 4000 - usage[row] / 10) < 0.03 for row in counts)
    top_third = RowDistribution(usage, 1 / 3)
    assert top_third.rows.tolist() == [1, 3]
    counts = Counter(top_third.sample_row(Random(f"{position}")) for position in range(4000))
    assert abs(counts[1] / 4000 - 5 / 8) < 0.03
    assert RowDistribution(usage, 1e-9).rows.tolist() == [1]
    with pytest.raises(ValueError, match="p_D is zero everywhere"):
        RowDistribution(np.zeros(3, np.int64), 1.0)


def test_unconditional_samples_use_frequent_rows_and_their_neighbors(root: Path) -> None:
    records = _sample_records(root, "likely", "--unconditional", "3", "--top-m", "0.2", "--text-guidance", "5",
                              "--database", "flat", "--database", "drawn")
    assert [(record["position"], record["database"]) for record in records] == [
        (position, name) for position in range(3) for name in ("flat", "drawn")]
    generator = open_generator(Run.parse(str(root), "small"), 3)
    for record in records:
        database = _dataset(root, record["database"])
        usage = neighbor_counts(_dataset(root, "drawn"), database, np.empty(0, np.int64))
        assert record["kind"] == "p_D" and record["drawn"]["used"] == usage[record["drawn"]["row"]]
        assert (usage > record["drawn"]["used"]).sum() < round(0.2 * len(usage))
        rows, searcher = _rows(record), Searcher(database)
        assert rows[0] == record["drawn"]["row"] and record["neighbors"][0]["score"] == pytest.approx(1, abs=2e-3)
        vectors = searcher.embeddings.rows(np.array([rows])).astype(np.float32)
        nearest, _ = searcher.search(vectors[:, 0], 4)
        assert rows[1:] == [row for row in nearest[0] if row != rows[0]][:2]
        # Nothing else is in the context: no text, and so no guidance by text.
        assert (generator.generate(vectors, [record["position"]], CONFIG)[0] == _png(root, "likely", record)).all()
    more_records = _sample_records(root, "more", "--unconditional", "4", "--top-m", "0.2", "--database", "flat")
    assert [record["drawn"] for record in more_records[:3]] == [
        record["drawn"] for record in records if record["database"] == "flat"]
    other_records = _sample_records(root, "other", "--unconditional", "4", "--seed", "1", "--database", "flat")
    assert [record["drawn"]["row"] for record in more_records] != [record["drawn"]["row"] for record in other_records]


def test_an_image_can_replace_a_prompt(root: Path, picture: Path, drawn_pictures: Path) -> None:
    records = _sample_records(root, "asked", "--image", str(picture), "--unconditional", "1", "--prompt", PROMPTS[0],
                              "--database", "flat")
    assert [record["kind"] for record in records] == ["prompt", "image", "p_D"]
    assert records[1]["image"] == {"name": picture.name, "sha256": hashlib.sha256(picture.read_bytes()).hexdigest(),
                                   "file": "asked/01-my-apple.png"}
    assert records[1]["file"] == "flat/01-my-apple.png"
    database_image = sorted((drawn_pictures / "flat").glob("*.png"))[3]
    assert records[1]["neighbors"][0]["sha256"] == hashlib.sha256(database_image.read_bytes()).hexdigest()
    encoder, searcher = clip.load_encoder(ClipConfig()), Searcher(_dataset(root, "flat"))
    vector = encoder.images(np.stack([encoder.prepared(picture.read_bytes())]))
    context = np.concatenate([vector, searcher.embeddings.rows(np.array(_rows(records[1]))).astype(np.float32)])
    generator = open_generator(Run.parse(str(root), "small"), 3)
    assert (generator.generate(context[None], [1], CONFIG)[0] == _png(root, "asked", records[1])).all()
    assert Image.open(root / "runs/small/samples/asked/asked/01-my-apple.png").size == (34, 34)
    records_alone = _sample_records(root, "alone", "--prompt", PROMPTS[0], "--database", "flat")
    assert (_png(root, "alone", records_alone[0]) == _png(root, "asked", records[0])).all()
    assert main(["verify", "--root", str(root), "--only", "runs/small/samples/asked"]) == 0


def test_neighbors_are_sampled_from_a_pool(root: Path) -> None:
    flags = ("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--database", "flat", "--unconditional", "1")
    records = _sample_records(root, "pool", *flags, "--pool", "8")
    texts = clip.load_encoder(ClipConfig()).texts(PROMPTS)
    nearest, _ = Searcher(_dataset(root, "flat")).search(texts, 8)
    ranks = [[nearest[number].tolist().index(row) for row in _rows(records[number])] for number in range(2)]
    assert all(query_ranks == sorted(set(query_ranks)) and len(query_ranks) == 3 for query_ranks in ranks)
    assert ranks[0] != ranks[1]
    assert _rows(records[2])[0] == records[2]["drawn"]["row"]
    records_again = _sample_records(root, "again", *flags, "--pool", "8", "--batch-size", "1")
    other_records = _sample_records(root, "seeds", *flags, "--pool", "8", "--seed", "1")
    assert [*map(_rows, records_again)] == [*map(_rows, records)] != [*map(_rows, other_records)]
    full_pool, no_pool = _sample_records(root, "whole", *flags, "--pool", "3"), _sample_records(root, "plain", *flags)
    assert [*map(_rows, full_pool)] == [*map(_rows, no_pool)]
    # A database with fewer rows than the pool gives all its rows to choose from.
    large_pool = _sample_records(root, "everything", *flags, "--pool", "1000")
    assert all(len(set(_rows(record))) == 3 for record in large_pool)


def test_a_mixture_divides_the_neighbors(root: Path) -> None:
    records = _sample_records(root, "mixed", "--k", "4", "--prompt", PROMPTS[0], "--unconditional", "4", "--database",
                              "flat:3+hatched:1", "--database", "hatched")
    mixed = [record for record in records if record["database"] == "flat:3+hatched:1"]
    text = clip.load_encoder(ClipConfig()).texts(PROMPTS[:1])
    nearest = {name: Searcher(_dataset(root, name)).search(text, count)[0][0].tolist()
               for name, count in (("flat", 3), ("hatched", 1))}
    for name, rows in nearest.items():
        assert [neighbor["row"] for neighbor in mixed[0]["neighbors"] if neighbor["database"] == name] == rows
    for record in mixed:
        assert Counter(neighbor["database"] for neighbor in record["neighbors"]) == {"flat": 3, "hatched": 1}
        scores = [neighbor["score"] for neighbor in record["neighbors"]]
        assert scores == sorted(scores, reverse=True)
        vectors = np.stack([Searcher(_dataset(root, neighbor["database"])).embeddings.rows(np.array(neighbor["row"]))
                            for neighbor in record["neighbors"]]).astype(np.float32)
        if record["kind"] == "p_D":
            first = record["neighbors"][0]
            assert record["drawn"].items() >= {name: first[name] for name in ("row", "key", "database")}.items()
            generator = open_generator(Run.parse(str(root), "small"), 3)
            image = generator.generate(vectors[None], [record["position"]], CONFIG)[0]
            assert (image == _png(root, "mixed", record)).all()
    assert (root / "runs/small/samples/mixed/flat=3+hatched=1/00-a-red-circle.png").exists()


def test_the_report_shows_the_requested_options(root: Path, picture: Path) -> None:
    caption = lookup.samples(_dataset(root, "flat"), [0])[0].caption  # of a database without a column held_out
    _sample_records(root, "all", "--prompt", PROMPTS[0], "--prompt", caption, "--image", str(picture),
                    "--unconditional", "1", "--top-m", "0.5", "--pool", "5", "--database", "flat+hatched")
    report.write_report(str(root), str(root / "report.html"))
    page = (root / "report.html").read_text()
    assert "could not be read" not in page
    for words in ("My Apple.webp", "from p_D", "flat+hatched", "among the 50 % of all rows", "from the 5 nearest",
                  "Databases joined by +", "drawn from", "a red circle", caption):
        assert words in page, words


@pytest.fixture
def names(tmp_path: Path) -> str:
    """A root with the folders of three datasets."""
    for name in "abc":
        (tmp_path / "datasets" / name).mkdir(parents=True)
    return str(tmp_path)


@pytest.mark.parametrize(("weights", "k", "shares"), [
    ("a:3+b:1", 4, [3, 1]), ("a+b", 3, [2, 1]), ("a+b+c", 4, [2, 1, 1]), ("a:0.1+b:0.2", 3, [1, 2]),
    ("a:1+b:3", 1, [0, 1]), ("a:5+b", 0, [0, 0]), ("a", 7, [7]), ("a:2+b:3+c:4", 10, [2, 3, 5])])
def test_shares_follow_the_weights(names: str, weights: str, k: int, shares: list[int]) -> None:
    assert Mixture.parse(names, weights).shares(k) == shares


@pytest.mark.parametrize(("text", "label", "item"), [
    ("a:3", "a", "a"), ("a@v2", "a@v2", "a-v2"), ("a:2+b:2", "a+b", "a+b"), ("a:30+b", "a:30+b:1", "a=30+b=1"),
    ("a:0.50+b@v3:1", "a:0.5+b@v3:1", "a=0.5+b-v3=1")])
def test_a_mixture_has_one_name(names: str, text: str, label: str, item: str) -> None:
    mixture = Mixture.parse(names, text)
    assert (mixture.label, mixture.item) == (label, item)
    assert Mixture.parse(names, label) == mixture or len(set(mixture.weights)) == 1


def test_prompts_are_embedded_with_the_encoder_of_the_run(root: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.toml").write_text('[embed]\nmodel = "RN50"\npretrained = "random"\n')
    flags = ["--config", str(tmp_path / "other.toml"), "--database", "flat", "--prompt", PROMPTS[0]]
    assert _sample(root, "--name", "of_the_run", *flags) == 0
    assert _sample(root, "--name", "refused", *flags, "--model", "RN50", "--pretrained", "random") == 2
    assert "the run small belongs to another encoder than RN50" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--image", "nowhere.png"], "there is no file or folder nowhere.png"),
    (["--prompt", "x", "--prompt", "x"], "given twice"),
    (["--prompt", "x", "--name", "../z"], "'../z' is not a name"),
    (["--image", "{root}"], "cannot read the image"),
    (["--image", "{root}/settings.toml"], "not_a_picture"),
    (["--image", "{picture}", "--image", "{picture}"], "an image is given twice"),
    (["--prompt", "x", "--pool", "2"], "hint: --pool 16"),
    (["--prompt", "x", "--pool", "-1"], "sample.pool = -1: must be at least 0"),
    (["--unconditional", "1", "--top-m", "0"], "sample.top_m = 0.0: must be above 0 and at most 1"),
    (["--unconditional", "1", "--top-m", "1.5"], "sample.top_m = 1.5: must be above 0 and at most 1"),
    (["--unconditional", "1", "--k", "0"], "has no neighbors to generate from"),
    (["--unconditional", "1", "--database", "outline"], "python -m jobs neighbors drawn --database outline"),
    (["--prompt", "x", "--database", "flat+nowhere"], "there is no dataset nowhere in "),
    (["--prompt", "x", "--database", "flat:0+hatched"], "the weight '0' of flat is not a number above 0"),
    (["--prompt", "x", "--database", "flat:-1"], "not a number above 0"),
    (["--prompt", "x", "--database", "flat+flat:2"], "names a database twice"),
    (["--prompt", "x", "--database", "flat:2"], "a database is given twice"),
    (["--prompt", "x", "--sampler", "heun"], "heun follows a flow"),
    (["--prompt", "x", "--ema", "0.5"], "the run has no average of the rate 0.5"),
    (["--prompt", "x", "--steps", "5000"], "below timesteps = 1000"),
    ([], "sample needs databases, and prompts"),
])
def test_invalid_sampling_requests_have_a_clear_message(arguments: list[str], message: str, root: Path, picture: Path,
                                                        capsys ) -> None:
    flags = [argument.format(root=root, picture=picture) for argument in arguments]
    code = 2
    with contextlib.suppress(SystemExit):  # flags that are wrong by themselves end in the parser
        code = _sample(root, "--database", "flat", *flags)
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error
    assert not [folder for folder in (root / "runs").glob("*/samples/*") if not (folder / "manifest.json").exists()]


def test_a_run_trained_elsewhere_has_no_p_data(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "runs/small", tmp_path / "runs/small", ignore=shutil.ignore_patterns("samples"))
    (tmp_path / "datasets").symlink_to(root / "datasets")
    plan = json.loads((tmp_path / "runs/small/plan.json").read_text())
    del plan["section"]["dataset"]
    (tmp_path / "runs/small/plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="not trained here"):
        Sampling(Run.parse(str(tmp_path), "small"), 0, (), (_dataset(tmp_path, "flat"),), ClipConfig(), CONFIG,
                 query_config=QueryConfig(unconditional=1))
