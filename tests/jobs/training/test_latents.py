"""Latents of a first stage, training on them, and runs made of released checkpoints."""

import io
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.cli.main import main
from jobs.config.recipes import tiny
from jobs.runs.metrics import read_metrics
from jobs.runs.run import Run
from jobs.sampling.config import SampleConfig
from jobs.sampling.generator import ImageGenerator
from jobs.training import latents
from jobs.training.config import LatentsConfig
from jobs.training.train_stage import Job, Training
from jobs.training.validation import Validation
from jobs.training.worker import train_in_processes
from model.config import UNetConfig
from model.network.unet import UNet
from model.weights import checkpoint, compvis, first_stage
from pipeline.batches.batches import Batches
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.hardware import devices
from pipeline.media import tars
from pipeline.media.resize import decode_pixels
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from tests.model.weights import golden_first_stage
from tests.model.weights.golden_first_stage import GOLDEN

SMALL = UNetConfig(in_channels=16, out_channels=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                   attention_downsampling=(1, 2), context_dim=256)


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small KL first stage of the golden weights, as diffusers keeps it; it names no factor."""
    folder = tmp_path_factory.mktemp("first-stage")
    golden_first_stage.save(folder)
    return folder


@pytest.fixture
def root(prepared_root: Path, tmp_path: Path) -> Path:
    """A copy of the prepared root."""
    shutil.copytree(prepared_root, tmp_path / "root")
    return tmp_path / "root"


def _edit(path: Path, name: str, value: object) -> None:
    document = json.loads(path.read_text())
    document[name] = value
    path.write_text(json.dumps({key: setting for key, setting in document.items() if setting is not None}))


def _write_checkpoint(path: Path, unet: UNetConfig = SMALL) -> Path:
    """A checkpoint under the names of the release, with random weights and the golden first stage."""
    torch.manual_seed(0)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in UNet(unet).state_dict().items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in compvis.read(GOLDEN).first_stage.items()}
    state["betas"] = (torch.linspace(0.0015**0.5, 0.015**0.5, 1000, dtype=torch.float64) ** 2).float()
    state["scale_factor"] = torch.tensor(0.5)
    torch.save({"state_dict": state, "global_step": 1234}, path)
    return path


def test_a_row_of_the_latents_is_its_image_encoded_and_scaled(root: Path, autoencoder: Path) -> None:
    dataset = Dataset.parse(str(root), "drawn")
    manifest = run_stage(latents.Latents(dataset, LatentsConfig(first_stage=str(autoencoder), flips=True)))
    about = manifest["info"]["first_stage"]
    assert about | {"sha256": "", "scale": 0} == {"source": str(autoencoder), "kind": "AutoencoderKL", "channels": 16,
                                                   "factor": 4, "scale": 0, "sha256": ""}
    network = first_stage.load(autoencoder)
    shards = dataset.manifest("shards")["items"]
    for number, (record, shard) in enumerate(zip(manifest["items"], shards, strict=True)):
        rows = np.load(dataset.fetch("latents", file_of(record, ".npy")))
        assert rows.shape == (shard["samples"], 2, 16, 8, 8) and rows.dtype == np.float16
        pictures = np.stack([decode_pixels(tars.sample_image(sample)) for sample in tars.read(
            dataset.fetch("shards", file_of(shard, ".tar")))])
        if number == 0:
            x = torch.from_numpy(pictures[:8]).permute(0, 3, 1, 2).float() / 127.5 - 1
            # The settings give no factor, so it is the factor that makes the first batch's deviation 1.
            assert about["scale"] == pytest.approx(1 / float(network.moments(x)[0].numpy().astype(np.float16)
                                                             .astype(np.float32).std()), rel=1e-5)
        for position in (0, len(pictures) - 1):
            x = torch.from_numpy(pictures[position][None]).permute(0, 3, 1, 2).float() / 127.5 - 1
            for kind, image in enumerate((x, x.flip(-1))):
                expected = about["scale"] * network.moments(image)[0][0].numpy()
                np.testing.assert_allclose(rows[position, kind], expected, atol=4e-3 * abs(expected).max())
    assert main(["verify", "--root", str(root), "--only", "datasets/drawn/v1/latents"]) == 0


def test_latents_are_made_in_smaller_batches_after_out_of_memory(root: Path, autoencoder: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, moments = Dataset.parse(str(root), "drawn"), first_stage.FirstStage.moments
    stage = latents.Latents(dataset, LatentsConfig(first_stage=str(autoencoder), batch_size=8, scale=1.0))

    def rows() -> np.ndarray:
        return np.concatenate([np.load(dataset.fetch("latents", file_of(record, ".npy")))
                               for record in dataset.manifest("latents")["items"]])

    run_stage(stage)
    full_batch_rows = rows()

    def limited(self: first_stage.FirstStage, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(pictures) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return moments(self, pictures)

    monkeypatch.setattr(first_stage.FirstStage, "moments", limited)
    monkeypatch.setattr(latents, "_fit", devices.BatchFit())
    manifest = run_stage(stage, overwrite=True)
    np.testing.assert_allclose(rows().astype(np.float32), full_batch_rows.astype(np.float32),
                               atol=4e-3 * abs(full_batch_rows).max())
    assert manifest["run"]["items_with_halved_batches"] == len(manifest["items"])
    assert manifest["items"][0]["run"]["times"][devices.HALVED].startswith("batch from 8 to 2 after out of memory on ")


def test_a_given_or_configured_factor_is_used(root: Path, autoencoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "configured"
    shutil.copytree(autoencoder, folder)
    _edit(folder / "config.json", "scaling_factor", 0.25)
    dataset = Dataset.parse(str(root), "drawn")
    for config, scale in ((LatentsConfig(first_stage=str(folder)), 0.25),
                          (LatentsConfig(first_stage=str(folder), scale=2.0), 2.0)):
        manifest = run_stage(latents.Latents(dataset, config), overwrite=True)
        assert manifest["info"]["first_stage"]["scale"] == scale


def test_batches_of_latents_have_each_sample_once_and_both_mirror_images(root: Path, autoencoder: Path) -> None:
    dataset = Dataset.parse(str(root), "drawn")
    run_stage(latents.Latents(dataset, LatentsConfig(first_stage=str(autoencoder), flips=True)))
    total = dataset.manifest("shards")["totals"]["samples"]
    all_latents = np.concatenate([np.load(dataset.fetch("latents", file_of(record, ".npy")))
                                  for record in dataset.manifest("latents")["items"]])
    whole = Batches(dataset, dataset, k=4, global_batch=8, seed=1, latents=True)
    halves = [Batches(dataset, dataset, k=4, global_batch=8, seed=1, latents=True, rank=rank, world=2)
              for rank in range(2)]
    rows, kinds = [], []
    for step in range(total // 8):
        batch = whole.at(step)
        parts = [half.at(step) for half in halves]
        for name in ("latent", "rows", "neighbors"):
            np.testing.assert_array_equal(batch[name], np.concatenate([part[name] for part in parts]))
        for latent, row in zip(batch["latent"], batch["rows"], strict=True):
            matches = [bool((latent == all_latents[row, kind]).all()) for kind in range(2)]
            assert any(matches)
            kinds.append(matches.index(True))
            rows.append(int(row))
    assert len(set(rows)) == len(rows) and 0.3 < np.mean(kinds) < 0.7


def test_a_run_on_latents_trains_and_generates_images(root: Path, autoencoder: Path, capsys) -> None:
    common = ["--root", str(root), "--local"]
    assert main(["latents", "drawn", "--first-stage", str(autoencoder), *common]) == 0
    sizes = ["--in-channels", "16", "--out-channels", "16", "--patch", "1"]
    train = ["train", "run", "--dataset", "drawn", *common, "--steps", "4", "--global-batch", "4", "--log-every", "1",
             "--checkpoint-every", "4"]
    assert main([*train, *sizes, "--latents"]) == 0
    assert main([*train, "--overwrite"]) == 0  # on images
    capsys.readouterr()
    assert main([*train, "--latents", "--overwrite"]) == 2
    assert "16 x 8 x 8" in capsys.readouterr().err
    assert main([*train, *sizes, "--latents", "--overwrite"]) == 0
    assert main(["sample", "run", "--prompt", "a red circle", "--database", "drawn", "--steps", "2", *common,
                 "--name", "some"]) == 0
    picture = Image.open(next((root / "runs/run/samples/some/drawn").glob("00-*circle.png")))
    assert picture.size == (32, 32)
    section = json.loads((root / "runs/run/plan.json").read_text())["section"]
    assert section["first_stage"]["factor"] == 4
    # Another first stage in the same place is noticed.
    latents.open_first_stage_on.cache_clear()
    changed = first_stage.load(autoencoder)
    with torch.no_grad():
        next(changed.network.parameters()).add_(1.0)
    backup = autoencoder.with_name("kept")
    shutil.copytree(autoencoder, backup)
    try:
        changed.network.save_pretrained(autoencoder)
        assert main(["sample", "run", "--prompt", "a blue square", "--database", "drawn", "--steps", "2", *common]) == 1
        assert "is not the one that the run run was trained with" in capsys.readouterr().err
    finally:
        shutil.rmtree(autoencoder)
        shutil.move(backup, autoencoder)
        latents.open_first_stage_on.cache_clear()


def _job(root: Path, run: str, validation: str = "") -> Job:
    """A run of two steps on the latents of `drawn`, looked at after each."""
    dataset = Dataset.parse(str(root), "drawn")
    config = replace(tiny().train, steps=2, global_batch=4, log_every=1, validate_every=1, precision="fp32",
                     unet=replace(SMALL, channel_mult=(1,), attention_downsampling=(1,), patch=2))
    return Job(Run.parse(str(root), run), dataset, dataset, config, latents=True,
               validation=Dataset.parse(str(root), validation) if validation else None)


def test_validation_on_latents_shows_the_images_of_sample_and_changes_nothing(
        root: Path, autoencoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(autoencoder.parent)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dataset = Dataset.parse(str(root), "drawn")
    manifest = run_stage(latents.Latents(dataset, LatentsConfig(first_stage=autoencoder.name)))
    monkeypatch.chdir(root)  # who trains has another working folder
    assert train_in_processes(_job(root, "with", "drawn")) and train_in_processes(_job(root, "without"))
    validated_run, plain_run = (Run.parse(str(root), name) for name in ("with", "without"))
    assert validated_run.checkpoint(2)["content"] == plain_run.checkpoint(2)["content"]
    assert [line["step"] for line in read_metrics(validated_run, "validation.jsonl")] == [1, 2]
    # The same noise and neighbors: the grid has what the run's own generator makes of them.
    validation = Validation(_job(root, "with", "drawn"), dataset)
    network = checkpoint.load_denoiser(validated_run.fetch(2))[0]
    images = validation.generate(network, torch.device("cpu"))
    context = validation.context[validation.shown].numpy()
    expected = ImageGenerator(validated_run, 2).generate(context, range(8), SampleConfig(
        steps=20, guidance=1.5, sampler="dpm++", precision="fp32", seed=validation.config.seed))
    assert images.shape == (8, 32, 32, 3) and images.std() > 1 and validation.config.context_norm == 1
    assert np.abs(images.astype(int) - expected).max() <= 1
    grid = (root / "runs/with/validation/0000002.png").read_bytes()
    cells = np.asarray(validation._grid(images))
    assert np.abs(np.asarray(Image.open(io.BytesIO(grid))).astype(int) - cells).max() <= 1
    assert not np.array_equal(cells, np.asarray(validation._grid(expected[::-1])))
    assert {int(path.name.split("_")[1]) for path in root.glob(
        "runs/with/wandb/offline-run-*/files/media/images/validation_*.png")} == {1, 2}
    assert main(["report", "--root", str(root)]) == 0
    assert "drawn in validation" in (root / "report.html").read_text()
    # Latents that were made with a factor of their own are brought to that of the run.
    shutil.copytree(root / "datasets/drawn", root / "datasets/held")
    held_out = Dataset.parse(str(root), "held")
    scale = manifest["info"]["first_stage"]["scale"]
    run_stage(latents.Latents(held_out, LatentsConfig(first_stage=str(autoencoder), scale=2 * scale)), overwrite=True)
    torch.testing.assert_close(Validation(_job(root, "with", "held"), held_out).x0, validation.x0, rtol=2e-3, atol=2e-3)


def test_a_run_without_its_first_stage_continues_with_one_warning(
        root: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "going"
    shutil.copytree(autoencoder, folder)
    run_stage(latents.Latents(Dataset.parse(str(root), "drawn"), LatentsConfig(first_stage=str(folder))))
    shutil.copytree(root / "datasets/drawn", root / "datasets/other")
    shutil.rmtree(folder)
    assert train_in_processes(_job(root, "blind", "drawn"))
    assert caplog.text.count("validation samples no images") == 1 and str(folder) in caplog.text
    assert [line["step"] for line in read_metrics(Run.parse(str(root), "blind"), "validation.jsonl")] == [1, 2]
    assert not (root / "runs/blind/validation").exists()
    assert main(["report", "--root", str(root)]) == 0
    assert "drawn in validation" not in (root / "report.html").read_text()
    # Another first stage under the same name is not taken for it.
    changed = first_stage.load(autoencoder)
    with torch.no_grad():
        next(changed.network.parameters()).add_(1.0)
    changed.network.save_pretrained(folder)
    caplog.clear()
    assert train_in_processes(_job(root, "deceived", "drawn"))
    assert caplog.text.count("is not the one that the run deceived was trained with") == 1
    latents.open_first_stage_on.cache_clear()
    stage = latents.Latents(Dataset.parse(str(root), "other"), LatentsConfig(first_stage=str(folder)))
    run_stage(stage, overwrite=True)
    latents.open_first_stage_on.cache_clear()
    with pytest.raises(ValueError, match="the latents of other are of another first stage than those of drawn"):
        Training(_job(root, "run", "other")).check()


def test_an_exported_run_on_latents_samples_without_its_first_stage(
        root: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder, out, other_root = tmp_path / "going", tmp_path / "carried", tmp_path / "elsewhere"
    shutil.copytree(autoencoder, folder)
    run_stage(latents.Latents(Dataset.parse(str(root), "drawn"), LatentsConfig(first_stage=str(folder))))
    assert train_in_processes(_job(root, "run"))
    command = ["sample", "--prompt", "a red circle", "--database", "drawn", "--steps", "3", "--name", "some", "--local"]

    def sampled_image(run_root: Path, run: str) -> np.ndarray:
        assert main([*command[:1], run, *command[1:], "--root", str(run_root)]) == 0
        image_file = next((run_root / f"runs/{run}/samples/some/drawn").glob("00-*circle.png"))
        return np.asarray(Image.open(image_file)).astype(int)

    image = sampled_image(root, "run")
    assert main(["export", "run", "--out", str(out), "--root", str(root)]) == 0
    shutil.rmtree(folder)
    latents.open_first_stage_on.cache_clear()
    shutil.copytree(root / "datasets", other_root / "datasets")
    assert main(["convert", "brought", "--checkpoint", str(out), "--root", str(other_root)]) == 0
    # An imported run can be exported again. Sampling with it needs neither the first folder nor the first export.
    assert main(["export", "brought", "--out", str(tmp_path / "further"), "--root", str(other_root)]) == 0
    shutil.move(out, tmp_path / "moved")
    converted_image = sampled_image(other_root, "brought")
    assert image.std() > 1 and np.abs(image - converted_image).mean() < 1  # weights in half precision
    assert main(["verify", "--root", str(other_root), "--only", "runs/brought"]) == 0
    # Half an export, or another first stage in it, is no run.
    convert = ["convert", "again", "--checkpoint", str(tmp_path / "moved"), "--root", str(other_root)]
    changed = first_stage.load(autoencoder)
    with torch.no_grad():
        next(changed.network.parameters()).add_(1.0)
    changed.network.save_pretrained(tmp_path / "moved/first_stage")
    assert main(convert) == 1 and "is not the first stage that was exported" in capsys.readouterr().err
    # Without its first stage a run is not exported, and nothing is left behind.
    latents.open_first_stage_on.cache_clear()
    assert main(["export", "run", "--out", str(out), "--root", str(root)]) == 2
    assert "there is no autoencoder in" in capsys.readouterr().err and not out.exists()


def test_a_run_with_its_own_vectors_works_with_every_sampler(root: Path, capsys) -> None:
    common = ["--root", str(root), "--local"]
    train = ["train", "own", "--dataset", "drawn", *common, "--steps", "2", "--global-batch", "4", "--log-every", "1",
             "--own", "image", "--random-k", "--p-drop-neighbor", "0.2", "--neighbor-noise", "0.1", "--learned-null"]
    assert main([*train, "--prediction", "v", "--min-snr", "5"]) == 0
    inputs = json.loads((root / "runs/own/plan.json").read_text())["inputs"]
    assert inputs["own"] == Dataset.parse(str(root), "drawn").identity("embeddings")
    assert main([*train, "--own", "caption", "--overwrite"]) == 2  # no captions were embedded
    assert "embed drawn --captions" in capsys.readouterr().err
    assert main([*train, "--prediction", "v", "--min-snr", "5", "--overwrite"]) == 0
    draw = ["sample", "own", "--prompt", "a red circle", "--database", "drawn", "--steps", "3", *common]
    pictures = []
    for flags in ([], ["--sampler", "dpm++"], ["--eta", "1"], ["--text-guidance", "4"]):
        assert main([*draw, *flags]) == 0
        folder = Path(json.loads(capsys.readouterr().out.splitlines()[-1])["folder"])
        pictures.append(next((folder / "drawn").glob("00-*circle.png")).read_bytes())
    assert len(set(pictures[:3])) == 3  # after two steps hardly anything follows the text
    assert main([*draw, "--sampler", "heun"]) == 2
    assert "heun follows a flow" in capsys.readouterr().err


def test_a_released_checkpoint_becomes_a_run_that_samples(root: Path, tmp_path: Path, capsys) -> None:
    common = ["--root", str(root), "--local"]
    file = _write_checkpoint(tmp_path / "model.ckpt")
    assert main(["convert", "paper", "--checkpoint", str(file), "--database", "drawn", *common]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["step"] == 1234 and summary["averaged"] is False
    assert main(["sample", "paper", "--prompt", "a red circle", "--database", "drawn", "--steps", "1", "--k", "2",
                 *common, "--name", "some"]) == 0
    picture = Image.open(next((root / "runs/paper/samples/some/drawn").glob("00-*circle.png")))
    assert picture.size == (256, 256)
    section = json.loads((root / "runs/paper/plan.json").read_text())["section"]
    assert section["first_stage"]["scale"] == 0.5 and section["train"]["diffusion"]["beta_end"] == 0.015
    assert main(["verify", "--root", str(root), "--only", "runs/paper"]) == 0
    (root / "runs/paper/checkpoints/0001234/ema.safetensors").write_bytes(b"other")
    assert main(["verify", "--root", str(root), "--only", "runs/paper"]) == 1
    assert main(["report", "--root", str(root)]) == 0


@pytest.mark.parametrize("spoil, message", [
    (lambda path: path.write_bytes(path.read_bytes()[:5000]), "cannot be read as weights"),
    (lambda path: _write_checkpoint(path, UNetConfig(**{**SMALL.__dict__, "context_dim": 48})), "takes vectors of 48"),
    (lambda path: path.unlink(), "there is no file or folder")])
def test_impossible_conversions_are_named_and_leave_nothing(root: Path, tmp_path: Path, spoil, message,
                                                            capsys ) -> None:
    file = _write_checkpoint(tmp_path / "model.ckpt")
    spoil(file)
    assert main(["convert", "paper", "--checkpoint", str(file), "--database", "drawn", "--root", str(root)]) == 2
    assert message in capsys.readouterr().err
    assert not (root / "runs/paper/plan.json").exists()


@pytest.mark.parametrize(("source", "said"), [
    ("nope", "there is no autoencoder in nope: expected a folder, or ORGANISATION/NAME of the hub\nhint: a folder"),
    ("a/b/c", "there is no autoencoder in a/b/c: "),
    ("nobody/nope", r"(hub cannot be reached|the hub has no nobody/nope).*\n.*--first-stage FOLDER")])
def test_a_first_stage_that_does_not_exist_is_named_at_once(source: str, said: str,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.embeddings.hub._HUB_ANSWER_S", 1.0)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=said):
        latents.open_first_stage(source)
    assert time.monotonic() - begun < 20


def test_a_missing_first_stage_has_a_hint(root: Path, tmp_path: Path, capsys) -> None:
    assert main(["latents", "drawn", "--root", str(root), "--local"]) == 2
    assert "--first-stage FOLDER" in capsys.readouterr().err
    assert main(["latents", "drawn", "--first-stage", str(tmp_path), "--root", str(root), "--local"]) == 2
    assert "there is no autoencoder in" in capsys.readouterr().err


@pytest.mark.slow
def test_latents_do_not_depend_on_the_workers(root: Path, autoencoder: Path, tmp_path: Path) -> None:
    dataset = Dataset.parse(str(root), "drawn")
    local_manifest = run_stage(latents.Latents(dataset, LatentsConfig(first_stage=str(autoencoder))))
    shutil.copytree(root, tmp_path / "other")
    shutil.rmtree(tmp_path / "other/datasets/drawn/v1/latents")
    subprocess.run([sys.executable, "-m", "jobs", "latents", "drawn", "--first-stage", str(autoencoder), "--root",
                    str(tmp_path / "other"), "--workers", "2"], check=True, capture_output=True)
    cluster_manifest = Dataset.parse(str(tmp_path / "other"), "drawn").manifest("latents")
    assert without_run_facts(local_manifest) == without_run_facts(cluster_manifest)
