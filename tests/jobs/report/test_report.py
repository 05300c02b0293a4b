"""The report: complete on a complete root, readable on a partial root, escaped and self-contained on any root."""

import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jobs.cli.main import main
from jobs.report import report, tables
from jobs.report.collect import RootContents
from jobs.report.images import spread_rows
from jobs.report.render import Album, render
from jobs.runs.run import SHOWN_ROWS, Run
from jobs.sampling.config import SampleConfig
from jobs.sampling.sample_stage import Sampling
from jobs.training.train_stage import Job, Training
from jobs.training.worker import train_in_processes
from model import recipes
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.indices.config import IndexConfig
from pipeline.indices.index import Index
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.files import load_neighbors
from pipeline.neighbors.neighbors import Neighbors
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from tests.pipeline import synthetic

HEADINGS = ("Samples", "Training", "Neighbors", "Datasets", "Indices", "Stages", "Encoder and settings")
SCRIPT, QUOTES = "<script>alert(1)</script>", "\"&' onload='x"
HOSTILE_NAME = "<img src=x onerror=alert(1)>\"'&"
HELD_OUT = "a thing that training has not seen"
PROMPTS = (SCRIPT, QUOTES, HELD_OUT)
SOURCES = [{"style": "line", "package": "<b>pack</b>", "version": "1", "licence_spdx": "MIT & more",
            "licence_url": "https://example.org/licence", "author_name": SCRIPT, "author_url": "javascript:alert(2)"}]


class Document(HTMLParser):
    """The tags of a page with their attributes, and its text outside of the style sheet."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(str(page))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data if self.tags[-1:] and self.tags[-1][0] != "style" else ""

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.tags if attribute in attributes]


def report_page(root: Path) -> str:
    report.write_report(str(root), str(root / "report.html"))
    return (root / "report.html").read_text()


def shards(root: Path, name: str, pictures: Path) -> Dataset:
    """A dataset of synthetic images: some have hostile captions, one is undecodable, one is held out."""
    source = root / "source" / name
    source.mkdir(parents=True)
    with open(source / "captions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("file", "caption", "held_out"))
        for place, path in enumerate(sorted(pictures.rglob("*.png"))[::4]):
            shutil.copy(path, source / f"{place}.png")
            rows.writerow((f"{place}.png", {0: SCRIPT, 1: QUOTES, 2: HELD_OUT}.get(place, f"drawing {place}"),
                           int(place == 2)))
    (source / "broken<i>.png").write_bytes(b"no picture")
    (source / "sources.json").write_text(json.dumps(SOURCES))
    dataset = Dataset.parse(str(root), name)
    run_stage(Shard(dataset, ShardConfig(source=str(source), sources=str(source / "sources.json"), image_size=32,
                                         samples_per_shard=16, format="png")))
    return dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, drawn_pictures: Path) -> Path:
    """Everything there is: two datasets, neighbors, a run, its samples."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("train", "line"):
        dataset = shards(folder, name, drawn_pictures)
        run_stage(Embed(dataset, EmbedConfig()))
        run_stage(Index(dataset, IndexConfig()))
    train = Dataset.parse(str(folder), "train")
    run_stage(Neighbors(train, train, NeighborsConfig(k=5)))
    run = Run.parse(str(folder), "first")
    tiny = recipes.tiny()
    config = replace(tiny, steps=4, global_batch=2, log_every=1, k=2,
                     unet=replace(tiny.unet, model_channels=32, channel_mult=(1,), attention_downsampling=(1,)))
    job = Job(run, train, train, config)
    train_in_processes(job)
    run_stage(Training(job))
    run_stage(Sampling(run, 0, PROMPTS, (train, Dataset.parse(str(folder), "line")), EmbedConfig().clip(),
                       SampleConfig(k=2, steps=2)))
    return folder


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return report_page(root)


def test_the_report_has_every_part(page: str):
    document = Document(page)
    assert all(f"<h2>{heading}</h2>" in page for heading in HEADINGS)
    assert all(prompt in document.text for prompt in PROMPTS)
    assert "could not be read" not in document.text and "not there" not in document.text
    assert document.text.count("held out") == 2  # the mark of one prompt, and its explanation
    assert "undecodable" in document.text or "broken" in document.text
    for words in ("recall@10", "tiny-clip-64", "DDIM steps, guidance 2", "samples/s", "mean loss of the last tenth",
                  "training images;"):
        assert words in document.text
    pictures = [attributes for name, attributes in document.tags if name == "img"]
    assert sum("noise" in (picture["title"] or "") for picture in pictures) == len(PROMPTS) * 2
    assert all(re.search(r"key \d+, row \d+", picture["title"]) or "checkpoint step 4" in picture["title"]
               for picture in pictures)
    assert len(page) < 2_000_000


