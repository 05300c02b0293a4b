"""Checks before work: they list all that would fail later together, and refuse nothing that would work."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.checks import machine
from jobs.checks.check import Check, run_checks
from jobs.cli.main import main
from jobs.publishing.consumers import list_encoders
from jobs.runs.metrics import never_made_a_step
from jobs.runs.run import Run
from tests.pipeline import synthetic

_SMALL = ["--global-batch", "4", "--steps", "2", "--model-channels", "32", "--precision", "fp32", "--k", "2"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Images of three shapes."""
    (tmp_path / "images").mkdir()
    for number, size in enumerate(((64, 64), (96, 64), (80, 96))):
        synthetic.noise(*size, seed=number).save(tmp_path / f"images/{number}.png")
    return tmp_path / "images"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def _pipeline(source: Path, *more: str) -> list[str]:
    return ["pipeline", "mine", "--source", str(source), "--local", "--root", str(source.parent / "root"), *more]


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_all_failures_are_listed_together_before_anything_is_written(
        source: Path, dry_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(source.parent)
    assert main(_pipeline(source, "--resize", "keep_ratio", "--train", "run", "--database", "absent", "--neighbors.k",
                          "2", "--train.unet.context-dim", "512", "--train.unet.in-channels", "16", "--gpus", "2",
                          *dry_run)) == 2
    said = capsys.readouterr().err
    assert re.search(r"error: [78] checks failed, and nothing was started", said)
    for sentence in ("different sizes: expected one size for training, got 64 x 64, 96 x 64, 64 x 77",
                     "there is no dataset absent in ", "expected 3 channels for images, got 16",
                     "expected 512 numbers, got 256", "expected at least 4 (train.k), got 2 (neighbors.k)",
                     "--gpus 2: a worker of embed computes on 1 GPU"):
        assert said.count(sentence) == 1, (sentence, said)
    assert said.count("hint: ") >= 7 and "Traceback" not in said and _files(source.parent) == before


@pytest.mark.parametrize(("flags", "refused"), [
    (["--resize", "keep_ratio"], True), (["--resize", "border"], False), (["--resize", "no"], True),
    (["--image-size", "60"], True), (["--only-if-bigger", "--image-size", "80"], True),
    (["--only-if-bigger", "--resize", "border"], False)])
def test_images_that_do_not_fit_the_network_are_refused(source: Path, flags: list[str], refused: bool) -> None:
    assert main(_pipeline(source, *flags, "--train", "run", "--dry-run")) == (2 if refused else 0)
    assert main(_pipeline(source, *flags, "--dry-run")) == 0  # without training they may have any size


def test_images_of_one_shape_may_keep_it(source: Path) -> None:
    for name in ("1.png", "2.png"):
        (source / name).unlink()
    assert main(_pipeline(source, "--resize", "keep_ratio", "--train", "run", "--dry-run")) == 0


def test_images_of_several_shapes_in_shards_are_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(source.parent / "root"), "--local"]
    assert main(["shard", "mine", "--source", str(source), "--resize", "keep_ratio", "--image-size", "64", *root]) == 0
    assert main(["train", "run", "--dataset", "mine", *root]) == 2
    assert "the images of mine have different sizes" in capsys.readouterr().err
    assert not (source.parent / "root/runs").exists()


@pytest.mark.parametrize(("flags", "warned"), [(["--recipe", "tiny"], True), (["--image-size", "32"], False),
                                               (["--model-channels", "32"], False)])
