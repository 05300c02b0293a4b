"""Every verb that makes something shows hostile names, captions and prompts without their control characters."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry, generate_latest

from jobs.cli.verbs import VERBS
from jobs.inspection.prometheus import RootMetrics
from model.weights import compvis, first_stage
from tests.laws.terminal import HOSTILE, RAW, SHOWN, check_verbs

_GOLDEN = Path(__file__).parents[1] / "model/weights/golden/compvis_small.safetensors"
_SETTINGS = """[train]
steps = 1
global_batch = 4
k = 2
precision = "fp32"
image_size = 16
[train.unet]
model_channels = 32
"""
_EVALUATE = ["--prompt", HOSTILE, "--judge-steps", "2", "--steps", "2", "--sweep-k", "1", "--sweep-guidance", "1"]
_WITHOUT_DRY_RUN = ("search", "report")
_SAMPLE = ["--database", "flat", "--steps", "2", "--k", "2", "--name"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with hostile names and captions in two styles, fewer for training, a first stage, and settings."""
    folder = tmp_path_factory.mktemp("hostile")
    colors = np.random.default_rng(0)
    for style, first in (("flat", 0), ("outline", 0), ("art", 2)):
        (folder / style).mkdir()
        names = [f"{number}\n{HOSTILE}{style}.png" for number in range(first, 6)]
        for name in names:
            Image.fromarray(colors.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / style / name)
        with open(folder / style / "captions.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file", "caption"), *((name, f"{HOSTILE}\n{name[0]}") for name in names)])
    weights = {name: tensor.float() for name, tensor in compvis.read(_GOLDEN).first_stage.items()}
    first_stage.build(compvis.first_stage_config(weights),
                      compvis.first_stage_weights(weights)).network.save_pretrained(folder / "first-stage")
    (folder / "settings.toml").write_text(_SETTINGS)
    Image.new("RGB", (16, 16), (9, 9, 9)).save(folder / f"{HOSTILE}.png")
    return folder


def _commands(place: Path) -> list[list[str]]:
    databases = ["--database", "flat", "--database", "outline"]
    styles = ("flat", "outline", "art")
    commands = [["shard", style, "--source", str(place / style), "--image-size", "16"] for style in styles]
    commands += [[verb, style] for style in styles for verb in ("embed", "index")]
    commands += [
        ["embed", "flat", "--captions"],
        ["neighbors", "art", "--database", "flat", "--k", "2"],
        ["latents", "flat", "--first-stage", str(place / "first-stage")],
        ["train", "run", "--dataset", "art", "--database", "flat", "--config", str(place / "settings.toml")],
        ["sample", "run", *_SAMPLE, "texts", "--prompt", HOSTILE],
        ["sample", "run", *_SAMPLE, "images", "--image", str(place / f"{HOSTILE}.png")],
        ["sample", "run", *_SAMPLE, "rows", "--unconditional", "1"],
        ["evaluate", "run", *databases, *_EVALUATE, "--name", "here"],
        ["evaluate", "run", *databases, *_EVALUATE, "--name", "here", "--json"],
        ["export", "run", "--out", str(place / f"out {HOSTILE}")],
        ["convert", "carried", "--checkpoint", str(place / f"out {HOSTILE}")],
        ["rebuild", "built", "--source", str(place / "flat"), "--image-size", "16"],
        ["style", "styled", "--source", str(place / "flat")],
        ["sample", HOSTILE, "--database", "flat", "--steps", "2"],
        ["pipeline", "piped", "--source", str(place / "flat"), "--image-size", "16"],
        ["search", "flat", HOSTILE], ["search", "flat", HOSTILE, "--json", "--database", "art"],
        ["forget", "--url", f"5\n{HOSTILE}flat.png"],
        ["credits", str(place / "root/runs/run/samples/texts/samples.json")],
        ["show", f"5\n{HOSTILE}flat.png", "--dataset", "flat"], ["ls"], ["ls", "flat"],
        ["init", "style", str(place / f"{HOSTILE}.toml")], ["rm", "runs/run/samples/rows", "--yes"],
        ["versions", "built"], ["repair", "built"], ["gc", "built"], ["verify"], ["status"], ["report"],
        ["plan"], ["recipes"], ["demo", "--drawn", "--dry-run"], ["submit", "--dry-run", "embed", "flat"]]
    return commands


