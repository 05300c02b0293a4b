"""A source and its first published version."""

import shutil
from pathlib import Path

import pytest

from tests.jobs.publishing.published_art import paint, rebuild
from tests.pipeline import synthetic


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source of 72 synthetic images, and a root with the version made of it; copy it before use."""
    folder = tmp_path_factory.mktemp("first")
    synthetic.drawings(folder / "source")
    rebuild(folder / "root", folder / "source")
    return folder


@pytest.fixture
def place(first: Path, tmp_path: Path) -> Path:
    shutil.copytree(first, tmp_path / "place")  # with the times of the files
    return tmp_path / "place"


@pytest.fixture(scope="session")
def two_versions(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a second version, of one more image; to be copied."""
    folder = tmp_path_factory.mktemp("two") / "place"
    shutil.copytree(first, folder)
    paint(folder / "source" / "added.png", 1)
    assert rebuild(folder / "root", folder / "source")["published"] == "v2"
    return folder


@pytest.fixture
def second(two_versions: Path, tmp_path: Path) -> Path:
    """A root with two published versions, and its source."""
    shutil.copytree(two_versions, tmp_path / "second")
    return tmp_path / "second"
