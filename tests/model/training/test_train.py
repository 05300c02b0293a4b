"""Laws of training: a stop or more processes do not change the result, and averages follow their formula."""

import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from model.diffusion import randomness
from model.training.train import learning_rate, train
from model.weights.checkpoint import load_denoiser
from model.weights.ema import EMA
from tests.model.training import toy_run


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(config, folder, **more):
    records, folder = [], Path(folder)
    step = train(
        config,
        more.pop("batch_at", toy_run.batches(config.global_batch)),
        device="cpu",
        save=lambda step, write: write(folder / f"{step:07d}"),
        log=records.append,
        **more,
    )
    return step, records


def test_resumed_is_never_stopped(tmp_path):
    config = toy_run.config(steps=8)
    _, straight = _run(config, tmp_path / "straight")
    polls = iter([False, False, False, True])
    reached, first = _run(config, tmp_path / "halves", stop=lambda: next(polls))
    assert reached == 4
    end, second = _run(config, tmp_path / "halves", resume=tmp_path / "halves" / "0000004")
    assert end == 8
    both = first + second
    for key in ("step", "loss", "lr", "grad_norm"):
        assert [r[key] for r in straight] == [r[key] for r in both]
    for name in ("model", "ema", "optimizer"):
        a = load_file(tmp_path / "straight" / "0000008" / f"{name}.safetensors")
        b = load_file(tmp_path / "halves" / "0000008" / f"{name}.safetensors")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Three processes have 2, 3 and 3 of eight images. Half-way runs begin with a checkpoint of a single process.
@pytest.mark.parametrize(("world", "way", "half_way"), [(3, "ddp", True),
                                                        pytest.param(2, "ddp", False, marks=pytest.mark.slow),
                                                        pytest.param(2, "fsdp", False, marks=pytest.mark.slow),
                                                        pytest.param(2, "fsdp", True, marks=pytest.mark.slow),
                                                        pytest.param(3, "fsdp", False, marks=pytest.mark.slow)])
def test_several_processes_train_like_one(tmp_path, world, way, half_way):
    config = toy_run.config(steps=4)
    _, alone = _run(replace(config, checkpoint_every=2), tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folder = tmp_path / "two"
    folder.mkdir()
    if half_way:
        shutil.copytree(tmp_path / "0000002", folder / "0000002")
        alone = alone[2:]
    script = str(Path(__file__).with_name("train_process.py"))
    pair = [subprocess.Popen([sys.executable, script, str(r), str(world), port, str(folder), way])
            for r in range(world)]
    try:
        assert [process.wait(timeout=120) for process in pair] == [0] * world
    finally:
        for process in pair:
            process.kill()
    first, *others = (json.loads((folder / f"records{r}.json").read_text()) for r in range(world))
    assert others == [[]] * (world - 1)
    shared = torch.tensor([(r["loss"], r["grad_norm"]) for r in first])
    alone = torch.tensor([(r["loss"], r["grad_norm"]) for r in alone])
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)
    for name in ("model", "ema"):
        a = load_file(tmp_path / "0000004" / f"{name}.safetensors")
        b = load_file(folder / "0000004" / f"{name}.safetensors")
        # Adam divides by the gradient's size, so rounding moves near-zero gradients by up to lr.
        moved = max((a[k] - b[k]).abs().max().item() for k in a)
        far = sum(((a[k] - b[k]).abs() > 1e-5).sum().item() for k in a)
        assert moved < config.lr and far < 0.001 * sum(a[k].numel() for k in a)


def test_more_processes_than_images_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 9)
    with pytest.raises(ValueError, match=r"global_batch = 8 .* 9 processes"):
        _run(toy_run.config(), "nowhere")


