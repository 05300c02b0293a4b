"""The embed stage: vectors equal those of open_clip, and inputs that do not match are refused."""

import io
import json
import shutil
import tarfile
import threading
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings
from pipeline.datasets.metadata import metadata
from pipeline.embeddings import clip, clip_weights
from pipeline.embeddings.clip_weights import _MEAN, _STD, BUNDLED, ClipConfig, describe_encoder
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed, EmbedCaptions, check_same_encoder
from pipeline.embeddings.encode_shards import samples_per_pass
from pipeline.media import tars
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from pipeline.stages.plan import prepare
from pipeline.stages.types import StageFailed
from pipeline.stages.worker import process_and_commit
from pipeline.versions import verify
from tests.pipeline import synthetic
from tests.pipeline.media.sample_images import photo

pytestmark = pytest.mark.usefixtures("fresh_encoder")


def pictures_of(dataset: Dataset) -> list[Image.Image]:
    return [Image.open(io.BytesIO(tars.sample_image(sample))).convert("RGB")
            for record in dataset.manifest("shards")["items"]
            for sample in tars.read(dataset.fetch("shards", file_of(record, ".tar")))]


def embedded_by_open_clip(pictures: list[Image.Image], **preprocessing) -> np.ndarray:
    """The expected vectors follow the steps of open_clip's documentation."""
    open_clip.add_model_config(BUNDLED)
    model, _, preprocess = open_clip.create_model_and_transforms(
        "tiny-clip-64", pretrained=str(BUNDLED / "tiny_clip.safetensors"), **preprocessing)
    model.eval()
    with torch.no_grad():
        features = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]))
        return (features / features.norm(dim=-1, keepdim=True)).numpy()


def test_embeddings_are_those_of_open_clip_row_by_row(built):
    rows, pictures = Embeddings(built).all().astype(np.float32), pictures_of(built)
    assert len(rows) == len(pictures) == 72
    cosine = (rows * embedded_by_open_clip(pictures)).sum(1)
    assert cosine.min() > 1 - 1e-3
    # The comparison is sensitive: it fails for the next row, and for other means.
    assert (np.roll(rows, 1, axis=0) * rows).sum(1).min() < 0.9
    other = embedded_by_open_clip(pictures, image_mean=open_clip.OPENAI_DATASET_STD,
                                  image_std=open_clip.OPENAI_DATASET_MEAN)
    assert (rows * other).sum(1).min() < 1 - 1e-3


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize(("width", "height"), [(256, 256), (341, 256), (256, 341), (64, 64), (64, 97), (31, 50),
                                               (1000, 99), (640, 427)])
def test_images_are_preprocessed_as_in_open_clip(width, height, mode, interpolation):
    """Levels differ only by the rounding of two libraries. A crop one pixel further differs ten times as much."""
    preprocessing = open_clip.transform.PreprocessCfg(size=64, interpolation=interpolation, resize_mode=mode)
    encoder = replace(clip.load_encoder(ClipConfig()),
                      prepare=open_clip.transform.image_transform_v2(preprocessing, is_train=False),
                      preprocessing={"image_size": 64, "resize": mode, "interpolation": interpolation})
    picture = photo(width, height)
    data = synthetic.encoded(picture, "PNG")
    theirs = encoder.prepare(picture).numpy()
    ours = encoder.prepared(data)
    if mode == "longest":
        np.testing.assert_array_equal(ours, theirs)
        return
    mean, std = (np.array(values)[:, None, None] for values in (_MEAN, _STD))
    levels = (theirs * std + mean) * 255
    difference = np.abs(ours.transpose(2, 0, 1) - levels)
    assert difference.max() < 4.5 and difference.mean() < 0.5


def test_a_dozen_photographs_have_the_vectors_of_open_clip(tmp_path):
    """For JPEGs of many shapes and kinds the cosine to the steps of open_clip's documentation is at least 0.999."""
    shapes = [(300, 200), (200, 300), (256, 256), (500, 256), (256, 700), (64, 64), (90, 64), (640, 480), (65, 66),
              (128, 512), (333, 222), (257, 301)]
    kinds = [{}, {"quality": 60}, {"progressive": True}, {"subsampling": 0}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}]
    data = [synthetic.encoded(photo(*shape, seed), "JPEG", **({"quality": 95} | kinds[seed % len(kinds)]))
            for seed, shape in enumerate(shapes)]
    encoder = clip.load_encoder(ClipConfig())
    ours = encoder.images(np.stack([encoder.prepared(jpeg) for jpeg in data]))
    theirs = embedded_by_open_clip([Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in data])
    assert (ours * theirs).sum(1).min() > 1 - 1e-3
    assert np.abs(np.linalg.norm(ours, axis=1) - 1).max() < 1e-4
    # The bound is tight: a crop off the middle, or another kernel, is farther away.
    moved = np.stack([np.roll(encoder.prepared(jpeg), 2, axis=1) for jpeg in data])
    assert (encoder.images(moved) * theirs).sum(1).min() < 1 - 1e-3


