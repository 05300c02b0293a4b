"""gc beside commands that publish or build a version at the same moment."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.publishing import garbage_collect
from jobs.publishing.config import GcConfig
from jobs.publishing.garbage_collect import collect_garbage
from jobs.publishing.rebuild import GatesFailed, run_rebuild
from jobs.publishing.releases import list_versions, rollback
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.releases import version_marks
from pipeline.releases.published import Published, open_dataset
from pipeline.stages import seal as seal_module
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from pipeline.versions.config import GatesConfig
from tests.jobs.publishing.published_art import (
    NAME,
    drop,
    make_rebuild,
    paint,
    pictures,
    published_dataset,
    rebuild,
    vectors_by_content,
)

_ALL = GcConfig(keep=0, lease=0)


def _reasons(root: Path) -> dict[str, str]:
    return {entry["version"]: entry["kept"] for entry in collect_garbage(str(root), NAME, _ALL)}


def _age(folder: Path, hours: float) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - 3600 * hours,) * 2)


def test_a_version_that_is_built_is_not_removed(place: Path) -> None:
    paint(place / "source" / "added.png", 1)
    reasons: list[dict[str, str]] = []

    def seal(stage: Any) -> dict[str, Any]:
        manifest = run_stage(stage)
        _age(place / "root" / "datasets", 30)
        reasons.append(_reasons(place / "root"))
        return manifest
    assert run_rebuild(make_rebuild(place / "root", place / "source"), seal)["published"] == "v2"
    assert all(reason["v1"] == "published" and reason["v2"].startswith("in use by process ") for reason in reasons)
    assert len(vectors_by_content(published_dataset(place / "root"))) == 73


def test_the_base_of_a_rebuild_is_not_removed_after_another_publication(place: Path) -> None:
    paint(place / "source" / "added.png", 1)
    late = make_rebuild(place / "root", place / "source")
    reasons: dict[str, str] = {}

    def seal(stage: Any) -> dict[str, Any]:
        if not reasons:
            paint(place / "source" / "more.png", 2)
            assert rebuild(place / "root", place / "source")["published"] == "v3"
            reasons.update(_reasons(place / "root"))
        return run_stage(stage)
    assert run_rebuild(late, seal)["superseded"] == "v2"
    assert reasons["v1"].startswith("in use by process ") and reasons["v3"] == "published"


def test_a_version_that_gc_removes_is_not_published(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate stopped v2. A day later it passes, while gc runs and the lease of the rebuild has ended."""
    drop(place, pictures(place)[5])
    with pytest.raises(GatesFailed):
        run_rebuild(make_rebuild(place / "root", place / "source", gates=GatesConfig(max_lost=0.0)), run_stage)
    mark, collected = version_marks.mark_publishing, []

    def collect_first(*arguments: Any) -> Any:
        if not collected:
            collected.append(0)
            for file in (place / "root" / "leases").iterdir():
                file.unlink()
            _age(place / "root" / "datasets", 30)
            collected.append(_reasons(place / "root"))
        return mark(*arguments)
    monkeypatch.setattr(version_marks, "mark_publishing", collect_first)
    with pytest.raises(StageFailed, match=r"it was removed\nhint: the same rebuild makes another"):
        run_rebuild(make_rebuild(place / "root", place / "source"), run_stage)
    assert collected[1] == {"v1": "published", "v2": ""}
    monkeypatch.undo()
    assert published_dataset(place / "root").version == "v1"
    assert len(vectors_by_content(published_dataset(place / "root"))) == 72
    assert rebuild(place / "root", place / "source")["published"] == "v3"
    assert [version["removed"] for version in list_versions(str(place / "root"), NAME)] == [False, True, False]


