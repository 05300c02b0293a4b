import io
import itertools
import json
import pickle
import random

import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages import records
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from pipeline.stages.plan import read_items
from pipeline.stages.records import Collected
from pipeline.stages.stage import fingerprint
from pipeline.stages.types import StageFailed
from pipeline.versions import verify
from tests.pipeline import synthetic
from tests.pipeline.stages.count_stage import Count, CountConfig
from tests.pipeline.synthetic import encoded, noise


def make_record(number: int) -> dict:
    """A record with many or few of the possible fields."""
    rng = random.Random(number)
    reasons = rng.sample(["timeout", "http_404", "corrupt", "robots"], rng.randrange(4))
    return {"id": f"{number:06d}", "plan": "p" * 64, "samples": rng.randrange(3),
            "files": [{"name": f"{number:06d}.{kind}", "bytes": rng.randrange(1 << 40), "sha256": f"{rng.random()}"}
                      for kind in ("parquet", "tar")[:rng.randrange(3)]],
            "skipped": {reason: rng.randrange(1 << 33) for reason in reasons},
            "noted": {"animated": 1} if number % 3 else {},
            "info": {"rows": number, "deep": {"list": [1, None, "x\ud83d"]}} if number % 2 else {},
            "run": {"seconds": number / 8, "host": "host"}}


def as_table(done: list[dict]) -> records.Rows:
    """Records as they are in the file beside a manifest."""
    return records.records(records.to_bytes([records.table(done)]))


@pytest.mark.parametrize("name", ["NVIDIA H200 (140 GiB), driver 580.159.04, bf16", 'a "quoted" \\ name'])
def test_devices_are_counted_in_a_table_as_in_a_list(name):
    done = [make_record(number) for number in range(40)]
    for record in done[::3]:
        record["run"] = {"device": name} | record["run"]
    done[1]["run"]["device"] = "CPU, fp32"
    wanted = {name: 14, "CPU, fp32": 1}
    assert records.devices(done) == records.devices(as_table(done)) == wanted
    assert records.devices(as_table(done[2:3])) == {}


@pytest.mark.parametrize("count", [0, 1, 2, 5000])
def test_a_table_of_records_equals_the_list(count):
    done = [make_record(number) for number in range(count)]
    table = as_table(done)
    assert list(table) == done and len(table) == count and table == done
    assert table.ids() == [record["id"] for record in done]
    assert records.totals(table) == records.totals(done)
    assert records.seconds(table) == records.seconds(done)
    described = [{"name": "all.txt", "bytes": 1, "sha256": "ff"}]
    assert records.content("print", described, table) == records.content("print", described, done)
    for index in (0, count - 1, -1, -count) if count else ():
        assert table[index] == done[index]
    for index in (count, -count - 1):
        with pytest.raises(IndexError):
            table[index]
    assert table[2:4000:7] == done[2:4000:7] and table[::-1] == done[::-1]


def test_parts_of_a_table_equal_parts_of_the_list():
    """A slice of Arrow refers to all of its table, and must be packed as a copy would be."""
    done = [make_record(number) for number in range(300)]
    table = records.table(done)
    for start, length in ((0, 300), (1, 298), (17, 100), (299, 1), (150, 0)):
        part, listed = records.records(records.to_bytes([table.slice(start, length)])), done[start:start + length]
        assert list(part) == listed and records.totals(part) == records.totals(listed)
        assert records.content("x", [], part) == records.content("x", [], listed)
    apart = records.to_bytes([table.slice(200, 50), table.slice(3, 40), table.slice(7, 0)])
    assert list(records.records(apart)) == done[200:250] + done[3:43]
    assert apart == records.to_bytes([records.table(done[200:250] + done[3:43])])


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 7, 64, 300])
def test_groups_of_rows_add_up_to_the_table(monkeypatch, group):
    done = [make_record(number) for number in range(300)]
    monkeypatch.setattr(records, "_GROUP", group)
    table = records.table(done)
    data = records.to_bytes([table])
    assert data == records.to_bytes([table.slice(start, 11) for start in range(0, 300, 11)])
    rows = records.records(data)
    assert [part.num_rows for part in rows.tables()] == [min(group, 300 - start) for start in range(0, 300, group)]
    assert list(rows) == done and rows.ids() == [record["id"] for record in done]
    order = random.Random(group).sample(range(-300, 300), 100)
    assert [rows[index] for index in order] == [done[index] for index in order]
    assert records.totals(rows) == records.totals(done) and records.seconds(rows) == records.seconds(done)
    assert records.content("x", [], rows) == records.content("x", [], done)
    assert sum(count for _, count in records.infos(rows)) == 300
    again = pickle.loads(pickle.dumps(rows))
    assert again == rows and again[-1] == done[-1]
    collected = Collected(every=13)
    for record in random.Random(group).sample(done, 300):
        collected.add(record)
    assert list(collected.in_order([record["id"] for record in done[::-1]])) == done[::-1]
    assert collected.in_order(rows.ids()).data == data


