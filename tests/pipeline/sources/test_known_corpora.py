"""Known corpora are read without flags: small copies have the columns of the originals."""

import base64
import bz2
import hashlib
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.layouts.column_paths import cell_at, find_roots
from pipeline.rows.licenses import attribution_of, license_of
from pipeline.stages.types import StageFailed
from tests.pipeline.shards.test_shard import ledger, table
from tests.pipeline.sources.list_datasets import PICTURES, open_path, shard_source
from tests.pipeline.sources.test_folder_captions import write_images

IMAGE = PICTURES["00.png"]
MD5 = hashlib.md5(IMAGE)
CLASSES = {"artist": ["vincent-van-gogh"], "genre": ["landscape", "portrait"], "style": ["Baroque", "Cubism"]}


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_rows(path: Path, *rows: dict, classes: dict | None = None) -> Path:
    features = {name: {"_type": "ClassLabel", "names": names} for name, names in (classes or {}).items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if classes else None
    pq.write_table(pa.Table.from_pylist(list(rows)).replace_schema_metadata(metadata), path)
    return path


def re_laion(folder: Path, url: str) -> Path:
    return write_rows(folder / "part-00000-c000.snappy.parquet", {
        "url": url, "caption": "a cat", "similarity": 0.3, "hash": 7, "punsafe": 0.1, "pwatermark": 0.2})


def laion_after_img2dataset(folder: Path, url: str) -> Path:
    row = {"similarity": 0.3, "hash": 7, "punsafe": 0.1, "pwatermark": 0.2, "LANGUAGE": "en", "caption": "a cat",
           "url": url, "key": "000000000", "status": "success", "error_message": None, "width": 20, "height": 24,
           "original_width": 20, "original_height": 24, "exif": "{}", "md5": MD5.hexdigest()}
    return write_rows(folder / "00000.parquet", row, row | {"status": "failed_to_download", "key": "000000001"})


def datacomp(folder: Path, url: str) -> Path:
    return write_rows(folder / "0.parquet", {
        "uid": "00ab", "url": url, "text": "a cat", "original_width": 20, "original_height": 24,
        "clip_b32_similarity_score": 0.3, "clip_l14_similarity_score": 0.3, "face_bboxes": [[0.1, 0.2, 0.3, 0.4]],
        "sha256": hashlib.sha256(IMAGE).hexdigest()})


def pd12m(folder: Path, url: str) -> Path:
    return write_rows(folder / "pd12m.00.parquet", {
        "id": "1", "url": url, "caption": "a cat", "width": 20, "height": 24, "mime_type": "image/png",
        "hash": MD5.hexdigest(), "license": "https://creativecommons.org/publicdomain/zero/1.0/",
        "source": "https://example.org/1"})


def open_images(folder: Path, url: str, md5: bytes = MD5.digest(), thumbnail: str = "") -> Path:
    return write_lines(
        folder / "train-images.csv",
        "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,"
        "Thumbnail300KURL,Rotation",
        f"000060e3,train,{url},https://www.flickr.com/photos/a/1,https://creativecommons.org/licenses/by/2.0/,"
        'https://www.flickr.com/people/a/,"Al ""A"" B",a cat,'
        f"{len(IMAGE)},{base64.b64encode(md5).decode()},{thumbnail},")


def cc3m(folder: Path, url: str) -> Path:
    return write_lines(folder / "Train_GCC-training.tsv", f"a cat\t{url}")


def cc12m(folder: Path, url: str) -> Path:
    return write_lines(folder / "cc12m.tsv", f"{url}\ta cat")


def wikiart(folder: Path, _: str) -> Path:
    return write_rows(folder / "train-00000-of-00072.parquet", {
        "image": {"bytes": IMAGE, "path": None}, "artist": 0, "genre": 1, "style": 1}, classes=CLASSES)


def artbench(folder: Path, url: str) -> Path:
    return write_lines(folder / "ArtBench-10.csv", "name,artist,url,is_public_domain,length,width,label,split",
                       f"a_cat.jpg,El Greco,{url},True,24,20,renaissance,train")


def met(folder: Path, url: str) -> Path:
    return write_lines(folder / "objects.jsonl", json.dumps({
        "objectID": 1, "isHighlight": False, "isPublicDomain": True, "primaryImage": url, "primaryImageSmall": "",
        "title": "a cat", "artistDisplayName": "El Greco", "objectURL": "https://www.metmuseum.org/art/1"}))


def rijksmuseum(folder: Path, url: str) -> Path:
    return write_lines(folder / "dump.csv", "objectInventoryNumber,objectPersistentIdentifier,objectTitle[1],"
                       "objectType[1],objectCreator[1],objectCreationDate[1],objectImage",
                       f"SK-A-1,http://hdl.handle.net/1,a cat,painting,Jan Steen,1660,{url}")


def smithsonian(folder: Path, url: str) -> Path:
    media = [{"content": url, "idsId": "CHNDM-1", "type": "Images", "usage": {"access": "CC0"}},
             {"content": "http://127.0.0.1/other", "usage": {"access": "Usage conditions apply"}}]
    record = {"id": "edanmdm-chndm_1", "version": "", "unitCode": "CHNDM", "linkedId": "0", "type": "edanmdm",
              "url": "edanmdm:chndm_1", "hash": "0a", "docSignature": "1b", "timestamp": 1, "lastTimeUpdated": 1,
              "content": {"descriptiveNonRepeating": {
                  "online_media": {"media": media, "mediaCount": 2}, "title": {"label": "Title", "content": "a cat"},
                  "metadata_usage": {"access": "CC0"}, "record_link": "https://collection.example.org/1"},
                  "freetext": {"name": [{"label": "Artist", "content": "El Greco"}]}}}
    path = folder / "metadata/objects/CHNDM/00.txt.bz2"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bz2.compress(json.dumps(record).encode() + b"\n"))
    return folder / "metadata"


