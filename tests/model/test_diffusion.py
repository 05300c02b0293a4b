"""Laws of the forward process and of sampling."""

import pytest
import torch

from model.diffusion import (
    DiffusionConfig,
    alpha_bar,
    alpha_sigma,
    loss,
    q_sample,
    target,
    to_x0_eps,
)
from model.sample import ddim_timesteps, initial_noise, sample


def test_schedule_is_the_square_of_a_ramp():
    config = DiffusionConfig()
    bar = alpha_bar(config)
    betas = 1 - bar[1:] / bar[:-1]
    steps = betas.sqrt().diff()
    assert bar.dtype == torch.float64 and (bar.diff() < 0).all()
    torch.testing.assert_close(1 - bar[0].item(), config.beta_start)
    torch.testing.assert_close(betas[-1].item(), config.beta_end)
    torch.testing.assert_close(steps, steps.mean().expand_as(steps))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_a_perfect_answer_gives_picture_and_noise_back(prediction):
    config = DiffusionConfig(prediction=prediction)
    x0, eps = torch.rand(8, 3, 4, 4) * 2 - 1, torch.randn(8, 3, 4, 4)
    t = torch.tensor([0, 1, 50, 200, 400, 600, 800, 900])
    answer = target(config, x0, eps, t)
    back, noise = to_x0_eps(config, q_sample(config, x0, eps, t), answer, t)
    torch.testing.assert_close(back, x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(noise, eps, rtol=1e-3, atol=1e-3)
    assert torch.equal(loss(config, answer, x0, eps, t), torch.zeros(8))


def test_loss_is_per_picture():
    config = DiffusionConfig()
    x0, t = torch.zeros(3, 3, 4, 4), torch.tensor([1, 10, 100])
    eps = torch.randn(3, 3, 4, 4)
    answer = eps + torch.tensor([0.0, 1.0, 2.0])[:, None, None, None]
    torch.testing.assert_close(loss(config, answer, x0, eps, t), torch.tensor([0.0, 1.0, 4.0]), rtol=1e-4, atol=1e-5)


class Gaussian:
    """The ideal denoiser of pictures whose pixels are independent N(mean, std^2)."""

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


def test_clamped_pictures_stay_in_range():
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


def test_starting_noise_belongs_to_the_position():
    together = initial_noise(7, range(6), (3, 8, 8))
    apart = torch.cat([initial_noise(7, [i], (3, 8, 8)) for i in range(6)])
    assert torch.equal(together, apart)
    assert len({row.sum().item() for row in together}) == 6
