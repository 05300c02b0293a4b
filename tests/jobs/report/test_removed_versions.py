"""The report of a root from which gc has removed the version that samples were made with."""

import json
import shutil
from pathlib import Path

from jobs.cli.main import main
from tests.jobs.publishing.published_art import paint
from tests.pipeline import synthetic


def test_samples_of_a_removed_version_are_shown(trained_root: Path, tmp_path: Path) -> None:
    root = shutil.copytree(trained_root, tmp_path / "root")
    source = synthetic.drawings(tmp_path / "source", subjects=6, size=32, styles=("flat",))

    def run(*words: str) -> int:
        return main([*words, "--root", str(root)])

    rebuild = ("rebuild", "art", "--source", str(source), "--image-size", "32", "--local")
    assert run(*rebuild) == 0
    assert run("sample", "small", "--prompt", "a tree", "--database", "art", "--steps", "2", "--local") == 0
    paint(source / "more.png", 1)
    assert run(*rebuild) == 0 and run("gc", "art", "--keep", "0", "--lease", "0") == 0
    assert not (root / "datasets/art/v1/shards/manifest.json").exists()
    samples = json.loads(next(root.glob("runs/small/samples/*/samples.json")).read_text())
    neighbors = len(samples["pictures"][0]["neighbors"])
    assert run("report") == 0
    images = (root / "report.html").read_text().count("<img")
    # The list has no hashes for a domain, and the rows of a removed version are not known.
    assert run("forget", "--domain", "example.org") == 0 and run("report") == 0
    assert (root / "report.html").read_text().count("<img") == images - neighbors and neighbors > 2
