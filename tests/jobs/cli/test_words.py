"""A flag of several values may be repeated, and a path is not empty."""

from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.cli.parse import parse_command
from jobs.cli.verbs import VERBS, load_verb
from jobs.cli.words import join_repeated


@pytest.mark.parametrize("words", [
    ["--source", "a", "--source", "b", "mine"], ["mine", "--source=a", "--source=b"], ["mine", "--source", "a", "b"],
    ["mine", "--source", "a", "--image-size", "32", "--source", "b"],
    ["--source", "a", "--image-size", "32", "--source=b", "mine"]])
def test_a_repeated_source_adds_to_the_first(words: list[str]) -> None:
    for verb in ("shard", "style", "rebuild"):
        _, options = parse_command([verb, *words])
        assert (options.dataset, options.shard.source) == ("mine", ("a", "b")), verb


def test_flags_of_one_value_and_of_other_verbs_stay_as_they_are() -> None:
    for words in (["--root", "a", "--root", "b"], ["--workers", "1", "x"], ["--", "--source", "a", "--source", "b"]):
        assert join_repeated(load_verb("shard")[0], words) == words
    images = ["--image", "a", "--image", "b"]
    assert join_repeated(load_verb("search")[0], images) == images
    guidance = ["--sweep-guidance", "-1", "2", "--sweep-guidance", "-inf"]
    assert join_repeated(load_verb("evaluate")[0], guidance) == ["--sweep-guidance", "-1", "2", "-inf"]


@pytest.mark.parametrize("words", [
    ["shard", "mine", "--source", ""], ["style", "mine", "--source="], ["rebuild", "mine", "--source", "a", ""],
    ["convert", "run", "--checkpoint", ""], ["export", "run", "--out", ""], ["sample", "--image", ""],
    ["embed", "mine", "--adopt", ""], ["submit", "shard", "mine", "--source", ""]])
def test_an_empty_path_is_refused(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "names nothing: expected a path, got an empty word\nhint: --" in said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"init", "recipes"}))
def test_an_empty_root_is_refused(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--root", ""]) == 2
    assert "--root '' names nothing" in capsys.readouterr().err
