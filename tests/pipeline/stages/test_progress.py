"""The progress of a run adds up, also if workers die, and a budget stops it at the right time."""

import json
import random
import time
from collections import Counter

import pytest

from jobs.telemetry.progress_bar import describe_progress
from pipeline import storage
from pipeline.stages import progress, records
from pipeline.stages.driver import run_in_process, run_stage
from pipeline.stages.manifest import without_run_facts
from pipeline.stages.plan import prepare
from pipeline.stages.progress import LEAST, ProgressReporter, Tally
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output, StageFailed


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(progress, "period", lambda folder: 0.0)


def report_rows(folder, item, rows, *, again=False, **skipped):
    """A worker's report on an item that it is still processing."""
    report_progress = ProgressReporter(str(folder), item, again=again)
    report_progress(rows=rows, samples=rows - sum(skipped.values()), length=10 * rows, skipped=Counter(skipped))
    return report_progress


def make_record(item, rows, *, retried=0, **skipped):
    net = {reason: count - retried for reason, count in ({"cut": 0} | skipped if retried else skipped).items()}
    return {"id": item, "samples": rows - sum(skipped.values()), "skipped": net,
            "info": {"rows": rows} | ({"retried": retried} if retried else {})}


def test_recorded_and_unfinished_rows_add_up(tmp_path):
    tally = Tally(str(tmp_path), 4, 400)
    tally.record(make_record("000000", 100, http_404=10), 900)
    report_rows(tmp_path, "000001", 50, http_404=5, cut=1)
    now = tally.look()
    assert (now["rows"], now["samples"], now["bytes"], now["items"]) == (150, 134, 1400, 1)
    assert now["skipped"] == {"http_404": 15, "cut": 1} and next(iter(now["skipped"])) == "http_404"
    assert now == storage.read_json(f"{tmp_path}/progress.json")
    assert now["of_rows"] == 400 and now["of_items"] == 4


def test_an_item_is_not_counted_twice_when_it_is_recorded(tmp_path):
    tally = Tally(str(tmp_path), 2, 200)
    report_progress = report_rows(tmp_path, "000000", 90, cut=9)
    assert tally.look()["rows"] == 90
    tally.record(make_record("000000", 100, cut=10), 1000)
    # Its worker has not yet removed its report, or died before.
    assert tally.look()["rows"] == tally.look(quick=True)["rows"] == 100
    assert tally.now["skipped"] == {"cut": 10}
    report_progress.done()
    assert tally.look()["rows"] == 100 and storage.list_files(f"{tmp_path}/progress") == []


def test_reports_of_dead_workers_do_not_count(tmp_path):
    report_rows(tmp_path, "000000", 80, cut=80)  # of a run that was killed
    tally = Tally(str(tmp_path), 2, 200)
    assert tally.look()["rows"] == 0
    report_rows(tmp_path, "000000", 10)  # the worker that has it now
    assert tally.look()["rows"] == 10 and tally.now["skipped"] == {}
    report_rows(tmp_path, "000001", 50, cut=50)
    assert tally.look()["rows"] == 60
    tally.give_up("000001")
    assert tally.look()["rows"] == 10 and tally.now["failed_items"] == 1


def test_workers_of_another_driver_count_from_their_next_report(tmp_path):
    report_rows(tmp_path, "000000", 80)
    tally = Tally(str(tmp_path), 2, 200)
    report_rows(tmp_path, "000000", 90)
    assert tally.look()["rows"] == 90


def test_a_cut_off_or_missing_report_is_ignored(tmp_path):
    tally = Tally(str(tmp_path), 2, 200)
    report_rows(tmp_path, "000000", 80)
    storage.put_bytes(b'{"rows": ', f"{tmp_path}/progress/000001.json")
    assert tally.look()["rows"] == 80


def test_a_budget_needs_a_minimum_of_rows(tmp_path):
    tally = Tally(str(tmp_path), 10, 10 * LEAST)
    report_rows(tmp_path, "000000", LEAST - 1, cut=LEAST - 1)
    tally.look()
    assert tally.over(0.5) == ""
    assert f"{LEAST - 1} of {LEAST - 1} rows failed (100%, allowed are 50%): {LEAST - 1} cut" in \
        tally.over(0.5, final=True)
    report_rows(tmp_path, "000000", LEAST, cut=LEAST)
    tally.look()
    assert tally.over(0.5) and not tally.over(1.0)


