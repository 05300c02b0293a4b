"""Parquet files of the Hugging Face Hub and of img2dataset are read unchanged."""

import base64
import hashlib
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from tests.pipeline import web_server
from tests.pipeline.shards.test_shard import ledger, table
from tests.pipeline.sources.list_datasets import PICTURES, open_path, shard_source, stored_samples, write_list

IMAGES = [PICTURES[f"{number:02d}.png"] for number in range(9)]
JPEG_URL = "data:image/png;base64," + base64.b64encode(IMAGES[0]).decode()


def write_hub(path, columns: dict, features: dict):
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


def test_class_labels_are_stored_by_name(tmp_path):
    styles = {"names": ["Baroque", "Cubism", "Ukiyo_e"], "_type": "ClassLabel"}
    images = [{"bytes": data, "path": None} for data in IMAGES]
    (tmp_path / "lists").mkdir()
    write_hub(tmp_path / "lists/0.parquet", {"image": images[:8], "style": [0, 1, 2, -1, None, 2, 7, 1]},
              {"image": {"_type": "Image"}, "style": styles})
    write_hub(tmp_path / "lists/1.parquet", {"image": images[8:], "style": ["Realism"]}, {})
    dataset, manifest = shard_source(tmp_path / "x", tmp_path / "lists")
    assert [row["style"] for row in table(dataset, manifest)] == [
        "Baroque", "Cubism", "Ukiyo_e", None, None, "Ukiyo_e", "7", "Cubism", "Realism"]
    assert [sample["json"]["style"] for sample in stored_samples(dataset, manifest)][:2] == ["Baroque", "Cubism"]
    assert [(line["reason"], line["detail"]) for line in ledger(dataset, manifest)] == [
        ("cell_changed", "style: no name for the class 7")]
    # A filter compares what the file holds.
    assert shard_source(tmp_path / "y", tmp_path / "lists/0.parquet", where="style == 2")[1]["totals"]["samples"] == 2


def output_rows(image_site: str) -> list[dict]:
    return [{"url": f"http://{image_site}/{number:02d}.png", "caption": f"caption {number}", "key": f"00000000{number}",
             "status": ["success", "failed_to_download", "failed_to_resize"][number % 3],
             "error_message": [None, "HTTP Error 404", None][number % 3], "width": 20, "height": 24,
             "original_width": 40, "original_height": 48, "sha256": hashlib.sha256(IMAGES[number]).hexdigest()}
            for number in range(9)]


def test_failed_rows_of_img2dataset_are_counted_and_not_fetched_again(tmp_path, image_site):
    for kind in ("parquet", "csv"):
        path = write_list(tmp_path / f"list.{kind}", output_rows(image_site))
        web_server.seen(image_site)
        dataset, manifest = shard_source(tmp_path / kind, path, max_pixels=10_000)
        assert manifest["totals"]["samples"] == 3 and manifest["totals"]["skipped"] == {"failed_before": 6}
        assert web_server.seen(image_site)["requests"] == 3
        assert Counter(row["error_message"] for row in table(dataset, manifest)) == {
            None: 3, "failed_before: failed_to_download: HTTP Error 404": 3, "failed_before: failed_to_resize": 3}
        _, manifest = shard_source(tmp_path / f"{kind} again", path, fetch_failed=True)
        assert manifest["totals"]["samples"] == 9


def test_images_reencoded_by_img2dataset_are_not_compared_with_the_hash(tmp_path, image_site):
    rows = [row | {"txt": row["caption"] if row["status"] == "success" else None, "caption": None, "sha256": "0" * 64,
                   "jpg": IMAGES[number] if row["status"] == "success" else None}
            for number, row in enumerate(output_rows(image_site))]
    path = write_list(tmp_path / "list.parquet", rows)
    web_server.seen(image_site)
    dataset, manifest = shard_source(tmp_path / "x", path, caption_column="txt")
    assert manifest["totals"]["samples"] == 3 and manifest["totals"]["skipped"] == {"failed_before": 6}
    assert "requests" not in web_server.seen(image_site)
    assert [row["source_sha256"] for row in table(dataset, manifest)] == ["0" * 64] * 9
    assert [sample["txt"] for sample in stored_samples(dataset, manifest)] == [b"caption 0", b"caption 3", b"caption 6"]
    _, manifest = shard_source(tmp_path / "y", path, hash_column="none")
    assert manifest["totals"]["samples"] == 3


