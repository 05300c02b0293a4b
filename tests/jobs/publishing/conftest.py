"""A source and its first published version."""

import shutil
from pathlib import Path

import pytest

from tests.jobs.publishing.published_art import rebuild
from tests.pipeline import synthetic


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source of 72 drawn pictures, and a root with the version made of it; to be copied."""
    folder = tmp_path_factory.mktemp("first")
    synthetic.drawings(folder / "source")
    rebuild(folder / "root", folder / "source")
    return folder


@pytest.fixture
def place(first: Path, tmp_path: Path) -> Path:
    shutil.copytree(first, tmp_path / "place")  # with the times of the files
    return tmp_path / "place"
