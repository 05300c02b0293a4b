"""Samples of a version that gc has removed: the report shows them, and a takedown finds their images."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from tests.jobs.publishing.published_art import paint


def test_samples_of_a_removed_version_are_shown_without_what_was_taken_down(
        trained_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture) -> None:
    root = shutil.copytree(trained_root, tmp_path / "root")
    (source := tmp_path / "source").mkdir()
    for seed in range(6):
        paint(source / f"own-{seed}.png", seed)

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main([*words, "--root", str(root)]) == 0
        return capsys.readouterr().out

    def count_images() -> int:
        run("report")
        return (root / "report.html").read_text().count("<img")

    def notes() -> list[str]:
        credited = json.loads(run("credits", f"runs/small/samples/{folder.name}", "--json"))
        return [neighbor["note"] for neighbor in credited[0]["pictures"]]

    rebuild = ("rebuild", "art", "--source", str(source), "--image-size", "32", "--local")
    run(*rebuild)
    run("sample", "small", "--prompt", "a tree", "--database", "art", "--steps", "2", "--local")
    folder = next(root.glob("runs/small/samples/*"))
    samples: dict[str, Any] = json.loads((folder / "samples.json").read_text())
    neighbors = samples["pictures"][0]["neighbors"]
    assert len(neighbors) > 2
    (source / neighbors[0]["url"]).unlink()
    paint(source / "more.png", 7)
    run(*rebuild, "--full", "--min-overlap", "0.1")
    run("gc", "art", "--keep", "0", "--lease", "0")
    assert not (root / "datasets/art/v1/shards/manifest.json").exists()
    images = count_images()
    run("forget", "--domain", "example.org")
    assert count_images() == images
    said = run("forget", "--url", neighbors[0]["url"])  # no version has it any more
    assert "no dataset has such images" in said and f"runs/small/samples/{folder.name}" in said
    assert count_images() == images - 1
    assert [note == "this image was taken down" for note in notes()] == [True] + [False] * (len(neighbors) - 1)

    # Older samples do not name the URLs of their neighbors: each of them may be the one that was taken down.
    for neighbor in neighbors:
        del neighbor["url"]
    (folder / "samples.json").write_text(json.dumps(samples))
    assert count_images() == images - len(neighbors)
    assert all("may have been taken down" in note for note in notes())
    run("forget", "--url", "other.png")
    assert f"runs/small/samples/{folder.name} may show such images" in caplog.text
