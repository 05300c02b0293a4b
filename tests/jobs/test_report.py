"""The report: whole on a whole root, readable on half a root, escaped and self-contained on any."""

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

from jobs import report
from jobs.report import tables
from jobs.report.curve import curve, smoothed, trade_off
from jobs.report.page import Album, size, tag
from jobs.report.pictures import spread
from jobs.report.root import Root
from jobs.runs.run import Run
from jobs.sampling.config import SampleConfig
from jobs.sampling.sample_stage import Sampling
from jobs.training.train_stage import Job, Training
from jobs.training.worker import train_in_processes
from model import recipes
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.embed import Embed, EmbedConfig
from pipeline.indices.config import IndexConfig
from pipeline.indices.index import Index
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.neighbors import Neighbors
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from tests.pipeline import made

HEADINGS = ("Samples", "The finding", "Training", "Neighbours", "Datasets", "Indices", "Stages", "Encoder and settings")
SCRIPT, QUOTES = "<script>alert(1)</script>", "\"&' onload='x"
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
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data if self.tags[-1:] and self.tags[-1][0] != "style" else ""

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.tags if attribute in attributes]


def written(root: Path) -> str:
    report.write(str(root), str(root / "report.html"))
    return (root / "report.html").read_text()


def shards(root: Path, name: str, pictures: Path) -> Dataset:
    """A dataset of drawn pictures, some with hostile captions, one undecodable, one held out."""
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
    """Everything there is: two datasets, neighbours, a run, its samples."""
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
    return written(root)


def test_everything_is_in_it(page: str):
    document = Document(page)
    assert all(f"<h2>{heading}</h2>" in page for heading in HEADINGS)
    assert all(prompt in document.text for prompt in PROMPTS)
    assert "could not be read" not in document.text and "not there" not in document.text
    assert document.text.count("held out") == 2  # the mark of one prompt, and its explanation
    assert "undecodable" in document.text or "broken" in document.text
    for words in ("recall@10", "tiny-clip-64", "DDIM steps, guidance 2", "samples/s", "loss at the end"):
        assert words in document.text
    pictures = [one for name, one in document.tags if name == "img"]
    assert sum("noise" in (one["title"] or "") for one in pictures) == len(PROMPTS) * 2
    assert all(re.search(r"key \d+, row \d+", one["title"]) or "checkpoint step 4" in one["title"] for one in pictures)
    assert len(page) < 2_000_000


def test_neighbours_are_shown_from_the_nearest_to_the_farthest_with_their_distribution(page: str, root: Path):
    part = page[page.index("<h2>Neighbours</h2>"):page.index("<h2>Datasets</h2>")]
    manifests = [json.loads(path.read_text()) for path in root.glob("datasets/*/v1/neighbors/*/manifest.json")]
    assert len(manifests) == part.count("cosine similarity of all neighbours</span>")
    for manifest in manifests:
        filled = np.flatnonzero(manifest["info"]["scores"])
        assert part.count("<rect ") >= filled[-1] - filled[0] + 1
        assert f"of {manifest['info']['rows']:,} in the database" in part
        assert f"the most used one is that of {manifest['info']['most_used']} picture" in part
    for table in part.split("<table")[1:]:
        nearest = [float(found.group(1)) for row in table.split("<tr>")[2:]
                   if (found := re.search(r"score (-?\d\.\d+)", row))]
        assert nearest == sorted(nearest, reverse=True) and len(nearest) > 2


def test_captions_prompts_and_sources_are_text(page: str):
    document = Document(page)
    assert SCRIPT not in page and "<b>pack" not in page and "<i>" not in page
    assert not any(name in {"script", "b", "i"} or attribute.startswith("on")
                   for name, attributes in document.tags for attribute in attributes)
    assert SCRIPT in document.values("alt") and "broken<i>.png" in document.text


def test_it_needs_no_other_file(page: str):
    document = Document(page)
    assert all(value.startswith("data:image/") for value in document.values("src"))
    assert all(value.startswith("#") for name, attributes in document.tags if name != "a"
               for key, value in attributes.items() if key in {"href", "srcset", "xlink:href"})
    links = set(document.values("href")) - {value for value in document.values("href") if value.startswith("#")}
    assert links == {"https://example.org/licence"}
    assert not {name for name, _ in document.tags} & {"link", "iframe", "object", "embed", "base"}
    assert "url(" not in page and "@import" not in page


def test_an_empty_root(tmp_path: Path):
    assert "Nothing is below this root yet" in Document(written(tmp_path)).text
    assert "Nothing is below this root yet" in Document(written(tmp_path / "absent")).text


def test_a_root_with_only_shards(tmp_path: Path, drawn_pictures: Path):
    shards(tmp_path, "train", drawn_pictures)
    text = Document(written(tmp_path)).text
    for words in ("No samples yet", "No curve yet", "No neighbours yet", "No index yet", "Nothing embedded yet",
                  "36 of 36 pictures"):
        assert words in text
    assert "could not be read" not in text


