"""Where each row of a source went: into one sample or line of the ledger, however often it is tried."""

import csv
import hashlib
import io
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.media import tars
from pipeline.shards import deduplicate, shard
from pipeline.shards.deduplicate import Deduplicate
from pipeline.shards.shard import Shard
from pipeline.sources.config import DownloadConfig, ShardConfig
from pipeline.stages import progress
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from pipeline.stages.plan import prepare
from pipeline.stages.types import Outcome, StageFailed
from pipeline.stages.worker import process_and_commit
from pipeline.versions import verify
from tests.pipeline import synthetic, web_server
from tests.pipeline.shards.test_shard import ledger, table
from tests.pipeline.synthetic import encoded, noise

PICTURES = {f"{number:02d}.png": encoded(noise(20, 24, number), "PNG") for number in range(24)}
FILES = PICTURES | {"text.jpg": b"no picture", "small.png": encoded(noise(4, 4), "PNG"), "empty.png": b"",
                    "cut.jpg": encoded(noise(64, 64), "JPEG")[:2000], "long.png": encoded(noise(300, 2), "PNG")}
pytestmark = pytest.mark.usefixtures("private_cache")
IMG2DATASET = {"count", "successes", "failed_to_download", "failed_to_resize", "duration", "start_time", "end_time",
               "status_dict"}


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with web_server.serving(FILES) as address:
        yield address


def config(source, **options) -> ShardConfig:
    download = DownloadConfig(**{"retries": 0, "connections": 8, "timeout": 10.0, "read_timeout": 5.0,
                                 "allow_hosts": ("127.0.0.1",)} | options.pop("download", {}))
    return ShardConfig(**{"source": str(source), "samples_per_shard": 7, "image_size": 16, "format": "png",
                          "download": download} | options)


def sharded(root, source, **options) -> tuple[Dataset, dict]:
    dataset = Dataset.parse(str(root), "x")
    return dataset, run_stage(Shard(dataset, config(source, **options)))


