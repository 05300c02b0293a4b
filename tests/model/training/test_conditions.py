"""The condition of an image in training: its neighbors, their number, their noise, and its own vector."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.config import DiffusionConfig, TrainConfig, from_dict, identity, to_dict
from model.network.unet import UNet
from model.training.inputs import _prepare_inputs
from tests.model.training import toy_run


def prepare_inputs(config: TrainConfig, step: int = 0, rank: int = 0, world: int = 1, own: np.ndarray | None = None):
    def batch_at(step):
        batch = toy_run.batches(config.global_batch, rank, world)(step)
        share = config.global_batch // world
        return batch if own is None else batch | {"own": own[rank * share:(rank + 1) * share]}

    share = config.global_batch // world
    return _prepare_inputs(config, batch_at, step, range(rank * share, (rank + 1) * share))


def test_a_random_k_is_the_same_in_a_batch_and_differs_between_steps():
    config = toy_run.config(random_k=True, k=4)
    counts = [prepare_inputs(config, step).context.shape[1] for step in range(40)]
    assert set(counts) == {1, 2, 3, 4}
    for step in range(5):
        assert all(prepare_inputs(config, step, rank, 2).context.shape[1] == counts[step] for rank in (0, 1))


def test_noise_rotates_neighbors_and_keeps_their_length():
    plain, noisy = (prepare_inputs(toy_run.config(k=4, p_uncond=0.0, neighbor_noise=noise, global_batch=64)).context
                    for noise in (0.0, 0.3))
    torch.testing.assert_close(plain.norm(dim=-1), noisy.norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(plain, noisy, dim=-1)
    # Noise of length 0.3 across a vector of length 1 turns it by about as much.
    assert 0.9 < cosine.mean() < 0.99 and cosine.min() < 0.95


def test_single_neighbors_are_dropped_at_the_configured_rate():
    context = prepare_inputs(toy_run.config(k=4, p_uncond=0.0, p_drop_neighbor=0.25, global_batch=512)).context
    dropped = ~context.any(-1)
    assert abs(dropped.float().mean() - 0.25) < 0.03
    assert dropped.sum(1).float().var() > 0


def test_noise_and_dropping_depend_on_the_position_in_the_batch():
    config = toy_run.config(k=4, neighbor_noise=0.3, p_drop_neighbor=0.3)
    whole = prepare_inputs(config, 3).context
    halves = torch.cat([prepare_inputs(config, 3, rank, 2).context for rank in range(2)])
    assert torch.equal(whole, halves)


def test_the_own_vector_is_first_and_unchanged():
    config = toy_run.config(k=4, p_uncond=0.0, p_drop_neighbor=1.0, own="image", context_norm=2.0)
    own = np.random.default_rng(0).standard_normal((8, toy_run.CODE)).astype(np.float16)
    context = prepare_inputs(config, own=own).context
    assert context.shape[1] == 5
    torch.testing.assert_close(context[:, 0], 2 * torch.from_numpy(own).float())
    assert not context[:, 1:].any()


def test_a_learned_null_replaces_zeros_and_learns():
    net = UNet(replace(toy_run.UNET, learned_null=True))
    with torch.no_grad():
        for weight in net.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.1)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    context = torch.randn(2, 3, 4)
    missing, filled = context.clone(), context.clone()
    missing[:, 1], filled[:, 1] = 0.0, net.null.detach()
    torch.testing.assert_close(net(x, t, missing), net(x, t, filled))
    assert not torch.allclose(net(x, t, missing), net(x, t, context), atol=1e-4)
    net(x, t, missing).square().mean().backward()
    assert net.null.grad.abs().sum() > 0


def test_settings_of_earlier_runs_are_read_unchanged():
    config = toy_run.config()
    old = to_dict(config)
    for name in ("context_norm", "random_k", "p_drop_neighbor", "neighbor_noise", "own", "image_size", "ema_more",
                 "accumulate", "channels_last", "fsdp", "validate_every"):
        del old[name]
    del old["unet"]["learned_null"], old["diffusion"]["min_snr"]
    assert from_dict(json.loads(json.dumps(old))) == config
    kept = identity(config)
    for name in ("steps", "checkpoint_every", "log_every", "compile"):
        del old[name]
    assert kept == json.loads(json.dumps(old))
    assert identity(replace(config, unet=replace(config.unet, checkpointing=True))) == kept
    assert identity(replace(config, own="image"))["own"] == "image"
    assert identity(replace(config, diffusion=DiffusionConfig(min_snr=5.0)))["diffusion"]["min_snr"] == 5.0


@pytest.mark.parametrize("settings, said", [
    ({"p_drop_neighbor": 1.5}, "p_drop_neighbor = 1.5"), ({"neighbor_noise": -1.0}, "neighbor_noise = -1"),
    ({"own": "sound"}, "own = 'sound'"), ({"context_norm": 0.0}, "context_norm = 0")])
def test_faulty_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        toy_run.config(**settings)
