"""A rebuild after one that was killed with other settings, and after a rollback from a damaged version."""

from pathlib import Path
from typing import Any

import pytest

from jobs.publishing.rebuild import run_rebuild
from jobs.publishing.releases import rollback
from pipeline.indices.extend import Extension
from pipeline.stages.driver import run_stage
from pipeline.stages.plan import prepare
from pipeline.stages.stage import Stage
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