@pytest.mark.parametrize("every", [1, 3, 7, 1000])
def test_records_are_collected_in_any_order_and_packed(every):
    done = [make_record(number) for number in range(20)]
    packs: list[bytes] = []
    collected = Collected(packs.append, every)
    shuffled = random.Random(every).sample(done, 20)
    for record in shuffled[:17]:
        collected.add(record)
    ids = [record["id"] for record in done]
    missing_ids = {record["id"] for record in shuffled[17:]}
    assert collected.ids == set(ids) - missing_ids
    assert list(collected.in_order(ids)) == [record for record in done if record["id"] not in missing_ids]
    assert sum(len(records.records(pack)) for pack in packs) == 17 // every * every
    # The packs of another driver have some of the same records.
    other = Collected(every=every)
    for pack in packs:
        other.add_pack(pack)
        other.add_pack(pack)
    for record in done:
        if record["id"] not in other.ids:
            other.add(record)
    assert list(other.in_order(ids)) == done and list(other.in_order([])) == []
    assert records.totals(other.in_order(ids)) == records.totals(done)


def source(folder):
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.png").write_bytes(encoded(noise(16, 16, number), "PNG") if number % 4 else b"no picture")
    return folder


def built(root, pictures) -> tuple[Dataset, dict, dict]:
    dataset = Dataset.parse(str(root), "x")
    shards = run_stage(Shard(dataset, ShardConfig(source=str(pictures), samples_per_shard=2, image_size=16)))
    return dataset, shards, run_stage(Embed(dataset, EmbedConfig(batch_size=4)))


def test_a_stage_of_many_items_gives_the_result_of_few(tmp_path, monkeypatch):
    pictures = source(tmp_path / "source")
    few, *few_manifests = built(tmp_path / "few", pictures)
    monkeypatch.setattr(records, "INLINE", 3)
    many, *many_manifests = built(tmp_path / "many", pictures)
    for name, few_manifest, many_manifest in zip(("shards", "embeddings"), few_manifests, many_manifests, strict=True):
        folder = many.folder(name)
        plan, manifest = (storage.read_json(storage.join(folder, file)) for file in ("plan.json", "manifest.json"))
        assert plan["items"]["count"] == manifest["items"]["count"] == 5
        assert isinstance(storage.read_json(storage.join(few.folder(name), "plan.json"))["items"], list)
        loaded = many.manifest(name)
        assert without_run_facts(few_manifest) == without_run_facts(many_manifest) == without_run_facts(loaded)
        assert few_manifest["content"] == loaded["content"] and few_manifest["totals"] == loaded["totals"]
        assert list(loaded["items"]) == list(many_manifest["items"])
        assert loaded["items"][-1] == many_manifest["items"][4]
        assert list(verify.find_faults(many.root, many.path(name))) == []
    assert [item.inputs for item in read_items(many.folder("shards"))] == [
        item.inputs for item in read_items(few.folder("shards"))]
    assert (Embeddings(few).all() == Embeddings(many).all()).all()
    in_few, in_many = ({name: data for name, data in synthetic.files_below(tmp_path / folder).items()
                        if name.endswith((".tar", ".npy"))} for folder in ("few", "many"))
    assert in_few == in_many
    # No item is processed again, in either form.
    for inline in (3, 1000):
        monkeypatch.setattr(records, "INLINE", inline)
        assert without_run_facts(built(tmp_path / "many", pictures)[1]) == without_run_facts(few_manifests[0])


