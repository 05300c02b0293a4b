"""A rebuild after one that was killed with other settings, after removed images, after a damaged version."""

from pathlib import Path
from typing import Any

import pytest

from jobs.publishing.rebuild import GatesFailed, run_rebuild
from jobs.publishing.releases import rollback
from pipeline.datasets.embeddings import Embeddings
from pipeline.indices.extend import Extension
from pipeline.releases import release_files
from pipeline.stages.driver import run_stage
from pipeline.stages.plan import prepare
from pipeline.stages.stage import Stage
from pipeline.takedowns import hidden_rows
from pipeline.versions.config import GatesConfig
from tests.jobs.publishing.published_art import (
    NAME,
    make_rebuild,
    paint,
    pictures,
    published_dataset,
    rebuild,
    vectors_by_content,
)


def test_a_rebuild_goes_on_with_the_index_that_another_retrain_has_begun(place: Path) -> None:
    def stop_before_the_index(stage: Stage) -> dict[str, Any]:
        if isinstance(stage, Extension):
            prepare(stage)
            raise KeyboardInterrupt
        return run_stage(stage)

    for number in range(12):
        paint(place / "source" / f"more-{number}.png", number)
    root, source = place / "root", place / "source"
    with pytest.raises(KeyboardInterrupt):
        run_rebuild(make_rebuild(root, source, retrain=1.0), stop_before_the_index)
    assert rebuild(root, source, retrain=0.0)["published"] == "v2"
    assert "extends" in published_dataset(root).manifest("index")["info"]


def test_a_damaged_version_that_was_rolled_back_is_made_again(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, source = place / "root", place / "source"
    paint(source / "added.png", 1)
    assert rebuild(root, source)["published"] == "v2"
    (root / "datasets" / NAME / "v2/index/knn.index").unlink()
    assert rollback(str(root), NAME, "v1") == {"dataset": NAME, "published": "v1", "rolled_back": "v2"}
    assert "to undo this" not in caplog.text
    assert rebuild(root, source)["published"] == "v3"
    assert "v2 is unpublished and damaged" in caplog.text and len(vectors_by_content(published_dataset(root))) == len(
        pictures(place))


def test_removed_images_stop_no_rebuild_and_unknown_names_do(place: Path) -> None:
    def failed() -> float:
        release = release_files.read_release(published_dataset(place / "root"))[0]
        assert release
        return float(next(gate["value"] for gate in release["gates"] if gate["name"] == "failed"))

    images = pictures(place)
    for count, full in ((8, False), (16, False), (16, True)):  # 22 % in all, and the gate is at 10 %
        for image in images[:count]:
            image.unlink(missing_ok=True)
        paint(place / "source" / f"new{count}{full}.png", count)
        summary = rebuild(place / "root", place / "source", full=full, gates=GatesConfig(min_overlap=0))
        assert summary["published"] and failed() == 0
        assert summary["removed"] == (0 if full else 8)
    assert len(Embeddings(published_dataset(place / "root"))) - len(
        hidden_rows.read_hidden_rows(published_dataset(place / "root"))) == 72 - 16 + 3

    captions = place / "source" / "captions.csv"
    words = captions.read_text().splitlines()[-1].partition(",")[2]
    captions.write_text(captions.read_text() + "".join(f"never{number}.png,{words}\n" for number in range(12)))
    with pytest.raises(GatesFailed, match=r"failed: 0\.1"):
        rebuild(place / "root", place / "source")
    published_now = rebuild(place / "root", place / "source", gates=GatesConfig(max_failed=0.2, min_overlap=0))
    assert published_now["published"] and 0.1 < failed() < 0.2
    (place / "source" / "damaged.png").write_bytes(b"no picture")
    assert rebuild(place / "root", place / "source")["published"] and 0 < failed() < 0.1