def smithsonian_without_title(folder: Path, url: str) -> Path:
    """The first record has a title, and the second one only that inside of its content."""
    path = next(smithsonian(folder, url).rglob("*.bz2"))
    record = bz2.decompress(path.read_bytes())
    path.write_bytes(bz2.compress(json.dumps({"title": "a dog"} | json.loads(record)).encode() + b"\n" + record))
    return folder / "metadata"


def aic(folder: Path, url: str) -> Path:
    path = folder / "json/artworks/4.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        "id": 4, "api_model": "artworks", "title": "a cat", "is_public_domain": True, "artist_title": "El Greco",
        "image_id": url.rpartition("/")[2].removesuffix(".png"), "thumbnail": {"lqip": "data:image/gif;base64,R0"}},
        indent=4))
    return path.parent


LISTS = [  # layout, maker, caption, license, (author, title, page)
    ("re-LAION", re_laion, "a cat", "", ("", "", "")),
    ("LAION after img2dataset", laion_after_img2dataset, "a cat", "", ("", "", "")),
    ("DataComp", datacomp, "a cat", "", ("", "", "")),
    ("PD12M", pd12m, "a cat", "CC0-1.0", ("", "", "https://example.org/1")),
    ("OpenImages", open_images, "a cat", "CC-BY-2.0", ('Al "A" B', "a cat", "https://www.flickr.com/photos/a/1")),
    ("CC3M", cc3m, "a cat", "", ("", "", "")),
    ("CC12M", cc12m, "a cat", "", ("", "", "")),
    ("WikiArt", wikiart, "Cubism, portrait, vincent-van-gogh", "", ("vincent-van-gogh", "", "")),
    ("ArtBench-10", artbench, "renaissance, El Greco", "CC-PDM-1.0", ("El Greco", "", "")),
    ("Met", met, "a cat", "CC-PDM-1.0", ("El Greco", "a cat", "https://www.metmuseum.org/art/1")),
    ("Rijksmuseum", rijksmuseum, "a cat", "", ("Jan Steen", "a cat", "http://hdl.handle.net/1")),
    ("Smithsonian", smithsonian, "a cat", "CC0-1.0", ("El Greco", "a cat", "https://collection.example.org/1")),
    ("AIC", aic, "a cat", "CC-PDM-1.0", ("El Greco", "a cat", "https://www.artic.edu/artworks/4")),
]


