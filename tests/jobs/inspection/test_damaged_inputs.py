"""A plan whose inputs lie outside the root, or are no folder, costs only its own folder."""

import json
import shutil
from pathlib import Path

import pytest

from jobs.cli.main import main
from pipeline.datasets.dataset import Dataset
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from tests.pipeline import synthetic


@pytest.mark.parametrize(("path", "fault"), [
    ("../../../../../etc/passwd", "embeddings/plan.json is damaged at inputs.shards.path"),
    ("/etc/passwd", "embeddings/plan.json is damaged at inputs.shards.path"),
    ("file:///etc/passwd", "embeddings/plan.json is damaged at inputs.shards.path"),
    ("datasets/good/v1/shards/plan.json", "rebuilt since: shards")])
def test_a_damaged_plan_does_not_hide_other_datasets(tmp_path: Path, path: str, fault: str,
                                                     capsys: pytest.CaptureFixture[str] ) -> None:
    synthetic.drawings(tmp_path / "source")
    root = str(tmp_path / "root")
    run_stage(Shard(Dataset(root, "good"), ShardConfig(source=(str(tmp_path / "source"),), image_size=32)))
    folder = tmp_path / "root/datasets/bad/v1/embeddings"
    folder.mkdir(parents=True)
    plan = json.loads((tmp_path / "root/datasets/good/v1/shards/plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"inputs": {"shards": {"path": path, "digest": "0" * 64}}}))
    assert main(["status", "--root", root]) == 0
    out = capsys.readouterr().out
    assert fault in out and "datasets/good/v1/shards" in out and "sealed" in out
    damaged = fault.startswith("embeddings")
    assert main(["verify", "--root", root]) == int(damaged)
    assert (fault in capsys.readouterr().out) == damaged
    assert main(["report", "--root", root]) == 0
    shutil.rmtree(folder)
    assert main(["verify", "--root", root]) == 0
