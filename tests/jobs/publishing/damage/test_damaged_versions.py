"""Damage of versions that are not current: verify finds it, rollback and gc judge it, and hints name what works."""

import json
import os
import shutil
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.publishing.config import GcConfig
from jobs.publishing.garbage_collect import collect_garbage
from pipeline.releases.published import Published
from tests.jobs.publishing.damage.attacks import DAMAGE
from tests.jobs.publishing.published_art import NAME, paint, published_dataset, rebuild


@pytest.fixture
def third(second: Path) -> Path:
    """A root with three published versions, and its source."""
    paint(second / "source" / "third.png", 3)
    assert rebuild(second / "root", second / "source")["published"] == "v3"
    return second


def _version(place: Path, version: str) -> Path:
    return place / "root/datasets" / NAME / version


def _pin(place: Path, version: str) -> None:
    run = place / "root/runs/consumer"
    run.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps({"stage": "train", "inputs": {
        "database": {"path": f"datasets/{NAME}/{version}/embeddings", "digest": ""}}}))


@pytest.mark.parametrize(("damage", "fault"), [
    ("removed", "the release of drawn@v1 is missing"), ("edited", "is not the one that was published: it was changed"),
    ("zeros", "datasets/drawn/v1/release.json: the release of drawn@v1 is not the one that was published")])
