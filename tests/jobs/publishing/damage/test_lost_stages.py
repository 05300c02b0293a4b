"""A stage that a released version lost, or that was added to it: no command seals another one in its place."""

import shutil
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.publishing.check_published import check_published
from jobs.publishing.rebuild import run_rebuild
from pipeline.releases import published
from pipeline.stages.driver import run_stage
from tests.jobs.publishing.published_art import NAME, make_rebuild, paint, pointer, published_dataset


@pytest.mark.parametrize(("verb", "stage"), [("embed", "embeddings"), ("index", "index")])
def test_a_lost_stage_of_a_published_version_is_not_made_again(second: Path, capsys: pytest.CaptureFixture[str],
                                                                verb: str, stage: str) -> None:
    root = second / "root"
    manifest = root / f"datasets/{NAME}/v2/{stage}/manifest.json"
    manifest.unlink()
    assert main([verb, f"{NAME}@v2", "--local", "--root", str(root)]) == 1
    said = capsys.readouterr().err
    assert f"the manifest of its {stage} is lost" in said and not manifest.exists()
    assert f"hint: python -m jobs rollback {NAME} --to v1" in said
    assert main(["rollback", NAME, "--to", "v1", "--root", str(root)]) == 0
    assert main([verb, f"{NAME}@v2", "--local", "--root", str(root)]) == 1
    assert f"hint: python -m jobs gc {NAME} --lease 0" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["index/manifest.json", "embeddings/000000.npy", "release.json"])
def test_a_damaged_version_that_was_never_published_is_not_continued(second: Path, damage: str) -> None:
    paint(second / "source" / "third.png", 3)
    rebuild = make_rebuild(second / "root", second / "source")
    before = pointer(second).read_bytes(), sorted((second / "root/published").rglob("*.json"))
    assert run_rebuild(rebuild, run_stage)["published"] == "v3"
    pointer(second).write_bytes(before[0])  # as if the command had been killed right before the swap
    (second / f"root/published/{NAME}/000003.json").unlink()
    shutil.rmtree(published.storage.cache_folder() / "seen")
    file = second / f"root/datasets/{NAME}/v3/{damage}"
    if damage == "release.json":
        file.write_text("{")
    elif file.exists():
        file.unlink()
    else:  # its vectors are those of v1, but for the new shard
        next(file.parent.glob("*.npy")).unlink()
    result = run_rebuild(make_rebuild(second / "root", second / "source"), run_stage)
    assert result["published"] == "v4" and published_dataset(second / "root").version == "v4"
    assert main(["gc", NAME, "--lease", "0", "--keep", "0", "--root", str(second / "root")]) == 0
    assert check_published(str(second / "root"))[1] == []