def write_list(path: Path, rows: list[dict]) -> Path:
    """Rows as parquet, CSV or lines of JSON."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def urls(path: Path, addresses: list[str]) -> Path:
    return write_list(path, [{"url": url, "caption": f"row {row}"} for row, url in enumerate(addresses)])


def accounted(dataset: Dataset, manifest: dict, rows: int) -> dict[int, str]:
    """Check that tars, parquet, ledger, statistics and records tell the same story; reasons by row, "" for good."""
    reasons: dict[int, str] = {}
    filtered, schemas = 0, set()
    for record in manifest["items"]:
        parquet = dataset.fetch("shards", file_of(record, ".parquet"))
        schemas.add(pq.read_schema(parquet))
        lines = pq.read_table(parquet).to_pylist()
        samples = list(tars.read(dataset.fetch("shards", file_of(record, ".tar"))))
        good = [line for line in lines if line["status"] == "success"]
        assert [sample["__key__"] for sample in samples] == [line["key"] for line in good]
        assert len({line["key"] for line in lines}) == len(lines)
        assert len({line["source_row"] for line in lines}) == len(lines) == record["info"]["rows"]
        for line in lines:
            if line["status"] == "success":
                assert line["error_message"] is None and line["sha256"] and line["original_sha256"]
            else:
                assert line["status"] in {"failed_to_download", "failed_to_resize", "duplicate"}
                assert line["sha256"] is None or line["status"] == "duplicate"
            reasons[line["source_row"]] = (line["error_message"] or "").split(":")[0]
        counted = Counter(reasons[line["source_row"]] for line in lines)
        assert record["samples"] == counted.pop("", 0) and record["skipped"] == dict(counted)
        stats = storage.read_json(storage.join(dataset.folder("shards"), f"{record['id']}_stats.json"))
        by_status = Counter(line["status"] for line in lines)
        assert stats.keys() == IMG2DATASET and stats["count"] == len(lines) and stats["successes"] == len(samples)
        assert stats["start_time"] <= stats["end_time"] and stats["duration"] >= 0
        assert [stats[name] for name in ("failed_to_download", "failed_to_resize")] == [
            by_status["failed_to_download"], by_status["failed_to_resize"]]
        assert Counter(stats["status_dict"]) == Counter({"success": len(samples)} if samples else {}) + counted
        filtered += record["info"].get("filtered", 0)
    assert len(reasons) + filtered == rows and set(reasons) <= set(range(rows)) and len(schemas) == 1
    told = shard.count_rows(manifest, table(dataset, manifest))
    assert told == {"rows": rows, "good": sum(not reason for reason in reasons.values()), "filtered": filtered,
                    "failed": sum(map(bool, reasons.values()))}
    assert list(verify.find_faults(dataset.root, dataset.path("shards"))) == []
    return reasons


def pictures(dataset: Dataset, manifest: dict) -> list[bytes]:
    return [tars.sample_image(sample) for record in manifest["items"]
            for sample in tars.read(dataset.fetch("shards", file_of(record, ".tar")))]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_every_row_is_a_sample_or_has_a_reason(tmp_path, site, kind):
    expected = {"00.png": "", "absent.png": "http_404", "status/403": "http_403", "status/204": "empty_file",
                "text.jpg": "not_a_picture", "empty.png": "empty_file", "cut.jpg": "corrupt", "small.png": "too_small",
                "long.png": "too_small", "loop": "too_many_redirects", "hops/3?file=01.png": "",
                "redirect?to=%2F02.png": "", "redirect?to=http://127.0.0.2/": "forbidden_address",
                "redirect?to=file:///etc/passwd": "bad_url", "robots?value=noai&file=03.png": "robots",
                "robots?value=all&file=03.png": "", "cut?file=04.png": "cut", "garbage": "protocol",
                "status/500": "http_500", "type-lie?file=05.png": "", "chunked?file=06.png": "",
                "gzipped?file=07.png": "", "private?user:word": "http_401"}
    addresses = [f"http://{site}/{path}" for path in expected]
    more = {"": "bad_url", "no address": "bad_url", "ftp://example.org/a.png": "bad_url",
            "http://localhost/a.png": "forbidden_address", "http://169.254.169.254/latest": "forbidden_address"}
    dataset, manifest = sharded(tmp_path, urls(tmp_path / f"list.{kind}", [*addresses, *more]), min_size=10,
                                where='not contains(caption, "row 0")')
    reasons = accounted(dataset, manifest, len(expected) + len(more))
    assert reasons == dict(list(enumerate([*expected.values(), *more.values()]))[1:])
    late = {"not_a_picture", "empty_file", "corrupt", "too_small"}
    for line in table(dataset, manifest):
        reason = reasons[line["source_row"]]
        assert line["status"] == ("success" if not reason else "failed_to_resize" if reason in late
                                  else "failed_to_download"), line
        assert line["caption"] == f"row {line['source_row']}"
    assert Counter(line["reason"] for line in ledger(dataset, manifest) if not line["kept"]) == Counter(
        filter(None, reasons.values())) == manifest["totals"]["skipped"]


def test_hashes_of_the_list_are_checked(tmp_path, site):
    def of(algorithm: str) -> list[str]:
        right = [hashlib.new(algorithm, PICTURES[f"{number:02d}.png"]).hexdigest() for number in range(8)]
        return [right[0], right[1].upper(), f" {right[2]}\n", right[0], "0" * len(right[0]), "garbage", "", "z" * len(
            right[0])]
    for name in ("sha256", "md5", "original_sha256"):
        cells = of(name.removeprefix("original_"))
        rows = [{"url": f"http://{site}/{number:02d}.png", name: cell} for number, cell in enumerate(cells)]
        for kind in ("csv", "parquet"):
            root = tmp_path / f"{name}-{kind}"
            dataset, manifest = sharded(root, write_list(tmp_path / f"{name}.{kind}", rows))
            reasons = accounted(dataset, manifest, 8)
            assert [row for row, reason in reasons.items() if reason] == [3, 4]
            assert manifest["totals"]["skipped"] == {"hash_mismatch": 2}
            assert manifest["totals"]["noted"] == {"hash_unreadable": 2}
            assert [line["status"] for line in table(dataset, manifest)][3] == "failed_to_download"
        dataset, manifest = sharded(tmp_path / f"{name}-none", tmp_path / f"{name}.csv", hash_column="none")
        assert manifest["totals"]["samples"] == 8 and manifest["totals"]["noted"] == {}
    raw = [{"url": f"http://{site}/{number:02d}.png", "sha256": hashlib.sha256(PICTURES["00.png"]).digest()}
           for number in range(2)]
    _, manifest = sharded(tmp_path / "raw", write_list(tmp_path / "raw.parquet", raw))
    assert manifest["totals"]["skipped"] == {"hash_mismatch": 1} and manifest["totals"]["noted"] == {}


def readable(folder: Path) -> dict[str, str]:
    """Every file below a folder as text, parquet and tars with what is in them."""
    found = {}
    for name, data in synthetic.files_below(folder).items():
        found[name] = data.decode("latin-1")
        if name.endswith(".parquet"):
            found[name] += json.dumps(pq.read_table(io.BytesIO(data)).to_pylist(), default=str)
    return found


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl.gz"])
def test_passwords_in_addresses_appear_nowhere(tmp_path, site, kind):
    import gzip
    rows = [{"url": url, "caption": f"row {number}", "mirror": url} for number, url in enumerate((
        f"http://somebody:hidden-word@{site}/00.png",
        # This server wants to be told what it shall be asked for: escaped, so that it is not found below.
        f"http://somebody:hidden-word@{site}/private?%73omebody:%68idden-word",
        f"http://somebody:hidden-word@{site}/absent.png", f"http://hidden-word@{site}/text.jpg",
        f"http://{site}/01.png", f"http://somebody:hidden%2Dword@{site}/garbage", "http://a:hidden-word@[::1/",
        "ftp://a:hidden-word@example.org/", f"http://other:hidden-word@{site}/flaky?name={kind}&file=02.png",
        f"http://{site}/03.png?x-amz-signature=hidden-word"))]
    path = write_list(tmp_path / f"list.{kind.partition('.')[0]}", rows)
    if kind.endswith(".gz"):
        (tmp_path / "list.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    dataset = Dataset.parse(str(tmp_path / "root"), "x")
    one = Shard(dataset, config(tmp_path / f"list.{kind}", samples_per_shard=4))
    manifest = run_stage(one, retry=True)
    reasons = [line["error_message"] and line["error_message"].split(":")[0] for line in table(dataset, manifest)]
    # The password reached its server: what it answers to it is no picture, but not 401.
    assert reasons[:10] == [None, "not_a_picture", "http_404", "not_a_picture", None, "protocol", "bad_url", "bad_url",
                            "http_500", None]
    assert reasons[-1] is None  # so it did at the second try
    # Rows of a list of text are copied beside the plan as they are: workers need them in full.
    found = {name: text for name, text in readable(tmp_path / "root").items() if "/rows/" not in name}
    assert any("http://***@" in text for text in found.values())
    for word in ("hidden-word", "hidden%2Dword", "somebody"):
        assert [name for name, text in found.items() if word in text] == []


# Order.

def test_whatever_order_downloads_end_in_the_tars_are_those_of_a_folder(tmp_path, site, monkeypatch):
    from pipeline.sources import downloader
    monkeypatch.setattr(downloader, "_FIRST_WAIT", 0.05)
    folder = tmp_path / "source"
    folder.mkdir()
    for name, data in PICTURES.items():
        (folder / name).write_bytes(data)
    ways = ["{0}", "flaky?n={2}&name={1}{0}&file={0}", "hops/{2}?file={0}", "chunked?file={0}",
            "busy?after=0&n=1&name={1}{0}&file={0}"]
    found = []
    for run in range(2):
        addresses = [f"http://{site}/{ways[number % len(ways)].format(name, run, number % 3 + 1)}"
                     for number, name in enumerate(sorted(PICTURES))]
        dataset, manifest = sharded(tmp_path / f"{run}", urls(tmp_path / f"{run}.csv", addresses), samples_per_shard=24,
                                    download={"retries": 3, "connections": 24})
        assert set(accounted(dataset, manifest, 24).values()) == {""}
        found.append((dataset, manifest))
    local = sharded(tmp_path / "local", folder, samples_per_shard=24)
    assert pictures(*found[0]) == pictures(*found[1]) == pictures(*local)
    assert [line["source_row"] for line in table(*found[0])] == list(range(24))
    # The same list twice: the same bytes.
    plain = urls(tmp_path / "plain.csv", [f"http://{site}/{way}" for way in ("00.png", "hops/2?file=01.png", "02.png",
                                                                             "absent.png")])
    twice = [sharded(tmp_path / name, plain, samples_per_shard=3) for name in ("one", "other")]
    assert without_run_facts(twice[0][1]) == without_run_facts(twice[1][1])
    first, second = (synthetic.files_below(tmp_path / name) for name in ("one", "other"))
    for name in first:
        if name.endswith((".tar", ".parquet", ".jsonl")):
            assert first[name] == second[name]


# Duplicates.

def blot(number: int, shade: int = 0) -> Image.Image:
    """A picture of its own for each number, a little darker with `shade`."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (64, 64), tuple(map(int, rng.integers(0, 256, 3))))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, width, height = map(int, rng.integers(0, 50, 4))
        draw.rectangle((x, y, x + width, y + height), tuple(map(int, rng.integers(0, 256, 3))))
    return Image.fromarray((np.asarray(image).astype(int) - shade).clip(0, 255).astype(np.uint8))