def test_verify_and_rollback_check_the_release_of_an_older_version(
        second: Path, damage: str, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    root, release = str(second / "root"), _version(second, "v1") / "release.json"
    if damage == "removed":
        release.unlink()
    elif damage == "edited":
        release.write_text(release.read_text().replace('"number": 1', '"number": 2'))
    else:  # the entry of the history names another hash
        entry = second / "root/published" / NAME / "000001.json"
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"release": "0" * 64}))
    for flags in ([], ["--quick"]):
        assert main(["verify", *flags, "--root", root]) == 1
        out, err = capsys.readouterr()
        assert fault in out and f"hint: python -m jobs gc {NAME} --lease 0 --root {root}" in err
    assert main(["rollback", NAME, "--to", "v1", "--root", root]) == 1
    assert "drawn@v1 was published, and is damaged now: the release of drawn@v1 is " in capsys.readouterr().err
    assert main(["versions", NAME, "--root", root]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["v1", "damaged"]
    assert main(["gc", NAME, "--lease", "0", "--root", root]) == 0
    assert main(["verify", "--root", root]) == 0


def test_rollback_distinguishes_unpublished_from_damaged_versions(
        second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(second / "root")
    assert main(["rollback", NAME, "--to", "v9", "--root", root]) == 2
    assert "drawn@v9 was never published, so it cannot be again" in capsys.readouterr().err
    (second / "root/published" / NAME / "000001.json").unlink()
    assert main(["rollback", NAME, "--to", "v1", "--root", root]) == 2
    assert "v1 has a release, but the history does not name it: it was never published, or" in capsys.readouterr().err
    assert main(["verify", "--quick", "--root", root]) == 1
    out, err = capsys.readouterr()
    assert "published/drawn/000001.json: is missing" in out
    assert f"hint: python -m jobs repair {NAME} --root {root}" in err
    assert main(["repair", NAME, "--root", root]) == 0
    assert main(["verify", "--quick", "--root", root]) == 0


@pytest.mark.parametrize("stage", ["shards", "index"])
def test_readers_name_a_published_stage_without_a_manifest(second: Path, stage: str,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    root = str(second / "root")
    (_version(second, "v2") / stage / "manifest.json").unlink()
    for verb in (["search", NAME, "a circle"], ["neighbors", f"{NAME}@v1", "--database", NAME, "--local"],
                 ["sample", "a circle", "--database", NAME, "--local"]):
        assert main([*verb, "--root", root]) == 1, verb
        error = capsys.readouterr().err
        assert f"{stage} is part of the published {NAME}@v2 and has no manifest.json" in error, error
        assert f"hint: python -m jobs verify --quick --only datasets/{NAME} --root {root}" in error, error
    assert main(["verify", "--quick", "--only", f"datasets/{NAME}", "--root", root]) == 1
    assert f"hint: python -m jobs rollback {NAME} --to v1 --root {root}" in capsys.readouterr().err
    assert main(["rollback", NAME, "--to", "v1", "--root", root]) == 0
    assert main(["search", NAME, "a circle", "--root", root]) == 0


@pytest.mark.parametrize("stage", ["embeddings"])
def test_a_damaged_input_of_a_published_stage_is_no_invalid_usage(second: Path, stage: str,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    root = str(second / "root")
    (_version(second, "v2") / stage / "manifest.json").write_text("{")
    for verb in (["neighbors", f"{NAME}@v1", "--database", NAME, "--local"],
                 ["sample", "a circle", "--database", NAME, "--local"]):
        assert main([*verb, "--root", root]) == 1, verb
        assert f"hint: python -m jobs verify --against current --root {root}" in capsys.readouterr().err, verb
    assert main(["verify", "--against", "current", "--root", root]) == 1
    assert f"hint: python -m jobs rollback {NAME} --to v1 --root {root}" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["forgotten.json", f"datasets/{NAME}/v2/forgotten.json",
                                  f"datasets/{NAME}/current.json", f"published/{NAME}/000002.json"])
def test_one_hint_restores_what_a_pipe_has_replaced(second: Path, path: str, capsys: pytest.CaptureFixture[str]
                                                    ) -> None:
    root, file = str(second / "root"), second / "root" / path
    assert main(["forget", "--url", "flat/000001.png", "--root", root]) == 0
    file.unlink()
    os.mkfifo(file)
    for verb in (["search", NAME, "a circle"], ["versions", NAME]) if "current" in path else (
            ["search", NAME, "a circle"], ["verify", "--quick"]):
        assert main([*verb, "--root", root]) == 1
        error = capsys.readouterr().err.replace(f" --root {root}", "")
        assert f"hint: remove {file}; then python -m jobs repair {NAME}\n" in error
    file.unlink()
    assert main(["repair", NAME, "--root", root]) == 0
    assert main(["search", NAME, "a circle", "--root", root]) == 0
    assert main(["verify", "--quick", "--root", root]) == 0


def test_verify_finds_a_missing_part_of_an_older_version(second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (_version(second, "v1") / "index/manifest.json").unlink()
    assert main(["verify", "--quick", "--root", str(second / "root")]) == 1
    assert "datasets/drawn/v1/index: " in capsys.readouterr().out


def test_the_hint_names_a_version_that_is_whole(third: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(third / "root")
    (_version(third, "v2") / "index/manifest.json").unlink()
    (_version(third, "v3") / "index/manifest.json").unlink()
    for verb in (["verify"], ["repair", NAME], ["gc", NAME], ["rollback", NAME, "--to", "v2"]):
        assert main([*verb, "--root", root]) == 1, verb
        error = capsys.readouterr().err
        assert f"hint: python -m jobs rollback {NAME} --to v1 --root {root}; or python -m jobs rebuild" in error, verb
    assert main(["rollback", NAME, "--root", root]) == 0  # by default too
    assert published_dataset(root).version == "v1"


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_the_hint_is_a_rebuild_if_no_version_is_whole(third: Path, suffix: str, capsys: pytest.CaptureFixture[str]
                                                      ) -> None:
    root = str(third / "root")
    for file in (_version(third, "v1") / "shards").glob(f"0*.{suffix}"):  # all three versions have it
        file.write_bytes(file.read_bytes()[:-512])
    for verb in (["verify"], ["repair", NAME], ["gc", NAME], ["rollback", NAME], ["rollback", NAME, "--to", "v1"]):
        assert main([*verb, "--root", root]) == 1, verb
        assert f"\nhint: python -m jobs rebuild {NAME} --source SOURCE --root {root}\n" in capsys.readouterr().err, verb
    assert rebuild(root, third / "source")["published"] == "v4"


def test_a_repeated_rollback_changes_nothing(third: Path, capsys: pytest.CaptureFixture[str],
                                             caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    root = str(third / "root")
    assert main(["rollback", NAME, "--root", root]) == 0
    assert json.loads(capsys.readouterr().out) == {"dataset": NAME, "published": "v2", "rolled_back": "v3"}
    assert "hint: to undo this: python -m jobs rollback drawn --to v3" in caplog.text
    entry = third / "root/published" / NAME / "000004.json"
    entry.unlink()  # the first command was killed after its swap, before it wrote the history
    assert main(["rollback", NAME, "--root", root]) == 0
    assert json.loads(capsys.readouterr().out) == {"dataset": NAME, "published": "v2", "already": True}
    assert "hint: to go further back: python -m jobs rollback drawn --to VERSION" in caplog.text
    assert main(["rollback", NAME, "--to", "v1", "--root", root]) == 0
    assert entry.exists() and published_dataset(root).version == "v1"
    assert main(["rollback", NAME, "--to", "v3", "--root", root]) == 0
    assert main(["rollback", NAME, "--root", root]) == 0
    assert published_dataset(root).version == "v3"


def test_a_rebuild_replaces_a_damaged_version_after_a_rollback(second: Path) -> None:
    root = str(second / "root")
    assert main(["rollback", NAME, "--root", root]) == 0
    assert rebuild(root, second / "source")["rolled_back"] == "v2"
    (_version(second, "v1") / "index/manifest.json").unlink()
    assert rebuild(root, second / "source")["published"] == "v3"


def test_gc_keeps_unreadable_versions_and_continues(third: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(third / "root")
    paint(third / "source" / "fourth.png", 4)
    assert rebuild(third / "root", third / "source")["published"] == "v4"
    _pin(third, "v2")
    shards = _version(third, "v2") / "shards"
    (shards / "manifest.json").write_bytes(b"{")
    next((shards / "records").iterdir()).unlink()
    command = ["gc", NAME, "--keep", "0", "--lease", "0", "--root", root]
    for flags in (["--dry-run"], []):
        assert main([*command, *flags, "--json"]) == 1
        out, err = capsys.readouterr()
        entries = {entry["version"]: entry for entry in json.loads(out)}
        assert {version: entry["kept"] for version, entry in entries.items()} == {
            "v1": "v2 cannot be read and may need its files", "v2": "pinned by runs/consumer", "v3": "",
            "v4": "published"}
        assert "the manifest of " in entries["v2"]["unreadable"] and entries["v3"]["removed_files"]
        assert "1 versions stay and cannot be read, so earlier versions stay too: drawn@v2 (" in err
        assert f"from a backup; or remove runs/consumer, then python -m jobs gc {NAME} --lease 0 --root {root}" in err
    assert (_version(third, "v1") / "shards/manifest.json").exists()
    shutil.rmtree(third / "root/runs/consumer")
    assert main(command) == 0
    assert main(["verify", "--root", root]) == 0


def test_versions_with_missing_files_do_not_count_among_the_newest(third: Path) -> None:
    next((_version(third, "v2") / "index").glob("knn.index")).unlink()
    kept = {entry["version"]: entry["kept"] for entry in collect_garbage(
        str(third / "root"), NAME, GcConfig(keep=2, lease=0))}
    assert kept == {"v1": "one of the newest 2", "v2": "", "v3": "published"}


def test_rot_is_replaced_by_a_thorough_rebuild_and_removed_by_gc(second: Path,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    root = str(second / "root")
    DAMAGE["rot"](next((_version(second, "v2") / "embeddings").glob("*.npy")))
    assert main(["verify", "--root", root]) == 1
    assert f"or python -m jobs rebuild {NAME} --source SOURCE --thorough --root" in capsys.readouterr().err
    assert rebuild(root, second / "source", thorough=True)["published"] == "v3"
    assert main(["verify", "--root", root]) == 1
    assert f"hint: python -m jobs gc {NAME} --lease 0 --verify --root" in capsys.readouterr().err
    assert main(["gc", NAME, "--lease", "0", "--verify", "--root", root]) == 0
    assert main(["verify", "--root", root]) == 0


def test_entries_that_do_not_agree_with_the_release_are_restored(second: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    root = str(second / "root")
    for path in (second / "root/published" / NAME / "000001.json", _version(second, "current.json")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"number": 7}))
    assert main(["verify", "--quick", "--root", root]) == 1
    out, err = capsys.readouterr()
    assert out.count("does not agree with the release of its version: number") == 2
    assert f"repair {NAME} --root {root}" in err
    assert main(["repair", NAME, "--root", root]) == 0
    assert Published.load(root, NAME).number == 2
    assert main(["verify", "--root", root]) == 0


def test_a_rebuild_after_forget_names_no_flag_of_another_verb(second: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, image = str(second / "root"), sorted((second / "source").rglob("*.png"))[3]
    image.unlink()
    assert rebuild(root, second / "source")["published"] == "v3"
    assert published_dataset(root).is_sealed("tombstones")
    assert main(["forget", "--key", f"{NAME}/0000000004", "--root", root]) == 0
    paint(second / "source" / "more.png", 4)
    assert rebuild(root, second / "source", rewrite=0.0)["published"] == "v4"
    assert not published_dataset(root).is_sealed("tombstones") and "--tombstone" not in caplog.text


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"stage": "train", "inputs": 3}'])
def test_gc_removes_nothing_that_a_damaged_plan_may_need(second: Path, damage: str,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    root, run = str(second / "root"), second / "root/runs/consumer"
    _pin(second, "v1")
    plan = (run / "plan.json").read_text()
    (run / "plan.json").write_text(damage)
    gc = ["gc", NAME, "--keep", "0", "--lease", "0", "--root", root]
    assert main(gc) == 1
    error = capsys.readouterr().err
    assert "what runs/consumer needs is unknown" in error and f"rm runs/consumer --root {root}" in error
    assert (_version(second, "v1") / "shards/manifest.json").exists()
    assert main(["versions", NAME, "--root", root]) == 0
    (run / "manifest.json").write_text(plan)  # a sealed folder names its inputs twice
    assert main(gc) == 0
    assert "v1  kept: pinned by runs/consumer" in capsys.readouterr().out
