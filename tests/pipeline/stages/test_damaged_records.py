"""Damage in an unfinished stage: the item of a damaged record is processed again, and a damaged plan is named."""

import json
import logging
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.stages import records
from pipeline.stages.documents import check_plan, check_release
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import read_manifest, without_run_facts
from pipeline.stages.types import StageFailed
from tests.pipeline.stages.count_stage import Count, lasting_files, stage_folder

_DAMAGE = {"not JSON": b"{", "empty": b"", "nested": b"[" * 100_000, "no UTF-8": b"\xff", "a list": b"[]",
           "huge": json.dumps({"id": "000001", "samples": 10**30}).encode()}


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A stage folder with records of five items; the sixth failed."""
    with pytest.raises(StageFailed):
        run_stage(Count(tmp_path, broken={"000005": ValueError("no")}))
    return tmp_path / "count"


@pytest.mark.parametrize("damage", [*_DAMAGE, "another item", "text for a number", "no plan", "deep info",
                                    "a file outside", "a whole address"])
def test_the_item_of_a_damaged_record_is_processed_again(unfinished: Path, tmp_path: Path, damage: str,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    path = unfinished / "records/000001.json"
    record = json.loads(path.read_text())
    deep: dict[str, object] = {}
    for _ in range(300):
        deep = {"a": deep}
    changes = {"another item": {"id": "000002"}, "text for a number": {"samples": "2"}, "deep info": {"info": deep},
               "no plan": {"plan": None}, "a file outside": {"files": [record["files"][0] | {"name": "../x"}]},
               "a whole address": {"files": [record["files"][0] | {"name": "/etc/a.tar"}]}}
    path.write_bytes(_DAMAGE[damage] if damage in _DAMAGE else json.dumps(record | changes[damage]).encode())
    again = Count(tmp_path)
    with caplog.at_level(logging.WARNING):
        manifest = run_stage(again)
    assert sorted(again.processed) == ["000001", "000005"]
    assert caplog.text.count(f"{path} is") == 1 and "the item is processed again" in caplog.text
    whole = Path(stage_folder(Count(tmp_path / "whole")))
    assert lasting_files(unfinished) == lasting_files(whole)
    assert without_run_facts(manifest) == without_run_facts(json.loads((whole / "manifest.json").read_text()))


@pytest.mark.parametrize("damage", _DAMAGE)
def test_damaged_reports_and_failures_change_nothing(unfinished: Path, tmp_path: Path, damage: str) -> None:
    for name in ("progress/000003.json", "progress.json", "failures/000005.json", "failures/zzz.json"):
        (unfinished / name).parent.mkdir(exist_ok=True)
        (unfinished / name).write_bytes(_DAMAGE[damage])
    again = Count(tmp_path)
    run_stage(again)
    assert again.processed == ["000005"]


@pytest.mark.parametrize("name", ["plan.json", "more/0001.json"])
@pytest.mark.parametrize("damage", _DAMAGE)
def test_a_damaged_plan_is_named(unfinished: Path, tmp_path: Path, name: str, damage: str) -> None:
    (unfinished / "more").mkdir(exist_ok=True)
    (unfinished / name).write_bytes(_DAMAGE[damage])
    with pytest.raises(storage.DamagedFile, match=rf"{name}.* is (damaged|not JSON).*\nhint: ") as caught:
        run_stage(Count(tmp_path))
    assert "Traceback" not in str(caught.value)


def test_a_plan_without_rows_is_named(unfinished: Path, tmp_path: Path) -> None:
    plan = json.loads((unfinished / "plan.json").read_text())
    plan["items"][2]["inputs"]["count"] = "many"
    (unfinished / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(storage.DamagedFile, match=r"the items in .*plan\.json are damaged"):
        run_stage(Count(tmp_path))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "s3://b/a.tar"])
def test_no_document_names_a_file_outside_of_the_dataset(tmp_path: Path, name: str) -> None:
    manifest = run_stage(Count(tmp_path))
    folder = Path(stage_folder(Count(tmp_path)))
    record = manifest["items"][0]
    changed = record | {"files": [record["files"][0] | {"name": name}]}
    for document in (manifest | {"items": [changed]}, manifest | {"files": changed["files"]}):
        (folder / "manifest.json").write_bytes(storage.json_bytes(document))
        with pytest.raises(storage.DamagedFile, match=r"manifest\.json is damaged.*\nhint: "):
            read_manifest(str(folder), "")
    if not storage.is_whole_address(name):  # a long list of adopted tars has such names
        with pytest.raises(storage.DamagedFile, match="does not lie in the dataset\nhint: "):
            list(records.records(records.to_bytes([records.table([changed])])))
    plan = json.loads((folder / "plan.json").read_text())
    plan["items"][0]["id"] = name
    with pytest.raises(storage.DamagedFile, match=r"plan\.json is damaged at items"):
        check_plan(plan, "plan.json")
    release = {"manifests": {name: "0"}, "content": "", "number": 1, "samples": 1, "recall@10": None}
    with pytest.raises(storage.DamagedFile, match=r"release\.json is damaged: .* is no stage"):
        check_release(release, "release.json")
