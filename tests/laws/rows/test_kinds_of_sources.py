"""One law for every kind of source: each row is good, failed or filtered, and the counts of all reports agree."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.telemetry.progress_bar import describe_progress
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.media import tars
from pipeline.shards import shard
from pipeline.shards.adopt import Adopt
from pipeline.shards.shard import Shard
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from tests.laws.rows.row_accounting import FILES, config, write_list
from tests.pipeline.shards.test_shard import ledger, table

pytestmark = pytest.mark.usefixtures("private_cache")

GOOD, FAILED, FILTERED = ("00.png", "01.png", "02.png", "03.png"), ("text.jpg", "empty.png", "cut.jpg"), ("04.png",
                                                                                                        "05.png")
NAMES = (*GOOD[:2], *FILTERED[:1], *FAILED, *GOOD[2:], *FILTERED[1:])
WHERE = 'not contains(caption, "leave")'


def caption(name: str) -> str:
    return f"leave {name}" if name in FILTERED else f"take {name}"


def make_source(kind: str, folder: Path, site: str) -> Path:
    """The same nine rows as another kind of source."""
    if kind == "folder":
        (folder / "in").mkdir()
        for name in NAMES:
            (folder / "in" / name).write_bytes(FILES[name])
            (folder / "in" / name).with_suffix(".txt").write_text(caption(name))
        return folder / "in"
    if kind == "tar":
        tars.write(folder / "in.tar", [{"__key__": name[:-4], name[-3:]: FILES[name], "txt": caption(name).encode()}
                                       for name in NAMES])
        return folder / "in.tar"
    if kind == "parquet of images":
        pq.write_table(pa.table({"image": [{"bytes": FILES[name], "path": name} for name in NAMES],
                                 "caption": [caption(name) for name in NAMES]}), folder / "in.parquet")
        return folder / "in.parquet"
    if kind == "tsv":
        (folder / "in.tsv").write_text("url\tcaption\n" + "".join(
            f"http://{site}/{name}\t{caption(name)}\n" for name in NAMES))
        return folder / "in.tsv"
    rows = [{"url": f"http://{site}/{name}", "caption": caption(name)} for name in NAMES]
    return write_list(folder / f"in.{kind}", rows)


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet of images", "parquet", "csv", "tsv", "jsonl"])
def test_rows_are_good_failed_or_filtered(tmp_path, image_site, kind):
    source = make_source(kind, tmp_path, image_site)
    where = "" if kind == "folder" else WHERE  # a folder takes no filter
    filtered = len(FILTERED) if where else 0
    dataset, tallies = Dataset.parse(str(tmp_path / "root"), "x"), []
    manifest = run_stage(Shard(dataset, config(source, where=where)),
                         watch=lambda tally: tallies.append(dict(tally.now)))
    totals = manifest["totals"]
    assert shard.count_rows(manifest, table(dataset, manifest)) == {
        "rows": len(NAMES), "good": len(NAMES) - len(FAILED) - filtered, "failed": len(FAILED), "filtered": filtered}
    assert manifest["info"]["rows"] == len(NAMES) == totals["samples"] + sum(totals["skipped"].values()) + filtered
    assert Counter(line["reason"] for line in ledger(dataset, manifest) if not line["kept"]) == totals["skipped"]
    assert totals["skipped"] == {"not_a_picture": 1, "empty_file": 1, "corrupt": 1}
    share = 100 * totals["samples"] / (totals["samples"] + len(FAILED))
    assert f"{share:.1f}% good" in describe_progress(tallies[-1])
    stats = [storage.read_json(storage.join(dataset.folder("shards"), f"{record['id']}_stats.json"))
             for record in manifest["items"]]
    assert sum(each["count"] for each in stats) == len(NAMES) - filtered


@pytest.mark.parametrize("make", [Shard, Adopt])
def test_a_corpus_without_rows_is_an_error(tmp_path, make):
    tars.write(tmp_path / "empty.tar", [])
    with pytest.raises(StageFailed, match=r"no .* of .*empty.tar can be"):
        run_stage(make(Dataset.parse(str(tmp_path / "root"), "x"), config(tmp_path / "empty.tar")))