def test_neighbors_are_sorted_by_distance_with_their_distribution(page: str, root: Path):
    section = page[page.index("<h2>Neighbors</h2>"):page.index("<h2>Datasets</h2>")]
    manifests = [json.loads(path.read_text()) for path in root.glob("datasets/*/v1/neighbors/*/manifest.json")]
    # Each chart is there for wide and for narrow pages.
    assert len(manifests) == section.count('class="chart"')
    assert len(manifests) == section.count("cosine similarity of all neighbors</text>") / 2
    charts = [chart.split("</div>")[0] for chart in section.split('<div class="chart">')[1:]]
    bars = [chart.count('class="bar"') / 2 for chart in charts]
    filled = [np.flatnonzero(manifest["info"]["scores"]) for manifest in manifests]
    assert sorted(bars) == sorted(bins[-1] - bins[0] + 1 for bins in filled)
    for manifest in manifests:
        assert f"of {manifest['info']['rows']:,} in the database" in section
        assert f"the most used one is that of {manifest['info']['most_used']} image" in section
    for table in section.split("<table")[1:]:
        nearest = [float(match.group(1)) for row in table.split("<tr>")[2:]
                   if (match := re.search(r"score (-?\d\.\d+)", row))]
        assert nearest == sorted(nearest, reverse=True) and len(nearest) > 2


def test_captions_prompts_and_sources_are_text(page: str):
    document = Document(page)
    assert SCRIPT not in page and "<b>pack" not in page and "<i>" not in page
    assert not any(name in {"script", "b", "i"} or attribute.startswith("on")
                   for name, attributes in document.tags for attribute in attributes)
    assert SCRIPT in document.values("alt") and "broken<i>.png" in document.text


def test_the_report_needs_no_other_file(page: str):
    document = Document(page)
    assert all(value.startswith("data:image/") for value in document.values("src"))
    assert all(value.startswith("#") for name, attributes in document.tags if name != "a"
               for key, value in attributes.items() if key in {"href", "srcset", "xlink:href"})
    links = set(document.values("href")) - {value for value in document.values("href") if value.startswith("#")}
    assert links == {"https://example.org/licence"}
    assert not {name for name, _ in document.tags} & {"link", "iframe", "object", "embed", "base"}
    assert "url(" not in page and "@import" not in page


def test_an_empty_root_has_a_report(tmp_path: Path):
    assert "Nothing is below this root yet" in Document(report_page(tmp_path)).text
    assert "Nothing is below this root yet" in Document(report_page(tmp_path / "absent")).text


def test_a_root_with_only_shards_has_a_report(tmp_path: Path, drawn_pictures: Path):
    shards(tmp_path, "train", drawn_pictures)
    text = Document(report_page(tmp_path)).text
    assert "36 of 36 images" in text and "could not be read" not in text
    assert re.findall("<h2>(.*)</h2>", (tmp_path / "report.html").read_text()) == ["Datasets", "Stages"]


