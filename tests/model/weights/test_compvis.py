"""Released checkpoints: every name is accounted for, and the networks give the outputs of the published code.

`golden/` has random weights under the names of the release, some inputs, and the outputs of CompVis's code
(latent-diffusion at a506df5) for them, in float32 on a CPU.
"""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from model.diffusion.process import alpha_bar
from model.diffusion.samplers import ddim_timesteps, sample
from model.network.unet import UNet
from model.recipes import ffhq_415m, imagenet_400m, laion_1p3b
from model.weights import compvis, first_stage

GOLDEN = Path(__file__).parent / "golden"
KEYS = json.loads((GOLDEN / "compvis_full_keys.json").read_text())


@pytest.fixture(scope="module")
def small():
    return compvis.read(GOLDEN / "compvis_small.safetensors")


@pytest.fixture(scope="module")
def io():
    with np.load(GOLDEN / "compvis_small_io.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def unet(small):
    net = UNet(compvis.unet_config(small.unet))
    net.load_state_dict({name: tensor.float() for name, tensor in small.unet.items()})
    return net.eval()


@pytest.fixture(scope="module")
def autoencoder(small):
    weights = {name: tensor.float() for name, tensor in small.first_stage.items()}
    return first_stage.build(compvis.first_stage_config(weights), compvis.first_stage_weights(weights))


def shapes(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in KEYS[name]["keys"].items()}


@torch.no_grad()
def test_the_unet_gives_the_outputs_of_the_published_code(unet, io):
    torch.testing.assert_close(unet(io["x"], io["t"], io["context"]), io["eps"], rtol=0, atol=1e-4)


def test_the_first_stage_gives_the_outputs_of_the_published_code(autoencoder, io):
    mean, log_variance = io["moments"].chunk(2, 1)
    encoded_mean, deviation = autoencoder.moments(io["image"])
    torch.testing.assert_close(encoded_mean, mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(deviation, (0.5 * log_variance.clamp(-30, 20)).exp(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(autoencoder.decode(io["z"]), io["decoded"], rtol=0, atol=1e-4)


def test_ten_steps_of_ddim_give_the_result_of_the_published_code(unet, io):
    from model.config import DiffusionConfig
    config = DiffusionConfig(beta_start=0.0015, beta_end=0.015)
    torch.testing.assert_close(alpha_bar(config), io["alphas_cumprod"], rtol=0, atol=1e-12)
    assert ddim_timesteps(1000, 10) == io["ddim_timesteps"].tolist()[::-1]
    end = sample(unet, config, io["ddim_context"], io["ddim_start"], steps=10, guidance=5.0, clamp=False)
    scale = io["ddim_end"].abs().max()
    torch.testing.assert_close(end / scale, io["ddim_end"] / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, recipe", [("rdm256_imagenet", imagenet_400m), ("rdm256_ffhq", ffhq_415m),
                                          ("rdm768", laion_1p3b)])
def test_every_name_and_size_of_a_released_unet_is_known(name, recipe):
    weights = shapes(name)
    config = compvis.unet_config(weights)
    expected = recipe().unet
    assert {**config.__dict__, "checkpointing": True, "attention_downsampling": set(config.attention_downsampling)} == {
        **expected.__dict__, "attention_downsampling": set(expected.attention_downsampling)}
    with torch.device("meta"):
        net = UNet(config)
    assert {key: list(tensor.shape) for key, tensor in net.state_dict().items()} == KEYS[name]["keys"]
    assert sum(weight.numel() for weight in net.parameters()) == KEYS[name]["params"]


@pytest.mark.parametrize("name, kind, factor, channels", [("first_stage_kl_f16", "AutoencoderKL", 16, 16),
                                                          ("first_stage_vq_f4", "VQModel", 4, 3)])
def test_every_name_and_size_of_a_released_first_stage_is_known(name, kind, factor, channels):
    import diffusers
    weights = shapes(name)
    config = compvis.first_stage_config(weights)
    assert config["_class_name"] == kind
    with torch.device("meta"):
        network = getattr(diffusers, kind).from_config(config)
    ours = {key: list(tensor.shape) for key, tensor in compvis.first_stage_weights(weights).items()}
    assert ours == {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    stage = first_stage.FirstStage(network, kind, 1.0)
    assert (stage.factor, stage.channels) == (factor, channels)
    assert sum(tensor.numel() for tensor in weights.values()) == KEYS[name]["params"]


def checkpoint(small, path: Path, **more) -> Path:
    """A `model.ckpt` as a trainer writes it, with a moving average, a schedule, a loss and a pickled callback."""
    betas = torch.linspace(0.0015**0.5, 0.015**0.5, 1000, dtype=torch.float64) ** 2
    state = {f"model.diffusion_model.{name}": tensor + 1 for name, tensor in small.unet.items()}
    state |= {"model_ema." + f"diffusion_model.{name}".replace(".", ""): tensor for name, tensor in small.unet.items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in small.first_stage.items()}
    state |= {"betas": betas.float(), "alphas_cumprod": (1 - betas).cumprod(0).float(),
              "scale_factor": torch.tensor(0.2),
              "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7),
              "first_stage_model.loss.logvar": torch.zeros(())}
    torch.save({"state_dict": state, "global_step": 42, "epoch": 1} | more, path)
    return path


def test_a_whole_checkpoint_is_read_with_its_average_and_its_schedule(small, tmp_path):
    released = compvis.read(checkpoint(small, tmp_path / "model.ckpt"))
    assert released.averaged and released.step == 42 and released.scale == pytest.approx(0.2)
    assert (released.diffusion.beta_start, released.diffusion.beta_end) == (0.0015, 0.015)
    assert released.unet.keys() == small.unet.keys() and released.first_stage.keys() == small.first_stage.keys()
    assert all(torch.equal(released.unet[name], tensor) for name, tensor in small.unet.items())
    assert set(released.left_out) == {"betas", "alphas_cumprod", "scale_factor", "model_ema.decay",
                                      "model_ema.num_updates", "first_stage_model.loss.logvar"}


class Callback:
    """An object that a trainer pickles beside the weights. Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_no_code_of_a_checkpoint_runs(small, tmp_path):
    trap = tmp_path / "sprung"
    path = checkpoint(small, tmp_path / "model.ckpt", callbacks=Callback(str(trap)))
    pickle.loads(pickle.dumps(Callback(str(trap))))
    assert trap.exists()
    trap.unlink()
    try:
        compvis.read(path)
    except ValueError as error:
        assert "cannot be read as weights" in str(error)
    assert not trap.exists()


@pytest.mark.parametrize("break_it, said", [
    (lambda state: state.update({"model.diffusion_model2.x": torch.zeros(1)}), "no released model has"),
    (lambda state: [state.pop(name) for name in list(state) if name.startswith("model.diffusion_model.")],
     "no weights of a UNet"),
    (lambda state: state.pop(next(name for name in state if name.startswith("model_ema.diffusion"))), "lacks"),
    (lambda state: state.update({"betas": torch.linspace(0.001, 0.02, 1000)}), "squares of a linear ramp")])
def test_a_file_that_is_no_released_checkpoint_has_a_clear_message(small, tmp_path, break_it, said):
    path = checkpoint(small, tmp_path / "model.ckpt")
    whole = torch.load(path, weights_only=True)
    break_it(whole["state_dict"])
    torch.save(whole, path)
    with pytest.raises(ValueError, match=said):
        compvis.read(path)


def test_a_cut_checkpoint_has_a_clear_message(small, tmp_path):
    path = checkpoint(small, tmp_path / "model.ckpt")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        compvis.read(path)


def test_weights_of_another_model_are_refused(small):
    with pytest.raises(ValueError, match="not the weights of a UNet"):
        compvis.unet_config(small.first_stage)
    with pytest.raises(ValueError, match="not the weights of a first stage"):
        compvis.first_stage_config(small.unet)


def test_a_first_stage_is_loaded_from_a_folder(autoencoder, io, tmp_path):
    autoencoder.network.save_pretrained(tmp_path)
    loaded = first_stage.load(tmp_path, scale=0.5)
    latents = loaded.encode(io["image"])
    torch.testing.assert_close(latents, 0.5 * autoencoder.moments(io["image"])[0])
    torch.testing.assert_close(loaded.decode(0.5 * io["z"]), io["decoded"], rtol=0, atol=1e-4)
    noise = torch.ones_like(latents)
    mean, deviation = autoencoder.moments(io["image"])
    torch.testing.assert_close(loaded.encode(io["image"], noise), 0.5 * (mean + deviation))
    with pytest.raises(ValueError, match="sides must divide"):
        loaded.encode(io["image"][..., :-1])


def test_a_folder_without_an_autoencoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="holds a UNet2DModel"):
        first_stage.load(tmp_path)