def test_images_that_are_larger_than_those_of_the_small_network_are_named(
        prepared_root: Path, flags: list[str], warned: bool, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    """A style database has images of 256 pixels. `train` without a recipe has a network for 64."""
    monkeypatch.setattr("jobs.checks.demo_defaults.stored_sizes", lambda dataset: iter([(256, 256)]))
    train = ["train", "run", "--dataset", "drawn", "--root", str(prepared_root), "--local", "--dry-run"]
    assert main([*train, *flags]) == 0
    sentence = ("256 x 256 pixels, and this small network is meant for 64 x 64: a step takes about 16 times as long\n"
                "hint: --image-size 64")
    assert (sentence in caplog.text) == warned


def test_a_taken_run_name_is_refused_and_one_that_made_no_step_is_free(
        prepared_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    shutil.copytree(prepared_root, root)
    train = ["train", "run", "--dataset", "drawn", "--root", str(root), "--local", *_SMALL]
    assert main(train) == 0
    pipeline = ["pipeline", "drawn", "--source", str(tmp_path), "--train", "run", "--root", str(root), "--local"]
    assert main([*pipeline, "--dry-run"]) == 2
    assert "the run name run is taken" in capsys.readouterr().err
    assert main([*train, "--lr", "0.5"]) == 2  # it has a checkpoint
    for name in ("checkpoints", "records"):
        shutil.rmtree(root / "runs/run" / name)
    for name in ("metrics.jsonl", "manifest.json"):
        (root / "runs/run" / name).unlink()
    assert never_made_a_step(Run(str(root), "run")) and list_encoders(str(root), "drawn") == {}
    assert main([*pipeline, "--dry-run"]) != 0
    assert "is taken" not in capsys.readouterr().err
    assert main([*train, "--lr", "0.0005", "--dry-run"]) == 0
    assert main([*train, "--lr", "0.0005"]) == 0
    assert json.loads((root / "runs/run/plan.json").read_text())["section"]["train"]["lr"] == 0.0005
    assert list(list_encoders(str(root), "drawn")) == ["the run run"]


def test_a_database_of_another_encoder_is_refused(prepared_root: Path, source: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = ["pipeline", "mine", "--source", str(source), "--database", "drawn", "--root", str(prepared_root),
                "--local", "--dry-run"]
    assert main(pipeline) == 0
    assert main([*pipeline, "--embed.model", "ViT-B-32", "--embed.pretrained", "random"]) == 2
    said = capsys.readouterr().err
    assert "drawn was made with another encoder" in said and "expected tiny-clip-64 (bundled), got ViT-B-32" in said


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--embed.model", "ViT-B-33", "--embed.pretrained", "openai"], "open_clip knows no model 'ViT-B-33'"),
    (["--embed.model", "ViT-B-32", "--embed.pretrained", "opnai"], "hint: --embed.pretrained openai"),
    (["--embed.model", "local-dir:/absent"], "local-dir:/absent cannot be read")])
@pytest.mark.parametrize("verb", ["pipeline", "rebuild"])
def test_an_encoder_that_cannot_be_loaded_is_refused(source: Path, verb: str, flags: list[str], sentence: str,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, *_pipeline(source)[1:], *flags]) == 2
    said = capsys.readouterr().err
    assert said.count(sentence) == 1 and not (source.parent / "root").exists()


def test_a_full_disk_is_refused_and_a_nearly_full_one_is_not(
        source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for free, code in ((100, 1), (1 << 40, 0)):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert main(_pipeline(source, "--dry-run")) == code
    assert re.search(r"too little room: expected about [\d.]+ kB, got 100 B free", capsys.readouterr().err)


def test_a_network_that_does_not_fit_the_memory_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1 << 20)
    assert main(_pipeline(source, "--train", "run", "--dry-run")) == 1
    assert "the network does not fit the memory" in capsys.readouterr().err


def test_the_memory_limit_is_at_most_that_of_the_machine() -> None:
    assert 1 << 28 < machine.memory_bytes() < 1 << 50


def test_a_missing_gpu_is_refused_before_the_first_stage(source: Path) -> None:
    assert main(_pipeline(source, "--gpus", "1")) == 1
    assert not (source.parent / "root").exists()


def test_a_bucket_that_does_not_exist_is_refused(source: Path, s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = ["pipeline", "mine", "--source", str(source), "--local", "--dry-run", "--root"]
    assert main([*pipeline, "s3://no-such-bucket-here/root"]) == 2
    assert "there is no such bucket" in capsys.readouterr().err
    assert main([*pipeline, f"{s3}/root"]) == 0


@pytest.mark.parametrize(("words", "sentence"), [
    (["pipeline", "mine", "--source", "/nodes/images", "--train", "r", "--neighbors.k", "2"], "got 2 (neighbors.k)"),
    (["train", "r", "--dataset", "mine", "--in-channels", "16"], "expected 3 channels for images, got 16"),
    (["rebuild", "mine", "--source", "/nodes/images", "--gpus", "2"], "a worker of embed computes on 1 GPU")])
def test_submit_refuses_what_the_job_would_refuse(words: list[str], sentence: str,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--root", "/nodes/root"]
    assert main(["submit", "--dry-run", *words, *at]) == 2
    assert sentence in capsys.readouterr().err
    assert main(["submit", "--dry-run", *words[:-2], *at]) == 0  # files of the nodes need not be here


def test_one_failure_keeps_its_kind_and_equal_failures_count_once() -> None:
    def fail() -> None:
        raise FileNotFoundError("no place\nhint: a place")

    with pytest.raises(FileNotFoundError):
        run_checks([Check("one", fail), Check("two", fail), Check("three", lambda: None)])
    run_checks([])
