"""Failed rows are retried, in the same version and in the next, and are counted once."""

import os
import signal
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.shards import shard
from pipeline.shards.shard import Shard
from pipeline.stages import progress
from pipeline.stages.driver import run_stage
from pipeline.stages.plan import prepare
from pipeline.stages.types import Outcome, StageFailed
from pipeline.stages.worker import process_and_commit
from pipeline.versions import verify
from tests.laws.rows.row_accounting import PICTURES, check_accounting, config, shard_source, write_url_list
from tests.pipeline import synthetic, web_server
from tests.pipeline.shards.test_shard import table

pytestmark = pytest.mark.usefixtures("private_cache")


def flaky_urls(image_site: str, name: str, count: int = 22) -> list[str]:
    """Every third row fails once, every seventh twice, and one always."""
    addresses = []
    for number in range(count):
        fails = 2 if number % 7 == 6 else 1 if number % 3 == 0 else 0
        file = f"{number:02d}.png"
        path = f"flaky?n={fails}&name={name}-{number}&file={file}" if fails else file
        addresses.append(f"http://{image_site}/absent-{name}.png" if number == 13 else f"http://{image_site}/{path}")
    return addresses


def failing_rows(image_site: str, name: str, count: int = 22) -> list[list[int]]:
    """Rows that fail at the first try, the second, the third."""
    twice, once = ([number for number in range(count) if number != 13 and number % 7 == 6],
                   [number for number in range(count) if number != 13 and number % 7 != 6 and number % 3 == 0])
    return [sorted([*twice, *once, 13]), sorted([*twice, 13]), [13]]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_failed_rows_are_retried_before_sealing(tmp_path, image_site, kind):
    name = f"{kind}-again"
    source = write_url_list(tmp_path / f"list.{kind}", flaky_urls(image_site, name))
    dataset = Dataset.parse(str(tmp_path), "x")
    stage = Shard(dataset, config(source))
    items = prepare(stage)
    for item in items:
        process_and_commit(stage, item)
    first = synthetic.files_below(tmp_path / "datasets")
    web_server.seen(image_site)
    manifest = run_stage(Shard(dataset, config(source)), retry=True)
    failed = failing_rows(image_site, name)
    assert web_server.seen(image_site)["requests"] == len(failed[0])  # and of those that are there none
    assert [record["info"] for record in manifest["items"]] == [
        {"rows": 7}, {"rows": 7}, {"rows": 7}, {"rows": 1}, {"rows": 7, "retried": 7},
        {"rows": len(failed[0]) - 7, "retried": len(failed[0]) - 7}]
    assert [line["source_row"] for line in table(dataset, manifest)] == [*range(22), *failed[0]]
    assert manifest["info"]["retried"] == len(failed[0])
    assert sum(manifest["totals"]["skipped"].values()) == len(failed[1]) == 22 - manifest["totals"]["samples"]
    assert shard.count_rows(manifest, table(dataset, manifest)) == {
        "rows": 22, "good": 22 - len(failed[1]), "failed": len(failed[1]), "filtered": 0}
    after = synthetic.files_below(tmp_path / "datasets")
    assert {key: data for key, data in first.items() if after.get(key) != data} == {}
    assert list(verify.find_faults(dataset.root, dataset.path("shards"))) == []
    assert {line["caption"] for line in table(dataset, manifest)} == {f"row {number}" for number in range(22)}


