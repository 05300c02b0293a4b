"""Damaged images in a source: the ledger names those that were kept, and no shard stores damaged bytes."""

import simplejpeg

from tests.laws.rows.row_accounting import stored_images
from tests.pipeline.media.sample_images import photo
from tests.pipeline.shards.test_shard import ledger, shard_source, table
from tests.pipeline.synthetic import encoded


def test_small_damage_is_named_and_cut_off_and_large_damage_is_left_out(tmp_path):
    whole = encoded(photo(320, 320), "JPEG", quality=90)
    middle = len(whole) // 2
    files = {"end.jpg": whole[:-2], "good.jpg": whole, "half.jpg": whole[:middle], "rows.jpg": whole[:-400],
             "zeros.jpg": whole[:middle] + bytes(300) + whole[middle + 300:]}
    (tmp_path / "source").mkdir()
    for name, data in files.items():
        (tmp_path / "source" / name).write_bytes(data)
    dataset, manifest = shard_source(tmp_path / "root", tmp_path / "source", resize="no", format="jpg")
    assert manifest["totals"]["skipped"] == {"corrupt": 2}
    assert manifest["totals"]["noted"]["damaged"] == 2
    lines = {line["key"]: line["detail"] for line in ledger(dataset, manifest) if line["reason"] != "caption_missing"}
    assert lines.keys() == files.keys() - {"good.jpg"}
    assert "no pixel is lost" in lines["end.jpg"] and "of 320 rows are lost and cut off" in lines["rows.jpg"]
    stored = dict(zip(("end.jpg", "good.jpg", "rows.jpg"), stored_images(dataset, manifest), strict=True))
    assert stored["good.jpg"] == whole and stored["end.jpg"] != files["end.jpg"]
    for data in stored.values():
        simplejpeg.decode_jpeg(data, "RGB", strict=True)
    heights = {row["url"]: row["height"] for row in table(dataset, manifest) if row["status"] == "success"}
    assert heights["end.jpg"] == 320 and 320 * 0.9 <= heights["rows.jpg"] < 320