@pytest.mark.parametrize(("name", "make", "caption", "license", "credit"), LISTS, ids=[each[0] for each in LISTS])
def test_tables_of_known_corpora_are_read(tmp_path, image_site, caplog, name, make, caption, license, credit):
    flags = {"url_column": f"http://{image_site}/{{image_id}}.png"} if name == "AIC" else {}  # not its real host
    with caplog.at_level(logging.INFO):
        dataset, manifest = shard_source(tmp_path / "x", make(tmp_path, f"http://{image_site}/00.png"), **flags)
    row = table(dataset, manifest)[0]
    assert manifest["totals"]["samples"] == 1 and row["caption"] == caption
    assert license_of(row).spdx == license and tuple(attribution_of(row).values()) == credit
    assert [f"looks like {name}" in record.message for record in caplog.records].count(True) == 1
    assert not any("no column is a caption" in record.message for record in caplog.records)


@pytest.mark.parametrize(("make", "flags", "caption"), [
    (cc3m, {"columns": "words,url"}, ""), (cc12m, {"columns": "url,title"}, "a cat"),
    (wikiart, {"caption_column": "{style}"}, "Cubism"), (open_images, {"caption_column": "Author"}, 'Al "A" B')])
def test_flags_override_a_layout(tmp_path, image_site, make, flags, caption):
    dataset, manifest = shard_source(tmp_path / "x", make(tmp_path, f"http://{image_site}/00.png"), **flags)
    assert [row["caption"] for row in table(dataset, manifest)] == [caption]


def test_a_layout_has_the_caption_of_records_without_the_usual_column(tmp_path, image_site):
    dataset, _ = shard_source(tmp_path / "x", smithsonian_without_title(tmp_path, f"http://{image_site}/00.png"))
    assert [row["caption"] for row in table(dataset, _)] == ["a dog", "a cat"]


def test_open_images_is_checked_by_hash_or_by_thumbnail(tmp_path, image_site):
    url = f"http://{image_site}/00.png"
    with pytest.raises(StageFailed, match="1 hash_mismatch"):
        shard_source(tmp_path / "1", open_images(tmp_path, url, hashlib.md5(b"other").digest()))
    path = open_images(tmp_path, url, thumbnail=f"http://{image_site}/01.png")
    dataset, manifest = shard_source(tmp_path / "2", path, url_column="Thumbnail300KURL")
    assert table(dataset, manifest)[0]["url"].endswith("/01.png")
    path = open_images(tmp_path, url)  # the thumbnail is empty
    with pytest.raises(StageFailed, match="1 bad_url"):
        shard_source(tmp_path / "3", path, url_column="Thumbnail300KURL")
    dataset, manifest = shard_source(tmp_path / "4", path, url_column="Thumbnail300KURL;OriginalURL")
    assert table(dataset, manifest)[0]["url"] == url and ledger(dataset, manifest) == []


@pytest.mark.parametrize(("name", "files", "cells"), [
    ("ArtBench-10", ["train/ukiyo_e/a.png", "test/baroque/b.png"], {"style": ["baroque", "ukiyo_e"]}),
    ("WikiArt", ["wikiart/Baroque/jan-steen_a-cat.png", "wikiart/Pop_Art/me.png"], {
        "style": ["Baroque", "Pop_Art"], "artist": ["jan-steen", "me"], "title": ["a-cat", None]}),
    ("ImageFolder", ["train/cat/a.png", "test/dog/b.png"], {"label": ["dog", "cat"]}),
    ("ImageFolder", ["train/cat/a.png", "test/dog/b.png", "README.png"], {"label": [None, "dog", "cat"]}),
    ("", ["train/cat/a.png", "README.png"], {})])
