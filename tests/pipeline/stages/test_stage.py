import contextlib
import itertools
import json
import os
import signal
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.stages.driver import run_in_process, run_stage
from pipeline.stages.manifest import read_manifest, without_run_facts
from pipeline.stages.plan import clear_folder, prepare
from pipeline.stages.scratch import _sweep, scratch_folder, shared_scratch
from pipeline.stages.seal import seal_stage
from pipeline.stages.stage import Stage
from pipeline.stages.types import Entry, Item, Output, PlanReplaced, StageFailed
from pipeline.stages.worker import process_and_commit
from tests.pipeline import synthetic


@dataclass(frozen=True)
class CountConfig:
    step: int = 1
    text: str = "x"


class Count(Stage):
    """Six items of two files each; some can be told to fail."""

    name = "count"

    def __init__(self, root, config=None, broken=()):
        super().__init__(str(root), "count", config or CountConfig())
        self.broken, self.processed = broken, []

    def inputs(self):
        return {"numbers": {"path": "", "digest": "1"}}

    def plan(self):
        named = [(storage.name_by_content(f"lists/{number}.txt", data), data) for number, data in
                 ((number, str(number * self.config.step).encode()) for number in range(6))]
        return [Item(f"{number:06d}", {"list": name}, ((name, data),)) for number, (name, data) in enumerate(named)]

    def process(self, item, scratch):
        self.processed.append(item.id)
        error = self.broken.get(item.id) if self.broken else None
        if error:
            raise error
        number = storage.read_bytes(storage.join(self.folder, item.inputs["list"]))
        for name in "ab":
            (scratch / name).write_bytes(name.encode() + number * 100)
        return Output(2, {f"{item.id}.{name}": scratch / name for name in "ab"},
                      [Entry("k", "odd", "left out"), Entry("k", "remark", kept=True)] if number == b"1" else [])

    def finish(self, records, scratch):
        (scratch / "all").write_text(" ".join(record["id"] for record in records))
        return Output(files={"all.txt": scratch / "all"}, info={"records": len(records)})


def lasting(folder) -> dict[str, bytes]:
    """What a folder holds for good: no remains of a killed process, no seconds and dates."""
    files = {name: data for name, data in synthetic.files_below(Path(folder)).items()
             if not any(part.startswith(".") for part in Path(name).parts) and not name.endswith("_stats.json")}
    for name, data in files.items():
        document = json.loads(data) if name.endswith(".json") else None
        if name == "manifest.json":
            document = without_run_facts(document)
        if isinstance(document, dict):
            document.pop("run", None)
            files[name] = json.dumps(document, sort_keys=True).encode()
    return files


