"""The comparison of a source with the listing of a version by columns equals a loop over the rows."""

import csv
import os
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.datasets.dataset import Dataset
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.takedowns.takedown_list import Forgotten
from pipeline.versions import listing as listings
from pipeline.versions import source_diff
from pipeline.versions.listing import LISTING_SCHEMA, read_listing, wide
from pipeline.versions.source_diff import Hashes, SourceDiff
from pipeline.versions.update_shards import Update
from tests.pipeline import synthetic

NAMES = [f"http://a{number % 3}.org/{number}.png" for number in range(40)]


def read(path: Path, rows: list[tuple[str, str]], forgotten: Forgotten) -> SourceDiff:
    """A list of URLs and captions as a source."""
    folder = path / f"diff{len(list(path.iterdir()))}"
    folder.mkdir()
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("url", "caption"), *rows])
    return SourceDiff.read(ShardConfig(source=(str(folder / "list.csv"),)), forgotten, str(folder))


def compare_row_by_row(rows: list[dict[str, Any]], before: list[dict[str, Any]], hashes: dict[int, str],
                       forgotten: Forgotten) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The result that `SourceDiff.against` must have for a list of URLs, from a loop over the rows."""
    old_rows, names = {row["mark"]: row for row in before}, Counter(row["name"] for row in before)
    result, counts = [], Counter[str]()
    for number, row in enumerate(rows):
        old = old_rows.get(row["mark"])
        same = old is not None and (hashes[number] == old["sha256"] if number in hashes and old["sha256"]
                                    else row["stamp"] == old["stamp"])
        if not old or not same or old["status"] != "success":
            counts["changed" if names[row["name"]] > 0 else "added"] += 1
            names[row["name"]] -= names[row["name"]] > 0
            result.append(row | {"sha256": "", "shard": "", "row": -1, "status": "", "fresh": True})
            continue
        names[row["name"]] -= 1
        out = old["sha256"] in forgotten.sha256
        counts["forgotten" if out else "kept"] += 1
        place = {"shard": "", "row": -1, "status": "forgotten"} if out else {
            name: old[name] for name in ("shard", "row", "status")}
        result.append(row | {"sha256": old["sha256"], "fresh": False} | place)
    for name, count in names.items():
        counts["forgotten" if forgotten.has_name(name) else "removed"] += max(count, 0)
    return result, counts


@pytest.mark.parametrize("seed", range(8))
def test_columns_give_the_result_of_a_loop_over_rows(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    rows = [(chance.choice(NAMES), f"caption {chance.randrange(3)}") for _ in range(chance.choice([1, 30, 120]))]
    first = read(tmp_path, rows, Forgotten()).listing().drop(["fresh"]).to_pylist()
    for number, row in enumerate(first):
        row |= {"sha256": f"{number % 9:064x}", "shard": f"{number // 10:06d}", "row": number,
                "status": chance.choice(["success"] * 4 + ["failed_to_download"])}
        row["stamp"] = chance.choice(["", "", "other"])
    chance.shuffle(first)
    before = pa.Table.from_pylist(first, wide(LISTING_SCHEMA))
    changed = [(name, "new" if chance.random() < 0.2 else caption) for name, caption in rows
               if chance.random() < 0.8] + [(chance.choice(NAMES), "more") for _ in range(chance.randrange(9))]
    chance.shuffle(changed)
    forgotten = Forgotten(frozenset({f"{4:064x}"}), frozenset(NAMES[:3]), frozenset({"a1.org"}))
    kept_names = [row for row in changed if not forgotten.has_name(row[0])] or [("http://b.org/1.png", "only")]
    source = read(tmp_path, [*changed, *kept_names[:1]], forgotten)
    now = source.listing().select(["name", "mark", "stamp"]).to_pylist()
    hashes = {number: f"{chance.randrange(9):064x}" for number in range(0, len(now), 3)}
    diff = source.against(before, Hashes(np.array(list(hashes), np.int64),
                                         pa.array(list(hashes.values()), pa.large_string())))
    expected, counts = compare_row_by_row(now, first, hashes, forgotten)
    assert diff.listing().to_pylist() == [{name: row[name] for name in diff.listing().column_names} for row in expected]
    assert dict(diff.counts) == dict(counts)
    fresh = [number for number, row in enumerate(expected) if row["fresh"]]
    assert diff.fresh_numbers().tolist() == fresh
    assert [row.number for row in diff.rows(diff.fresh_numbers())] == fresh
    live: dict[str, list[int]] = {}
    for row in expected:
        if row["shard"] and row["status"] == "success":
            live.setdefault(row["shard"], []).append(row["row"])
    assert {shard: rows.tolist() for shard, rows in diff.live_rows().items()} == {
        shard: sorted(rows) for shard, rows in live.items()}


def test_rows_of_one_name_are_distinguished(tmp_path: Path) -> None:
    diff = read(tmp_path, [(NAMES[0], "same")] * 3 + [(NAMES[1], "same")], Forgotten())
    marks = diff.listing()["mark"].to_pylist()
    assert len(set(marks)) == 4
    again = read(tmp_path, [(NAMES[1], "same")] + [(NAMES[0], "same")] * 3, Forgotten())
    assert again.listing()["mark"].to_pylist() == [marks[3], *marks[:3]] and again.digest != diff.digest


SIGNED_ROWS = [
    *((f"https://h.org/{number}.png?w=1&X-Goog-Signature=secret{number}", "signed") for number in range(5)),
    *((f"https://h.org/get?key={number}", "unknown") for number in range(5)),
    *((f"https://me:secret@h.org/{number}.png?token=secret", "known") for number in range(5)),
    ("https://h.org/a.png?sig=secret1&se=1", "twice"), ("https://h.org/a.png?sig=secret2&se=2", "twice"),
    ("https://h.org/get?key=1", "unknown"), *((name, "plain") for name in NAMES[:5])]


def _as_stored(diff: SourceDiff) -> pa.Table:
    """The listing of the version that a diff makes, if each row becomes a sample."""
    rows = diff.listing().drop(["fresh"]).to_pylist()
    for number, row in enumerate(rows):
        row |= {"sha256": f"{number:064x}", "shard": "000000", "row": number, "status": "success"}
    return pa.Table.from_pylist(rows, wide(LISTING_SCHEMA))


@pytest.mark.parametrize("change", ["edit .txt", "edit .caption", "edit .json", "add .caption", "touch .png", ""])
def test_changed_words_beside_an_image_are_changes(tmp_path: Path, change: str) -> None:
    source, (action, _, suffix) = tmp_path / "source", change.partition(" ")
    source.mkdir()
    for name in ("a", "b"):
        (source / f"{name}.png").write_bytes(b"image")
        (source / f"{name}.txt").write_text("" if action == "add" or suffix == ".caption" else name)
        if suffix == ".caption" and action == "edit":
            (source / f"{name}.caption").write_text(name)
        (source / f"{name}.json").write_text('{"year": 1907}')

    def read_folder() -> SourceDiff:
        folder = tmp_path / f"diff{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return SourceDiff.read(ShardConfig(source=(str(source),)), Forgotten(), str(folder))

    first = read_folder()
    identity = first.source.identity()
    if suffix == ".png":
        os.utime(source / "a.png", (1, 1))
    elif action:
        (source / f"a{suffix}").write_text('{"year": 1908, "more": 1}' if suffix == ".json" else "other words")
    second, before = read_folder(), _as_stored(first)
    suspects = second.suspects(before)
    assert suspects.tolist() == ([0] if suffix == ".png" else [])
    diff = second.against(before, Hashes(suspects, before["sha256"].take(pa.array(suspects)).combine_chunks()))
    assert diff.fresh_numbers().tolist() == ([] if suffix in {".png", ""} else [0])
    assert (identity == second.source.identity()) == (action != "add")


def test_rows_of_an_old_version_with_another_url_format_stay(tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as old_program:
        old_program.setattr(source_diff, "source_name", source_diff.old_source_name)
        old_program.setattr(source_diff, "redact_cells", dict)
        before = _as_stored(read(tmp_path, SIGNED_ROWS, Forgotten()))
    assert "key=1" in str(before["name"].to_pylist())
    diff = read(tmp_path, SIGNED_ROWS, Forgotten()).against(before, Hashes.none())
    assert dict(diff.counts) == {"kept": len(SIGNED_ROWS), "removed": 0}
    names = " ".join(diff.listing()["name"].to_pylist())
    assert "secret" not in names and "key=REDACTED-" in names and NAMES[0] in names
    fewer = read(tmp_path, SIGNED_ROWS[3:], Forgotten()).against(before, Hashes.none())
    assert dict(fewer.counts) == {"kept": len(SIGNED_ROWS) - 3, "removed": 3}
    again = read(tmp_path, SIGNED_ROWS, Forgotten()).against(_as_stored(diff), Hashes.none())
    assert dict(again.counts) == {"kept": len(SIGNED_ROWS), "removed": 0}


def test_rows_that_are_signed_again_stay_and_other_keys_are_other_images(tmp_path: Path) -> None:
    before = _as_stored(read(tmp_path, SIGNED_ROWS, Forgotten()))
    signed = [(url.replace("secret", "later"), caption) for url, caption in SIGNED_ROWS]
    assert dict(read(tmp_path, signed, Forgotten()).against(before, Hashes.none()).counts) == {
        "kept": len(SIGNED_ROWS), "removed": 0}
    moved = [(url.replace("key=1", "key=100"), caption) for url, caption in SIGNED_ROWS]
    assert dict(read(tmp_path, moved, Forgotten()).against(before, Hashes.none()).counts) == {
        "kept": len(SIGNED_ROWS) - 2, "added": 2, "removed": 2}


def test_a_takedown_finds_a_url_with_and_without_its_parameters(tmp_path: Path) -> None:
    for url, count in ((SIGNED_ROWS[0][0], 1), ("https://h.org/0.png?w=1&X-Goog-Signature=***", 1),
                       ("https://h.org/get?key=1", 2), ("https://other:word@h.org/0.png?token=x", 1),
                       ("https://h.org/get?key=9", 0)):
        diff = read(tmp_path, SIGNED_ROWS, Forgotten(urls=frozenset({url})))
        assert diff.count == len(SIGNED_ROWS) - count, url


def test_a_stage_with_a_diff_is_small(tmp_path: Path) -> None:
    """Workers get the path of the rows, not the rows."""
    few, many = (read(tmp_path, [(f"http://a.org/{number}", "") for number in range(count)], Forgotten())
                 for count in (10, 10_000))
    assert abs(len(pickle.dumps(many)) - len(pickle.dumps(few))) < 100
    assert pickle.loads(pickle.dumps(many)).listing().equals(many.listing())


def test_pieces_and_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next version has equal bytes for any number of threads and any size of the pieces."""
    synthetic.drawings(tmp_path / "source")
    config = ShardConfig(image_size=32, format="png", samples_per_shard=7, source=(str(tmp_path / "source"),))
    base = Dataset(str(tmp_path / "first"), "drawn")

    def diff_against(folder: str, **pieces: int) -> SourceDiff:
        (tmp_path / folder).mkdir()
        source = SourceDiff.read(config, Forgotten(), str(tmp_path / folder))
        before = read_listing(base, **pieces) if pieces else wide(LISTING_SCHEMA).empty_table()
        return source.against(before, Hashes.none())

    run_stage(Update(base, config, None, diff_against("d0"), 0.5))
    paths = sorted((tmp_path / "source").rglob("*.png"))
    for path in paths[::5]:
        path.unlink()
    synthetic.noise(32, 32, 1).save(paths[1])
    results = []
    for number, (piece_rows, readers, group) in enumerate([(1, 1, 1), (5, 3, 4), (1 << 16, 16, 64)]):
        monkeypatch.setattr(listings, "_SHARDS_AT_ONCE", group)
        diff = diff_against(f"d{number + 1}", piece_rows=piece_rows, readers=readers)
        root = shutil.copytree(tmp_path / "first", tmp_path / f"root{number}")
        target = Dataset(str(root), "drawn", "v2")
        run_stage(Update(target, config, Dataset(str(root), "drawn"), diff, 0.5))
        results.append({entry["name"].rpartition("/")[2]: entry["sha256"] for record in [
            *target.manifest("shards")["items"], target.manifest("shards")] for entry in record["files"]})
    assert results[0] == results[1] == results[2] and "listing.parquet" in results[0]
