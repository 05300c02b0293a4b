"""A rebuild that must do more than take over: a decoder is new, or an extended index would be too large."""

import logging
from pathlib import Path

import pytest

from jobs.cli.main import main
from pipeline.datasets.metadata import metadata
from pipeline.media import decode
from pipeline.releases.published import Published
from pipeline.versions.config import GatesConfig
from tests.jobs.publishing.published_art import paint, published_dataset, rebuild
from tests.pipeline.media.sample_images import jxl_header, without_extra_formats


def test_an_image_that_lacked_a_decoder_is_tried_again_once_it_is_installed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pi_heif", reason="pip install pi-heif")
    source, root = tmp_path / "source", tmp_path / "root"
    source.mkdir()
    for number in range(3):
        paint(source / f"{number}.png", number)
    heic = Path(__file__).parents[2] / "pipeline/media/shapes.heic"
    (source / "a.heic").write_bytes(heic.read_bytes())
    (source / "b.heic").write_bytes(b"no image")  # it failed for another reason
    (source / "c.jxl").write_bytes(jxl_header(96, 64))  # its package is missing all the same
    gates = GatesConfig(max_failed=1)
    with without_extra_formats():
        assert rebuild(root, source, gates=gates)["published"] == "v1"
    monkeypatch.setattr(decode, "_EXTRA_MODULES", {"HEIF": "pi_heif", "JXL": "no_such_package"})
    result = rebuild(root, source, gates=gates)
    assert (result["published"], result["kept"], result["changed"], result["added"]) == ("v2", 5, 1, 0)
    rows = [row for record in published_dataset(root).manifest("shards")["items"]
            for row in metadata(published_dataset(root), record)]
    assert sorted(row["url"] for row in rows) == ["0.png", "1.png", "2.png", "a.heic"]
    assert published_dataset(root).manifest("shards")["totals"]["skipped"] == {
        "not_a_picture": 1, "needs_formats_extra": 1}
    assert rebuild(root, source, gates=gates)["unchanged"]


def test_an_index_that_would_outgrow_its_limit_is_trained_again(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "source").mkdir()
    words = ["rebuild", "some", "--source", str(tmp_path / "source"), "--root", str(tmp_path / "root"), "--local"]
    for first, last in ((0, 77), (77, 103)):  # a quarter more, which is too few for another training
        for number in range(first, last):
            paint(tmp_path / f"source/{number}.png", number)
        with caplog.at_level(logging.INFO):
            assert main(words) == 0
    assert "the extended index would be larger than its limit" in caplog.text
    assert Published.load(str(tmp_path / "root"), "some").version == "v2"
