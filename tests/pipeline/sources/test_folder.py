"""Folders as sources: captions in several formats, and file name patterns."""

import pytest

from pipeline import storage
from tests.pipeline import synthetic
from tests.pipeline.shards.test_shard import ledger, table
from tests.pipeline.sources.list_datasets import PICTURES, open_path, shard_source, write_list


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_captions_of_a_folder_may_be_in_any_kind_of_file(tmp_path, kind):
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    names = ["a.png", "below/b.png", "c.png"]
    for number, name in enumerate(names):
        (source / name).write_bytes(PICTURES[f"{number:02d}.png"])
    rows = [{"file": name, "caption": "not this", "words": f"{name}, \u2028 in two lines\x85", "year": 1900 + number}
            for number, name in enumerate(names[:2])]
    write_list(source / f"captions.{kind}", rows)
    dataset, manifest = shard_source(tmp_path, source, caption_column="words")
    rows_by_name = {row["url"]: row for row in table(dataset, manifest)}
    assert {name: row["caption"] for name, row in rows_by_name.items()} == {
        "a.png": rows[0]["words"], "below/b.png": rows[1]["words"], "c.png": ""}
    years = [1900, 1901] if kind != "csv" else ["1900", "1901"]
    assert [row["year"] for row in rows_by_name.values()] == [*years, None]
    assert manifest["totals"]["noted"] == {"caption_missing": 1}


def test_captions_may_be_text_files_beside_the_images(tmp_path, s3):
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    texts = {"a.png": "caption of a \n", "below/b.b.png": "\ufeffof b", "c.png": None, "d.png": ""}
    for name, caption in texts.items():
        (source / name).write_bytes(PICTURES["00.png"])
        if caption is not None:
            (source / name).with_suffix(".txt").write_text(caption)
    for name, data in synthetic.files_below(source).items():
        storage.put_bytes(data, storage.join(s3, "source", name))
    for root, place in ((tmp_path / "local", source), (tmp_path / "remote", storage.join(s3, "source"))):
        dataset, manifest = shard_source(root, place)
        assert {row["url"]: row["caption"] for row in table(dataset, manifest)} == {
            "a.png": "caption of a", "below/b.b.png": "of b", "c.png": "", "d.png": ""}
        assert [(line["key"], line["reason"]) for line in ledger(dataset, manifest)] == [
            ("c.png", "caption_missing"), ("d.png", "caption_missing")]


def test_patterns_choose_images_of_a_folder(tmp_path, s3):
    source = tmp_path / "source [1]"
    names = ["a.png", "b.jpg", "x/c.png", "x/y/d.png", "x/y/e[2].png"]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(PICTURES["00.png"])
        storage.put_bytes(PICTURES["00.png"], storage.join(s3, name))
    write_list(source / "captions.csv", [{"file": name, "caption": name} for name in [*names, "absent.png"]])
    for pattern, expected in (("*.png", ["a.png", "absent.png"]), ("**/*.png", ["a.png", *names[2:], "absent.png"]),
                              ("x/*.png", ["c.png"]), ("x/**", ["c.png", "y/d.png", "y/e[2].png"]), ("?.*", names[:2]),
                              ("**/e[2]*", names[4:]), ("**/y/?.png", ["x/y/d.png"])):
        for place in (str(source), s3):
            rows = list(open_path(f"{place}/{pattern}", kind="pictures")._list())
            wanted = [name for name in expected if place != s3 or name != "absent.png"]
            assert [row.name for row in rows] == wanted, (place, pattern)
            if place != s3 and not pattern.startswith("x"):  # names and captions are those of the folder before it
                assert all(row.caption == row.name for row in rows)