@pytest.mark.parametrize("layout", ["structs", "bytes", "base64", "data", "list of data", "url", "url data"])
def test_images_may_be_in_lists_in_base64_and_in_urls(tmp_path, image_site, layout):
    texts = [base64.b64encode(data).decode() for data in IMAGES]
    urls = [f"data:image/png;base64,{text}" for text in texts]
    columns = {"structs": {"images": [[{"bytes": data, "path": f"{number}.png"}] * (1 + number % 2)
                                      for number, data in enumerate(IMAGES)]},
               "bytes": {"images": [[data] for data in IMAGES]}, "base64": {"image": texts}, "data": {"image": urls},
               "list of data": {"images": pa.array([[{"bytes": data}, None] for data in IMAGES])},
               "url": {"image": [f"http://{image_site}/{number:02d}.png" for number in range(9)]},
               "url data": {"url": urls}}[layout]
    pq.write_table(pa.table(columns | {"text": [f"text {number}" for number in range(9)]}), tmp_path / "a.parquet")
    dataset, manifest = shard_source(tmp_path / "x", tmp_path / "a.parquet")
    expected = shard_source(tmp_path / "y", write_list(tmp_path / "b.parquet", [{"jpg": data} for data in IMAGES]))
    assert [sample["png"] for sample in stored_samples(dataset, manifest)] == [
        sample["png"] for sample in stored_samples(*expected)]
    assert [row["caption"] for row in table(dataset, manifest)] == [f"text {number}" for number in range(9)]
    several = [line["detail"] for line in ledger(dataset, manifest) if line["reason"] == "first_of_several"]
    assert several == ["images: the first of 2 is taken"] * {"structs": 4, "list of data": 9}.get(layout, 0)
    assert all(len(row["url"]) < 80 for row in table(dataset, manifest))


def test_data_urls_of_text_lists_are_decoded(tmp_path, image_site):
    rows = [{"url": JPEG_URL, "caption": "a"}, {"url": "data:image/png;base64,?", "caption": "b"},
            {"url": "data:,", "caption": "c"}, {"url": f"http://{image_site}/01.png", "caption": "d"},
            {"url": "data:image/svg+xml,%3Csvg%2F%3E", "caption": "e"}]
    for kind in ("csv", "jsonl", "parquet"):
        dataset, manifest = shard_source(tmp_path / kind, write_list(tmp_path / f"list.{kind}", rows))
        stored = table(dataset, manifest)
        assert [row["error_message"] and row["error_message"].split(":")[0] for row in stored] == [
            None, "bad_url", "bad_url", None, "not_a_picture"]
        assert stored[0]["url"].startswith("data:image/png;sha256=") and len(stored[0]["url"]) == 38
        plan = storage.read_json(storage.join(dataset.folder("shards"), "plan.json"))
        assert len(plan["items"]) == 1


def test_every_file_is_searched_for_captions(tmp_path, image_site, caplog):
    url = f"http://{image_site}/00.png"
    for kind in ("parquet", "jsonl"):
        folder = tmp_path / kind
        write_list(folder / f"a.{kind}", [{"url": url, "year": 1900}])
        write_list(folder / f"b.{kind}", [{"url": url, "Prompt": "words"}])
        dataset, manifest = shard_source(tmp_path / f"{kind} root", folder)
        assert [row["caption"] for row in table(dataset, manifest)] == ["", "words"]
        assert manifest["totals"]["noted"] == {"caption_missing": 1} and "no column is a caption" not in caplog.text
    open_path(folder / "a.jsonl")
    assert "a.jsonl: no column is a caption; it has year\nhint: --caption-column NAME" in caplog.text