def test_captions_have_embeddings_of_the_same_rows(copied):
    texts = EmbedCaptions(copied, EmbedConfig(batch_size=16))
    manifest = run_stage(texts)
    captions = [row["caption"] for record in copied.manifest("shards")["items"] for row in metadata(copied, record)]
    rows = np.concatenate([np.load(copied.fetch("text_embeddings", file_of(record, ".npy")))
                           for record in manifest["items"]])
    assert manifest["totals"]["samples"] == 72 and rows.dtype == np.float16
    expected = clip.load_encoder(ClipConfig()).texts(captions)
    assert (rows.astype(np.float32) * expected).sum(1).min() > 1 - 1e-3
    assert list(verify.find_faults(copied.root, copied.path("text_embeddings"))) == []


def test_samples_without_a_caption_are_named(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(2):
        synthetic.noise(32, 32).save(tmp_path / f"images/{number}.png")
    (tmp_path / "images/captions.csv").write_text("file,caption\n1.png,a caption\n")
    dataset = Dataset.parse(str(tmp_path / "root"), "some")
    run_stage(Shard(dataset, ShardConfig(source=str(tmp_path / "images"), image_size=32)))
    sealed = run_stage(EmbedCaptions(dataset, EmbedConfig(batch_size=16)))
    assert sealed["totals"]["samples"] == 2 and sealed["totals"]["noted"] == {"no_caption": 1}


def test_the_manifest_has_seconds_and_memory(built):
    for record in built.manifest("embeddings")["items"]:
        assert record["run"]["times"].keys() >= {"read", "decode", "forward", "wait", "write"}
        assert record["run"]["times"]["forward"] > 0 and record["run"]["peak_mb"] > 100


def test_rows_are_of_unit_length_and_half_precision(built):
    embeddings = Embeddings(built)
    assert all(shard.dtype == np.float16 for shard in embeddings.shards)
    assert np.abs(np.linalg.norm(embeddings.all().astype(np.float32), axis=1) - 1).max() < 1e-3
    assert [len(shard) for shard in embeddings.shards] == [30, 30, 12] and embeddings.dim == 256


def test_rows_by_id_are_rows_by_shard(built):
    embeddings, ids = Embeddings(built), np.array([[71, 0, 29], [30, -1, 59]])
    rows, every = embeddings.rows(ids), embeddings.all()
    assert rows.shape == (2, 3, 256) and not rows[1, 1].any()
    np.testing.assert_array_equal(rows[ids >= 0], every[ids[ids >= 0]])


def test_text_vectors_are_those_of_open_clip():
    encoder = clip.load_encoder(ClipConfig(precision="fp32"))
    model = encoder.model
    texts = ["a red heart", "blue square"]
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer("tiny-clip-64")(texts))
    expected = (expected / expected.norm(dim=-1, keepdim=True)).numpy()
    np.testing.assert_allclose(encoder.texts(texts), expected, atol=1e-4)
    assert (clip.load_encoder(ClipConfig(precision="bf16")).texts(texts) * expected).sum(1).min() > 1 - 1e-3


def test_the_description_is_that_of_the_loaded_encoder():
    description, encoder = describe_encoder(ClipConfig()), clip.load_encoder(ClipConfig())
    loaded = encoder.model.visual.preprocess_cfg
    assert description["dim"] == encoder.dim == 256
    preprocessing = description["preprocessing"]
    assert list(loaded["mean"]) == list(preprocessing["mean"]) and list(loaded["std"]) == list(preprocessing["std"])
    assert loaded["interpolation"] == preprocessing["interpolation"]
    assert loaded["resize_mode"] == preprocessing["resize"]
    assert json.loads(json.dumps(description)) == description