# Numbers of pictures, and how each is stored: the same file, the same pixels, or nearly the same.
KINDS = [(0, "png"), (1, "png"), (0, "png"), (2, "png"), (1, "webp"), (3, "png"), (0, "dark"), (4, "png"), (3, "dark"),
         (2, "png"), (5, "png"), (5, "webp"), (5, "dark"), (6, "png")]


def blots(folder: Path) -> Path:
    folder.mkdir()
    for place, (number, kind) in enumerate(KINDS):
        image = blot(number, 2 if kind == "dark" else 0)
        data = encoded(image, "WEBP", lossless=True) if kind == "webp" else encoded(image, "PNG")
        (folder / f"{place:02d}.{'webp' if kind == 'webp' else 'png'}").write_bytes(data)
    (folder / "05 broken.png").write_bytes(b"no picture")
    return folder


def first_ones(how: str) -> list[int]:
    """Places of the pictures that stay, the broken one among them as none."""
    seen, stays = set(), []
    for place, (number, kind) in enumerate(KINDS):
        sign = number if how == "near" else (number, kind == "dark")
        if sign not in seen:
            seen.add(sign)
            stays.append(place)
    return stays


@pytest.mark.parametrize("how", ["exact", "near"])
def test_of_duplicates_the_first_stays(tmp_path, how):
    source, results = blots(tmp_path / "source"), []
    for size in (3, 100, 1):
        dataset = Dataset.parse(str(tmp_path / f"{size}"), "x")
        sifted = Deduplicate(dataset, config(source, duplicates=how, samples_per_shard=size, image_size=64))
        manifest = deduplicate.deduplicate_shards(sifted, run_stage)
        reasons = accounted(dataset, manifest, len(KINDS) + 1)
        lines = table(dataset, manifest)
        assert [int(line["url"][:2]) for line in lines if line["status"] == "success"] == first_ones(how)
        assert reasons[5] == "not_a_picture"
        assert sum(reason == "duplicate" for reason in reasons.values()) == len(KINDS) - len(first_ones(how))
        gone = [line for line in lines if line["status"] == "duplicate"]
        assert all(line["error_message"].startswith("duplicate: of sample ") for line in gone)
        assert sorted(line["key"] for line in ledger(dataset, manifest)) == sorted(
            ["05 broken.png", *(line["url"] for line in gone)])
        assert not storage.exists(storage.join(dataset.folder("unsifted"), "plan.json"))
        assert not (tmp_path / f"{size}" / "datasets" / "x" / "v1" / "unsifted").exists()
        before = synthetic.files_below(tmp_path / f"{size}")
        assert without_run_facts(deduplicate.deduplicate_shards(sifted, run_stage)) == without_run_facts(manifest)
        assert synthetic.files_below(tmp_path / f"{size}") == before
        results.append([(line["url"], line["status"]) for line in lines])
    assert results[0] == results[1] == results[2]