def test_a_budget_is_exact(tmp_path):
    tally = Tally(str(tmp_path), 2, 2000)
    tally.start()
    tally.record(make_record("000000", 1000, cut=300), 0)
    tally.look()
    assert not tally.over(0.3) and not tally.over(0.3, final=True)
    tally.record(make_record("000001", 1000, cut=301), 0)
    tally.look()
    assert "601 of 2000 rows failed (30%, allowed are 30%): 601 cut" == tally.over(0.3) == tally.over(0.3, final=True)


def test_filtered_rows_are_no_failures(tmp_path):
    tally = Tally(str(tmp_path), 2, 2000, by_choice={"too_small"})
    tally.record(make_record("000000", 1000, too_small=900, cut=50), 0)
    report_rows(tmp_path, "000001", 1000, too_small=900)
    tally.look()
    assert not tally.over(0.1, final=True) and not tally.over(0.1)
    assert tally.over(0.01, final=True) == "50 of 2000 rows failed (2%, allowed are 1%): 50 cut"
    assert tally.now["skipped"] == {"too_small": 1800, "cut": 50}


def test_retried_rows_count_once_in_a_budget(tmp_path):
    tally = Tally(str(tmp_path), 3, 1500)
    tally.record(make_record("000000", 1000, cut=300), 0)
    tally.start()
    # Half of them fail again, and some are in progress.
    tally.record(make_record("000001", 200, retried=200, cut=100), 0)
    report_rows(tmp_path, "000002", 90, again=True, cut=90)
    tally.look()
    assert tally.over(0.25) == ""  # no row of this run failed for the first time
    assert tally.over(0.21, final=True) == "" and "200 of 1000 rows failed (20%" in tally.over(0.19, final=True)
    assert tally.now["rows"] == 1290 and tally.now["retried"] == 290
    assert "80.0% good" in describe_progress(tally.now)  # rows in progress are not counted twice
    tally.record(make_record("000002", 100, retried=100), 0)
    assert "100 of 1000 rows failed (10%" in tally.over(0.09, final=True)
    assert "90.0% good" in describe_progress(tally.look())
    assert "1300 of 1500 rows (300 tried again)" in describe_progress(tally.now)


def test_a_share_of_good_rows_is_never_negative(tmp_path):
    tally = Tally(str(tmp_path), 2, 0)
    tally.record(make_record("000000", 0, tar_cut=1), 0)
    assert "good" not in describe_progress(tally.look())
    tally.record(make_record("000001", 3, tar_cut=1, corrupt=3), 0)
    assert "0.0% good" in describe_progress(tally.look())


def test_a_stopped_run_resumes_when_the_cause_is_gone(tmp_path):
    tally = Tally(str(tmp_path), 10, 10_000)
    tally.record(make_record("000000", 1000, connect=1000), 0)
    tally.start()
    tally.record(make_record("000001", 500), 0)
    tally.look()
    assert tally.over(0.3) == "" and "1000 of 1500 rows failed (67%" in tally.over(0.3, final=True)
    tally.record(make_record("000002", 500, connect=400), 0)
    tally.look()
    assert "400 of 1000 rows failed (40%" in tally.over(0.3)


def test_records_in_columns_count_like_others(tmp_path):
    done = [make_record(f"{number:06d}", 100, cut=number % 7, retried=100 * (number % 50 == 0)) | {
        "plan": "p", "files": [{"name": "a", "bytes": number, "sha256": "0"}], "noted": {}, "run": {"seconds": 0.5}}
        for number in range(500)]
    for record_list in (done, [record | {"info": {}} for record in done]):
        columns = records.records(records.to_bytes([records.table(record_list)]))
        list_tally, column_tally = Tally(f"{tmp_path}/one", 500, 0), Tally(f"{tmp_path}/other", 500, 0)
        list_tally.start(record_list)
        column_tally.start(columns)
        assert list_tally.look() | {"updated": 0} == column_tally.look() | {"updated": 0}
        assert list_tally.recorded_ids == column_tally.recorded_ids
        assert list_tally.over(0.0, final=True) == column_tally.over(0.0, final=True) != ""
        assert records.seconds(columns) == records.seconds(record_list) == 250
        assert records.totals(columns) == records.totals(record_list)
        assert records.content("p", [], columns) == records.content("p", [], record_list)