@pytest.mark.parametrize("name", ["manifest", "items"])
@pytest.mark.parametrize("how", ["gone", "cut", "other bytes", "other list"])
def test_a_changed_item_list_is_detected(tmp_path, monkeypatch, name, how):
    monkeypatch.setattr(records, "INLINE", 3)
    run_stage(Count(tmp_path))
    folder = tmp_path / "count"
    document = "manifest.json" if name == "manifest" else "plan.json"
    path = folder / json.loads((folder / document).read_text())["items"]["file"]["name"]
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:-1])
    elif how == "other bytes":
        path.write_bytes(data[:100] + bytes(byte ^ 255 for byte in data[100:200]) + data[200:])
    else:
        entry = json.loads((folder / document).read_text())
        table = pq.read_table(io.BytesIO(data))
        changed = records.to_bytes([table.slice(1)], table.schema)
        path.write_bytes(changed)
        entry["items"]["file"]["bytes"] = len(changed)
        (folder / document).write_text(json.dumps(entry))
    if name == "manifest":
        assert any("manifest" in fault["path"] for fault in verify.find_faults(str(tmp_path), "count"))
    else:
        with pytest.raises(ValueError, match=r"hint: python -m jobs verify"):
            read_items(str(folder))


def test_a_stage_resumes_from_packed_records(tmp_path, monkeypatch):
    expected = without_run_facts(run_stage(Count(tmp_path / "whole")))
    monkeypatch.setattr(records, "Collected", lambda flushed: Collected(flushed, every=2))
    stage = Count(tmp_path / "broken", broken={"000003": ValueError("not today")})
    with pytest.raises(StageFailed, match="1 of 6 items failed, the first is 000003"):
        run_stage(stage)
    packs = list((tmp_path / "broken" / "count" / "packs").rglob("*.parquet"))
    assert [pq.read_table(pack).num_rows for pack in packs] == [2, 2] and len(stage.processed) == 6
    # A packed record is not read again as a single file.
    read = []
    monkeypatch.setattr(storage, "read_json", lambda url, real=storage.read_json: read.append(url) or real(url))
    again = Count(tmp_path / "broken")
    assert without_run_facts(run_stage(again)) == expected
    assert again.processed == ["000003"]
    assert sum("/records/0" in url for url in read) <= 3
    assert list(verify.find_faults(str(tmp_path / "broken"), "count")) == []


def test_packs_of_another_plan_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "Collected", lambda flushed: Collected(flushed, every=1))
    with pytest.raises(StageFailed):
        run_stage(Count(tmp_path, broken={"000005": ValueError("not today")}))
    with pytest.raises(ValueError, match="planned with other settings"):
        run_stage(Count(tmp_path, CountConfig(step=2)))
    other = Count(tmp_path, CountConfig(step=2))
    manifest = run_stage(other, overwrite=True)
    assert sorted(other.processed) == [f"{number:06d}" for number in range(6)]
    assert {record["plan"] for record in manifest["items"]} == {fingerprint(other)}
    assert not list((tmp_path / "count" / "packs").rglob(f"*{fingerprint(Count(tmp_path))[:12]}*"))


def test_retried_rows_become_new_items(tmp_path, monkeypatch):
    """Retried rows become more items. They are in separate lists, and their numbers continue."""
    monkeypatch.setattr(records, "INLINE", 2)
    pictures = source(tmp_path / "source")
    dataset = Dataset.parse(str(tmp_path), "x")
    stage = Shard(dataset, ShardConfig(source=str(pictures), samples_per_shard=1, image_size=16))
    with pytest.raises(StageFailed, match="3 of 9 rows failed"):
        run_stage(stage, max_failed=0.1)
    for number in (0, 4, 8):
        (pictures / f"{number}.png").write_bytes(encoded(noise(16, 16, number), "PNG"))
    manifest = run_stage(stage, retry=True, max_failed=0.0)
    assert [item.id for item in read_items(stage.folder)] == [f"{number:06d}" for number in range(12)]
    assert [record["samples"] for record in manifest["items"]] == [
        *(int(number % 4 > 0) for number in range(9)), 1, 1, 1]
    assert list(verify.find_faults(dataset.root, dataset.path("shards"))) == []
    added = storage.read_json(storage.join(stage.folder, "more", "0001.json"))["items"]
    assert added["count"] == 3 and added["file"]["name"].startswith("more-0001")
    assert list(itertools.chain.from_iterable(record["noted"] for record in manifest["items"])) == []
