"""Planning, processing, committing and sealing of a stage."""

import json
import shutil

import pytest

from pipeline import storage
from pipeline.stages.driver import run_in_process, run_stage
from pipeline.stages.manifest import read_manifest, without_run_facts
from pipeline.stages.plan import clear_folder, prepare
from pipeline.stages.seal import seal_stage
from pipeline.stages.types import PlanReplaced, StageFailed
from pipeline.stages.worker import process_and_commit
from tests.pipeline import synthetic
from tests.pipeline.stages.count_stage import Count, CountConfig, lasting_files, stage_folder


def test_two_runs_give_the_same_bytes(tmp_path):
    first, second = stage_folder(Count(tmp_path / "one")), stage_folder(Count(tmp_path / "other"))
    assert lasting_files(first) == lasting_files(second)


def test_the_manifest_lists_the_files(tmp_path):
    manifest = run_stage(Count(tmp_path))
    files = synthetic.files_below(tmp_path / "count")
    described = [*manifest["files"], *(file for record in manifest["items"] for file in record["files"])]
    for entry in described:
        assert entry == storage.describe_file(entry["name"], tmp_path / "count" / entry["name"])
    known = {entry["name"] for entry in described} | {name for name in files if name.startswith("lists/")}
    known |= {f"records/{number:06d}.json" for number in range(6)} | {"plan.json", "manifest.json"}
    assert set(files) == known
    assert manifest["totals"] == {"items": 6, "samples": 12, "skipped": {"odd": 1}, "noted": {"remark": 1},
                                  "bytes": sum(entry["bytes"] for entry in described[1:])}
    ledger = [json.loads(line) for line in files["ledger/000001.jsonl"].splitlines()]
    assert [(line["reason"], line["kept"]) for line in ledger] == [("odd", False), ("remark", True)]


def test_a_sealed_folder_is_not_touched(tmp_path):
    run_stage(Count(tmp_path))
    before = synthetic.files_below(tmp_path)
    again = Count(tmp_path)
    run_stage(again)
    assert again.processed == [] and synthetic.files_below(tmp_path) == before


def test_only_items_without_a_record_are_processed_again(tmp_path):
    with pytest.raises(StageFailed):
        run_stage(Count(tmp_path, broken={"000002": ValueError("no"), "000004": ValueError("no")}))
    again = Count(tmp_path)
    run_stage(again)
    assert sorted(again.processed) == ["000002", "000004"]


def test_other_settings_are_refused_and_named(tmp_path):
    run_stage(Count(tmp_path))
    before = synthetic.files_below(tmp_path)
    with pytest.raises(ValueError, match=r"section\.step: there 1, now 2") as caught:
        run_stage(Count(tmp_path, CountConfig(step=2)))
    assert "hint:" in str(caught.value) and "text" not in str(caught.value)
    assert synthetic.files_below(tmp_path) == before


def test_other_inputs_are_refused_and_named(tmp_path):
    run_stage(Count(tmp_path))
    other = Count(tmp_path)
    other.inputs = lambda: {"numbers": {"path": "", "digest": "2"}}
    with pytest.raises(ValueError, match=r'inputs\.numbers\.digest: there "1", now "2"'):
        run_stage(other)


def test_the_loser_of_two_plans_changes_nothing_of_the_winner(tmp_path):
    """Both drivers found the folder unclaimed. The second has other settings and comes last."""
    winner, loser = Count(tmp_path), Count(tmp_path, CountConfig(step=2))
    plan = loser.plan

    def late():
        prepare(winner)
        return plan()
    loser.plan = late
    with pytest.raises(ValueError, match=r"section\.step"):
        prepare(loser)
    run_stage(winner)
    run_stage(Count(tmp_path / "alone"))
    remaining_files, winner_files = lasting_files(tmp_path / "count"), lasting_files(tmp_path / "alone" / "count")
    assert {name: data for name, data in remaining_files.items() if name in winner_files} == winner_files
    # Lists of the loser stay under other names, and no file refers to them.
    assert all(name.startswith("lists/") for name in remaining_files.keys() - winner_files.keys())


@pytest.mark.parametrize("error", [ValueError("bad input"), RuntimeError("bad luck")])
def test_a_failed_item_is_reported_and_the_others_are_done(tmp_path, error):
    broken = Count(tmp_path, broken={"000003": error})
    with pytest.raises(StageFailed, match=r"1 of 6 items failed, the first is 000003: .*bad") as caught:
        run_stage(broken)
    assert "hint:" in str(caught.value)
    assert len(storage.list_files(storage.join(broken.folder, "records"))) == 5
    assert not storage.exists(storage.join(broken.folder, "manifest.json"))
    report = storage.read_json(storage.join(broken.folder, "failures", "000003.json"))
    assert "Traceback" in report["traceback"] and "bad" in report["error"]
    # Invalid usage is not retried, a temporary failure is.
    assert broken.processed.count("000003") == (1 if isinstance(error, ValueError) else 3)
    run_stage(Count(tmp_path))
    assert storage.list_files(storage.join(broken.folder, "failures")) == []
    run_stage(Count(tmp_path / "alone"))
    assert lasting_files(broken.folder) == lasting_files(tmp_path / "alone" / "count")


def test_failures_of_items_that_succeeded_later_are_removed(tmp_path):
    with pytest.raises(StageFailed):
        run_stage(Count(tmp_path, broken={"000001": ValueError("no"), "000003": ValueError("no")}))
    with pytest.raises(StageFailed):
        run_stage(Count(tmp_path, broken={"000003": ValueError("no")}))
    assert storage.list_files(str(tmp_path / "count" / "failures")) == ["000003.json"]