@pytest.mark.parametrize("model", ["ViT-B-16-SigLIP-256", "ViT-L-14", "ViT-B-32"])
def test_the_description_has_the_preprocessing_of_the_tag(model, tmp_path, monkeypatch):
    """The description follows from the names alone, because these weights are too large to fetch."""
    tag = open_clip.list_pretrained_tags_by_model(model)[0]
    (tmp_path / "w").write_bytes(b"weights")
    monkeypatch.setattr(clip_weights, "is_offered", lambda *_: False)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_, **__: str(tmp_path / "w"))
    preprocessing = describe_encoder(ClipConfig(model, tag))["preprocessing"]
    expected = open_clip.factory.PreprocessCfg(**{key: value for key, value in open_clip.get_pretrained_cfg(
        model, tag).items() if key in open_clip.factory.PreprocessCfg.__dataclass_fields__})
    assert (list(preprocessing["mean"]), list(preprocessing["std"])) == (list(expected.mean), list(expected.std))
    assert (preprocessing["interpolation"], preprocessing["resize"]) == (expected.interpolation, expected.resize_mode)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_batch_size_changes_vectors_by_rounding_only(built, copied, size):
    shutil.rmtree(copied.folder("embeddings"))
    run_stage(Embed(copied, EmbedConfig(batch_size=size)))
    expected, vectors = Embeddings(built).all().astype(np.float32), Embeddings(copied).all().astype(np.float32)
    assert (expected * vectors).sum(1).min() > 1 - 1e-3


@pytest.mark.parametrize("threads", [1, 3])
def test_two_runs_give_the_same_bytes_with_any_number_of_threads(threads, built, copied, monkeypatch):
    before = torch.get_num_threads()
    shutil.rmtree(copied.folder("embeddings"))
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(1)
    try:
        run_stage(Embed(copied, EmbedConfig(batch_size=16)))
    finally:
        torch.set_num_threads(before)
    assert without_run_facts(copied.manifest("embeddings")) == without_run_facts(built.manifest("embeddings"))