class KilledAt:
    """The process kills itself right before or after its nth change of a final name."""

    def __init__(self, point: int) -> None:
        self.left = point

    def wrapped(self, change):
        def one(*arguments, **options):
            self.tick()
            result = change(*arguments, **options)
            self.tick()
            return result
        return one

    def tick(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def run(self, stage_: Stage) -> None:
        os.replace, os.link = self.wrapped(os.replace), self.wrapped(os.link)
        run_stage(stage_)


def killed_at_every_point(make, root) -> int:
    """Run `make(folder)` anew for every point it can be killed at, each time to its end; how many there were."""
    run_stage(undisturbed := make(root / "undisturbed"))
    expected = lasting(undisturbed.folder)
    for point in itertools.count():
        one = make(root / f"killed-{point}")
        status = synthetic.in_child(lambda: KilledAt(point).run(one))  # noqa: B023
        if status == 0:
            return point
        assert os.WTERMSIG(status) == signal.SIGKILL
        if not (sealed := storage.exists(storage.join(one.folder, "manifest.json"))):
            with pytest.raises(ValueError, match="is not sealed"):
                read_manifest(one.folder, one.command)
        again = make(root / f"killed-{point}")
        run_stage(again)
        assert lasting(one.folder) == expected, f"killed at {point}, sealed {sealed}"


def test_killed_anywhere_and_run_again_is_the_same_folder(tmp_path):
    # Of 6 lists, the plan, 13 files of items, 6 records, the file of all and the manifest, before and after. Files of
    # items come from scratch by a name that is hidden at first.
    assert killed_at_every_point(Count, tmp_path) == 2 * (6 + 1 + 2 * 13 + 6 + 1 + 1)


def test_sharding_killed_anywhere_and_run_again_is_the_same_folder(tmp_path):
    from pipeline.shards.shard import Shard
    from pipeline.sources.config import ShardConfig
    source = synthetic.drawings(tmp_path / "pictures", subjects=2, size=8)
    (source / "broken.png").write_bytes(b"no picture")

    def make(root):
        return Shard(Dataset.parse(str(root), "x"), ShardConfig(source=str(source), samples_per_shard=6, image_size=8))
    assert killed_at_every_point(make, tmp_path) > 20


def test_killed_at_any_time_and_run_again_is_the_same_folder(tmp_path):
    """Not between two steps but somewhere in the middle of one."""
    expected = lasting(stage_folder(Count(tmp_path / "undisturbed")))
    for number in range(12):
        one = Count(tmp_path / f"{number}")
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                run_stage(one)
            os._exit(0)
        threading.Event().wait(0.004 * number)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert lasting(stage_folder(one)) == expected


def stage_folder(one: Stage) -> str:
    run_stage(one)
    return one.folder


def test_two_runs_give_the_same_bytes(tmp_path):
    one, other = stage_folder(Count(tmp_path / "one")), stage_folder(Count(tmp_path / "other"))
    assert lasting(one) == lasting(other)


def test_the_manifest_says_what_is_there(tmp_path):
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


def test_only_what_has_no_record_is_done_again(tmp_path):
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


def test_of_two_plans_at_once_the_loser_leaves_the_winner_alone(tmp_path):
    """Both found the folder unclaimed; the second has other settings and comes last."""
    one, other = Count(tmp_path), Count(tmp_path, CountConfig(step=2))
    plan = other.plan

    def late():
        prepare(one)
        return plan()
    other.plan = late
    with pytest.raises(ValueError, match=r"section\.step"):
        prepare(other)
    run_stage(one)
    run_stage(Count(tmp_path / "alone"))
    left, alone = lasting(tmp_path / "count"), lasting(tmp_path / "alone" / "count")
    assert {name: data for name, data in left.items() if name in alone} == alone
    # Lists of the loser stay, under names of their own; nothing refers to them.
    assert all(name.startswith("lists/") for name in left.keys() - alone.keys())


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
    # A user's mistake is not tried again, bad luck is.
    assert broken.processed.count("000003") == (1 if isinstance(error, ValueError) else 3)
    run_stage(Count(tmp_path))
    assert storage.list_files(storage.join(broken.folder, "failures")) == []
    run_stage(Count(tmp_path / "alone"))
    assert lasting(broken.folder) == lasting(tmp_path / "alone" / "count")


def test_failures_of_items_that_succeeded_since_are_gone(tmp_path):
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


def test_bad_luck_that_passes_is_no_failure(tmp_path):
    class Flaky(Count):
        def process(self, item, scratch):
            if self.processed.count(item.id) < 2:
                self.processed.append(item.id)
                raise OSError("connection reset")
            return super().process(item, scratch)
    run_stage(Flaky(tmp_path / "flaky"))
    run_stage(Count(tmp_path / "calm"))
    assert lasting(tmp_path / "flaky" / "count") == lasting(tmp_path / "calm" / "count")


def test_a_late_twin_steps_back(tmp_path):
    """An actor thought dead comes back after its item was done by another, and has other bytes."""
    one = Count(tmp_path)
    items = prepare(one)

    class Late(Count):
        def process(self, item, scratch):
            output = super().process(item, scratch)
            (scratch / "a").write_bytes(b"other bytes")
            self.first = process_and_commit(one, item)
            return output
    late = Late(tmp_path)
    record = process_and_commit(late, items[0])
    assert record == late.first
    assert (tmp_path / "count" / "000000.a").read_bytes() != b"other bytes"
    assert process_and_commit(late, items[0]) == record and late.processed == ["000000"]


@pytest.mark.parametrize("done", [True, False])
def test_a_late_worker_of_a_replaced_plan_changes_nothing(tmp_path, done):
    """The folder is planned again with other settings while an item is in hand; the new item is done, or not yet."""
    late, new = Count(tmp_path), Count(tmp_path, CountConfig(step=2))
    items = prepare(late)
    process = late.process

    def slow(item, scratch):
        output = process(item, scratch)
        clear_folder(new)
        new_items = prepare(new)
        if done:
            process_and_commit(new, new_items[1])
        late.before = lasting(new.folder)
        return output
    late.process = slow
    with pytest.raises(PlanReplaced, match=r"planned again or removed while this command ran: expected .*\nhint: "):
        process_and_commit(late, items[1])
    assert lasting(new.folder) == late.before
    run_stage(Count(tmp_path, CountConfig(step=2)))
    run_stage(Count(tmp_path / "alone", CountConfig(step=2)))
    assert lasting(new.folder) == lasting(tmp_path / "alone" / "count")


def test_a_driver_of_a_replaced_plan_ends_and_changes_nothing(tmp_path):
    late, new = Count(tmp_path), Count(tmp_path, CountConfig(step=2))

    def replaced(stage_, items):
        for number, outcome in enumerate(run_in_process(stage_, items)):
            if number == 1:
                run_stage(new, overwrite=True)
            yield outcome
    with pytest.raises(PlanReplaced):
        run_stage(late, replaced)
    run_stage(Count(tmp_path / "alone", CountConfig(step=2)))
    assert lasting(new.folder) == lasting(tmp_path / "alone" / "count")


def test_a_record_of_a_replaced_plan_is_replaced(tmp_path):
    """A late worker wrote it just after the folder was emptied."""
    late = Count(tmp_path)
    record = process_and_commit(late, prepare(late)[1])
    new = Count(tmp_path, CountConfig(step=2))
    clear_folder(new)
    prepare(new)
    storage.put_json(record, storage.join(new.folder, "records", "000001.json"))
    run_stage(new)
    run_stage(Count(tmp_path / "alone", CountConfig(step=2)))
    assert lasting(new.folder) == lasting(tmp_path / "alone" / "count")


def test_a_seal_without_all_records_is_refused(tmp_path):
    one = Count(tmp_path)
    items = prepare(one)
    process_and_commit(one, items[1])
    with pytest.raises(StageFailed, match="5 of 6 items have no record, the first is 000000"):
        seal_stage(one, items)
    with pytest.raises(ValueError, match=r"is not sealed: it has no manifest\.json\nhint: python -m jobs count"):
        read_manifest(one.folder, one.command)


def test_an_order_of_items_of_ones_own_changes_nothing(tmp_path):
    def backwards(stage_, items):
        return run_in_process(stage_, items[::-1])
    run_stage(Count(tmp_path / "one"))
    run_stage(Count(tmp_path / "other"), backwards)
    assert lasting(tmp_path / "one" / "count") == lasting(tmp_path / "other" / "count")


def test_nothing_to_do_is_said(tmp_path):
    empty = Count(tmp_path)
    empty.plan = list
    with pytest.raises(ValueError, match="nothing to do"):
        run_stage(empty)


def test_rebuilding_starts_anew(tmp_path):
    run_stage(Count(tmp_path))
    (tmp_path / "count" / "stray").write_text("x")
    run_stage(Count(tmp_path, CountConfig(step=2)), overwrite=True)
    run_stage(Count(tmp_path / "alone", CountConfig(step=2)))
    assert lasting(tmp_path / "count") == lasting(tmp_path / "alone" / "count")


def test_rebuilding_killed_anywhere_leaves_nothing_of_the_old(tmp_path, monkeypatch):
    """The removal may be cut off after any file: what it left must not pass for a part of the new folder."""
    run_stage(Count(tmp_path / "alone", CountConfig(step=2)))
    expected = lasting(tmp_path / "alone" / "count")
    removals = 0
    unlink, rmdir = os.unlink, os.rmdir

    def cut_off(change):
        def one(path, *arguments, **options):
            nonlocal removals
            if removals == limit:
                raise KeyboardInterrupt
            removals += 1
            return change(path, *arguments, **options)
        return one

    for limit in range(0, 40, 3):
        removals = 0
        root = tmp_path / f"{limit}"
        run_stage(Count(root))
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", cut_off(unlink))
            patch.setattr(os, "rmdir", cut_off(rmdir))
            with contextlib.suppress(KeyboardInterrupt):
                run_stage(Count(root, CountConfig(step=2)), overwrite=True)
        with contextlib.suppress(ValueError):  # it may be refused: the old plan is still there
            run_stage(Count(root, CountConfig(step=2)))
            assert lasting(root / "count") == expected, f"cut off after {limit} removals"


def test_stages_on_an_object_store_are_like_local_ones(tmp_path, s3):
    local, remote = run_stage(Count(tmp_path)), run_stage(Count(s3))
    assert without_run_facts(local) == without_run_facts(remote)
    again = Count(s3)
    assert run_stage(again) == remote and again.processed == []
    rebuilt = run_stage(Count(s3, CountConfig(step=2)), overwrite=True)
    assert rebuilt["section"]["step"] == 2 and rebuilt["content"] != remote["content"]


def test_scratch_folders_are_gone(tmp_path, monkeypatch):
    import tempfile
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with contextlib.suppress(StageFailed):
        run_stage(Count(tmp_path, broken={"000001": ValueError("no")}))
    run_stage(Count(tmp_path))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_scratch_of_a_killed_process_is_removed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def die():
        with scratch_folder("one") as folder:
            (folder / "spool").write_bytes(b"much")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(synthetic.in_child(die)) == signal.SIGKILL
    with scratch_folder("other") as living:
        left = next(one for one in tmp_path.iterdir() if one != living)
        for one in (left, living):
            os.utime(one / ".alive", (0, 0))
        _sweep.cache_clear()
        with scratch_folder("third"):
            assert living.exists() and not left.exists()
    assert list(tmp_path.iterdir()) == []


def test_scratch_in_common_is_filled_anew_after_somebody_died_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def dies(folder):
        (folder / "half").write_bytes(b"x")
        (folder / "below").mkdir()
        raise OSError("the disk is gone")

    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            shared_scratch("test-of-filling", dies)

    def fills(folder):
        assert not (folder / "half").exists() and not (folder / "below").exists()
        with open(folder / "rows", "ab") as file:
            file.write(b"row")

    for _ in range(2):
        assert (shared_scratch("test-of-filling", fills) / "rows").read_bytes() == b"row"
