"""`style` publishes a folder of images as `rebuild` does, and `sample` finds a model for it."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.cli.options import CommonOptions
from jobs.cli.run_stage import spare_ray
from jobs.cluster.config import ClusterConfig
from jobs.config.published_settings import choose_encoder
from jobs.runs.newest_run import find_newest_run
from jobs.runs.run import Run
from jobs.training.export import BUNDLED, BUNDLED_RUN, import_run
from pipeline.embeddings.clip_weights import ClipConfig, describe_encoder, encoder_of
from pipeline.embeddings.config import EmbedConfig
from pipeline.releases import published
from tests.jobs.publishing.published_art import paint
from tests.pipeline import synthetic

_FILES = ("*.tar", "*.parquet", "*.npy", "knn.index")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Callable[..., tuple[dict, str]]:
    """A function that runs a command, and returns its JSON document and its log."""
    def run_command(*words: str, code: int = 0) -> tuple[dict, str]:
        caplog.clear()
        assert main([*words]) == code, caplog.text
        shown = capsys.readouterr()
        return json.loads(shown.out or "{}"), caplog.text + shown.err

    return run_command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return synthetic.drawings(tmp_path / "source", subjects=12, size=300, styles=("flat",))


def test_style_is_a_rebuild_and_its_repetition_the_next_version(
        tmp_path: Path, source: Path, run: Callable[..., tuple[dict, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    report, log = run("style", "mine", "--source", str(source), "--root", first)
    assert report["published"] == "v1" and report["embedded"] == 12
    assert {"imports", "source", "shard", "embed", "index", "publish"} == report["seconds"].keys()
    assert "was trained on emoji" in log
    run("rebuild", "mine", "--source", str(source), "--root", second, "--recipe", "style", "--local")
    folder = "datasets/mine/v1"
    for pattern in _FILES:
        files = sorted(path.relative_to(first) for path in Path(first, folder).rglob(pattern))
        assert files
        assert all(Path(first, file).read_bytes() == Path(second, file).read_bytes() for file in files), pattern
    assert published.open_dataset(first, "mine").manifest("index")["info"]["key"] == "Flat"
    paint(source / "one-more.png", 1)
    again, _ = run("style", "mine", "--source", str(source), "--root", first)
    assert (again["published"], again["kept"], again["added"], again["embedded"]) == ("v2", 12, 1, 1)
    none, _ = run("style", "mine", "--source", str(source), "--root", first)
    assert none["unchanged"] and none["published"] == "v2"


@pytest.mark.slow
def test_prompts_alone_are_sampled_with_the_bundled_model(
        tmp_path: Path, source: Path, run: Callable[..., tuple[dict, str]], capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "root")
    run("style", "mine", "--source", str(source), "--root", root)
    words = ("sample", "a tree", "--database", "mine", "--steps", "2", "--root", root)
    waits, _ = run(*words, "--dry-run")
    assert waits["waits_for"].endswith("runs/emoji_32") and not Path(root, "runs").exists()
    report, log = run(*words)
    assert "'a tree' with the run emoji_32" in log
    document = json.loads(Path(report["folder"], "samples.json").read_text())
    assert [picture["prompt"] for picture in document["pictures"]] == ["a tree"]
    named, _ = run("sample", "emoji_32", "--prompt", "a tree", *words[2:])
    assert named["folder"] == report["folder"]
    _, log = run("sample", "emoji_32", "--database", "mine", "--root", root, code=2)
    assert "sample needs databases, and prompts" in log  # it is the name of a run, so it is no prompt
    _, log = run("sample", "a tree", "--root", root, code=2)
    assert "there are mine\nhint: --database mine" in log
    paint(source / "one-more.png", 1)
    run("style", "mine", "--source", str(source), "--root", root)
    keep = ("gc", "mine", "--keep", "0", "--lease", "0", "--dry-run", "--root", root)
    assert main([*keep, "--json"]) == 0
    sample = str(Path(report["folder"]).relative_to(root))
    assert main([*keep]) == 0
    first, _, table = capsys.readouterr().out.partition("v1  ")
    assert [entry.get("samples") for entry in json.loads(first)] == [[sample], None]
    assert f"; credits would be lost for {sample}\n" in table.partition("v2  ")[0]


@pytest.mark.slow
def test_the_newest_run_is_preferred_and_another_encoder_has_none(
        trained_root: Path, tmp_path: Path, run: Callable[..., tuple[dict, str]]) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained_root, root)
    newest = find_newest_run(str(root))
    assert newest and newest.name == "small" and newest == find_newest_run(str(root), describe_encoder(ClipConfig()))
    shutil.copytree(root / "runs/small", root / "runs/demo")
    newest = find_newest_run(str(root))
    assert newest and newest.name == "small"  # although the demo's is newer
    assert find_newest_run(str(root), describe_encoder(ClipConfig(pretrained="random"))) is None
    _, log = run("sample", "a tree", "--database", "flat", "--steps", "2", "--root", str(root))
    assert "with the run small" in log and "hint" not in log
    import_run(Run(str(root), BUNDLED_RUN), BUNDLED)
    for checkpoint in (root / "runs/small/checkpoints").iterdir():
        os.utime(checkpoint / "manifest.json")  # newer than the bundled model
    _, log = run("sample", "a tree", "--database", "flat", "--steps", "2", "--root", str(root))
    assert "with the run small, the newest one (step 3)" in log
    assert (f"small has only 3 steps, and emoji_32 has 12,000\nhint: python -m jobs sample emoji_32 --prompt "
            f"'a tree' --database flat --root {root}\n") in log
    shutil.rmtree(root / "runs/emoji_32")
    (root / "runs/small/manifest.json").rename(tmp_path / "manifest.json")
    checkpoint = root / "runs/small/checkpoints/0000003/checkpoint.json"
    whole = json.loads(checkpoint.read_text())
    checkpoint.write_text(json.dumps(whole | {"config": whole["config"] | {"steps": 400}}))
    _, log = run("sample", "a tree", "--database", "flat", "--steps", "2", "--root", str(root))
    assert (f"the run small is at step 3 of 400 and is not used; to use it: python -m jobs sample small "
            f"--prompt 'a tree' --database flat --root {root}\n") in log
    assert "with the run demo" in log and choose_encoder(str(root), "mine", EmbedConfig()) == EmbedConfig().clip()
    (tmp_path / "manifest.json").rename(root / "runs/small/manifest.json")
    path = root / "datasets/flat/v1/embeddings/manifest.json"
    document = json.loads(path.read_text())
    document["info"]["encoder"]["weights_sha256"] = "0"
    path.write_text(json.dumps(document))
    _, log = run("sample", "a tree", "--database", "flat", "--root", str(root), code=2)
    assert f"hint: python -m jobs train RUN --dataset flat --root {root}" in log


def test_the_encoder_is_that_of_the_newest_run(trained_root: Path) -> None:
    default = EmbedConfig()
    assert choose_encoder(str(trained_root), "mine", default) == default.clip()
    other = EmbedConfig(pretrained="random")
    assert choose_encoder(str(trained_root), "mine", other) == other.clip()
    description = describe_encoder(ClipConfig()) | {"model": "ViT-B-32", "pretrained": "openai"}
    assert encoder_of("the run small", description) == ClipConfig("ViT-B-32", "openai")
    for unknown in ({"pretrained": "file"}, {"model": "local-dir"}):
        with pytest.raises(ValueError, match="hint: --model and --pretrained"):
            encoder_of("the run small", description | unknown)


def test_ray_is_skipped_only_for_small_work_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    common, cluster = CommonOptions(), ClusterConfig()
    assert spare_ray(common, cluster, small=True).local and not spare_ray(common, cluster, small=False).local
    for named in (replace(cluster, workers=8), replace(cluster, gpus=1.0)):
        assert not spare_ray(common, named, small=True).local
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert not spare_ray(common, cluster, small=True).local


def test_a_plain_rebuild_keeps_the_settings_of_the_published_version(
        tmp_path: Path, source: Path, run: Callable[..., tuple[dict, str]]) -> None:
    place = ("--source", str(source), "--root", str(tmp_path / "root"), "--local")
    run("style", "mine", *place, "--image-size", "48", "--embed.precision", "fp32")

    def section(stage: str) -> dict:
        return published.open_dataset(str(tmp_path / "root"), "mine").manifest(stage)["section"]

    first = {stage: section(stage) for stage in ("shards", "embeddings")}
    none, log = run("rebuild", "mine", *place)
    assert none["unchanged"] and none["published"] == "v1" and none["kept"] == 12
    assert "--image-size 48 --format jpg" in log and "--embed.precision fp32" in log and "--index.key Flat" in log
    paint(source / "one-more.png", 1)
    again, _ = run("rebuild", "mine", *place)
    assert (again["published"], again["kept"], again["embedded"]) == ("v2", 12, 1)
    assert {stage: section(stage) for stage in first} == first
    paint(source / "another.png", 2)
    new, log = run("rebuild", "mine", *place, "--image-size", "32", "--retrain", "0")
    assert new["published"] == "v3" and section("shards")["image_size"] == 32 and section("shards")["format"] == "jpg"
    assert "--image-size 32 (was 48)" in log
    assert section("index")["key"] == "Flat"  # v2 was an extension of v1, whose settings do not name it
    recipe, log = run("rebuild", "mine", *place, "--recipe", "tiny", "--dry-run")
    assert recipe["added"] == 14 and "--image-size 64 (was 32)" in log and "stay" not in log
    file = tmp_path / "settings.toml"
    file.write_text("[shard]\nimage_size = 40\n")
    _, log = run("style", "mine", *place, "--config", str(file), "--dry-run")
    assert "--image-size 40 (was 32)" in log and "--embed.precision fp32" in log


def test_the_encoder_of_the_published_version_stays(source: Path, tmp_path: Path,
                                                    run: Callable[..., tuple[dict, str]]) -> None:
    place = ("--source", str(source), "--root", str(tmp_path / "root"), "--local")
    run("rebuild", "mine", *place, "--embed.pretrained", "random", "--min-recall", "0")
    paint(source / "one-more.png", 1)
    report, log = run("rebuild", "mine", *place, "--min-recall", "0", "--min-overlap", "0")
    assert report["published"] == "v2" and report["reused"] == 12 and "--embed.pretrained random" in log