def test_a_version_removed_after_the_swap_gives_the_pointer_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The publisher was paused between its mark and its swap for longer than gc waits."""
    paint(place / "source" / "added.png", 1)
    swap = Published._swap

    def remove_first(self: Published, document: dict[str, Any]) -> bool:
        if document["version"] == "v2" and self.version == "v1":
            monkeypatch.setattr(Published, "_swap", swap)
            monkeypatch.setattr(garbage_collect, "_PUBLISHING_S", 0.0)
            for file in (place / "root" / "leases").iterdir():
                file.unlink()
            assert _reasons(place / "root") == {"v1": "published", "v2": ""}
        return swap(self, document)
    monkeypatch.setattr(Published, "_swap", remove_first)
    with pytest.raises(StageFailed, match="v2 was removed while it was published"):
        rebuild(place / "root", place / "source")
    current = Published.load(str(place / "root"), NAME)
    assert (current.version, current.document["sequence"]) == ("v1", 3)
    assert len(vectors_by_content(published_dataset(place / "root"))) == 72
    assert rebuild(place / "root", place / "source")["published"] == "v3"


def test_a_version_that_another_process_publishes_is_kept(place: Path) -> None:
    paint(place / "source" / "added.png", 1)
    rebuild(place / "root", place / "source")
    version_marks.mark_publishing(Dataset(str(place / "root"), NAME, "v1"), 3)  # a rollback has begun
    assert _reasons(place / "root") == {"v1": "being published", "v2": "published"}
    assert rollback(str(place / "root"), NAME, "")["published"] == "v1"
    assert _reasons(place / "root") == {"v1": "published", "v2": ""}
    with pytest.raises(ValueError, match="v2 was removed"):
        rollback(str(place / "root"), NAME, "v2")


def test_gc_ignores_the_clock_of_the_publisher(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(place / "source" / "added.png", 1)
    clock = time.time
    for hours in (-25, 25):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: clock() + 3600 * hours)  # noqa: B023
            paint(place / "source" / f"added{hours}.png", hours + 100)
            rebuild(place / "root", place / "source")
            reasons = {entry["version"]: entry["kept"]
                       for entry in collect_garbage(str(place / "root"), NAME, GcConfig(keep=0))}
            assert reasons.pop(max(reasons)) == "published"
            assert set(reasons.values()) == {"leased"}


def test_gc_finishes_the_work_of_a_killed_gc(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(place / "source" / "added.png", 1)
    rebuild(place / "root", place / "source", full=True)
    remove, removed = storage.remove, []

    def kill(url: str) -> None:
        remove(url)
        if "/v1/" in url:
            removed.append(url)
            if len(removed) == 3:
                raise KeyboardInterrupt
    monkeypatch.setattr(storage, "remove", kill)
    with pytest.raises(KeyboardInterrupt):
        _reasons(place / "root")
    monkeypatch.undo()
    assert [version["removed"] for version in list_versions(str(place / "root"), NAME)] == [True, False]
    assert _reasons(place / "root") == {"v1": "", "v2": "published"}
    remaining = sorted(path.name for path in (place / "root" / "datasets" / NAME / "v1").rglob("*") if path.is_file())
    assert remaining == [".swap", "mark.json", "release.json"]
    assert _reasons(place / "root") == {"v2": "published"}


def test_equal_rebuilds_that_seal_together_publish_one_whole_version(place: Path) -> None:
    """The one driver is paused before each seal until the other one has sealed."""
    paint(place / "source" / "added.png", 1)
    fast = make_rebuild(place / "root", place / "source")
    slow = make_rebuild(place / "root", place / "source")
    create, published = seal_module._create_manifest, []

    def pause(stage: Any, *arguments: Any) -> dict[str, Any]:
        if not published:
            published.append(None)
            time.sleep(1.1)  # a manifest holds the second of its seal
            published.append(run_rebuild(fast, run_stage)["published"])
        return create(stage, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal_module, "_create_manifest", pause)
        assert run_rebuild(slow, run_stage)["published"] == "v2"
    assert published[1] == "v2"
    root = str(place / "root")
    paint(place / "source" / "more.png", 2)
    done = rebuild(root, place / "source")
    assert done["published"] == "v3" and done["embedded"] == 1
    assert rollback(root, NAME, "v2")["published"] == "v2"


def test_gc_removes_leftovers_in_other_datasets_and_in_runs(tmp_path: Path) -> None:
    folders = ("", "takedowns", f"published/{NAME}", "datasets/other/v1/shards/records", "runs/one/checkpoints/0000002")
    leftovers = [tmp_path / folder / ".000000.json.0123456789abcdef" for folder in folders]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (time.time() - 7200,) * 2)
    with pytest.raises(ValueError, match=f"nothing of {NAME} is published"):
        collect_garbage(str(tmp_path), NAME, GcConfig())
    assert [path for path in leftovers if path.exists()] == []


def test_a_mark_alone_removes_no_version_that_stays(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A killed gc may have marked a version and removed nothing. A mark can be forged, too."""
    paint(place / "source" / "added.png", 1)
    rebuild(place / "root", place / "source", full=True)
    first = Dataset(str(place / "root"), NAME, "v1")
    assert version_marks.mark_removing(first, version_marks.read_mark(first))
    assert open_dataset(str(place / "root"), f"{NAME}@v1").is_sealed("shards")
    kept = {entry["version"]: entry["kept"] for entry in collect_garbage(str(place / "root"), NAME, GcConfig(keep=3))}
    assert kept == {"v1": "one of the newest 3", "v2": "published"}
    assert "v1 was marked for removal and stays" in caplog.text
    assert not version_marks.is_removing(first)
    assert rollback(str(place / "root"), NAME, "v1")["published"] == "v1"