def test_a_damaged_part_does_not_remove_the_others(root: Path, tmp_path: Path, page: str,
                                                   capsys: pytest.CaptureFixture[str]):
    for name in ("datasets", "runs"):
        shutil.copytree(root / name, tmp_path / name)
    next((tmp_path / "datasets/train/v1/shards").glob("*.tar")).write_bytes(b"cut")
    (tmp_path / "datasets/line/v1/index/manifest.json").write_text("{")
    next((tmp_path / "runs/first/samples").glob("*/samples.json")).unlink()
    with open(tmp_path / "runs/first/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert main(["report", "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert re.search(r"^error: \S+report.html is written, but 5 parts of it could not be read: The best images: .+\n"
                     r"hint: python -m jobs verify --root \S+$", said, re.MULTILINE), said
    text = Document((tmp_path / "report.html").read_text()).text
    assert "could not be read" in text
    assert "mean loss of the last tenth" in text or "The training loss over the steps" in text
    assert "36 of 36 images" in text  # the contact sheet of the other dataset


@pytest.mark.parametrize(("error", "reason"), [
    (KeyError("held_out"), "The part could not be read: one of its files has no value named &#39;held_out&#39;"),
    (TypeError("'int' object is not iterable"), "one of its files is not in the expected form (TypeError: "),
    (ValueError("shards is not sealed\nhint: shard"), "The part could not be read: shards is not sealed</p>")])
def test_a_failed_part_has_its_reason_as_text(error: Exception, reason: str, tmp_path: Path):
    def make() -> None:
        raise error

    assert reason in str(RootContents(str(tmp_path)).try_part("The part", make))


def test_unfinished_and_failed_stages_are_named(root: Path, tmp_path: Path):
    shutil.copytree(root / "datasets", tmp_path / "datasets")
    folder = tmp_path / "datasets/line/v1/embeddings"
    (folder / "manifest.json").unlink()
    (folder / "records/000001.json").unlink()
    (folder / "failures").mkdir()
    (folder / "failures/000001.json").write_text(json.dumps({"id": "000001", "error": SCRIPT, "traceback": ""}))
    page = report_page(tmp_path)
    text = Document(page).text
    assert "2 of 3, 1 failed" in text and SCRIPT in text and SCRIPT not in page
    assert "stale" in text  # the index was built from embeddings that are gone


def test_rows_are_spread_over_few_shards():
    assert spread_rows([10, 0, 10], 4) == [2, 7, 12, 17]
    assert spread_rows([], 4) == [] and spread_rows([0], 4) == []
    assert spread_rows([3], 40) == [0, 1, 2]
    many = spread_rows([1000] * 5000, 40)
    assert many == sorted(set(many)) and len(many) == 40
    assert len({row // 1000 for row in many}) <= 6


def test_templates_escape_values_but_not_rendered_parts():
    page = render("section.html", intro=SCRIPT, parts=[render("unreadable.html", name=QUOTES, reason=SCRIPT)],
                  more=HOSTILE_NAME)
    assert SCRIPT not in page and HOSTILE_NAME not in page and page.count('<p class="note">') == 2
    document = Document(page)
    assert {name for name, _ in document.tags} == {"p"}
    assert {key for _, attributes in document.tags for key in attributes} == {"class"}
    assert document.text.count(SCRIPT) == 2 and QUOTES in document.text and HOSTILE_NAME in document.text


def test_names_of_runs_and_samples_are_text(root: Path, tmp_path: Path):
    for name in ("datasets", "runs"):
        shutil.copytree(root / name, tmp_path / name)
    samples = tmp_path / "runs/first/samples"
    next(samples.iterdir()).rename(samples / HOSTILE_NAME)
    (tmp_path / "runs/first").rename(tmp_path / "runs" / HOSTILE_NAME)
    page = report_page(tmp_path)
    document = Document(page)
    assert f"runs/{HOSTILE_NAME}/samples/{HOSTILE_NAME}" in document.text
    assert HOSTILE_NAME not in page and "onerror" not in {key for _, attributes in document.tags for key in attributes}
    assert all(value.startswith("data:image/") for value in document.values("src"))


def test_a_page_explains_its_samples_once(root: Path, tmp_path: Path):
    copy = shutil.copytree(root, tmp_path / "root")
    for samples in [*copy.glob("runs/*/samples/*")][:1]:
        shutil.copytree(samples, samples.with_name("again"))
    report.write_report(str(copy), str(tmp_path / "report.html"))
    text = (tmp_path / "report.html").read_text()
    assert text.count("A row starts from the same noise in every column.") == 1
    assert text.count("guidance ") >= 2 and "again</small>" in text


def test_an_album_has_a_limited_size():
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    assert Album().image(b"no image", "broken").source is None and Album().image(None, "none").source is None
    data = io.BytesIO()
    noise.save(data, "PNG")
    album = Album(budget=5000)
    images = [album.image(data.getvalue(), "noise") for _ in range(6)]
    assert (images[0].source or "").startswith("data:image/webp") and (images[0].width, images[0].height) == (64, 64)
    assert images[-1].source is None and album.left_out == sum(image.source is None for image in images) > 0


def test_indices_with_a_search_parameter_show_their_tuning(tmp_path: Path):
    vectors = synthetic.clustered(2000, 16, clusters=200, spread=1.0)
    run_stage(Index(synthetic.vector_dataset(tmp_path, "knob", [vectors]),
                    IndexConfig(key="IVF16,SQ8", target_recall=1.0)))
    run_stage(Index(synthetic.vector_dataset(tmp_path, "none", [vectors]), IndexConfig(key="SQ8")))
    document = Document(tables.tuning(RootContents(str(tmp_path))))
    assert "knob IVF16,SQ8" in document.text and "images as queries" in document.text
    curve = Dataset.parse(str(tmp_path), "knob").manifest("index")["info"]["curve"]
    assert len(curve) > 1
    for step in curve:
        assert f"{step['parameter']}: {step['image']['10']:.3f} in " in document.text
    with pytest.raises(storage.DamagedFile, match="2 parts of it could not be read"):  # these datasets have no images
        report_page(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "The share that a larger search effort finds" in page and page.count('<figure class="tuning">') == 1


def test_a_dataset_counts_once_whatever_its_versions(tmp_path: Path, drawn_pictures: Path):
    for name in ("line@v1", "line@v2", "line@v3"):
        shards(tmp_path, name, drawn_pictures)
    shutil.rmtree(tmp_path / "datasets/line/v3/shards")  # a version that was only begun
    page = report_page(tmp_path)
    assert re.search(r"samples in 1 dataset, .* sources\s*36\s", Document(page).text) and "2 other versions" in page
    assert "line@v2" in page[page.index("<h2>Datasets</h2>"):page.index("<h2>Stages</h2>")]
    (tmp_path / "datasets/line/current.json").write_text(json.dumps({"version": "v1", "number": 1}))
    page = report_page(tmp_path)
    assert "line@v2" not in page[page.index("<h2>Datasets</h2>"):page.index("<h2>Stages</h2>")]


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_shows_the_report(root: Path, page: str, tmp_path: Path):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2400"]
    address = f"file://{root / 'report.html'}"
    subprocess.run([*command, f"--screenshot={tmp_path / 'shot.png'}", address], check=True, capture_output=True,
                   timeout=120)
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.size == (1200, 2400)
        assert len(shot.convert("RGB").getcolors(1 << 24)) > 500
        ink = shot.convert("L").point(lambda value: 255 * (value < 250)).getbbox()
    assert ink and ink[3] - ink[1] > 2000
    dumped = subprocess.run([*command, "--dump-dom", address], check=True, capture_output=True, text=True, timeout=120)
    headings = re.findall(r"<section id=[^>]*>\s*<h2>([^<]*)</h2>", dumped.stdout)
    assert tuple(headings) == HEADINGS


def test_hidden_rows_are_shown_nowhere(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A forgotten neighbor of a sample: not beside it, nor in validation, neighbor lists, contact sheets or `show`."""
    copy = Path(shutil.copytree(root, tmp_path / "root"))
    folder = next((copy / "runs/first/samples").iterdir())
    samples = json.loads((folder / "samples.json").read_text())
    row = next(entry["neighbors"][0] for entry in samples["pictures"] if entry["database"] == "line")
    grid = PngInfo()
    grid.add_text(SHOWN_ROWS, json.dumps([{"database": "line", "row": row["row"], "sha256": row["sha256"]}]))
    (copy / "runs/first/validation").mkdir()
    Image.new("RGB", (8, 8)).save(copy / "runs/first/validation/0000004.png", pnginfo=grid)
    (copy / "runs/first/validation.jsonl").write_text(json.dumps(
        {"step": 4, "validation_loss": 1.0, "validation_shuffled": 1.0, "validation_nobody": 1.0}))
    marks = [f"key {row['key']}, row {row['row']}", f"{row['key']} · "]
    before = Document(report_page(copy))
    assert all(mark in " ".join(before.values("title")) for mark in marks)
    assert "drawn in validation" in before.values("alt")
    capsys.readouterr()
    assert main(["forget", "--key", f"line/{row['key']}", "--root", str(copy)]) == 0
    assert f"  to remove it: python -m jobs rm runs/first/validation --root {copy}\n" in capsys.readouterr().out
    after = Document(report_page(copy))
    titles = " ".join(after.values("title"))
    assert not any(mark in titles for mark in marks) and "could not be read" not in after.text
    assert "drawn in validation (no image)" in after.values("aria-label")
    nearest = np.concatenate(load_neighbors(Dataset(str(copy), "train"), Dataset(str(copy), "train")))
    query = int(np.flatnonzero((nearest == row["row"]).any(1))[0])
    capsys.readouterr()
    assert main(["show", f"train/{query:010d}", "--json", "--out", str(tmp_path / "one.png"), "--root", str(copy)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert row["row"] not in [near["row"] for near in shown["neighbors"]["train"]] and shown["row"] == query
