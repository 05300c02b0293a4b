"""The list of recipes: every recipe is there, and its numbers are those of the networks and encoders themselves."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.cli.main import main
from jobs.cli.parse import parse_command
from jobs.config.recipes import RECIPES
from jobs.planning.recipe_table import list_recipes, recipes_table
from model.network.unet import UNet
from pipeline.embeddings.reachable import vector_length
from tests.pipeline import synthetic


def test_recipes_lists_facts_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    listed = {facts["recipe"]: facts for facts in json.loads(capsys.readouterr().out)}
    assert list(listed) == list(RECIPES)
    assert {listed[name]["image_size"] for name in ("imagenet_400m", "laion_1p3b")} == {256, 768}
    for name, facts in listed.items():
        settings = RECIPES[name]()
        assert facts["vector_length"] == vector_length(settings.embed.clip()), name
        with torch.device("meta"):
            count = sum(weight.numel() for weight in UNet(settings.train.unet).parameters())
        assert (facts["parameters"], facts["training_bytes"]) == (count, 20 * count)
        words = shlex.split(facts["command"])
        assert words[:3] == ["python", "-m", "jobs"] and parse_command(words[3:])[1].shard == replace(
            settings.shard, source=("FOLDER" if name == "style" else "SOURCE",))


def test_the_table_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "80")
    table = recipes_table(list_recipes()).split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert {"imagenet_400m", "ViT-B-32-quickgelu", "401", "GPUs"} <= set(table.split())


def test_the_table_names_every_recipe_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    for facts in list_recipes():
        assert facts.recipe in said and facts.purpose in said and facts.command in said


@pytest.mark.parametrize(("flags", "named"), [
    ([], ["trained on emoji"]), (["--train", "run"], ["trained on emoji", "a small one for a first try"]),
    (["--recipe", "tiny"], []), (["--config", "settings.toml"], [])])
def test_defaults_of_the_demo_are_named_once_for_other_sources(
        tmp_path: Path, flags: list[str], named: list[str], caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "settings.toml").write_text("[shard]\nimage_size = 32\n")
    synthetic.noise(64, 64).save(tmp_path / "images/one.png")
    assert main(["pipeline", "mine", "--source", "images", "--local", "--dry-run", *flags]) == 0
    said = caplog.text
    assert said.count("python -m jobs recipes") == bool(named) and all(part in said for part in named)