def test_randomness_does_not_depend_on_the_processes():
    whole = randomness.noise(1, "noise", 9, range(8), (3, 4, 4))
    levels = randomness.timesteps(1, 9, range(8), 1000)
    dropped = randomness.dropout_mask(1, 9, range(1000), 0.1)
    for world in (2, 4, 8):
        shares = [range(r * 8 // world, (r + 1) * 8 // world) for r in range(world)]
        assert torch.equal(whole, torch.cat([randomness.noise(1, "noise", 9, s, (3, 4, 4)) for s in shares]))
        assert torch.equal(levels, torch.cat([randomness.timesteps(1, 9, s, 1000) for s in shares]))
    assert 60 < dropped.sum() < 140
    for other in ((2, "noise", 9), (1, "sample", 9), (1, "noise", 10)):
        assert not torch.equal(whole, randomness.noise(*other, range(8), (3, 4, 4)))


def test_average_follows_its_formula():
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, 0.5)
    expected = model.weight.detach().clone().double()
    for n in range(1, 20):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(ema.weights["weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_averages_of_several_rates_are_kept_resumed_and_loaded(tmp_path):
    config = toy_run.config(steps=6, ema_decay=0.9, ema_more=(0.0, 0.1))
    _run(config, tmp_path / "straight")
    _run(replace(config, steps=3), tmp_path / "halves")
    _run(config, tmp_path / "halves", resume=tmp_path / "halves" / "0000003")
    folder = tmp_path / "straight" / "0000006"
    output_weights = {rate: load_denoiser(folder, rate=rate)[0].out[2].weight for rate in (0.9, 0.1)}
    # The average of rate 0 equals the weights.
    assert not torch.equal(output_weights[0.9], output_weights[0.1])
    for name in ("ema", "ema-0.1", "ema-0"):
        a, b = (load_file(tmp_path / part / "0000006" / f"{name}.safetensors") for part in ("straight", "halves"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(load_file(folder / "ema-0.safetensors")["out.2.weight"],
                       load_file(folder / "model.safetensors")["out.2.weight"])
    with pytest.raises(ValueError, match=r"no average of the rate 0\.7\nhint: it has 0\.9, 0, 0\.1"):
        load_denoiser(folder, rate=0.7)


def test_accumulation_and_memory_layout_change_nothing(tmp_path):
    _, whole = _run(toy_run.config(steps=4), tmp_path / "whole")
    _, parts = _run(toy_run.config(steps=4, accumulate=3, channels_last=True), tmp_path / "parts")
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in whole] == pytest.approx([r[key] for r in parts], rel=1e-4)


def test_a_record_has_losses_by_noise_level_and_machine_metrics(tmp_path):
    _, records = _run(toy_run.config(steps=8, log_every=4, global_batch=16), tmp_path)
    levels = torch.cat([randomness.timesteps(5, step, range(16), 1000) for step in range(4)])
    counts = [int(((levels * 4 // 1000) == quarter).sum()) for quarter in range(4)]
    weighted = sum(records[0][f"loss_{quarter + 1}_of_4"] * counts[quarter] for quarter in range(4)) / sum(counts)
    assert weighted == pytest.approx(records[0]["loss"], rel=1e-5)
    for record in records:
        assert 0 <= record["data_wait"] <= 1 and record["memory_gb"] > 0.05 and record["tflops_per_s"] > 0
        assert "mfu" not in record  # the peak of this processor is unknown


@pytest.mark.parametrize(("log_every", "stop_at", "steps"), [(4, 99, [4, 6]), (50, 99, [6]), (50, 3, [3])])
def test_the_last_step_is_logged(tmp_path, log_every, stop_at, steps):
    _, every = _run(toy_run.config(steps=6), tmp_path / "every")
    reached: list[int] = []
    _, records = _run(toy_run.config(steps=6, log_every=log_every), tmp_path / "some",
                      watch=lambda step, _: reached.append(step), stop=lambda: len(reached) + 1 >= stop_at)
    assert [record["step"] for record in records] == steps
    first = 0
    for record in records:  # each loss is the mean of the steps since the last record
        losses = [step_record["loss"] for step_record in every[first:record["step"]]]
        assert record["loss"] == pytest.approx(sum(losses) / len(losses))
        first = record["step"]


def test_waiting_for_data_is_logged(tmp_path):
    ready = toy_run.batches(8)
    _, records = _run(toy_run.config(steps=6, log_every=3), tmp_path / "fast")
    pause = max(0.5, 4 * records[-1]["seconds"])
    assert records[-1]["data_wait"] < 0.5

    def slow(step):
        time.sleep(pause)
        return ready(step)

    _, records = _run(toy_run.config(steps=6, log_every=3), tmp_path / "slow", batch_at=slow)
    first, last = records
    assert 0.5 < last["data_wait"] < 1 and last["seconds"] - first["seconds"] > 3 * pause


def test_validation_sees_the_averaged_network_and_changes_nothing(tmp_path):
    seen = []

    def validate(step, network):
        seen.append((step, network.out[2].weight.clone(), network.training))
        return {"validation_loss": float(step)}

    config = toy_run.config(steps=5, validate_every=2)
    _run(config, tmp_path / "without")
    _, records = _run(config, tmp_path / "with", validate=validate)
    assert [step for step, _, _ in seen] == [2, 4, 5] and not any(training for _, _, training in seen)
    assert [r for r in records if "loss" not in r] == [{"step": s, "validation_loss": float(s)} for s in (2, 4, 5)]
    for name in ("model", "ema"):
        a, b = (load_file(tmp_path / part / "0000005" / f"{name}.safetensors") for part in ("without", "with"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(seen[-1][1], a["out.2.weight"])


def test_too_little_memory_names_the_setting_to_change(tmp_path):
    good = toy_run.batches(8)

    def batch_at(step):
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return good(step)

    with pytest.raises(MemoryError, match=r"(?s)8 images a process in 1 parts.*Tried.*hint: --accumulate 2"):
        _run(toy_run.config(checkpoint_every=2), tmp_path, batch_at=batch_at)
    assert [folder.name for folder in tmp_path.iterdir()] == ["0000002"]


def test_warmup_is_linear_then_constant():
    config = toy_run.config(lr=1.0, warmup=4)
    assert [learning_rate(config, s) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(tmp_path):
    good = toy_run.batches(8)

    def batch_at(step):
        batch = good(step)
        if step == 3:
            batch["neighbors"] = batch["neighbors"] * float("nan")
        return batch

    with pytest.raises(FloatingPointError, match="step 4: loss nan"):
        _run(toy_run.config(checkpoint_every=2), tmp_path, batch_at=batch_at)
    assert [folder.name for folder in tmp_path.iterdir()] == ["0000002"]


def test_resuming_with_other_settings_names_them(tmp_path):
    _run(toy_run.config(steps=1), tmp_path)
    with pytest.raises(ValueError, match=r"lr: 0\.002 -> 0\.1"):
        _run(toy_run.config(steps=2, lr=0.1), tmp_path, resume=tmp_path / "0000001")
    with pytest.raises(ValueError, match=r"no checkpoint\.json"):
        load_denoiser(tmp_path)


def test_a_batch_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"at least k, D\) = \(8, 6, 4\)"):
        _run(toy_run.config(k=6), tmp_path)


def test_a_saved_network_is_loaded_unchanged(tmp_path):
    config = toy_run.config(steps=2)
    _run(config, tmp_path)
    averaged, loaded_config = load_denoiser(tmp_path / "0000002")
    raw, _ = load_denoiser(tmp_path / "0000002", ema=False)
    assert loaded_config == config and not averaged.training
    assert not torch.equal(averaged.out[2].weight, raw.out[2].weight)


@pytest.mark.slow
def test_neighbors_reduce_the_loss(tmp_path):
    config = toy_run.config(steps=160, global_batch=16, log_every=40, p_uncond=0.0, lr=5e-3)
    losses = {}
    for shuffled in (False, True):
        batch_at = toy_run.batches(16, shuffled=shuffled)
        _, records = _run(config, tmp_path / str(shuffled), batch_at=batch_at)
        losses[shuffled] = records[-1]["loss"]
    # The same images, noise and noise levels: only the context differs.
    assert losses[False] < 0.7 * losses[True]