def test_one_damaged_part_does_not_cost_the_others(root: Path, tmp_path: Path, page: str):
    for name in ("datasets", "runs"):
        shutil.copytree(root / name, tmp_path / name)
    next((tmp_path / "datasets/train/v1/shards").glob("*.tar")).write_bytes(b"cut")
    (tmp_path / "datasets/line/v1/index/manifest.json").write_text("{")
    next((tmp_path / "runs/first/samples").glob("*/samples.json")).unlink()
    with open(tmp_path / "runs/first/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    text = Document(written(tmp_path)).text
    assert "could not be read" in text
    assert "loss at the end" in text or "The training loss over the steps" in text
    assert "36 of 36 pictures" in text  # the contact sheet of the other dataset


def test_unfinished_and_failed_stages_are_told(root: Path, tmp_path: Path):
    shutil.copytree(root / "datasets", tmp_path / "datasets")
    folder = tmp_path / "datasets/line/v1/embeddings"
    (folder / "manifest.json").unlink()
    (folder / "records/000001.json").unlink()
    (folder / "failures").mkdir()
    (folder / "failures/000001.json").write_text(json.dumps({"id": "000001", "error": SCRIPT, "traceback": ""}))
    page = written(tmp_path)
    text = Document(page).text
    assert "2 of 3, 1 failed" in text and SCRIPT in text and SCRIPT not in page
    assert "stale" in text  # the index was built from embeddings that are gone


def test_rows_are_spread_over_few_shards():
    assert spread([10, 0, 10], 4) == [2, 7, 12, 17]
    assert spread([], 4) == [] and spread([0], 4) == []
    assert spread([3], 40) == [0, 1, 2]
    many = spread([1000] * 5000, 40)
    assert many == sorted(set(many)) and len(many) == 40
    assert len({row // 1000 for row in many}) <= 6


def test_markup_escapes_unless_it_is_markup():
    made = tag("p", "<&", tag("b", "x"), None, ["'", ["y"]], title='"')
    assert made == '<p title="&quot;">&lt;&amp;<b>x</b>&#x27;y</p>'


def test_an_album_has_an_end():
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    assert "empty" in Album().picture(b"no picture", "broken") and "empty" in Album().picture(None, "none")
    data = io.BytesIO()
    noise.save(data, "PNG")
    album = Album(budget=5000)
    shown = [album.picture(data.getvalue(), "noise") for _ in range(6)]
    assert shown[0].startswith("<img") and "empty" in shown[-1] and album.left_out > 0


@pytest.mark.parametrize("losses", [[1.0], [0.0, 0.0], [2.0, 1.9, float("nan"), 1.95], [5e4, 3.0, 1e-7],
                                    [1 / (1 + step) for step in range(5000)], [-1.0, 3.0]])
def test_every_curve_lies_within_its_plot(losses: list[float]):
    drawing = curve([{"step": 10 * place, "loss": loss} for place, loss in enumerate(losses)])
    found = re.findall(r"points=\"([^\"]*)\"", drawing)
    points = [tuple(map(float, point.split(","))) for line in found for point in line.split()]
    assert points and all(-0.01 <= value <= 100.01 for point in points for value in point)


def test_a_curve_without_points_is_none():
    assert curve([]) is None and curve([{"step": 1}]) is None


@pytest.mark.parametrize("kinds", [
    {"pictures": [("nprobe=1", 0.01, 0.2), ("nprobe=2", 0.013, 0.2), ("nprobe=4", 7.0, 1.0)]},
    {"pictures": [("a", 0.5, 1.0), ("b", 0.5, 1.0)], "captions": [("a", 0.4, 0.0), ("b", 0.45, 0.01)]},
    {"pictures": [("a", 0.5, 1.0), ("b", 0.5, 1.0)]},
    {"pictures": [("a", 0.0, 0.3), ("b", 3.0, 0.99), ("c", 3.1, 0.995)]},
])
def test_a_tuning_lies_within_its_plot(kinds: dict):
    drawing = trade_off(kinds)
    points = [tuple(map(float, point.split(","))) for line in re.findall(r"points=\"([^\"]*)\"", drawing)
              for point in line.split()]
    timed = [one for points_ in kinds.values() for one in points_ if one[1] > 0]
    assert len(points) == len(timed) == drawing.count("<title>")
    assert all(-0.01 <= value <= 100.01 for point in points for value in point)
    for (x, y), (_, time, recall) in zip(points, timed, strict=True):
        assert all((time < other[1]) <= (x <= a) and (recall < other[2]) <= (y >= b)
                   for (a, b), other in zip(points, timed, strict=True))


def test_no_tuning_of_one_point():
    assert trade_off({}) is None and trade_off({"pictures": [("all", 0.3, 0.9)]}) is None


def test_indices_with_a_knob_show_their_tuning(tmp_path: Path):
    vectors = made.clustered(2000, 16, clusters=200, spread=1.0)
    run_stage(Index(made.given(tmp_path, "knob", [vectors]), IndexConfig(key="IVF16,SQ8", target_recall=1.0)))
    run_stage(Index(made.given(tmp_path, "none", [vectors]), IndexConfig(key="SQ8")))
    document = Document(tables.tuning(Root(str(tmp_path)))[0][0])
    assert "knobIVF16,SQ8" in document.text and "pictures as queries" in document.text
    curve_ = Dataset.parse(str(tmp_path), "knob").manifest("index")["info"]["curve"]
    assert len(curve_) > 1
    for step in curve_:
        assert f"{step['parameter']}: {step['image']['10']:.3f} in " in document.text
    page = written(tmp_path)
    assert "What a larger effort of search finds" in page and page.count("plot tuning") == 1


def test_smoothing_keeps_a_line_and_the_ends():
    line = [(float(x), 2.0 * x) for x in range(200)]
    assert all(made == pytest.approx(given) for made, given in zip(smoothed(line), line, strict=True))


def test_sizes():
    assert [size(value) for value in (None, 0, 999, 1000, 99_960, 123_456_789, 5e12, 6e15)] == [
        "–", "0 B", "999 B", "1.0 kB", "100 kB", "123 MB", "5.0 TB", "6.0 PB"]


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_shows_it(root: Path, page: str, tmp_path: Path):
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
    found = re.findall(r"<h2>([^<]*)</h2>", dumped.stdout)
    assert tuple(found) == HEADINGS
