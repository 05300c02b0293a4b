"""Roots that earlier versions of the program wrote, each in an archive with the script that made it."""

import tarfile
from pathlib import Path

_FOLDER = Path(__file__).parent
ROOT, PUBLISHED, RUN = "old_root.tar.gz", "old_published.tar.gz", "old_run.tar.xz"


def unpack(name: str, folder: Path) -> Path:
    """Unpack an archive into a folder. The root in it."""
    with tarfile.open(_FOLDER / name) as archive:
        archive.extractall(folder, filter="data")
    return folder / "root"