def runner_killed_after(count: int):
    """A runner whose process dies after the given number of items."""
    def runner(stage, items):
        for number, item in enumerate(items):
            if number == count:
                os.kill(os.getpid(), signal.SIGKILL)
            yield Outcome(item, process_and_commit(stage, item))
    return runner


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_second_round_retries_failed_rows_and_may_be_interrupted(tmp_path, image_site, kind):
    name = f"{kind}-rounds"
    source = write_url_list(tmp_path / f"list.{kind}", flaky_urls(image_site, name))
    dataset = Dataset.parse(str(tmp_path), "x")
    failed = failing_rows(image_site, name)

    def run(**options):
        return run_stage(Shard(dataset, config(source, samples_per_shard=4)), **options)
    with pytest.raises(StageFailed, match=r"rows failed \(\d+%, allowed are 1%\)"):
        run(max_failed=0.01)
    # Six shards are recorded, and one of the three shards of the round.
    assert synthetic.in_child(lambda: run(retry=True, runner=runner_killed_after(1), max_failed=0.01)) == signal.SIGKILL
    web_server.seen(image_site)
    with pytest.raises(StageFailed, match="rows failed"):
        run(retry=True, max_failed=0.01)
    assert web_server.seen(image_site)["requests"] == len(failed[0]) - 4
    manifest = run(retry=True)
    assert web_server.seen(image_site)["requests"] == len(failed[1])
    lines = table(dataset, manifest)
    assert [line["source_row"] for line in lines] == [*range(22), *failed[0], *failed[1]]
    assert shard.count_rows(manifest, lines) == {"rows": 22, "good": 21, "failed": 1, "filtered": 0}
    assert list(verify.find_faults(dataset.root, dataset.path("shards"))) == []
    run_stage(Shard(dataset, config(source, samples_per_shard=4)), retry=True)
    assert "requests" not in web_server.seen(image_site)  # it is sealed


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_another_version_reuses_the_shards_and_retries_the_rest(tmp_path, image_site, kind):
    name = f"{kind}-version"
    source = write_url_list(tmp_path / f"list.{kind}", flaky_urls(image_site, name))
    failed = [[row for row in rows if row != 20] for rows in failing_rows(image_site, name)]
    options = {"where": 'not contains(caption, "row 20")'}
    v1, first = shard_source(tmp_path, source, **options)
    before = synthetic.files_below(tmp_path)
    v2 = v1.next_version()
    assert (v2.version, v2.next_version().version) == ("v2", "v3")
    web_server.seen(image_site)
    second = run_stage(Shard(v2, config(source, **options), base=v1))
    assert web_server.seen(image_site)["requests"] == len(failed[0])
    assert {key: data for key, data in synthetic.files_below(tmp_path).items() if key in before} == before
    ours, theirs = (synthetic.files_below(Path(dataset.folder("shards"))) for dataset in (v2, v1))
    for file, data in theirs.items():
        if not file.startswith(("rows/", "records/", "plan", "manifest")):
            assert ours[file] == data, file
    assert [record | {"plan": "", "run": {}} for record in second["items"][:3]] == [
        record | {"plan": "", "run": {}} for record in first["items"]]
    assert shard.count_rows(second, table(v2, second)) == {"rows": 22, "good": 19, "failed": 2, "filtered": 1}
    assert list(verify.find_faults(v2.root, v2.path("shards"))) == []
    schemas = {pq.read_schema(v2.fetch("shards", file_of(record, ".parquet"))) for record in second["items"]}
    assert len(schemas) == 1
    # A third version, and one in which only the row that always fails is left to retry.
    web_server.seen(image_site)
    v3 = v2.next_version()
    third = run_stage(Shard(v3, config(source, **options), base=v2))
    assert web_server.seen(image_site)["requests"] == len(failed[1])
    assert shard.count_rows(third, table(v3, third)) == {"rows": 22, "good": 20, "failed": 1, "filtered": 1}
    fourth = run_stage(Shard(v3.next_version(), config(source, **options), base=v3))
    assert web_server.seen(image_site)["requests"] == 1 and len(fourth["items"]) == len(third["items"]) + 1
    assert fourth["info"]["filtered"] == 1
    with pytest.raises(ValueError, match=r"sharded with other settings \(image_size, quality\)"):
        prepare(Shard(Dataset.parse(v1.root, "x@other"), config(source, image_size=8, quality=9, **options),
                            base=v1))


def test_a_version_of_a_version_without_failures_is_the_same_again(tmp_path, image_site):
    source = write_url_list(tmp_path / "list.csv", [
        f"http://{image_site}/flaky?n=1&name=once&file=00.png", f"http://{image_site}/01.png"])
    v1 = Dataset.parse(str(tmp_path), "x")
    first = run_stage(Shard(v1, config(source)), retry=True)
    v2, v3 = v1.next_version(), v1.next_version().next_version()
    second = run_stage(Shard(v2, config(source), base=v1))
    third = run_stage(Shard(v3, config(source), base=v2), retry=True)
    for manifest in (second, third):
        assert [record["files"] for record in manifest["items"]] == [record["files"] for record in first["items"]]
        assert shard.count_rows(manifest, table(v1, first))["good"] == 2


def test_a_version_of_another_source_is_refused(tmp_path, image_site):
    source = write_url_list(tmp_path / "list.parquet", flaky_urls(image_site, "other"))
    v1, _ = shard_source(tmp_path, source)
    write_url_list(source, [f"http://{image_site}/{number:02d}.png" for number in range(22)])
    with pytest.raises(ValueError, match="x was sharded from other images than"):
        prepare(Shard(v1.next_version(), config(source), base=v1))


