"""A cache folder that cannot be used says nothing about a root."""

from pathlib import Path

import fsspec
import pytest

from jobs.cli.main import main


def test_an_unusable_cache_is_no_damage_of_a_root(second: Path, s3: str, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """`verify` would name each folder, and its hint would be to remove versions."""
    fsspec.filesystem("s3").put(str(second / "root"), f"{s3}/rdm", recursive=True)
    cache = second / "cache"
    cache.mkdir(mode=0o755)
    monkeypatch.setenv("RDM_CACHE", str(cache))
    assert main(["verify", "--root", f"{s3}/rdm"]) == 1
    said = capsys.readouterr()
    assert "is open to other users" in said.err and f"hint: chmod 700 {cache}" in said.err
    assert "gc" not in said.err and not said.out
    cache.chmod(0o700)
    assert main(["verify", "--root", f"{s3}/rdm"]) == 0
