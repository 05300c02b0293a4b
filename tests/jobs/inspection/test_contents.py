"""`ls` shows the states of `status` by dataset and run. `show` prints everything about one row."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.cli.main import main
from jobs.inspection import watch
from jobs.inspection.contents import contents_table, list_contents, list_stages, stages_table
from jobs.inspection.show import row_text, show_row
from jobs.inspection.status import read_status, status_table
from jobs.runs.run import Run
from jobs.runs.targets import target_path
from jobs.training.export import BUNDLED, BUNDLED_RUN, import_run
from pipeline.datasets import lookup
from pipeline.datasets.dataset import Dataset
from pipeline.stages.driver import run_stage
from pipeline.takedowns.hidden_rows import Tombstones
from pipeline.takedowns.takedowns import hide_rows
from tests.pipeline import synthetic


@pytest.fixture
def root(trained_root: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(trained_root, tmp_path / "root"))


def _printed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert main([*words]) == 0
    return json.loads(capsys.readouterr().out)


def test_ls_sums_up_the_states_of_status(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    states = {state["path"]: state for state in read_status(root)}
    entries = {entry["path"]: entry for entry in _printed(capsys, "ls", "--root", root)}
    assert set(entries) == {"datasets/drawn/v1", "datasets/flat/v1", "datasets/hatched/v1", "datasets/outline/v1",
                            "runs/small"}
    flat = [state for path, state in states.items() if path.startswith("datasets/flat/") and "bytes" in state]
    assert entries["datasets/flat/v1"] == {
        "path": "datasets/flat/v1", "state": "sealed", "rows": states["datasets/flat/v1/shards"]["samples"],
        "bytes": sum(state["bytes"] for state in flat), "sealed": max(state["sealed"] for state in flat)}
    table = contents_table(list(entries.values()), root)
    assert all(len(line) <= 80 for line in table.splitlines()) and len(table.splitlines()) == 6


def test_parameters_of_an_imported_run_are_no_rows(tmp_path: Path) -> None:
    import_run(Run.parse(str(tmp_path), BUNDLED_RUN), BUNDLED)
    entry, = list_contents(str(tmp_path))
    assert (entry["path"], entry["rows"], entry["state"]) == ("runs/emoji_32", None, "sealed")
    assert entry["bytes"] > 16 << 20  # the weights
    assert "4,191,280 parameters" in status_table(str(tmp_path), read_status(str(tmp_path)))
    watched = watch.read_snapshot(str(tmp_path))
    assert watched["stages"][0]["rows"] is None and "4191280" not in watch.snapshot_text(watched)


def test_ls_names_stale_damaged_and_unfinished_folders(root: str) -> None:
    folder = Path(root, "datasets")
    (folder / "flat/v1/embeddings/manifest.json").unlink()
    (folder / "outline/v1/index/manifest.json").write_bytes(b"{")
    (folder / "empty/v1").mkdir(parents=True)
    states = {entry["path"].split("/")[1]: entry["state"] for entry in list_contents(root)}
    assert states == {"drawn": "sealed", "flat": "index stale", "hatched": "sealed", "outline": "index damaged",
                      "empty": "empty", "small": "sealed"}
    stages = {stage["path"]: stage for stage in list_stages(root, "datasets/outline/v1")}
    assert {"name": "manifest.json", "bytes": 1} in stages["datasets/outline/v1/index"]["files"]


def test_ls_of_a_dataset_has_the_files_of_each_stage(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    stages = _printed(capsys, "ls", "drawn", "--root", root)
    assert [stage["path"] for stage in stages] == [f"datasets/drawn/v1/{name}" for name in (
        "shards", "embeddings", "index", "neighbors/drawn")]
    for stage in stages:
        assert stage["files"]
        for file in stage["files"]:
            assert Path(root, stage["path"], file["name"]).stat().st_size == file["bytes"]
    assert [stage["path"] for stage in list_stages(root, target_path(root, f"{root}/runs/small"))] == ["runs/small"]


@pytest.mark.parametrize(("text", "path"), [
    ("mine", "datasets/mine"), ("mine@v2", "datasets/mine/v2"), ("runs/a/", "runs/a"), ("/r/runs/a/samples/b",
                                                                                       "runs/a/samples/b")])
def test_a_target_names_a_path(text: str, path: str) -> None:
    assert target_path("/r", text) == path


@pytest.mark.parametrize("text", ["..", "../x", "runs", "datasets", "runs/../x", "leases/x", "a\x1b", "", "/o/runs/a",
                                  "runs//a", "a@b@c", "runs/a@b"])
def test_an_invalid_target_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no dataset, run or stage: expected .*\nhint: python -m jobs ls"):
        target_path("/r", text)


def test_a_mistyped_name_is_suggested(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, text, hint in (("ls", "flta", "did you mean flat?"), ("versions", "flta", "did you mean flat?"),
                             ("ls", "runs/smal", "did you mean runs/small?"), ("ls", "zz", "python -m jobs ls --root")):
        assert main([verb, text, "--root", root]) == 2
        assert f"hint: {hint}" in capsys.readouterr().err


def test_versions_of_an_unpublished_dataset_are_listed(root: str, capsys: pytest.CaptureFixture[str],
                                                       caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert main(["versions", "flat", "--root", root]) == 0
    assert capsys.readouterr().out == "v1  not published\n"
    assert "nothing of flat is published\nhint: python -m jobs rebuild flat --source SOURCE" in caplog.text


def test_show_prints_everything_about_a_row(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Dataset(root, "drawn")
    sample = lookup.samples(dataset, [60])[0]
    table = pq.ParquetFile(Path(dataset.folder("shards"), "000001.parquet")).read()
    document = _printed(capsys, "show", sample.key, "--dataset", "drawn", "--root", root, "--out",
                        str(tmp_path / "shown.png"))
    assert (document["row"], document["shard"], document["position"]) == (60, "000001", 10)
    assert document["caption"] == sample.caption and document["columns"]["sha256"] == sample.sha256
    assert set(document["columns"]) == set(table.column_names)
    assert (tmp_path / "shown.png").read_bytes() == sample.picture
    assert document["image"] | {"path": ""} == {"path": "", "format": "png", "width": 32, "height": 32,
                                                "bytes": len(sample.picture)}
    ids = np.load(Path(dataset.folder("neighbors/drawn"), "000001.ids.npy"))[10]
    neighbors = document["neighbors"]["drawn"]
    assert [neighbor["row"] for neighbor in neighbors] == [row for row in ids.tolist() if row >= 0]
    rows = lookup.samples(dataset, [neighbor["row"] for neighbor in neighbors])
    assert [(neighbor["key"], neighbor["caption"]) for neighbor in neighbors] == [
        (row.key, row.caption) for row in rows]
    assert not document["hidden"] and not document["forgotten"] and not document["published"]
    assert show_row(root, f"drawn/{document['name']}")["row"] == 60  # by its name in the source
    assert sample.caption in row_text(document)


def test_hidden_and_forgotten_rows_are_marked(root: str, tmp_path: Path) -> None:
    dataset = Dataset(root, "flat")
    keys = [sample.key for sample in lookup.samples(dataset, [0, 1, 2])]
    (tmp_path / "keys").write_text(keys[0])
    run_stage(Tombstones(dataset, str(tmp_path / "keys")))
    hide_rows(dataset, [1], 0)
    shown = [show_row(root, f"flat/{key}") for key in keys]
    assert [(row["hidden"], row["forgotten"]) for row in shown] == [(True, False), (True, True), (False, False)]


def test_a_skipped_row_is_shown_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = tmp_path / "source", str(tmp_path / "root")
    source.mkdir()
    synthetic.noise(32, 32, 1).save(source / "good.png")
    synthetic.noise(32, 32, 2).save(source / "warned.gif", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    (source / "broken.png").write_bytes(b"nothing")
    assert main(["shard", "mine", "--source", str(source), "--image-size", "32", "--local", "--root", root]) == 0
    broken = _printed(capsys, "show", "broken.png", "--root", root)
    assert broken["row"] is None and "image" not in broken
    assert [(entry["stage"], entry["reason"], entry["kept"]) for entry in broken["ledger"]] == [
        ("shards", "not_a_picture", False)]
    assert broken == _printed(capsys, "show", broken["key"], "--root", root)
    warned = _printed(capsys, "show", "warned.gif", "--root", root)
    assert warned["row"] == 1 and [entry["reason"] for entry in warned["ledger"]] == ["animated"]
    assert Image.open(io.BytesIO(Path(warned["image"]["path"]).read_bytes())).size == (32, 32)
    assert "left out" in row_text(broken | {"published": True}) and "published" not in row_text(
        broken | {"published": True})
    assert "animated" in row_text(warned)


def test_ambiguous_and_unknown_keys_are_refused(root: str) -> None:
    key = lookup.samples(Dataset(root, "flat"), [0])[0].key
    with pytest.raises(ValueError, match=rf"{key} is in 4 datasets: drawn, flat, hatched, outline\nhint: python -m "
                                         rf"jobs show {key} --dataset drawn"):
        show_row(root, key)
    with pytest.raises(ValueError, match=r"has no row nothing: .* looked in drawn, flat, hatched, outline\nhint: "):
        show_row(root, "nothing")
    with pytest.raises(ValueError, match="did you mean flat"):
        show_row(root, key, "flta")


def test_a_row_is_found_by_the_last_part_of_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, own = tmp_path / "source", str(tmp_path / "root")
    for name in ("a/apple 15.png", "a/pear.png", "b/pear.png"):
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        synthetic.noise(32, 32, len(name)).save(source / name)
    assert main(["shard", "mine", "--source", str(source), "--image-size", "32", "--local", "--root", own]) == 0
    capsys.readouterr()
    assert show_row(own, "mine/apple 15.png") == show_row(own, "a/apple 15.png")
    with pytest.raises(ValueError, match=r"2 rows have the file name pear\.png: mine/a/pear\.png, mine/b/pear\.png\n"
                                         r"hint: python -m jobs show mine/a/pear\.png"):
        show_row(own, "pear.png")


def test_a_sealed_run_has_the_files_of_its_folder(trained_root: Path) -> None:
    run = next(stage for stage in list_stages(str(trained_root), "runs/small") if stage["path"] == "runs/small")
    names = {entry["name"] for entry in run["files"]}
    assert run["state"] == "sealed" and {"manifest.json", "metrics.jsonl"} <= names


def test_the_table_of_files_has_the_first_ones_of_a_stage(root: str) -> None:
    stage = list_stages(root, "datasets/drawn/v1/shards")[0]
    stage["files"] = [{"name": f"{number}.tar", "bytes": 1} for number in range(12)]
    shown = stages_table([stage])
    assert "9.tar" in shown and "10.tar" not in shown and "and 2 more files" in shown