def test_a_report_that_is_being_written_does_not_count(tmp_path):
    """A file is written under a hidden name first. It was counted as another item."""
    tally = Tally(str(tmp_path), 2, 200)
    report = {"rows": 70, "samples": 70, "bytes": 0, "skipped": {}, "again": False}
    (tmp_path / "progress").mkdir()
    for name in ("000000.json", ".000000.json.0123456789abcdef"):
        (tmp_path / "progress" / name).write_text(json.dumps(report))
    assert tally.look()["rows"] == 70
    nothing = Tally(str(tmp_path / "other"), 2, 200).look()
    assert describe_progress(nothing).endswith(" at work") and describe_progress(nothing, 12.0).endswith("for 12 s")
    tally.record(make_record("000000", 100), 0)
    assert tally.look()["rows"] == 100


def test_the_rate_is_that_of_this_run(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    tally = Tally(str(tmp_path), 10, 10_000)
    tally.record(make_record("000000", 5000), 0)
    tally.start()
    assert tally.look()["seconds_left"] is None
    clock[0] += 10
    tally.record(make_record("000001", 1000), 0)
    assert tally.look()["rows_per_s"] == 100 and tally.now["seconds_left"] is None
    clock[0] += 10
    tally.record(make_record("000002", 1000), 0)
    assert tally.look()["rows_per_s"] == 100 and tally.now["seconds_left"] == 30
    assert "100 rows/s" in describe_progress(tally.now) and describe_progress(tally.now).endswith("30 s left")


def test_the_estimated_time_ignores_the_start_of_workers(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    tally = Tally(str(tmp_path), 100, 1000)
    clock[0] += 20  # imports
    tally.record(make_record("000000", 10), 0)
    assert tally.look()["seconds_left"] is None and "left" not in describe_progress(tally.now)
    clock[0] += 20
    for number in range(1, 41):
        tally.record(make_record(f"{number:06}", 10), 0)
    assert tally.look()["rows_per_s"] == 20 and tally.now["seconds_left"] == round(590 / 20)


def test_several_samples_of_a_row_count_as_one_good_row(tmp_path):
    tally = Tally(str(tmp_path), 1, 100)
    tally.record({"id": "000000", "samples": 360, "skipped": {"cut": 10}, "info": {"rows": 100}}, 0)
    assert "90.0% good" in describe_progress(tally.look())


def test_rows_stay_between_a_report_and_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "period", lambda folder: 0.0)
    tally = Tally(str(tmp_path), 2, 20)
    reporter = ProgressReporter(str(tmp_path), "000000")
    reporter(rows=9, samples=9, length=1, skipped=Counter())
    assert tally.look()["rows"] == 9
    reporter.done()
    assert tally.look()["rows"] == 9 and tally.now["rows_per_s"] >= 0
    tally.record(make_record("000000", 10), 1)
    assert tally.look()["rows"] == 10


def test_rows_without_a_vector_are_not_good(tmp_path):
    tally = Tally(str(tmp_path), 1, 100)
    tally.record({"id": "000000", "samples": 100, "skipped": {}, "noted": {"not_adopted": 3, "animated": 5},
                  "info": {}}, 0)
    assert "97.0% good" in describe_progress(tally.look())


def test_a_slow_read_of_progress_is_done_less_often(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "period", lambda folder: 5.0)
    tally = Tally(str(tmp_path), 1, 100)
    clock[0] += 5
    assert tally.due()
    monkeypatch.setattr(storage, "put_json", lambda *arguments: clock.__setitem__(0, clock[0] + 3))
    tally.look()
    clock[0] += 20
    assert not tally.due() and tally.due(quick=True)
    clock[0] += 10
    assert tally.due()


def test_a_report_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(storage, "put_json", fails)
    report_rows(tmp_path, "000000", 10).done()
    assert Tally(str(tmp_path), 1, 100).look()["rows"] == 0


def test_no_progress_files_are_left(tmp_path):
    tally = Tally(str(tmp_path), 1, 100)
    tally.clear()
    report_rows(tmp_path, "000000", 10)
    tally.look()
    tally.clear()
    assert storage.list_files(str(tmp_path)) == storage.list_folders(str(tmp_path)) == []


class Half(Stage):
    """Items of a hundred rows. A share of the rows fails at first and succeeds at the retry."""

    name = "half"

    def __init__(self, root, failing, items=6, upset=()):
        super().__init__(str(root), "half", None)
        self.failing, self.items, self.upset, self.done = failing, items, upset, []

    def section(self):
        return {}

    def plan(self):
        return [Item(f"{number:06d}", {"count": 100}) for number in range(self.items)]

    def items_to_retry(self, items, done):
        assert len({item.id for item in items}) == len(items)
        last = max(item.inputs.get("round", 0) for item in items)
        failed = sum(record["skipped"].get("cut", 0) for item, record in zip(items, done, strict=True)
                     if item.inputs.get("round", 0) == last)
        return [Item(f"{len(items):06d}", {"count": failed, "round": last + 1})] if failed else []

    def process(self, item, scratch):
        if item.id in self.upset:
            raise KeyboardInterrupt
        again, rows = "round" in item.inputs, item.inputs["count"]
        failed = 0 if again and self.failing < 1 else round(rows * self.failing)
        self.done.append(item.id)
        self.report_progress(rows=rows, samples=rows - failed, length=0, skipped=Counter(cut=failed))
        return Output(rows - failed, counts=({"cut": failed} if failed else {}, {}),
                      info={"rows": rows} | ({"retried": rows} if again else {}),
                      earlier_skipped={"cut": rows} if again else {})


def test_a_budget_holds_before_sealing(tmp_path):
    """The rows are too few for a check of the share before the end."""
    stage = Half(tmp_path, 0.5, items=1)
    with pytest.raises(StageFailed, match=r"50 of 100 rows failed \(50%, allowed are 40%\): 50 cut\nhint: .*retry"):
        run_stage(stage, max_failed=0.4)
    assert not storage.exists(f"{stage.folder}/manifest.json") and storage.list_files(f"{stage.folder}/records")
    with pytest.raises(StageFailed, match="50 of 100"):
        run_stage(Half(tmp_path, 0.5, items=1), max_failed=0.4)
    assert run_stage(Half(tmp_path, 0.5, items=1), max_failed=0.5)["totals"]["skipped"] == {"cut": 50}
    assert storage.list_folders(stage.folder) == ["records"]
    assert storage.list_files(stage.folder) == ["manifest.json", "plan.json"]


def test_a_budget_stops_a_run_before_its_end(tmp_path):
    stage = Half(tmp_path, 0.5)
    with pytest.raises(StageFailed, match=r"of \d+ rows failed \(50%"):
        run_stage(stage, max_failed=0.4)
    assert 1 < len(stage.done) < 6


def test_a_retry_comes_before_the_check_of_the_budget(tmp_path):
    manifest = run_stage(Half(tmp_path, 0.3), retry=True, max_failed=0.3)
    assert manifest["totals"]["skipped"] == {} and manifest["totals"]["samples"] == 600
    assert [item["id"] for item in manifest["items"]] == [f"{number:06d}" for number in range(7)]
    # All retried rows fail again. That does not stop the run, because no other row fails.
    worse = Half(tmp_path / "worse", 1.0, items=1)
    with pytest.raises(StageFailed, match=r"100 of 100 rows failed .*retried rows count again"):
        run_stage(worse, retry=True, max_failed=0.9)
    assert worse.done == ["000000", "000001"]


def test_an_interrupted_retry_is_finished_and_no_other_begins(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_stage(Half(tmp_path / "cut", 1.0, items=2, upset={"000002"}), retry=True)
    manifest = run_stage(Half(tmp_path / "cut", 1.0, items=2), retry=True)
    whole = run_stage(Half(tmp_path / "whole", 1.0, items=2), retry=True)
    assert without_run_facts(manifest) == without_run_facts(whole)


def test_two_drivers_make_one_retry(tmp_path):
    """The other driver has made its retry, and not sealed, when this one has ended its first pass."""
    first, second = Half(tmp_path, 1.0, items=3), Half(tmp_path, 1.0, items=3, upset={"000003"})

    def late(stage, items):
        yield from run_in_process(stage, items)
        if not late.met:
            late.met = True
            with pytest.raises(KeyboardInterrupt):
                run_stage(second, retry=True)
    late.met = False
    manifest = run_stage(first, late, retry=True)
    assert storage.list_files(f"{first.folder}/more") == ["0001.json"]
    assert [item["id"] for item in manifest["items"]] == [f"{number:06d}" for number in range(4)]


def test_two_drivers_that_start_together_use_different_orders(tmp_path, monkeypatch):
    """Both drivers found no plan. The second one must not process the items in the same order."""
    shuffled = []
    monkeypatch.setattr(random, "shuffle", shuffled.append)
    first, second = Half(tmp_path, 0.0), Half(tmp_path, 0.0)
    plan = second.plan

    def late():
        prepare(first)
        return plan()
    second.plan = late
    run_stage(second)
    assert shuffled == [[0, 1, 2, 3, 4, 5]]
