"""`forget` names the files that have copies of an image, with commands that make them again without it."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.cli.main import main
from pipeline import storage
from pipeline.datasets.metadata import metadata
from tests.jobs.publishing.published_art import NAME, published_dataset


def exported_keys(root: Path, version: str) -> list[str]:
    folder = root / "datasets" / NAME / version / "clip-retrieval/metadata"
    return [key for path in sorted(folder.iterdir()) for key in pq.read_table(path)["key"].to_pylist()]


def test_an_export_and_a_report_are_named_and_made_again(second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = second / "root"
    at_root = ["--root", str(root)]
    export = ["embed", NAME, "--export", "clip-retrieval", "--local", *at_root]
    assert main(export) == 0  # a name without a version is the published one
    assert not (root / "datasets" / NAME / "v1/clip-retrieval").exists() and len(exported_keys(root, "v2")) == 73
    dataset = published_dataset(root)
    key = metadata(dataset, dataset.manifest("shards")["items"][0])[0]["key"]
    request = ["forget", "--key", f"{NAME}/{key}", *at_root]
    assert main([*request, "--dry-run"]) == 0
    assert "report.html" not in capsys.readouterr().out
    (root / "report.html").write_text("<html>")
    assert main(request) == 0
    said = capsys.readouterr().out
    folder = f"datasets/{NAME}/v2/clip-retrieval"
    assert f"an export that has them: {folder}\n" in said and "a report that may show them: " in said
    assert (f"python -m jobs rm {folder} --root {root} && python -m jobs embed {NAME}@v2 --export clip-retrieval "
            f"--root {root}\n") in said
    assert main(export) == 2  # it would have other rows
    capsys.readouterr()
    assert main(["rm", folder, "--yes", *at_root]) == 0
    assert main(["embed", f"{NAME}@v2", "--export", "clip-retrieval", "--local", *at_root]) == 0
    assert key not in exported_keys(root, "v2") and len(exported_keys(root, "v2")) == 72
    capsys.readouterr()
    assert main(request) == 0
    assert "an export" not in capsys.readouterr().out
    assert main(["verify", *at_root]) == 0


def test_own_neighbor_lists_and_users_that_keep_the_bytes_are_named(second: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    root = str(second / "root")
    dataset = published_dataset(root)
    assert main(["neighbors", NAME, "--local", "--root", root]) == 0
    inputs = {"database": dataset.identity("embeddings")}
    storage.put_json({"stage": "train", "inputs": inputs}, storage.join(root, "runs/consumer/plan.json"))
    key = metadata(dataset, dataset.manifest("shards")["items"][0])[0]["key"]
    capsys.readouterr()
    assert main(["forget", "--key", f"{NAME}/{key}", "--root", root]) == 0
    said = capsys.readouterr().out
    assert f"neighbor lists made with it: datasets/{NAME}/v2/neighbors/{NAME}@v2\n" in said
    assert (f"  gc keeps {NAME}@v2 while runs/consumer uses it; to remove that: python -m jobs rm runs/consumer --root "
            f"{root}\n") in f"{said}\n"