def test_a_sample_that_stays_is_named_by_those_that_go(tmp_path):
    dataset = Dataset.parse(str(tmp_path), "x")
    manifest = deduplicate.deduplicate_shards(Deduplicate(dataset, config(
        blots(tmp_path / "source"), duplicates="exact", samples_per_shard=3, image_size=64)), run_stage)
    details = {line["url"]: line["error_message"] for line in table(dataset, manifest) if line["status"] == "duplicate"}
    assert details["02.png"] == "duplicate: of sample 0 of shard 000000"
    assert details["11.webp"] == "duplicate: of sample 2 of shard 000003"


def test_duplicates_among_patches(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name, image in (("a.png", noise(32, 32)), ("b.png", Image.new("RGB", (32, 32), "red")),
                        ("c.png", Image.new("RGB", (40, 40), "red"))):
        (source / name).write_bytes(encoded(image, "PNG"))
    dataset = Dataset.parse(str(tmp_path), "x")
    manifest = deduplicate.deduplicate_shards(Deduplicate(dataset, config(
        source, duplicates="exact", samples_per_shard=2, patches=3, patch_side=32,
                                             image_size=8)), run_stage)
    assert manifest["totals"]["samples"] == 4 and manifest["totals"]["skipped"] == {"duplicate": 5}
    assert shard.count_rows(manifest, table(dataset, manifest)) == {"rows": 3, "good": 2, "failed": 1, "filtered": 0}
    stats = [storage.read_json(storage.join(dataset.folder("shards"), f"00000{number}_stats.json"))
             for number in range(2)]
    assert [one["successes"] for one in stats] == [2, 0]
    assert [one["status_dict"] for one in stats] == [{"success": 2, "duplicate": 0}, {"success": 0, "duplicate": 1}]


def test_sifting_is_gone_on_with_wherever_it_was_left(tmp_path):
    source = blots(tmp_path / "source")

    def make(name: str) -> Deduplicate:
        return Deduplicate(Dataset.parse(str(tmp_path / name), "x"), config(
            source, duplicates="near", samples_per_shard=4, image_size=64))
    expected = without_run_facts(deduplicate.deduplicate_shards(make("whole"), run_stage))

    class Killed(BaseException):
        pass

    def seal_until(stages: int, items: int):
        """Seals some stages, and of the next one works off some items."""
        done = []

        def seal(one):
            if len(done) < stages:
                done.append(one)
                return run_stage(one)
            for item in prepare(one)[:items]:
                process_and_commit(one, item)
            raise Killed
        return seal
    for stages in (0, 1):
        for items in (0, 1, 3):
            name = f"{stages}-{items}"
            with pytest.raises(Killed):
                deduplicate.deduplicate_shards(make(name), seal_until(stages, items))
            assert without_run_facts(deduplicate.deduplicate_shards(make(name), run_stage)) == expected
    # Sealed, and what it was made from not yet removed.
    one = make("late")
    run_stage(one.whole)
    run_stage(one)
    assert without_run_facts(deduplicate.deduplicate_shards(make("late"), run_stage)) == expected
    assert not (tmp_path / "late" / "datasets" / "x" / "v1" / "unsifted").exists()
    assert without_run_facts(deduplicate.deduplicate_shards(make("late"), run_stage, overwrite=True)) == expected
    with pytest.raises(ValueError, match="duplicate_bits"):
        deduplicate.deduplicate_shards(Deduplicate(one.dataset, config(
            source, duplicates="near", samples_per_shard=4, image_size=64, duplicate_bits=2)), run_stage)


def test_a_row_that_was_tried_again_stays_if_it_is_first_in_the_source(tmp_path, site):
    addresses = [f"http://{site}/{path}" for path in ("flaky?n=1&name=sift&file=00.png", "01.png", "00.png")]
    sifted = Deduplicate(Dataset.parse(str(tmp_path), "x"),
                         config(urls(tmp_path / "list.csv", addresses), duplicates="exact"))
    manifest = deduplicate.deduplicate_shards(sifted, lambda one: run_stage(one, retry=one is sifted.whole))
    lines = table(sifted.dataset, manifest)
    assert [(line["source_row"], line["status"]) for line in lines] == [
        (0, "failed_to_download"), (1, "success"), (2, "duplicate"), (0, "success")]
    with pytest.raises(ValueError, match="duplicates are looked for among all"):
        prepare(Shard(sifted.dataset.following(), sifted.config, base=sifted.dataset))


# Again.

def shaky(site: str, name: str, count: int = 22) -> list[str]:
    """Every third fails once, every seventh twice, one for good."""
    addresses = []
    for number in range(count):
        fails = 2 if number % 7 == 6 else 1 if number % 3 == 0 else 0
        file = f"{number:02d}.png"
        addresses.append(f"http://{site}/absent-{name}.png" if number == 13 else f"http://{site}/{file}" if not fails
                         else f"http://{site}/flaky?n={fails}&name={name}-{number}&file={file}")
    return addresses


def of_round(site: str, name: str, count: int = 22) -> list[list[int]]:
    """Rows that fail at the first try, the second, the third."""
    twice, once = ([number for number in range(count) if number != 13 and number % 7 == 6],
                   [number for number in range(count) if number != 13 and number % 7 != 6 and number % 3 == 0])
    return [sorted([*twice, *once, 13]), sorted([*twice, 13]), [13]]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_rows_that_failed_are_tried_again_before_sealing(tmp_path, site, kind):
    name = f"{kind}-again"
    source = urls(tmp_path / f"list.{kind}", shaky(site, name))
    dataset = Dataset.parse(str(tmp_path), "x")
    one = Shard(dataset, config(source))
    items = prepare(one)
    for item in items:
        process_and_commit(one, item)
    first = synthetic.files_below(tmp_path / "datasets")
    web_server.seen(site)
    manifest = run_stage(Shard(dataset, config(source)), retry=True)
    failed = of_round(site, name)
    assert web_server.seen(site)["requests"] == len(failed[0])  # and of those that are there none
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


def killing_after(count: int):
    """A runner whose process dies when so many items are done."""
    def runner(one, items):
        for number, item in enumerate(items):
            if number == count:
                os.kill(os.getpid(), signal.SIGKILL)
            yield Outcome(item, process_and_commit(one, item))
    return runner


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_second_round_tries_what_still_fails_and_a_round_may_be_cut_off(tmp_path, site, kind):
    name = f"{kind}-rounds"
    source = urls(tmp_path / f"list.{kind}", shaky(site, name))
    dataset = Dataset.parse(str(tmp_path), "x")
    failed = of_round(site, name)

    def run(**options):
        return run_stage(Shard(dataset, config(source, samples_per_shard=4)), **options)
    with pytest.raises(StageFailed, match=r"rows failed \(\d+%, allowed are 1%\)"):
        run(max_failed=0.01)
    # Six shards are recorded; of the round's three one is worked off.
    assert synthetic.in_child(lambda: run(retry=True, runner=killing_after(1), max_failed=0.01)) == signal.SIGKILL
    web_server.seen(site)
    with pytest.raises(StageFailed, match="rows failed"):
        run(retry=True, max_failed=0.01)
    assert web_server.seen(site)["requests"] == len(failed[0]) - 4
    manifest = run(retry=True)
    assert web_server.seen(site)["requests"] == len(failed[1])
    lines = table(dataset, manifest)
    assert [line["source_row"] for line in lines] == [*range(22), *failed[0], *failed[1]]
    assert shard.count_rows(manifest, lines) == {"rows": 22, "good": 21, "failed": 1, "filtered": 0}
    assert list(verify.find_faults(dataset.root, dataset.path("shards"))) == []
    run_stage(Shard(dataset, config(source, samples_per_shard=4)), retry=True)
    assert "requests" not in web_server.seen(site)  # it is sealed


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_another_version_takes_over_the_shards_and_tries_the_rest(tmp_path, site, kind):
    name = f"{kind}-version"
    source = urls(tmp_path / f"list.{kind}", shaky(site, name))
    failed = [[row for row in rows if row != 20] for rows in of_round(site, name)]
    options = {"where": 'not contains(caption, "row 20")'}
    v1, first = sharded(tmp_path, source, **options)
    before = synthetic.files_below(tmp_path)
    v2 = v1.following()
    assert (v2.version, v2.following().version) == ("v2", "v3")
    web_server.seen(site)
    second = run_stage(Shard(v2, config(source, **options), base=v1))
    assert web_server.seen(site)["requests"] == len(failed[0])
    assert {key: data for key, data in synthetic.files_below(tmp_path).items() if key in before} == before
    ours, theirs = (synthetic.files_below(Path(one.folder("shards"))) for one in (v2, v1))
    for file, data in theirs.items():
        if not file.startswith(("rows/", "records/", "plan", "manifest")):
            assert ours[file] == data, file
    assert [record | {"plan": "", "run": {}} for record in second["items"][:3]] == [
        record | {"plan": "", "run": {}} for record in first["items"]]
    assert shard.count_rows(second, table(v2, second)) == {"rows": 22, "good": 19, "failed": 2, "filtered": 1}
    assert list(verify.find_faults(v2.root, v2.path("shards"))) == []
    schemas = {pq.read_schema(v2.fetch("shards", file_of(record, ".parquet"))) for record in second["items"]}
    assert len(schemas) == 1
    # And so on: a third, and one from which nothing is left to try but what fails for good.
    web_server.seen(site)
    v3 = v2.following()
    third = run_stage(Shard(v3, config(source, **options), base=v2))
    assert web_server.seen(site)["requests"] == len(failed[1])
    assert shard.count_rows(third, table(v3, third)) == {"rows": 22, "good": 20, "failed": 1, "filtered": 1}
    fourth = run_stage(Shard(v3.following(), config(source, **options), base=v3))
    assert web_server.seen(site)["requests"] == 1 and len(fourth["items"]) == len(third["items"]) + 1
    assert fourth["info"]["filtered"] == 1
    with pytest.raises(ValueError, match=r"sharded with other settings \(image_size, quality\)"):
        prepare(Shard(Dataset.parse(v1.root, "x@other"), config(source, image_size=8, quality=9, **options),
                            base=v1))


def test_a_version_of_a_version_without_failures_is_the_same_again(tmp_path, site):
    source = urls(tmp_path / "list.csv", [f"http://{site}/flaky?n=1&name=once&file=00.png", f"http://{site}/01.png"])
    v1 = Dataset.parse(str(tmp_path), "x")
    one = run_stage(Shard(v1, config(source)), retry=True)
    v2, v3 = v1.following(), v1.following().following()
    two = run_stage(Shard(v2, config(source), base=v1))
    three = run_stage(Shard(v3, config(source), base=v2), retry=True)
    for manifest in (two, three):
        assert [record["files"] for record in manifest["items"]] == [record["files"] for record in one["items"]]
        assert shard.count_rows(manifest, table(v1, one))["good"] == 2


def test_a_version_of_another_source_is_refused(tmp_path, site):
    source = urls(tmp_path / "list.parquet", shaky(site, "other"))
    v1, _ = sharded(tmp_path, source)
    urls(source, [f"http://{site}/{number:02d}.png" for number in range(22)])
    with pytest.raises(ValueError, match="x was sharded from other pictures than"):
        prepare(Shard(v1.following(), config(source), base=v1))


def test_pictures_of_a_folder_are_tried_again(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in PICTURES:
        (source / name).write_bytes(PICTURES[name] if int(name[:2]) % 5 else b"not yet copied")
    dataset = Dataset.parse(str(tmp_path), "x")
    one = Shard(dataset, config(source))
    with pytest.raises(StageFailed, match=r"5 of 24 rows failed .*: 5 not_a_picture"):
        run_stage(one, max_failed=0.1)
    for name in ("00.png", "05.png", "10.png"):
        (source / name).write_bytes(PICTURES[name])
    manifest = run_stage(Shard(dataset, config(source)), retry=True, max_failed=0.1)
    assert shard.count_rows(manifest, table(dataset, manifest)) == {
        "rows": 24, "good": 22, "failed": 2, "filtered": 0}
    (source / "15.png").write_bytes(PICTURES["15.png"])
    v2 = dataset.following()
    manifest = run_stage(Shard(v2, config(source), base=dataset))
    assert shard.count_rows(manifest, table(v2, manifest)) == {"rows": 24, "good": 23, "failed": 1, "filtered": 0}
    good = [line for line in table(v2, manifest) if line["status"] == "success"]
    assert sorted(line["source_row"] for line in good) == [number for number in range(24) if number != 20]
    assert {line["url"] for line in good} == {name for name in PICTURES if name != "20.png"}


def test_what_is_in_the_source_is_not_tried_again(tmp_path):
    pq.write_table(pa.table({"image": [b"no picture", PICTURES["00.png"]]}), tmp_path / "list.parquet")
    one = Shard(Dataset.parse(str(tmp_path), "x"), config(tmp_path / "list.parquet"))
    with pytest.raises(ValueError, match="what failed once would fail again"):
        run_stage(one, retry=True)
    assert run_stage(one)["totals"]["samples"] == 1


# The budget.

def test_a_hopeless_run_is_stopped_early_and_what_is_recorded_stays(tmp_path, site, monkeypatch):
    monkeypatch.setattr(progress, "period", lambda folder: 0.02)
    addresses = [f"http://{site}/{'00.png' if number % 3 == 0 else 'gone.png' if number % 3 == 1 else 'text.jpg'}"
                 for number in range(1500)]
    source = urls(tmp_path / "list.csv", addresses)
    dataset = Dataset.parse(str(tmp_path), "x")
    settings = {"samples_per_shard": 100, "image_size": 8}
    web_server.seen(site)
    with pytest.raises(StageFailed) as stopped:
        run_stage(Shard(dataset, config(source, **settings)), max_failed=0.3)
    message = str(stopped.value)
    assert "allowed are 30%" in message and "http_404" in message and "not_a_picture" in message
    assert web_server.seen(site)["requests"] < 500
    assert not storage.exists(storage.join(dataset.folder("shards"), "manifest.json"))
    recorded = storage.list_files(storage.join(dataset.folder("shards"), "records"))
    assert 1 <= len(recorded) < 5
    before = synthetic.files_below(tmp_path / "datasets")
    manifest = run_stage(Shard(dataset, config(source, **settings)), max_failed=0.7)
    assert web_server.seen(site)["requests"] == 1500 - 100 * len(recorded)
    after = synthetic.files_below(tmp_path / "datasets")
    assert all(after[name] == data for name, data in before.items() if "/progress" not in name)
    reasons = accounted(dataset, manifest, 1500)
    assert Counter(reasons.values()) == {"": 500, "http_404": 500, "not_a_picture": 500}


def test_the_budget_is_kept_by_small_lists_too(tmp_path, site):
    source = urls(tmp_path / "list.csv", [f"http://{site}/{name}.png" for name in ("00", "gone", "01", "small", "02")])
    dataset = Dataset.parse(str(tmp_path), "x")
    one = Shard(dataset, config(source, min_size=10))
    with pytest.raises(StageFailed, match=r"1 of 5 rows failed \(20%, allowed are 10%\): 1 http_404"):
        run_stage(one, max_failed=0.1)
    assert not storage.exists(storage.join(dataset.folder("shards"), "manifest.json"))
    assert run_stage(one, max_failed=0.2)["totals"]["samples"] == 3  # what is too small was left out by choice
