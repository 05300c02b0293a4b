"""Laws of the forward process and of sampling."""

import itertools

import pytest
import torch

from model.diffusion import randomness
from model.diffusion.guidance import Guidance
from model.diffusion.process import (
    DiffusionConfig,
    alpha_bar,
    alpha_sigma,
    amplitudes,
    loss,
    q_sample,
    target,
    to_x0_eps,
)
from model.diffusion.samplers import ddim_timesteps, initial_noise, sample, timesteps


def test_schedule_is_the_square_of_a_ramp():
    config = DiffusionConfig()
    bar = alpha_bar(config)
    betas = 1 - bar[1:] / bar[:-1]
    steps = betas.sqrt().diff()
    assert bar.dtype == torch.float64 and (bar.diff() < 0).all()
    torch.testing.assert_close(1 - bar[0].item(), config.beta_start)
    torch.testing.assert_close(betas[-1].item(), config.beta_end)
    torch.testing.assert_close(steps, steps.mean().expand_as(steps))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
def test_a_perfect_prediction_gives_image_and_noise(prediction):
    config = DiffusionConfig(prediction=prediction)
    x0, eps = torch.rand(8, 3, 4, 4) * 2 - 1, torch.randn(8, 3, 4, 4)
    t = torch.tensor([0, 1, 50, 200, 400, 600, 800, 900])
    answer = target(config, x0, eps, t)
    back, noise = to_x0_eps(config, q_sample(config, x0, eps, t), answer, t)
    torch.testing.assert_close(back, x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(noise, eps, rtol=1e-3, atol=1e-3)
    assert torch.equal(loss(config, answer, x0, eps, t), torch.zeros(8))


def test_loss_is_per_image():
    config = DiffusionConfig()
    x0, t = torch.zeros(3, 3, 4, 4), torch.tensor([1, 10, 100])
    eps = torch.randn(3, 3, 4, 4)
    answer = eps + torch.tensor([0.0, 1.0, 2.0])[:, None, None, None]
    torch.testing.assert_close(loss(config, answer, x0, eps, t), torch.tensor([0.0, 1.0, 4.0]), rtol=1e-4, atol=1e-5)


class Gaussian:
    """The ideal denoiser of images whose pixels are independent N(mean, std^2)."""

    def __init__(self, config: DiffusionConfig, mean: float, std: float):
        self.config, self.mean, self.std, self.calls = config, mean, std, 0

    def __call__(self, x, t, context):
        self.calls += len(x)
        alpha, sigma = alpha_sigma(self.config, t)
        variance = (alpha * self.std) ** 2 + sigma**2
        mean = self.mean * context.mean(dim=(1, 2))[:, None, None, None]
        eps = sigma * (x - alpha * mean) / variance
        if self.config.prediction == "epsilon":
            return eps
        x0 = (x - sigma * eps) / alpha
        if self.config.prediction == "flow":
            return eps - x0
        return x0 if self.config.prediction == "x0" else alpha * eps - sigma * x0


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("guidance, mean", [(1.0, 0.3), (2.0, 0.6)])
def test_ddim_recovers_a_gaussian(prediction, guidance, mean):
    # Guidance between two Gaussians of one variance extrapolates the mean: 0 + s (m - 0).
    config = DiffusionConfig(prediction=prediction)
    denoiser = Gaussian(config, 0.3, 0.1)
    noise = initial_noise(3, range(16), (3, 16, 16))
    out = sample(denoiser, config, torch.ones(16, 2, 4), noise, steps=250, guidance=guidance, clamp=False)
    assert abs(out.mean().item() - mean) < 0.02
    assert abs(out.std().item() - 0.1) < 0.01
    assert denoiser.calls == 250 * 16 * (1 if guidance == 1.0 else 2)


def _exact(config, noise, level, last, mean, std):
    """End point of x_T in the flow of the ideal denoiser, which keeps (x_t - alpha_t m) over the deviation of x_t."""
    (a, b), (s, r) = (values[[level, last]].tolist() for values in amplitudes(config))
    if config.prediction == "flow":
        b, r = 1.0, 0.0
    deviation_at_level, deviation_at_last = ((a * std) ** 2 + s**2) ** 0.5, ((b * std) ** 2 + r**2) ** 0.5
    return b * mean + deviation_at_last * (noise.double() - a * mean) / deviation_at_level


@pytest.mark.parametrize("prediction, sampler, steps, bound", [
    ("epsilon", "ddim", 100, 0.05), ("epsilon", "dpm++", 20, 0.01), ("v", "dpm++", 20, 0.01), ("x0", "dpm++", 10, 0.02),
    ("flow", "euler", 40, 0.05), ("flow", "ddim", 40, 0.05), ("flow", "heun", 40, 0.006)])
def test_samplers_end_at_the_end_of_the_ideal_flow(prediction, sampler, steps, bound):
    config = DiffusionConfig(prediction=prediction)
    noise = initial_noise(3, range(4), (3, 16, 16))
    level = timesteps(config, sampler, steps)[0]
    out = sample(Gaussian(config, 0.3, 0.4), config, torch.ones(4, 2, 4), noise, steps=steps, guidance=1.0,
                 sampler=sampler, clamp=False)
    exact = _exact(config, noise, level, 0, 0.3, 0.4)
    assert (out - exact).abs().mean() < bound * exact.abs().mean()


@pytest.mark.parametrize("prediction, better, worse", [("epsilon", "dpm++", "ddim"), ("flow", "heun", "euler")])
def test_a_second_order_sampler_is_more_accurate_with_equal_steps(prediction, better, worse):
    config = DiffusionConfig(prediction=prediction)
    noise = initial_noise(3, range(4), (3, 16, 16))
    errors = {}
    for sampler in (better, worse):
        exact = _exact(config, noise, timesteps(config, sampler, 20)[0], 0, 0.3, 0.4)
        out = sample(Gaussian(config, 0.3, 0.4), config, torch.ones(4, 2, 4), noise, steps=20, guidance=1.0,
                     sampler=sampler, clamp=False)
        errors[sampler] = (out - exact).abs().mean()
    assert errors[better] < errors[worse] / 4


@pytest.mark.parametrize("steps", [1, 5, 20, 100, 999])
@pytest.mark.parametrize("prediction, sampler", [("epsilon", "dpm++"), ("epsilon", "ddim"), ("flow", "heun")])
def test_levels_fall_from_step_to_step(prediction, sampler, steps):
    levels = timesteps(DiffusionConfig(prediction=prediction), sampler, steps)
    assert len(levels) == steps + 1 and levels[-1] == 0 and levels[0] < 1000
    assert all(later < earlier for earlier, later in itertools.pairwise(levels))


def test_fresh_noise_keeps_the_distribution_and_changes_the_image():
    config = DiffusionConfig()
    denoiser, noise = Gaussian(config, 0.3, 0.4), initial_noise(3, range(16), (3, 16, 16))

    def draw(eta, seed=0):
        return sample(denoiser, config, torch.ones(16, 2, 4), noise, steps=250, guidance=1.0, eta=eta, clamp=False,
                      fresh=lambda step: randomness.noise(seed, "eta", step, range(16), (3, 16, 16)))

    still, anew, other = draw(0.0), draw(1.0), draw(1.0, seed=1)
    assert abs(anew.mean().item() - 0.3) < 0.02 and abs(anew.std().item() - 0.4) < 0.03
    assert torch.equal(anew, draw(1.0)) and not torch.equal(anew, other)
    # eta = 1 replaces all noise, so little of the first noise is left.
    def alike(a, b):
        return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
    assert alike(still, noise) > 0.99 and alike(anew, noise) < 0.2


class Mixed(Gaussian):
    """An ideal denoiser for a Gaussian with the mean f + (a - f) / 2.

    f is the mean of the first context vector, which stands for the prompt; a is the mean of all context vectors.
    """

    def __call__(self, x, t, context):
        mean = context[:, :1].mean(1) + 0.5 * (context.mean(1) - context[:, :1].mean(1))
        return super().__call__(x, t, mean[:, None])


def test_prompt_and_neighbors_have_separate_guidance_scales():
    config = DiffusionConfig()
    context = torch.cat([torch.ones(8, 1, 4), 3 * torch.ones(8, 3, 4)], 1)  # means 1 and 2.5: mixed 1.75
    noise = initial_noise(3, range(8), (3, 16, 16))

    def draw(guidance):
        denoiser = Mixed(config, 0.1, 0.1)
        out = sample(denoiser, config, context, noise, steps=100, guidance=guidance, clamp=False)
        return out, denoiser.calls // (100 * 8)

    images, calls = draw(2.0)
    same_images, calls_of_same = draw(Guidance(2.0, 2.0))
    assert torch.equal(images, same_images) and calls == calls_of_same == 2
    # The mean is 0 for the null condition, 0.1 for the prompt, and 0.175 for both.
    for text, neighbors in ((1.0, 0.0), (2.0, 1.0), (0.0, 3.0)):
        out, calls = draw(Guidance(text, neighbors))
        assert calls == 3
        assert abs(out.mean().item() - (text * 0.1 + neighbors * 0.075)) < 0.01


@pytest.mark.parametrize("prediction, more, said", [
    ("epsilon", {"sampler": "heun"}, "follows a flow"), ("flow", {"eta": 0.5}, "eta is for ddim"),
    ("epsilon", {"eta": 0.5}, "needs fresh noise"), ("epsilon", {"sampler": "magic"}, "must be ddim"),
    ("flow", {"steps": 1000}, "steps = 1000"),
    ("flow", {"sampler": "dpm++"}, "for noise schedules")])
def test_settings_that_disagree_are_refused(prediction, more, said):
    config = DiffusionConfig(prediction=prediction)
    with pytest.raises(ValueError, match=said):
        sample(Gaussian(config, 0.3, 0.1), config, torch.ones(1, 2, 4), initial_noise(0, [0], (3, 8, 8)),
               **{"steps": 5, "guidance": 1.0} | more)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
def test_min_snr_gives_every_target_the_weight_of_its_x0_error(prediction):
    # An error of 0.1 in x0 costs 0.01 min(SNR, 5) for every prediction target.
    config = DiffusionConfig(prediction=prediction, min_snr=5.0)
    x0, eps = torch.rand(6, 3, 4, 4) * 2 - 1, torch.randn(6, 3, 4, 4)
    t = torch.tensor([20, 100, 300, 500, 700, 900])
    alpha, sigma = alpha_sigma(config, t)
    x_t = q_sample(config, x0, eps, t)
    off = {"epsilon": (x_t - alpha * (x0 + 0.1)) / sigma, "x0": x0 + 0.1,
           "v": (alpha * x_t - (x0 + 0.1)) / sigma, "flow": (x_t - (x0 + 0.1)) / sigma}[prediction]
    snr = (alpha / sigma).square().flatten()
    torch.testing.assert_close(loss(config, off, x0, eps, t), 0.01 * snr.clamp(max=5), rtol=2e-2, atol=1e-5)


def test_clamped_images_stay_in_range():
    config = DiffusionConfig()
    noise = initial_noise(0, range(2), (3, 8, 8))
    wild = Gaussian(config, 5.0, 0.1)
    out = sample(wild, config, torch.ones(2, 1, 4), noise, steps=20, guidance=1.0)
    assert torch.isfinite(out).all() and out.abs().max() <= 1.0


def test_timesteps_are_evenly_spaced_from_one():
    assert ddim_timesteps(1000, 10) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    for steps in (1, 7, 30, 250, 999):
        levels = ddim_timesteps(1000, steps)
        assert len(set(levels)) == steps and max(levels) < 1000
    with pytest.raises(ValueError, match="steps = 1000"):
        ddim_timesteps(1000, 1000)


def test_first_noise_depends_on_the_position_only():
    together = initial_noise(7, range(6), (3, 8, 8))
    apart = torch.cat([initial_noise(7, [i], (3, 8, 8)) for i in range(6)])
    assert torch.equal(together, apart)
    assert len({row.sum().item() for row in together}) == 6
