"""Drivers and workers that work on one folder at the same time."""

import json
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.stages.driver import run_in_process, run_stage
from pipeline.stages.plan import clear_folder, prepare
from pipeline.stages.seal import seal_stage
from pipeline.stages.types import StageFailed
from pipeline.stages.worker import process_and_commit, process_item
from tests.pipeline.stages.count_stage import Count, CountConfig, lasting_files


def test_a_folder_in_use_by_a_driver_is_not_emptied(tmp_path):
    working = Count(tmp_path)

    def run_and_overwrite(stage, items):
        for number, outcome in enumerate(run_in_process(stage, items)):
            if number == 1:
                with pytest.raises(StageFailed, match=r"another command works on .*: process \d+ on .*\nhint: wait"):
                    run_stage(Count(tmp_path, CountConfig(step=2)), overwrite=True)
            yield outcome
    manifest = run_stage(working, run_and_overwrite)
    run_stage(Count(tmp_path / "alone"))
    assert manifest["section"]["step"] == 1
    assert lasting_files(working.folder) == lasting_files(tmp_path / "alone" / "count")
    assert not (tmp_path / "leases").exists()


def test_drivers_that_seal_together_leave_one_manifest(tmp_path, monkeypatch):
    """A release names the hash of the manifest, and a manifest holds the time of its seal."""
    first, second = Count(tmp_path), Count(tmp_path)
    items = prepare(first)
    prepare(second)
    done = [process_and_commit(first, item) for item in items]
    sealed = seal_stage(first, items, done)
    data = (tmp_path / "count" / "manifest.json").read_bytes()
    monkeypatch.setenv("RDM_REVISION", "another revision")
    assert seal_stage(second, items, done) == sealed
    assert (tmp_path / "count" / "manifest.json").read_bytes() == data


def test_a_late_manifest_of_a_replaced_plan_is_replaced(tmp_path):
    late, new = Count(tmp_path), Count(tmp_path, CountConfig(step=2))
    run_stage(late)
    data = (tmp_path / "count" / "manifest.json").read_bytes()
    clear_folder(new)
    prepare(new)
    (tmp_path / "count" / "manifest.json").write_bytes(data)
    assert run_stage(new)["section"]["step"] == 2
    run_stage(Count(tmp_path / "alone", CountConfig(step=2)))
    assert lasting_files(new.folder) == lasting_files(tmp_path / "alone" / "count")


def test_two_workers_with_different_files_of_one_item_are_an_error(tmp_path):
    first, other = Count(tmp_path), Count(tmp_path)
    item = prepare(first)[0]
    prepare(other)
    commit = process_item(other, item)
    process_and_commit(first, item)
    record_file = Path(first.folder) / "records" / f"{item.id}.json"
    record = json.loads(record_file.read_text())
    record["files"][0]["sha256"] = "0" * 64
    record_file.unlink()

    def commit_first(*arguments):
        record_file.write_text(json.dumps(record))
        return False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "create_bytes", commit_first)
        with pytest.raises(StageFailed, match=r"two workers made item 000000 with different files"):
            commit()
