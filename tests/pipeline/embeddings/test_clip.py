"""Models from folders and hubs: the description fits the loaded model, and no model is loaded without weights."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.embeddings import clip, clip_weights
from pipeline.embeddings.clip_weights import BUNDLED, ClipConfig, describe_encoder
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed, dataset_encoder
from pipeline.stages.driver import run_stage
from pipeline.stages.plan import prepare
from pipeline.stages.worker import process_and_commit
from tests.pipeline import synthetic
from tests.pipeline.media.sample_images import photo

pytestmark = pytest.mark.usefixtures("fresh_encoder")


def write_model(path: Path, preprocessing: dict[str, Any] | None = None, **vision: Any) -> str:
    """The bundled CLIP as a folder in open_clip's layout, with other settings; its name as a model."""
    path.mkdir()
    architecture = json.loads((BUNDLED / "tiny-clip-64.json").read_text())
    architecture["vision_cfg"] |= vision
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture,
                                                            "preprocess_cfg": preprocessing or {}}))
    tensors = load_file(BUNDLED / "tiny_clip.safetensors")
    if vision:  # open_clip fits positions to another size in full precision only
        save_file({name: tensor.float() for name, tensor in tensors.items()}, path / "open_clip_model.safetensors")
    else:
        shutil.copy(BUNDLED / "tiny_clip.safetensors", path / "open_clip_model.safetensors")
    return f"local-dir:{path}"


def by_open_clip(model: str, pictures: list[Image.Image]) -> np.ndarray:
    """The expected vectors follow the steps of open_clip's documentation."""
    loaded, _, preprocess = open_clip.create_model_and_transforms(model)
    loaded.eval()
    with torch.no_grad():
        features = loaded.encode_image(torch.stack([preprocess(picture) for picture in pictures]))
    return (features / features.norm(dim=-1, keepdim=True)).numpy()


