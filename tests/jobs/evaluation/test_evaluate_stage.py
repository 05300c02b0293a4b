"""`evaluate` measures whether the style follows the database, with generated images of held-out subjects."""

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.cli.main import main
from jobs.evaluation import summary
from jobs.evaluation.evaluation_data import evaluation_data
from jobs.evaluation.held_out import held_out_captions, rows_with_captions
from jobs.evaluation.judge_stage import StyleClassifierStage
from jobs.runs.run import Run
from jobs.training.export import BUNDLED, BUNDLED_RUN, import_run
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.indices.config import IndexConfig
from pipeline.indices.index import Index
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages import progress
from pipeline.stages.driver import run_stage

STYLES = ("flat", "hatched", "outline")
FEW = ["--prompts", "2", "--judge-steps", "80", "--steps", "3", "--sweep-k", "1", "--sweep-guidance", "1.5",
       "--sweep-prompts", "1"]


@pytest.fixture(scope="module")
def judged_root(trained_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with trained judges and one small evaluation, `few`."""
    root = shutil.copytree(trained_root, tmp_path_factory.mktemp("judged") / "root")
    assert _evaluate(root, "--name", "few", "--ways", "database", "--sweep-k", "--sweep-guidance") == 0
    return root


@pytest.fixture
def root(judged_root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(judged_root, tmp_path / "root")


@pytest.fixture
def unjudged_root(trained_root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained_root, tmp_path / "root")


def _evaluate(root: Path, *flags: str, databases: Sequence[str] = STYLES) -> int:
    database_flags = [word for name in databases for word in ("--database", name)]
    return main(["evaluate", "small", *database_flags, "--root", str(root), "--local", *FEW, *flags])


def test_held_out_subjects_are_those_that_training_does_not_have(trained_root: Path, drawn_pictures: Path) -> None:
    train = Dataset.parse(str(trained_root), "drawn")
    held_out = held_out_captions(train, [Dataset.parse(str(trained_root), style) for style in STYLES])
    listed_lines = (drawn_pictures / "heldout.csv").read_text().splitlines()[1:]
    assert set(held_out) == {line.split(",")[1] for line in listed_lines} != set()
    rows = rows_with_captions(Dataset.parse(str(trained_root), "flat"), frozenset(held_out))
    assert len(rows) == len(held_out)


def test_databases_that_no_judge_can_test_are_left_out(unjudged_root: Path, drawn_pictures: Path,
                                                       caplog: pytest.LogCaptureFixture,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    own, root = Dataset.parse(str(unjudged_root), "own"), str(unjudged_root)
    for stage in (Shard(own, ShardConfig(source=str(drawn_pictures / "flat"), image_size=32, format="png")),
                  Embed(own, EmbedConfig()), Index(own, IndexConfig(key="Flat"))):  # without captions
        run_stage(stage)
    _, _, databases, unfit = evaluation_data(Run.parse(root, "small"))
    assert [database.name for database in databases] == list(STYLES)
    assert [(database.name, reason.partition(" needs")[0]) for database, reason in unfit] == [("own", "a judge")]
    assert _evaluate(unjudged_root, "--dry-run", databases=()) == 0
    assert "evaluate: own is left out: a judge needs images" in caplog.text
    assert _evaluate(unjudged_root, databases=("flat", "own", "outline")) == 2
    said = capsys.readouterr().err
    assert "own cannot be evaluated with the others" in said and "with both: flat, outline; or" in said
    assert not (unjudged_root / "runs/small/judges").exists()


def test_the_bundled_model_needs_the_datasets_of_the_demo(unjudged_root: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    import_run(Run.parse(str(unjudged_root), BUNDLED_RUN), BUNDLED)
    assert main(["evaluate", BUNDLED_RUN, "--root", str(unjudged_root), "--local"]) == 2
    said = capsys.readouterr().err
    assert f"the run {BUNDLED_RUN} was trained with train: not in " in said
    assert "bundled model: python -m jobs demo" in said


def test_a_judge_that_is_hardly_better_than_chance_is_named() -> None:
    styles = [{"database": "flat", "judge": 0.5, "probe": 1.0}, {"database": "line", "judge": 0.48, "probe": 0.0}]
    document = {"styles": ["flat", "line"], "real": {"judge": 0.498, "probe": 0.9, "styles": styles}}
    assert summary.describe_weak_judges(document) == [
        "The judge is right for 49.8 % of the real images, which is hardly more than chance: its figures mean nothing. "
        "--judge-steps trains it longer.",
        "The probe is hardly better than chance on the real images of line. Its figures for them mean nothing, and the "
        "means of all styles little. To leave them out, name the other databases."]


def test_everything_is_measured_and_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "runs/small/evaluations/few")
    assert _evaluate(root, "--name", "here") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in summary.NAMES.values()) and "k = 1" in table and "guidance = 1.5" in table
    folder = root / "runs/small/evaluations/here"
    document = json.loads((folder / "evaluation.json").read_text())
    assert document["styles"] == list(STYLES) and document["step"] == 3
    rows = {row["way"]: row for row in document["ways"]}
    for way in ("database", "prompt", "both", "text", "k-1", "guidance-1.5"):
        correct = []
        for number, style in enumerate(STYLES):
            style_scores = json.loads((folder / f"{way}-{style}.json").read_text())
            assert style_scores["style"] == number
            assert np.shape(style_scores["judge"]) == (len(style_scores["prompts"]), 2)
            correct.append(np.array(style_scores["judge"]) == number)
            sheet = np.asarray(Image.open(io.BytesIO((folder / f"{way}-{style}.png").read_bytes())))
            assert sheet.shape == (32, 16 * len(style_scores["prompts"]), 3)
        assert rows[way]["judge"]["mean"] == pytest.approx(np.mean(correct), abs=1e-4)
        assert rows[way]["judge"]["low"] <= rows[way]["judge"]["mean"] <= rows[way]["judge"]["high"]
        assert sum(rows[way]["styles"][0]["taken_for"].values()) == pytest.approx(1, abs=1e-3)
    assert sum(rows["neither"]["seen"].values()) == pytest.approx(1, abs=1e-3)
    # Judges of styles that differ so much are good after a few steps, on subjects that they have not seen.
    assert document["real"]["judge"] > 0.6 and document["real"]["probe"] > 0.6
    assert {path.name for path in folder.glob("grid-*.png")} == {
        f"grid-{way}.png" for way in ("database", "prompt", "both", "text")}
    assert Image.open(folder / "plot.png").width > 1000
    assert main(["verify", "--root", str(root)]) == 0
    assert main(["status", "--root", str(root)]) == 0
    assert "runs/small/evaluations/here" in capsys.readouterr().out
    assert main(["report", "--root", str(root)]) == 0
    page = (root / "report.html").read_text()
    part = page.partition("<h2>The finding</h2>")[2].partition("<h2>")[0]
    assert all(name in part for name in summary.NAMES.values()) and part.count("data:image/webp") == 3


def test_neighbors_have_the_style_and_not_the_subject(root: Path) -> None:
    assert _evaluate(root, "--name", "without") == 0 and _evaluate(root, "--name", "with", "--seen") == 0
    unseen = frozenset(held_out_captions(Dataset.parse(str(root), "drawn"),
                                [Dataset.parse(str(root), style) for style in STYLES]))
    unseen_neighbors = 0
    for style in STYLES:
        unseen_rows = set(rows_with_captions(Dataset.parse(str(root), style), unseen).tolist())
        for name in ("without", "with"):
            document = json.loads((root / f"runs/small/evaluations/{name}/database-{style}.json").read_text())
            neighbor_rows = {row for rows in document["neighbors"] for row in rows}
            assert -1 not in neighbor_rows
            if name == "without":
                assert not neighbor_rows & unseen_rows
            unseen_neighbors += len(neighbor_rows & unseen_rows)
        text = json.loads((root / f"runs/small/evaluations/without/text-{style}.json").read_text())
        assert text["neighbors"] == [[], []]
    assert unseen_neighbors


def test_samples_by_neighbors_alone_ignore_the_text(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _evaluate(root, "--name", "alone", "--no-text") == 0
    document = json.loads((root / "runs/small/evaluations/alone/evaluation.json").read_text())
    assert "text" not in {row["way"] for row in document["ways"]}
    assert _evaluate(root, "--name", "nothing", "--no-text", "--sweep-k", "1") == 0
    with contextlib.suppress(SystemExit):
        assert _evaluate(root, "--no-text", "--k", "0") == 2
    assert "sample.k = 0: must be at least 1 with sample.text = False" in " ".join(capsys.readouterr().err.split())


def test_only_the_requested_ways_are_generated(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "runs/small/evaluations/few"
    assert [row["way"] for row in json.loads((folder / "evaluation.json").read_text())["ways"]] == ["database"]
    assert [path.name for path in folder.glob("grid-*.png")] == ["grid-database.png"]
    assert main(["report", "--root", str(root)]) == 0
    page = (root / "report.html").read_text()
    part = page.partition("<h2>The finding</h2>")[2].partition("<h2>")[0]
    assert "databases swapped" in part and "the prompt names the style" not in part
    capsys.readouterr()
    assert _evaluate(root, "--ways", "text", "--no-text", "--sweep-k", "--sweep-guidance") == 2
    assert "no way and no sweep is requested" in capsys.readouterr().err


@pytest.mark.slow
def test_the_result_depends_on_neither_workers_nor_repetition(root: Path, cluster) -> None:
    assert _evaluate(root, "--name", "one") == 0
    ray = ["evaluate", "small", *[word for name in STYLES for word in ("--database", name)], "--root", str(root), *FEW]
    assert main([*ray, "--name", "two"]) == 0
    manifests = [json.loads((root / f"runs/small/evaluations/{name}/manifest.json").read_text())
                 for name in ("one", "two")]
    assert manifests[0]["content"] == manifests[1]["content"]
    before = (root / "runs/small/evaluations/one/manifest.json").stat().st_mtime_ns
    assert _evaluate(root, "--name", "one") == 0
    assert (root / "runs/small/evaluations/one/manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(("flags", "databases", "message"), [
    ((), ("flat",), "two databases"),
    (("--template", "a {prompt}"), STYLES, "{style}"),
    (("--words", "flat"), STYLES, "DATABASE=WORDS"),
    (("--prompts", "0"), STYLES, "at least 1"),
    (("--ways", "prompts"), STYLES, "evaluate.ways = 'prompts': must be some of database, prompt"),
    (("--checkpoint", "7"), STYLES, "7"),
    ((), ("flat", "nowhere"), "nowhere"),
])
def test_impossible_evaluations_are_refused_before_judges_are_trained(
        unjudged_root: Path, capsys: pytest.CaptureFixture[str], flags: Sequence[str], databases: Sequence[str],
        message: str) -> None:
    with contextlib.suppress(SystemExit):  # flags that are wrong by themselves end in the parser
        assert _evaluate(unjudged_root, *flags, databases=databases) == 2
    assert message in capsys.readouterr().err
    assert not (unjudged_root / "runs/small/judges").exists()


def test_a_database_without_unseen_subjects_needs_prompts(unjudged_root: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    # A second copy of what training has seen, twice over.
    for name in ("one", "two"):
        shutil.copytree(unjudged_root / "datasets/drawn", unjudged_root / f"datasets/{name}")
    assert _evaluate(unjudged_root, databases=("one", "two")) == 2
    assert "--prompt" in capsys.readouterr().err
    assert not (unjudged_root / "runs/small/judges").exists()


def test_an_interval_covers_prompts_and_not_images() -> None:
    rng = np.random.default_rng(0)
    by_prompt = np.repeat(rng.integers(2, size=(100, 1)), 50, 1).astype(float)  # all images of a prompt alike
    wide = summary.interval(by_prompt)
    narrow = summary.interval(rng.integers(2, size=(100, 50)).astype(float))
    assert 0.15 < wide["high"] - wide["low"] < 0.25
    assert narrow["high"] - narrow["low"] < 0.05


def test_a_lost_takedown_list_is_refused_before_judges_are_trained(
        unjudged_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forget", "--url", "http://example.org/a.png", "--root", str(unjudged_root)]) == 0
    (unjudged_root / "forgotten.json").unlink()
    assert _evaluate(unjudged_root) == 1
    assert "forgotten.json is missing or was replaced" in capsys.readouterr().err
    assert not (unjudged_root / "runs/small/judges").exists()


def test_a_judge_does_not_learn_hidden_images_and_reports_its_steps(
        unjudged_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, flat = str(unjudged_root), Dataset.parse(str(unjudged_root), "flat")
    record = flat.manifest("shards")["items"][0]
    (tmp_path / "keys").write_text(f"{metadata(flat, record, ['key'])[5]['key']}\n")
    assert main(["index", "flat", "--tombstone", str(tmp_path / "keys"), "--root", root, "--local"]) == 0
    run = Run.parse(root, "small")
    dataset, _, databases, _ = evaluation_data(run, STYLES)
    reported: list[tuple[int, int]] = []
    monkeypatch.setattr(progress, "period", lambda folder: 0.0)

    def watch(tally: progress.Tally) -> None:
        reported.append((tally.now["rows"], tally.now["of_rows"]))

    info = run_stage(StyleClassifierStage(run, dataset, databases, steps=2), watch=watch)["info"]
    assert {(64, 128), (128, 128)} <= {*reported}  # each step sees 64 images
    assert "rows" not in info
    rows = sum(record["samples"] for record in flat.manifest("shards")["items"])
    assert [style["seen"] + style["held_out"] for style in info["styles"]] == [rows - 1, rows, rows]