def test_passwords_are_not_written_into_failures(tmp_path):
    error = RuntimeError("cannot read https://user:secret@host/x")
    with pytest.raises(StageFailed) as caught:
        run_stage(Count(tmp_path, broken={"000001": error}))
    assert "secret" not in str(caught.value)
    assert b"secret" not in synthetic.files_below(tmp_path / "count" / "failures")["000001.json"]


def test_a_temporary_failure_is_retried(tmp_path):
    class Flaky(Count):
        def process(self, item, scratch):
            if self.processed.count(item.id) < 2:
                self.processed.append(item.id)
                raise OSError("connection reset")
            return super().process(item, scratch)
    run_stage(Flaky(tmp_path / "flaky"))
    run_stage(Count(tmp_path / "calm"))
    assert lasting_files(tmp_path / "flaky" / "count") == lasting_files(tmp_path / "calm" / "count")


def test_a_late_duplicate_steps_back(tmp_path):
    """An actor that seemed dead returns after another one processed its item, and has other bytes."""
    stage = Count(tmp_path)
    items = prepare(stage)

    class Late(Count):
        def process(self, item, scratch):
            output = super().process(item, scratch)
            (scratch / "a").write_bytes(b"other bytes")
            self.first = process_and_commit(stage, item)
            return output
    late = Late(tmp_path)
    record = process_and_commit(late, items[0])
    assert record == late.first
    assert (tmp_path / "count" / "000000.a").read_bytes() != b"other bytes"
    assert process_and_commit(late, items[0]) == record and late.processed == ["000000"]


@pytest.mark.parametrize("done", [True, False])
def test_a_late_worker_of_a_replaced_plan_changes_nothing(tmp_path, done):
    """The folder is planned again with other settings during an item. The new item is done, or not yet."""
    late, new = Count(tmp_path), Count(tmp_path, CountConfig(step=2))
    items = prepare(late)
    process = late.process

    def slow(item, scratch):
        output = process(item, scratch)
        clear_folder(new)
        new_items = prepare(new)
        if done:
            process_and_commit(new, new_items[1])
        late.before = lasting_files(new.folder)
        return output
    late.process = slow
    with pytest.raises(PlanReplaced, match=r"planned again or removed while this command ran: expected .*\nhint: "):
        process_and_commit(late, items[1])
    assert lasting_files(new.folder) == late.before
    run_stage(Count(tmp_path, CountConfig(step=2)))
    run_stage(Count(tmp_path / "alone", CountConfig(step=2)))
    assert lasting_files(new.folder) == lasting_files(tmp_path / "alone" / "count")


def test_a_driver_of_a_replaced_plan_ends_and_changes_nothing(tmp_path):
    """The driver lost its lease, because the machine slept or lost its network."""
    late, new = Count(tmp_path), Count(tmp_path, CountConfig(step=2))

    def replace_midway(stage, items):
        for number, outcome in enumerate(run_in_process(stage, items)):
            if number == 1:
                shutil.rmtree(tmp_path / "leases")
                run_stage(new, overwrite=True)
            yield outcome
    with pytest.raises(PlanReplaced):
        run_stage(late, replace_midway)
    run_stage(Count(tmp_path / "alone", CountConfig(step=2)))
    assert lasting_files(new.folder) == lasting_files(tmp_path / "alone" / "count")


def test_a_record_of_a_replaced_plan_is_replaced(tmp_path):
    """A late worker wrote the record just after the folder was emptied."""
    late = Count(tmp_path)
    record = process_and_commit(late, prepare(late)[1])
    new = Count(tmp_path, CountConfig(step=2))
    clear_folder(new)
    prepare(new)
    storage.put_json(record, storage.join(new.folder, "records", "000001.json"))
    run_stage(new)
    run_stage(Count(tmp_path / "alone", CountConfig(step=2)))
    assert lasting_files(new.folder) == lasting_files(tmp_path / "alone" / "count")


def test_a_seal_without_all_records_is_refused(tmp_path):
    stage = Count(tmp_path)
    items = prepare(stage)
    process_and_commit(stage, items[1])
    with pytest.raises(StageFailed, match="5 of 6 items have no record, the first is 000000"):
        seal_stage(stage, items)
    with pytest.raises(ValueError, match=r"is not sealed: it has no manifest\.json\nhint: python -m jobs count"):
        read_manifest(stage.folder, stage.command)


def test_the_order_of_items_changes_nothing(tmp_path):
    def backwards(stage, items):
        return run_in_process(stage, items[::-1])
    run_stage(Count(tmp_path / "one"))
    run_stage(Count(tmp_path / "other"), backwards)
    assert lasting_files(tmp_path / "one" / "count") == lasting_files(tmp_path / "other" / "count")


def test_nothing_to_do_is_reported(tmp_path):
    empty = Count(tmp_path)
    empty.plan = list
    with pytest.raises(ValueError, match="nothing to do"):
        run_stage(empty)


def test_overwriting_starts_from_an_empty_folder(tmp_path):
    run_stage(Count(tmp_path))
    (tmp_path / "count" / "stray").write_text("x")
    run_stage(Count(tmp_path, CountConfig(step=2)), overwrite=True)
    run_stage(Count(tmp_path / "alone", CountConfig(step=2)))
    assert lasting_files(tmp_path / "count") == lasting_files(tmp_path / "alone" / "count")


def test_stages_on_an_object_store_are_like_local_ones(tmp_path, s3):
    local, remote = run_stage(Count(tmp_path)), run_stage(Count(s3))
    assert without_run_facts(local) == without_run_facts(remote)
    again = Count(s3)
    assert run_stage(again) == remote and again.processed == []
    rebuilt = run_stage(Count(s3, CountConfig(step=2)), overwrite=True)
    assert rebuilt["section"]["step"] == 2 and rebuilt["content"] != remote["content"]
