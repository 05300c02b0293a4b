"""Scores: rows align, heads give the results of torch, and impossible requests are refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from jobs.cli.main import main
from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings
from pipeline.datasets.metadata import metadata
from pipeline.datasets.row_columns import RowSelection
from pipeline.scores.config import ScoreConfig
from pipeline.scores.score import Score
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from pipeline.versions import verify
from tests.pipeline import synthetic

DOCUMENT = Path(__file__).parents[3] / "docs/guides/score.md"
WARM = "tests.pipeline.scores.warm"
VECTORS = synthetic.clustered(60, 16)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three shards; one image did not decode."""
    vectors = VECTORS.copy()
    vectors[7] = 0
    return synthetic.vector_dataset(tmp_path / "root", "x", np.array_split(vectors, 3))


def predictor(width: int, *sizes: int) -> dict[str, torch.Tensor]:
    """Layers of random weights. Their numbers have gaps for dropout, as in the aesthetic predictor of LAION."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for number, size in enumerate(sizes):
        tensors[f"layers.{4 * number}.weight"] = torch.randn(size, width, generator=generator)
        tensors[f"layers.{4 * number}.bias"] = torch.randn(size, generator=generator)
        width = size
    return tensors


def write_head(path: Path, tensors: dict[str, torch.Tensor], **about: str) -> str:
    save_file(tensors, path, metadata=about or None)
    return str(path)


def scores_of(dataset: Dataset, name: str, column: str = "") -> np.ndarray:
    tables = [pq.read_table(dataset.fetch(f"scores/{name}", file_of(record, ".parquet")))
              for record in dataset.manifest(f"scores/{name}")["items"]]
    return np.concatenate([table[column or name].to_numpy() for table in tables])


@pytest.mark.parametrize(("sizes", "about", "between", "after"), [
    ((1,), {}, None, None), ((1,), {"output": "sigmoid"}, None, torch.sigmoid),
    ((8, 4, 1), {"activation": "none"}, None, None), ((8, 4, 1), {"activation": "relu"}, torch.relu, None),
    ((8, 4, 8, 1), {"activation": "tanh", "output": "sigmoid"}, torch.tanh, torch.sigmoid)])
def test_a_head_gives_the_result_of_torch(tmp_path, dataset, sizes, about, between, after):
    tensors = predictor(16, *sizes)
    manifest = run_stage(Score(dataset, f"good={write_head(tmp_path / 'a.safetensors', tensors, **about)}",
                               ScoreConfig()))
    rows = torch.from_numpy(Embeddings(dataset).all().astype(np.float32))
    for number in range(len(sizes)):
        rows = rows @ tensors[f"layers.{4 * number}.weight"].T + tensors[f"layers.{4 * number}.bias"]
        rows = between(rows) if between and number + 1 < len(sizes) else rows
    expected = (after(rows) if after else rows)[:, 0].numpy()
    scores = scores_of(dataset, "good")
    assert np.isnan(scores[7]) and np.isnan(scores).sum() == 1
    np.testing.assert_allclose(np.delete(scores, 7), np.delete(expected, 7), rtol=1e-4, atol=1e-5)
    assert manifest["totals"]["noted"] == {"no_vector": 1} and manifest["info"]["columns"] == ["good"]
    keys = [row["key"] for record in dataset.manifest("shards")["items"] for row in metadata(dataset, record, ["key"])]
    assert [key for record in manifest["items"] for key in pq.read_table(
        dataset.fetch("scores/good", file_of(record, ".parquet")))["key"].to_pylist()] == keys
    assert list(verify.find_faults(dataset.root, dataset.path("scores/good"))) == []


@pytest.mark.slow
def test_a_head_of_a_hub_is_found_in_its_cache(tmp_path, dataset):
    """Laid out as huggingface_hub leaves it; there is no network in tests."""
    snapshot = tmp_path / "hub/models--someone--head/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)
    write_head(snapshot / "model.safetensors", predictor(16, 1))
    arguments = ["score", "x", "--root", dataset.root, "--local", "--head"]
    codes = [subprocess.run([sys.executable, "-m", "jobs", *arguments, f"{name}=hf-hub:someone/{repository}"], env={
        **os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}, cwd=DOCUMENT.parents[2]).returncode
             for name, repository in (("good", "head"), ("better", "other"))]
    assert codes == [0, 2] and np.isnan(scores_of(dataset, "good")).sum() == 1


def test_several_outputs_are_columns_with_names(tmp_path, dataset):
    head = write_head(tmp_path / "a.safetensors", predictor(16, 3), output="softmax", labels="drawing, photo,other")
    run_stage(Score(dataset, f"kind={head}", ScoreConfig()))
    columns = [scores_of(dataset, "kind", f"kind_{label}") for label in ("drawing", "photo", "other")]
    np.testing.assert_allclose(np.delete(sum(columns), 7), 1, rtol=1e-5)
    run_stage(Score(dataset, f"two={WARM}:score_twice", ScoreConfig()))
    first = Embeddings(dataset).all()[:, 0].astype(np.float32)
    root = scores_of(dataset, "two", "two_root")
    assert (np.isnan(root) == ((first < 0) | (np.arange(60) == 7))).all()
    assert dataset.manifest("scores/two")["totals"]["noted"] == {"no_vector": 1, "not_finite": int((first < 0).sum())}


@pytest.mark.parametrize(("tensors", "about", "fault"), [
    (predictor(24, 1), {}, "expected vectors of 24 numbers, got 16"),
    (predictor(16, 8, 1), {}, "2 layers and does not say what is between them"),
    (predictor(16, 1), {"encoder": "ViT-L-14 openai"}, "expected ViT-L-14 openai, got given"),
    (predictor(16, 1), {"output": "square"}, "output is 'square'"),
    (predictor(16, 2), {"labels": "a,b,c"}, "has 2 outputs, and its metadata name 3: a, b, c"),
    (predictor(16, 2), {"labels": "a, a"}, "has 2 outputs, and its metadata name 2: a, a"),
    (predictor(16, 1), {"output": "softmax"}, "has one output: expected two or more for softmax"),
    (predictor(16, 1) | {"norm.running_mean": torch.zeros(3)}, {}, "linear layers alone, got norm.running_mean"),
    (predictor(16, 8) | {"layers.9.weight": torch.zeros(1, 5)}, {"activation": "none"}, "expected (n, 8), got (1, 5)"),
    ({"table": torch.zeros(2)}, {}, "linear layers alone, got table")])
def test_a_head_that_does_not_fit_is_refused_with_both_values(tmp_path, dataset, tensors, about, fault):
    with pytest.raises(ValueError) as error:
        run_stage(Score(dataset, f"good={write_head(tmp_path / 'a.safetensors', tensors, **about)}", ScoreConfig()))
    assert fault in str(error.value) and "hint: " in str(error.value)


def test_an_invalid_head_is_refused(tmp_path, dataset, capsys):
    torch.save(predictor(16, 1), tmp_path / "a.pth")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.pth").read_bytes())
    for spec, fault in ((f"good={tmp_path / 'a.pth'}", "no file of safetensors: expected FILE.safetensors or module"),
                        (f"good={tmp_path / 'b.safetensors'}", "cannot be read as safetensors"),
                        (f"good={tmp_path / 'c.safetensors'}", "there is no file"), ("good", "expected NAME=HEAD"),
                        ("good=hf-hub:one/two/pytorch_model.bin", "no file of safetensors"), ("a b=c", "NAME=HEAD"),
                        ("good=no_such_module:score", "there is no module no_such_module"),
                        (f"good={WARM}:nothing", "has no function nothing"),
                        (f"key={WARM}:score", "a column key already")):
        assert main(["score", "x", "--root", dataset.root, "--local", "--head", spec]) == 2
        error = capsys.readouterr().err
        assert fault in error and "hint: " in error and "Traceback" not in error
    with pytest.raises(StageFailed, match=r"expected numbers \(19,\), got float32 \(18,\) for good"):
        run_stage(Score(dataset, f"good={WARM}:score_too_few", ScoreConfig()))


def test_row_filters_take_scores_and_metadata(tmp_path, dataset):
    run_stage(Score(dataset, f"warmth={WARM}:score", ScoreConfig()))
    first = Embeddings(dataset).all()[:, 0].astype(np.float32)
    mask = RowSelection(dataset, 'warmth > 0 and key != "000-00001"').mask()
    assert (mask == ((first > 0) & (np.arange(60) != 1))).all()
    assert (RowSelection(dataset, "warmth is None").mask() == (np.arange(60) == 7)).all()
    assert (RowSelection(dataset, 'match(key, "^001")').mask() == (np.arange(60) // 20 == 1)).all()
    with pytest.raises(ValueError, match=r"names nsfw, and x has no such column: .* score \(warmth\)\nhint: .* score"):
        RowSelection(dataset, "nsfw < 0.5")
    run_stage(Score(dataset, f"good={write_head(tmp_path / 'a.safetensors', predictor(16, 1))}", ScoreConfig()))
    assert sorted(RowSelection(dataset, "good > 0 or warmth > 0").inputs()) == ["scores/good", "scores/warmth"]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def test_the_conversion_in_the_document_works(tmp_path, monkeypatch, capsys):
    vectors = synthetic.clustered(20, 768)
    dataset = synthetic.vector_dataset(tmp_path / "root", "x", [vectors], encoder={
        "model": "ViT-L-14", "pretrained": "openai", "dim": 768})
    tensors = predictor(768, 32, 16, 1)
    monkeypatch.chdir(tmp_path)
    torch.save(tensors, "sac+logos+ava1-l14-linearMSE.pth")
    exec(blocks()[0])
    assert main(["score", "x", "--root", dataset.root, "--local", "--head", "aesthetic=aesthetic.safetensors"]) == 0
    rows = torch.from_numpy(Embeddings(dataset).all().astype(np.float32))
    for number in range(3):
        rows = rows @ tensors[f"layers.{4 * number}.weight"].T + tensors[f"layers.{4 * number}.bias"]
    np.testing.assert_allclose(scores_of(dataset, "aesthetic"), rows[:, 0].numpy(), rtol=1e-3, atol=1e-3)


def test_the_function_in_the_document_scores_images(tmp_path, monkeypatch, copied, capsys):
    (tmp_path / "warmth.py").write_text(blocks()[1])
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["score", copied.label, "--root", copied.root, "--local", "--head", "warmth=warmth:score"]) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["samples"] == 72 and summary["head"] == "warmth:score"
    scores = scores_of(copied, "warmth")
    captions = [row["caption"] for record in copied.manifest("shards")["items"] for row in metadata(copied, record)]
    red, blue = (np.median([score for score, caption in zip(scores, captions, strict=True) if color in caption])
                 for color in ("red", "blue"))
    assert red > blue
    assert main(["status", "--root", copied.root]) == 0 and "scores/warmth" in capsys.readouterr().out
    assert main(["verify", "--root", copied.root]) == 0
    storage.put_bytes(b"", storage.join(copied.folder("scores/warmth"), "000001.parquet"))
    assert main(["verify", "--root", copied.root]) == 1