def test_a_small_shard_keeps_two_threads_busy(copied, monkeypatch):
    """Each forward pass waits for another one, so with fewer than two threads the test would not end."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    shutil.rmtree(copied.folder("embeddings"))
    encoder, barrier, sizes = clip.load_encoder(ClipConfig()), threading.Barrier(2, timeout=60), []
    encode = encoder.encode

    def encode_together(batch):
        barrier.wait()
        sizes.append(len(batch))
        return encode(batch)
    monkeypatch.setattr(encoder, "encode", encode_together)
    stage = Embed(copied, EmbedConfig())
    for item in prepare(stage)[:2]:
        process_and_commit(stage, item)
    assert sizes == [15] * 4


@pytest.mark.parametrize("size", [1, 16, 500])
def test_forward_passes_have_even_and_efficient_sizes(size):
    for count in range(1, 200):
        part = samples_per_pass(count, size)
        sizes = [min(part, count - first) for first in range(0, count, part)]
        assert sum(sizes) == count and max(sizes) <= min(size, 32)
        assert len(sizes) > 1 or count < 16 or size == 1
    assert samples_per_pass(0, size) == 1 and samples_per_pass(64, 128) == 32 and samples_per_pass(65, 128) == 22


def test_another_encoder_on_the_same_folder_is_refused_and_named(copied, weights):
    with pytest.raises(ValueError, match=r'section\.encoder\.pretrained: there "bundled", now "file"'):
        run_stage(Embed(copied, EmbedConfig(pretrained=str(weights))))
    with pytest.raises(ValueError, match=r'section\.precision: there "auto", now "bf16"'):
        run_stage(Embed(copied, EmbedConfig(batch_size=16, precision="bf16")))


def test_weights_in_a_file_give_the_same_vectors(built, copied, weights):
    shutil.rmtree(copied.folder("embeddings"))
    run_stage(Embed(copied, EmbedConfig(pretrained=str(weights), batch_size=16)))
    np.testing.assert_array_equal(Embeddings(built).all(), Embeddings(copied).all())
    # The weights are equal, but the user chose other names for them.
    with pytest.raises(ValueError, match="pretrained"):
        check_same_encoder(built, copied)


def change_weights(weights, folder):
    """Other weights under the same name in another folder."""
    from safetensors.torch import load_file, save_file
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("proj"))
    tensors[name] = tensors[name] + 0.1
    save_file(tensors, folder / "w.safetensors")
    return folder / "w.safetensors"


def test_other_weights_under_the_same_name_are_refused(copied, weights, tmp_path):
    shutil.rmtree(copied.folder("embeddings"))
    copied_weights = shutil.copy(weights, tmp_path / "w.safetensors")
    config = EmbedConfig(pretrained=str(copied_weights))
    run_stage(Embed(copied, config))
    change_weights(weights, tmp_path)
    describe_encoder.cache_clear()
    with pytest.raises(ValueError, match=r"section\.encoder\.weights_sha256"):
        run_stage(Embed(copied, config))


def test_a_worker_with_other_weights_than_the_plan_is_refused(copied, weights, tmp_path):
    """The file has the same name on every machine, but not the same bytes."""
    shutil.rmtree(copied.folder("embeddings"))
    copied_weights = shutil.copy(weights, tmp_path / "w.safetensors")
    stage = Embed(copied, EmbedConfig(pretrained=str(copied_weights)))
    items = prepare(stage)
    change_weights(weights, tmp_path)
    describe_encoder.cache_clear()
    with pytest.raises(ValueError, match="not those of the plan"):
        process_and_commit(stage, items[0])
    assert storage.list_files(storage.join(stage.folder, "records")) == []


def test_a_model_unknown_to_open_clip_is_refused(copied, tmp_path):
    (tmp_path / "wrong.safetensors").write_bytes(b"no weights")
    for config, message in [
        (EmbedConfig(model="no-such-model", pretrained=__file__), "open_clip knows no model"),
        (EmbedConfig(pretrained="no-such-tag"), "open_clip has no weights 'no-such-tag'"),
        (EmbedConfig(model="ViT-B-32"), "only tiny-clip-64 is bundled"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            Embed(copied, config).section()
        assert "hint:" in str(caught.value)
    with pytest.raises(ValueError, match="cannot load"):
        clip.load_encoder(ClipConfig(pretrained=str(tmp_path / "wrong.safetensors")))
    with pytest.raises(ValueError, match="batch_size"):
        Embed(copied, EmbedConfig(batch_size=0))


def test_a_tar_cut_between_two_members_is_refused(copied):
    """Such a tar reads without an error. Only its manifest shows the missing members."""
    shutil.rmtree(copied.folder("embeddings"))
    manifest_path = storage.join(copied.folder("shards"), "manifest.json")
    manifest = storage.read_json(manifest_path)
    entry = file_of(manifest["items"][1], ".tar")
    path = storage.local_path(storage.join(copied.folder("shards"), entry["name"]))
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[-3].offset
    path.write_bytes(path.read_bytes()[:cut])
    assert len(list(tars.read(path))) == 29
    with pytest.raises(StageFailed, match="is not the file its manifest describes"):
        run_stage(Embed(copied, EmbedConfig()))
    # It is refused even if the manifest was written again for the shorter file.
    entry |= storage.describe_file(entry["name"], path)
    storage.put_json(manifest, manifest_path)
    shutil.rmtree(copied.folder("embeddings"))
    with pytest.raises(StageFailed, match="does not have the 30 samples"):
        run_stage(Embed(copied, EmbedConfig()))


def test_an_undecodable_image_is_a_row_of_zeros(copied, built):
    shutil.rmtree(copied.folder("embeddings"))
    folder = copied.folder("shards")
    manifest = storage.read_json(storage.join(folder, "manifest.json"))
    entry = file_of(manifest["items"][1], ".tar")
    path = storage.local_path(storage.join(folder, entry["name"]))
    samples = list(tars.read(path))
    for row in (0, 16, 29):
        samples[row]["png"] = b"spoiled"
    tars.write(path, [{key: value for key, value in sample.items() if key != "__url__"} for sample in samples])
    entry |= storage.describe_file(entry["name"], path)
    storage.put_json(manifest, storage.join(folder, "manifest.json"))
    sealed = run_stage(Embed(copied, EmbedConfig(batch_size=8)))
    assert sealed["totals"]["noted"] == {"undecodable": 3} and sealed["totals"]["samples"] == 72
    rows, expected = Embeddings(copied).all(), Embeddings(built).all()
    assert np.flatnonzero(~rows.any(1)).tolist() == [30, 46, 59]
    rest = rows.any(1)
    assert (rows[rest].astype(np.float32) * expected[rest]).sum(1).min() > 1 - 1e-3


def test_a_shard_without_samples_has_embeddings_without_rows(tmp_path):
    source = synthetic.drawings(tmp_path / "source", subjects=1, size=16)
    for number in range(4):
        (source / f"a{number}.png").write_bytes(b"no picture")
    dataset = Dataset.parse(str(tmp_path), "x")
    run_stage(Shard(dataset, ShardConfig(source=str(source), samples_per_shard=4, image_size=16)))
    run_stage(Embed(dataset, EmbedConfig()))
    assert [shard.shape for shard in Embeddings(dataset).shards] == [(0, 256), (4, 256), (2, 256)]


def test_unsealed_shards_are_refused_with_the_command(tmp_path):
    dataset = Dataset.parse(str(tmp_path), "x@v2")
    with pytest.raises(ValueError, match=r"no dataset x in .*\nhint: python -m jobs shard x@v2 --source FOLDER --root"):
        run_stage(Embed(dataset, EmbedConfig()))