def test_images_of_a_folder_are_retried(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in PICTURES:
        (source / name).write_bytes(PICTURES[name] if int(name[:2]) % 5 else b"not yet copied")
    dataset = Dataset.parse(str(tmp_path), "x")
    stage = Shard(dataset, config(source))
    with pytest.raises(StageFailed, match=r"5 of 24 rows failed .*: 5 not_a_picture"):
        run_stage(stage, max_failed=0.1)
    for name in ("00.png", "05.png", "10.png"):
        (source / name).write_bytes(PICTURES[name])
    manifest = run_stage(Shard(dataset, config(source)), retry=True, max_failed=0.1)
    assert shard.count_rows(manifest, table(dataset, manifest)) == {
        "rows": 24, "good": 22, "failed": 2, "filtered": 0}
    (source / "15.png").write_bytes(PICTURES["15.png"])
    v2 = dataset.next_version()
    manifest = run_stage(Shard(v2, config(source), base=dataset))
    assert shard.count_rows(manifest, table(v2, manifest)) == {"rows": 24, "good": 23, "failed": 1, "filtered": 0}
    good = [line for line in table(v2, manifest) if line["status"] == "success"]
    assert sorted(line["source_row"] for line in good) == [number for number in range(24) if number != 20]
    assert {line["url"] for line in good} == {name for name in PICTURES if name != "20.png"}


def test_damage_in_the_source_is_not_retried(tmp_path):
    pq.write_table(pa.table({"image": [b"no picture", PICTURES["00.png"]]}), tmp_path / "list.parquet")
    stage = Shard(Dataset.parse(str(tmp_path), "x"), config(tmp_path / "list.parquet"))
    with pytest.raises(ValueError, match="failed rows would fail again"):
        run_stage(stage, retry=True)
    assert run_stage(stage)["totals"]["samples"] == 1


def test_a_hopeless_run_is_stopped_early_and_keeps_its_records(tmp_path, image_site, monkeypatch):
    monkeypatch.setattr(progress, "period", lambda folder: 0.02)
    addresses = [f"http://{image_site}/{'00.png' if number % 3 == 0 else 'gone.png' if number % 3 == 1 else 'text.jpg'}"
                 for number in range(1500)]
    source = write_url_list(tmp_path / "list.csv", addresses)
    dataset = Dataset.parse(str(tmp_path), "x")
    settings = {"samples_per_shard": 100, "image_size": 8}
    web_server.seen(image_site)
    with pytest.raises(StageFailed) as stopped:
        run_stage(Shard(dataset, config(source, **settings)), max_failed=0.3)
    message = str(stopped.value)
    assert "allowed are 30%" in message and "http_404" in message and "not_a_picture" in message
    assert web_server.seen(image_site)["requests"] < 500
    assert not storage.exists(storage.join(dataset.folder("shards"), "manifest.json"))
    recorded = storage.list_files(storage.join(dataset.folder("shards"), "records"))
    assert 1 <= len(recorded) < 5
    before = synthetic.files_below(tmp_path / "datasets")
    manifest = run_stage(Shard(dataset, config(source, **settings)), max_failed=0.7)
    assert web_server.seen(image_site)["requests"] == 1500 - 100 * len(recorded)
    after = synthetic.files_below(tmp_path / "datasets")
    assert all(after[name] == data for name, data in before.items() if "/progress" not in name)
    reasons = check_accounting(dataset, manifest, 1500)
    assert Counter(reasons.values()) == {"": 500, "http_404": 500, "not_a_picture": 500}


def test_the_budget_is_kept_by_small_lists_too(tmp_path, image_site):
    names = ("00", "gone", "01", "small", "02")
    source = write_url_list(tmp_path / "list.csv", [f"http://{image_site}/{name}.png" for name in names])
    dataset = Dataset.parse(str(tmp_path), "x")
    stage = Shard(dataset, config(source, min_size=10))
    with pytest.raises(StageFailed, match=r"1 of 5 rows failed \(20%, allowed are 10%\): 1 http_404"):
        run_stage(stage, max_failed=0.1)
    assert not storage.exists(storage.join(dataset.folder("shards"), "manifest.json"))
    assert run_stage(stage, max_failed=0.2)["totals"]["samples"] == 3  # what is too small was left out by choice