def test_folders_of_classes_give_captions(tmp_path, caplog, name, files, cells):
    source = write_images(tmp_path / "source", *files)
    with caplog.at_level(logging.INFO):
        dataset, manifest = shard_source(tmp_path / "x", source)
    rows = table(dataset, manifest)
    assert {column: [row[column] for row in rows] for column in cells} == cells
    assert [f"looks like {name};" in record.message for record in caplog.records].count(True) == bool(name)
    strangers = {line["key"] for line in ledger(dataset, manifest) if line["reason"] == "class_missing"}
    assert len(strangers) == (name == "ImageFolder" and "README.png" in files)
    # As versions without layouts hashed them.
    facts = [[file, "", {}, ["class_missing"] * (bool(name) and file == "README.png"), "", ""]
             for file in sorted(files)]
    assert open_path(source).identity() == hashlib.sha256(
        b"".join(json.dumps(each, sort_keys=True).encode() + b"\n" for each in facts)).hexdigest()


def test_the_table_of_wikiart_is_joined_with_its_folders(tmp_path):
    source = write_images(tmp_path, "wikiart/Baroque/jan-steen_a-cat.png", "wikiart/Pop_Art/me_a-dog.png")
    write_lines(source / "wikiart.csv", "path,artist,genre", "Baroque/jan-steen_a-cat.png,Jan Steen,animal",
                "wikiart/Pop_Art/me_a-dog.png,,portrait")
    columns = [row.columns for row in open_path(source)._rows()]
    assert columns == [{"artist": "Jan Steen", "genre": "animal", "style": "Baroque", "title": "a-cat"},
                       {"artist": None, "genre": "portrait", "style": "Pop_Art", "title": "a-dog"}]


def test_aic_and_the_csv_of_the_met_are_read(tmp_path):
    assert open_path(aic(tmp_path, "http://host/00.png")).columns.image == (
        "https://www.artic.edu/iiif/2/{image_id}/full/843,/0/default.jpg")
    path = write_lines(tmp_path / "MetObjects.csv", "\ufeffObject Number,Is Highlight,Is Timeline Work,"
                       "Is Public Domain,Object ID,Title,Artist Display Name,Link Resource,Tags",
                       "1,False,False,True,1,a cat,,,")
    with pytest.raises(ValueError, match=r"looks like MetObjects.csv: it has no URLs of images\nhint: "):
        open_path(path)


def test_tsv_with_a_header_keeps_it(tmp_path, image_site):
    path = write_lines(tmp_path / "list.tsv", f"caption\turl\thttp://{image_site}/x", f"a\thttp://{image_site}/00.png\tb")
    dataset, manifest = shard_source(tmp_path / "x", path)
    assert [row["caption"] for row in table(dataset, manifest)] == ["a"]


CELLS = {"a": {"b": [{"c": "x"}, {"c": ""}, {"c": "y", "d": [1, 2]}], "": 0}, "a.e": "dotted", "f": '{"g": ["h"]}',
         "id": "1 2/#", "none": None, "with;": "semicolon", "whole": 17.0, "half": 0.5}


@pytest.mark.parametrize(("expression", "value"), [
    ("a.e", "dotted"), ("a.b.c", ["x", "y"]), ("a.b.d", [1, 2]), ("f.g", ["h"]), ("a.x.y", None), ("z", None),
    ("a.b.0.c", "x"), ("a.b.9.c", None),
    ("with;", "semicolon"), ("none;a.x;a.e", "dotted"), ("https://h/{id}/0.jpg?q={a.b.c}", "https://h/1%202/%23/0.jpg?q=x"),
    ("{id}: {a.e}", "1 2/#: dotted"), ("{id} {none}", None), ("id.x", None),
    ("https://h/{whole}/{half}.jpg", "https://h/17/0.5.jpg")])
def test_paths_and_templates_give_urls(expression, value):
    assert cell_at(CELLS, expression) == value


def test_roots_of_paths_and_templates_are_found():
    assert find_roots("{a.b} {id}", CELLS) == ["a", "id"] and find_roots("{a.b} {x}", CELLS) == []
    assert find_roots("x;f.g", CELLS) == ["f"] and find_roots("a.e.x", CELLS) == ["a.e"]


def test_the_index_that_pandas_writes_is_no_caption(tmp_path, image_site):
    path = write_lines(tmp_path / "list.csv", ",url", f"7,http://{image_site}/00.png")
    dataset, manifest = shard_source(tmp_path / "x", path)
    assert [(row["caption"], row[""]) for row in table(dataset, manifest)] == [("", "7")]
