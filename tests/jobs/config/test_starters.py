"""`init` writes files that every verb accepts, and in which each setting can be changed."""

import json
import re
import shlex
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli.help import is_used
from jobs.cli.main import main
from jobs.cli.options import CommonOptions
from jobs.cli.parse import parse_command
from jobs.cli.verbs import VERBS, load_verb
from jobs.config.recipes import RECIPES
from jobs.config.settings import Settings
from jobs.config.starters import STARTERS
from jobs.config.toml import resolve_settings
from tests.pipeline import synthetic

_WITH_SETTINGS = [verb for verb in VERBS if is_used(verb, CommonOptions, "config")]
_READ_OTHER_STAGES = {"latents", "train", "sample"}


@pytest.fixture(params=STARTERS)
def file(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "a file.toml"
    assert main(["init", request.param, str(path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["purpose"] == request.param and shlex.split(printed["next"])[-1] == str(path)
    return path


def test_a_starter_file_sets_the_values_that_it_shows(file: Path) -> None:
    text = file.read_text()
    starter = next(starter for starter in STARTERS.values() if f"# {starter.summary.split('.')[0]}" in text)
    settings = resolve_settings("", str(file))
    document = tomllib.loads(text)
    for path, value in starter.settings.items():
        part, inner = document, settings
        for name in path.split("."):
            part, inner = part[name], getattr(inner, name)
        assert part == value and inner == value, path
    recipe = RECIPES[starter.recipe]()
    # The recipe of a style has the values of its purpose already.
    assert (asdict(settings) == asdict(recipe)) is (starter == STARTERS["style"])
    others = [name for name in Settings.__dataclass_fields__ if name not in starter.sections]
    assert replace(settings, **{name: getattr(recipe, name) for name in starter.sections}) == recipe, others


def test_every_commented_setting_has_its_default_value(file: Path) -> None:
    text = file.read_text()
    file.write_text(re.sub(r"^#(?=\w+ = )", "", text, flags=re.MULTILINE))
    assert file.read_text().count("\n") == text.count("\n") and file.read_text() != text
    changed = resolve_settings("", str(file))
    file.write_text(text)
    assert changed == resolve_settings("", str(file))
    assert text.count("\n# ") > 100
    assert all(len(line) <= 102 for line in text.splitlines() if re.match("# (?! )", line))


def test_every_verb_accepts_the_file(file: Path) -> None:
    for verb in _WITH_SETTINGS:
        words = shlex.split(load_verb(verb)[0].examples[0])  # type: ignore[attr-defined]
        words = words[:words.index("--recipe")] if "--recipe" in words else words
        _, options = parse_command([*words, "--config", str(file)])
        assert options.common.config == str(file)


def test_the_commands_of_a_file_can_be_parsed(file: Path) -> None:
    commands = re.findall(r"^#   python -m jobs (.*)$", file.read_text(), re.MULTILINE)
    assert commands
    for command in commands:
        parse_command(shlex.split(command))


def test_the_commands_of_a_file_accept_it_as_it_is(
        file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Only the encoder is replaced, for its weights would be downloaded, and the number of GPUs of this machine."""
    source = synthetic.drawings(tmp_path / "source", subjects=2, styles=("flat",))
    urls = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": ["https://example.org/1.jpg"], "caption": ["a tree"]}), urls)
    here = {"FOLDER": str(source), "s3://lists/*.parquet": str(urls)}
    for command in re.findall(r"^#   python -m jobs (.*)$", file.read_text(), re.MULTILINE):
        words = [here.get(word, "mine" if word == "NAME" else word) for word in shlex.split(command)]
        if words[0] in _READ_OTHER_STAGES:  # the commands before them make what they read
            continue
        words += ["--root", str(tmp_path / "root"), "--dry-run"]
        if words[0] in {"pipeline", "rebuild"}:
            words += ["--embed.model", "tiny-clip-64", "--embed.pretrained", "bundled", "--gpus", "0"]
        assert main(words) == 0, f"{words}: {caplog.text}{capsys.readouterr().err}"


def test_no_file_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text("own")
    assert main(["init", "demo", str(tmp_path / "mine.toml")]) == 2
    assert "init overwrites no file\nhint: " in capsys.readouterr().err
    assert (tmp_path / "mine.toml").read_text() == "own"
    assert main(["init", "demo", str(tmp_path / "none/x.toml")]) == 2
    assert "hint: mkdir -p " in capsys.readouterr().err