def test_a_folder_of_the_bundled_model_gives_its_vectors(copied: Dataset, built: Dataset, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    shutil.rmtree(copied.folder("embeddings"))
    run_stage(Embed(copied, EmbedConfig(model=model, batch_size=16)))
    np.testing.assert_array_equal(Embeddings(copied).all(), Embeddings(built).all())
    encoder, bundled = dataset_encoder(copied), dataset_encoder(built)
    assert encoder["model"] == "local-dir"  # the path does not matter
    assert encoder | {"model": bundled["model"]} == bundled
    texts = ["a red heart", "blue square"]
    expected = clip.load_encoder(ClipConfig()).texts(texts)
    np.testing.assert_array_equal(clip.load_encoder(ClipConfig(model)).texts(texts), expected)


@pytest.mark.parametrize("other", [
    {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}, {"interpolation": "bilinear"}, {"resize_mode": "squash"},
    {"resize_mode": "longest", "fill_color": 255}, {"interpolation": "random", "mean": None}])
def test_the_preprocessing_comes_from_the_folder(other: dict[str, Any], tmp_path: Path) -> None:
    config, plain = ClipConfig(write_model(tmp_path / "model", other), precision="fp32"), ClipConfig(precision="fp32")
    preprocessing, usual = describe_encoder(config)["preprocessing"], describe_encoder(plain)["preprocessing"]
    changes = {{"resize_mode": "resize"}.get(key, key): value for key, value in other.items() if value is not None}
    assert preprocessing == usual | changes != usual
    pictures = [photo(200, 130), photo(90, 200, 1)]
    encoders = [clip.load_encoder(config), clip.load_encoder(plain)]
    vectors = [encoder.images(np.stack([encoder.prepared(synthetic.encoded(picture, "PNG")) for picture in pictures]))
               for encoder in encoders]
    assert (vectors[0] * by_open_clip(config.model, pictures)).sum(1).min() > 1 - 1e-3
    if other.get("interpolation") != "random":  # open_clip reads this as bicubic
        assert (vectors[0] * vectors[1]).sum(1).min() < 1 - 2e-5


def test_the_image_size_comes_from_the_folder(tmp_path: Path) -> None:
    config = ClipConfig(write_model(tmp_path / "model", {"size": 64}, image_size=32), precision="fp32")
    assert describe_encoder(config)["preprocessing"]["image_size"] == 32
    assert describe_encoder(config)["architecture_sha256"] != describe_encoder(ClipConfig())["architecture_sha256"]
    encoder, picture = clip.load_encoder(config), photo(100, 80)
    prepared = encoder.prepared(synthetic.encoded(picture, "PNG"))
    assert prepared.shape == (32, 32, 3)
    assert (encoder.images(prepared[None]) * by_open_clip(config.model, [picture])).sum() > 1 - 1e-3


def test_a_description_loads_no_weights(tmp_path: Path) -> None:
    """The driver plans with the description, so it must not load 300 MB of weights."""
    model = write_model(tmp_path / "model")
    with open(tmp_path / "model" / "open_clip_model.safetensors", "ab") as file:
        file.truncate(300 << 20)
    description = describe_encoder(ClipConfig(model))
    assert description["weights_sha256"] != describe_encoder(ClipConfig())["weights_sha256"]
    assert description["dim"] == 256
    with pytest.raises(ValueError, match="cannot load local-dir:"):  # the folder was never read
        clip.load_encoder(ClipConfig(model))


def test_the_description_names_the_loaded_weights_of_several(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "open_clip_model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, tmp_path / "model" / "a.safetensors")
    assert describe_encoder(ClipConfig(model))["weights_sha256"] == describe_encoder(ClipConfig())["weights_sha256"]
    loaded = clip.load_encoder(ClipConfig(model)).model.state_dict()
    for name, tensor in clip.load_encoder(ClipConfig()).model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_a_worker_with_other_settings_in_its_folder_is_refused(copied: Dataset, tmp_path: Path) -> None:
    """The weights are equal, but another mean would change the vectors."""
    shutil.rmtree(copied.folder("embeddings"))
    stage = Embed(copied, EmbedConfig(model=write_model(tmp_path / "model")))
    items = prepare(stage)
    shutil.rmtree(tmp_path / "model")
    write_model(tmp_path / "model", {"mean": [0.5, 0.5, 0.5]})
    describe_encoder.cache_clear()
    with pytest.raises(ValueError, match=r"or its settings, are not those of the plan\nhint: "):
        process_and_commit(stage, items[0])


def test_folders_that_are_no_models_are_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    for name, config, message in [
        ("absent", ClipConfig(f"local-dir:{tmp_path}/absent"), "cannot be read: .*No such file"),
        ("empty", ClipConfig(f"local-dir:{tmp_path}/empty"), "cannot be read: .*No such file"),
        ("nameless", ClipConfig("local-dir:"), "names no model"),
        ("other weights", ClipConfig(model, "openai"), "comes with its own weights, and --pretrained openai"),
    ]:
        for load in (describe_encoder, clip.load_encoder):
            with pytest.raises(ValueError, match=message) as caught:
                load(config)
            assert "\nhint: " in str(caught.value) and len(str(caught.value).splitlines()) == 2, name
    (tmp_path / "model" / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights beside its open_clip_config"):
        clip.load_encoder(ClipConfig(model))  # open_clip would use random weights
    for text, message in [("{", "cannot be read"), ("{}", "has no model_cfg"),
                          ('{"model_cfg": {}}', "has no model_cfg"), ("[]", "has no model_cfg")]:
        (tmp_path / "model" / "open_clip_config.json").write_text(text)
        shutil.copy(BUNDLED / "tiny_clip.safetensors", tmp_path / "model" / "open_clip_model.safetensors")
        with pytest.raises(ValueError, match=message):
            describe_encoder(ClipConfig(model))


_ASK = """
import json, sys
from pipeline.embeddings.clip_weights import ClipConfig, describe_encoder
from pipeline.embeddings import clip, clip_weights
try:
    said = describe_encoder(ClipConfig(sys.argv[1]))
    print(json.dumps([said, clip.load_encoder(ClipConfig(sys.argv[1])).texts(["a red heart"]).tolist()]))
except ValueError as error:
    sys.exit(str(error))
"""


def describe_in_new_process(model: str, home: Path) -> "subprocess.CompletedProcess[str]":
    """Description and a vector of a model in a process that has only this cache of the hub."""
    return subprocess.run([sys.executable, "-c", _ASK, model], capture_output=True, text=True, env={
        **os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[3])})


@pytest.mark.slow
def test_a_model_of_a_hub_is_found_in_its_cache(tmp_path: Path) -> None:
    """Laid out as huggingface_hub leaves it; there is no network in tests."""
    repository = tmp_path / "hub" / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    write_model(repository / "snapshots" / ("0" * 40), {"mean": [0.5, 0.5, 0.5]})
    process = describe_in_new_process("hf-hub:someone/small", tmp_path)
    assert process.returncode == 0, process.stderr
    description, vectors = json.loads(process.stdout)
    bundled = describe_encoder(ClipConfig())
    assert description["model"] == "hf-hub:someone/small" and description["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert description["weights_sha256"] == bundled["weights_sha256"]
    np.testing.assert_allclose(vectors, clip.load_encoder(ClipConfig()).texts(["a red heart"]), atol=1e-6)
    # Settings, but no weights.
    (repository / "snapshots" / ("0" * 40) / "open_clip_model.safetensors").unlink()
    process = describe_in_new_process("hf-hub:someone/small", tmp_path)
    assert process.returncode == 1 and "hf-hub:someone/small cannot be read: " in process.stderr


def test_an_unreachable_hub_has_a_message_of_one_sentence(tmp_path: Path) -> None:
    process = describe_in_new_process("hf-hub:someone/absent", tmp_path)
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "hf-hub:someone/absent" in lines[-2] and "the hub cannot be reached" in lines[-2]
    assert lines[-1].startswith("hint: ") and "local-dir:FOLDER" in lines[-1]


def test_an_array_that_cannot_be_written_gives_no_warning() -> None:
    encoder = clip.load_encoder(ClipConfig())
    pixels = np.frombuffer(bytes(3 * 64 * 64), np.uint8).reshape(1, 64, 64, 3)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vectors = encoder.images(pixels)
    finally:
        torch.set_warn_always(before)
    np.testing.assert_array_equal(vectors, encoder.images(pixels.copy()))


def test_damaged_or_missing_bundled_weights_are_no_invalid_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                 ) -> None:
    copy = tmp_path / "tiny_clip.safetensors"
    monkeypatch.setattr(clip_weights, "_BUNDLED_WEIGHTS", copy)
    for load in (describe_encoder, clip.load_encoder):
        with pytest.raises(OSError, match=f"{copy} is missing: the installation is incomplete\nhint: pip install"):
            load(ClipConfig())
    copy.write_bytes(b"no weights")
    with pytest.raises(OSError, match=f"the bundled encoder {copy} cannot be loaded: .*\nhint: pip install"):
        clip.load_encoder(ClipConfig())


def test_a_lost_working_folder_is_no_invalid_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *_, **__: os.getcwd())  # as imports do
    with pytest.raises(OSError, match=r"encoder tiny-clip-64 cannot be loaded: the working folder .* was removed"):
        clip.load_encoder(ClipConfig())