def _refused(place: Path) -> list[list[str]]:
    """Commands whose error repeats an argument."""
    return [["embed", HOSTILE], ["embed", "flat", "--adopt", HOSTILE], ["index", "flat", "--extend", HOSTILE],
            ["neighbors", "flat", "--database", HOSTILE], ["latents", "flat", "--first-stage", HOSTILE],
            ["train", HOSTILE, "--dataset", "flat"], ["train", "run2", "--dataset", HOSTILE],
            ["sample", "run", "--prompt", "a", "--database", HOSTILE], ["sample", "run", "--image", HOSTILE],
            ["sample", HOSTILE, "--prompt", "a"], ["evaluate", "run", "--database", HOSTILE],
            ["export", HOSTILE, "--out", str(place / "o")], ["convert", "c", "--checkpoint", HOSTILE],
            ["rebuild", HOSTILE, "--source", str(place / "flat")], ["rebuild", "b", "--source", HOSTILE],
            ["style", "b", "--source", HOSTILE], ["sample", HOSTILE],
            ["shard", "w", "--source", str(place / "flat"), "--where", HOSTILE], ["rollback", "built", "--to", HOSTILE],
            ["forget", "--domain", HOSTILE], ["show", HOSTILE], ["ls", HOSTILE],
            ["rm", HOSTILE, "--yes"], ["rm", "flat", "--yes"], ["init", "demo", f"/none/{HOSTILE}"],
            ["score", "flat", "--head", HOSTILE], ["score", "flat", "--head", f"{HOSTILE}={HOSTILE}"],
            *([verb, "--config", HOSTILE] for verb in ("demo", "plan", "search", "recipes", "doctor")),
            ["submit", HOSTILE], ["submit", "--dry-run", "embed", HOSTILE], ["credits", HOSTILE], [HOSTILE]]


def _with_root(commands: list[list[str]], root: str) -> list[list[str]]:
    return [[*words, "--root", root, *([] if words[0] in {"credits", "export", "convert"} else ["--local"])]
            for words in commands]


@pytest.mark.slow
def test_verbs_print_no_control_characters_of_others(place: Path) -> None:
    root = str(place / "root")
    shown = check_verbs(_with_root(_commands(place), root))
    assert not {verb: said for verb, said in shown.items() if "EXIT 0" not in said}
    following = {line: [*shlex.split(line), *([] if line.startswith(_WITHOUT_DRY_RUN) else ["--dry-run"])]
                 for said in shown.values() for line in re.findall(r"^next: python -m jobs (.*)$", said, re.MULTILINE)}
    assert len(following) > 9 and all(f" --root {root}" in line for line in following)
    check_verbs([words for line, words in following.items() if SHOWN not in line and "samples/rows" not in line],
                expected="0")  # a command above has removed these samples
    tried = {words[0] for words in [*_commands(place), *_refused(place)]}
    assert tried - {HOSTILE} == VERBS.keys()
    refused = check_verbs(_with_root(_refused(place), root))
    assert not [words for words, said in refused.items() if "EXIT 0" in said]
    assert not RAW.search((place / "root/report.html").read_text())
    assert SHOWN in (place / "root/report.html").read_text()


def test_names_in_metrics_have_no_control_characters(place: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    stage = root / "datasets" / HOSTILE / f"v1{HOSTILE}" / "shards"
    stage.mkdir(parents=True)
    plan = {"format": 2, "stage": HOSTILE, "fingerprint": "0", "section": {}, "inputs": {}, "items": []}
    (stage / "plan.json").write_text(json.dumps(plan))
    (stage / "progress.json").write_text(json.dumps({
        "updated": 1.0, "items": 0, "of_items": 1, "rows": 0, "samples": 0, "of_rows": 3, "retried": 0, "bytes": 5,
        "rows_per_s": 1.0, "seconds_left": 3.0, "skipped": {HOSTILE: 1}, "failed_items": 0}))
    shutil.copytree(stage, root / "runs" / HOSTILE / "samples" / HOSTILE)
    shutil.copytree(stage, root / "pictures" / "\udcff")
    (root / "datasets" / HOSTILE / "current.json").write_text(json.dumps({"version": "v1", "number": 1}))
    registry = CollectorRegistry()
    registry.register(RootMetrics(str(root)))
    text = generate_latest(registry).decode()
    assert text.count("rdm_stage_items_left{") == 3 and r"\\x1b]0;owned" in text and r"\\udcff" in text
    assert not RAW.search(text)
