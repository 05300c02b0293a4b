import csv
import io

import numpy as np
from PIL import Image

from pipeline.corpora.config import DemoCorpusConfig
from pipeline.corpora.demo_corpus import DemoCorpus
from pipeline.datasets.dataset import Dataset
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from pipeline.versions import verify

CONFIG = DemoCorpusConfig(corpus="drawn", size=24, subjects=20, pictures_per_item=50)


def read_rows(folder, name: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO((folder / name).read_text())))


def test_the_drawn_corpus_is_a_folder_of_images_with_captions(tmp_path):
    manifest = run_stage(DemoCorpus(str(tmp_path), CONFIG, tmp_path / "cache"))
    folder = tmp_path / "pictures" / "drawn"
    assert manifest["totals"]["samples"] == 120 and not manifest["totals"]["skipped"]
    styles = ("flat", "hatched", "lineart", "outline", "silhouette", "soft")
    by_style = {style: read_rows(folder, f"{style}.csv") for style in styles}
    train, heldout = read_rows(folder, "train.csv"), read_rows(folder, "heldout.csv")
    # Each image is once in training or held out.
    every = {row["file"] for rows in by_style.values() for row in rows}
    assert len(every) == 120 == len(train) + len(heldout)
    assert {row["file"] for row in train} | {row["file"] for row in heldout} == every
    assert {row["subject"] for row in train}.isdisjoint(row["subject"] for row in heldout)
    subjects = {style: {row["subject"] for row in rows if row["held_out"] == "1"} for style, rows in by_style.items()}
    assert all(len(held_out) == 2 and held_out == subjects["flat"] for held_out in subjects.values())
    assert {row["subject"] for row in heldout} == subjects["flat"]
    for row in [*train, *heldout]:
        picture = Image.open(folder / row["file"])
        assert picture.size == (24, 24) and picture.mode == "RGB" and np.asarray(picture).std() > 1
        assert row["caption"] and row["style"] == row["file"].split("/")[0]
    # In the mixed dataset the styles alternate.
    assert len({row["style"] for row in train[:12]}) > 2
    assert list(verify.find_faults(str(tmp_path), "pictures/drawn")) == []


def test_two_runs_give_the_same_corpus(tmp_path):
    first, second = (run_stage(DemoCorpus(str(tmp_path / name), CONFIG, tmp_path)) for name in ("one", "other"))
    assert without_run_facts(first) == without_run_facts(second)


def test_training_shards_have_no_held_out_subject(tmp_path):
    run_stage(DemoCorpus(str(tmp_path), CONFIG, tmp_path))
    folder = tmp_path / "pictures" / "drawn"
    dataset = Dataset.parse(str(tmp_path), "train")
    manifest = run_stage(Shard(dataset, ShardConfig(source=str(folder), captions=str(folder / "train.csv"),
                                                    only_captioned=True, image_size=24, format="png",
                                                    sources=str(folder / "sources.json"))))
    from pipeline.datasets.metadata import metadata
    rows = [row for record in manifest["items"] for row in metadata(dataset, record)]
    assert len(rows) == 108 and manifest["totals"] | {"bytes": 0} == {
        "items": 1, "samples": 108, "bytes": 0, "skipped": {}, "noted": {}}
    held_out = {row["subject"] for row in read_rows(folder, "heldout.csv")}
    assert held_out and held_out.isdisjoint(row["subject"] for row in rows)
    assert [source["style"] for source in manifest["info"]["sources"]] == sorted({row["style"] for row in rows})
