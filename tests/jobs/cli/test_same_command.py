"""The same command of `pipeline` continues after other verbs have worked on the dataset."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.cli.main import main
from pipeline import storage

_TRAIN = """[train]
steps = 3
global_batch = 8
precision = "fp32"
image_size = 16
[train.unet]
model_channels = 32
"""
Run = Callable[..., int]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, drawn_pictures: Path) -> tuple[Run, Run, Path]:
    """Runs a verb; runs a pipeline that trains; and the root of both."""
    folder = tmp_path_factory.mktemp("again")
    (folder / "settings.toml").write_text(_TRAIN)

    def run(*words: str) -> int:
        return main([*words, "--root", str(folder / "root"), "--local", "--config", str(folder / "settings.toml")])

    def pipeline(*more: str) -> int:
        return run("pipeline", "a", "--source", str(drawn_pictures / "flat"), "--image-size", "16", "--train", "r",
                   *more)

    return run, pipeline, folder / "root"


def test_the_same_pipeline_continues_after_other_verbs(place: tuple[Run, Run, Path],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    run, pipeline, root = place
    assert run("shard", "a", "--source", str(root.parent / "none")) == 2  # a failure claims nothing
    assert pipeline("--train.lr", "1e30") == 1  # the loss is not finite
    assert pipeline() == 0
    sealed = storage.read_json(str(root / "runs/r/manifest.json"))
    (root.parent / "again_head.py").write_text("def score(shard):\n    return shard.vectors[:, 0]\n")
    monkeypatch.syspath_prepend(root.parent)
    (root.parent / "keys.txt").write_text("0000000005\n")
    local = ["--root", str(root), "--local"]
    for words in (["embed", "a", "--captions", *local], ["score", "a", "--head", "first=again_head:score", *local],
                  ["index", "a", "--tombstone", str(root.parent / "keys.txt"), *local],
                  ["ls", "a", *local[:2]], ["report", *local[:2]],
                  *(["forget", "--key", f"a/000000000{number}", *local[:2]] for number in range(2))):
        assert main(words) == 0
        assert pipeline() == 0, words
    assert storage.read_json(str(root / "runs/r/manifest.json")) == sealed


def test_another_key_is_refused_by_name_and_the_hint_works(place: tuple[Run, Run, Path],
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    run, pipeline, _ = place
    assert run("index", "a", "--key", "SQ8") == 2
    assert "(section.key: there \"\", now \"SQ8\")" in capsys.readouterr().err
    assert run("index", "a", "--key", "SQ8", "--overwrite") == 0
    capsys.readouterr()
    assert pipeline() == 2
    assert "(section.key: there \"SQ8\", now \"\")" in capsys.readouterr().err
    assert pipeline("--index.key", "SQ8") == 2  # the lists of neighbors are of the index before


@pytest.mark.parametrize("verb", ["embed", "pipeline", "rebuild"])
def test_a_source_that_is_not_the_demo_gets_one_line_on_the_encoder(
        verb: str, tmp_path: Path, drawn_pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = ["--source", str(drawn_pictures / "flat"), "--image-size", "16"]
    root = ["--root", str(tmp_path / "root"), "--local"]
    if verb == "embed":
        assert main(["shard", "a", *source, *root]) == 0
        source = []
    with caplog.at_level(logging.WARNING):
        assert main([verb, "a", *source, *root, "--dry-run"]) == 0
    lines = [line for line in caplog.messages if "the defaults are for the demo" in line]
    assert len(lines) == 1
    named = re.search(r"--recipe tiny", lines[0])
    assert named
    caplog.clear()
    assert main([verb, "a", *source, *root, *named[0].split()]) == 0
    assert "the defaults are for the demo" not in caplog.text


def test_a_pipeline_with_a_run_names_the_settings_of_the_demo_once(tmp_path: Path, drawn_pictures: Path,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    words = ["pipeline", "a", "--source", str(drawn_pictures / "flat"), "--image-size", "16", "--neighbors.k", "2",
             "--train", "r", "--train.k", "2", "--train.steps", "1", "--root", str(tmp_path / "root"), "--local"]
    with caplog.at_level(logging.WARNING):
        assert main(words) == 0
    lines = [line for line in caplog.messages if "the defaults are for the demo" in line]
    assert len(lines) == 1 and "the network is a small one" in lines[0]
