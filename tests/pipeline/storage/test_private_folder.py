"""A folder in a shared place is used only if no other user can put files into it."""

import os
import tempfile
import threading

import pytest

from pipeline import storage
from pipeline.stages import scratch
from pipeline.storage.private_folder import make_private_folder

OTHER_USER = 12345


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A folder for temporary files that every user may write to."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv("RDM_CACHE", raising=False)
    return folder


def _uses(shared):
    """Functions that make a folder below `shared`, with its path and the variable that names another folder."""
    uid = os.getuid()
    return [(storage.cache_folder, shared / f"rdm-cache-{uid}", "RDM_CACHE"),
            (lambda: scratch.shared_scratch("owner", lambda folder: None), shared / f"rdm-owner-{uid}", "TMPDIR"),
            (lambda: make_private_folder(shared / "own", "OWN"), shared / "own", "OWN")]


@pytest.mark.parametrize("use", range(3))
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_new_folder_belongs_to_this_user_alone(shared, use, umask, monkeypatch):
    monkeypatch.setattr(scratch, "_shared", {})
    make, folder, _ = _uses(shared)[use]
    before = os.umask(umask)
    try:
        assert make() == folder and make() == folder
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700 and folder.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("use", range(3))
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o701, 0o755, 0o1777])
def test_a_folder_that_is_open_to_others_is_refused(shared, use, mode, monkeypatch):
    monkeypatch.setattr(scratch, "_shared", {})
    make, folder, variable = _uses(shared)[use]
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(PermissionError, match=rf"{folder} is open to other users \(mode 0?{mode:o}\).*\n"
                                              rf"hint: chmod 700 {folder}.* or {variable}=FOLDER"):
        make()
    folder.chmod(0o700)
    assert make() == folder


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
@pytest.mark.parametrize("use", range(3))
def test_a_folder_of_another_user_is_refused(shared, use, monkeypatch):
    monkeypatch.setattr(scratch, "_shared", {})
    make, folder, variable = _uses(shared)[use]
    folder.mkdir(mode=0o700)
    os.chown(folder, OTHER_USER, OTHER_USER)
    with pytest.raises(PermissionError, match=rf"{folder} belongs to the user {OTHER_USER}.*\nhint: {variable}=FOLDER"):
        make()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("use", range(3))
@pytest.mark.parametrize("target", ["own", "absent", "file"])
def test_a_link_is_refused_with_any_target(shared, tmp_path, use, target, monkeypatch):
    monkeypatch.setattr(scratch, "_shared", {})
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "file").touch()
    make, folder, variable = _uses(shared)[use]
    folder.symlink_to(tmp_path / target)
    with pytest.raises(PermissionError, match=rf"{folder} is a symbolic link.*\nhint: {variable}=FOLDER"):
        make()
    assert list((tmp_path / "own").iterdir()) == []


def test_a_file_is_no_folder(shared):
    (shared / "own").touch()
    with pytest.raises(PermissionError, match=r"own is no folder"):
        make_private_folder(shared / "own", "OWN")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_another_users_scratch_is_neither_opened_nor_removed(shared):
    theirs = shared / "rdm-theirs"
    theirs.mkdir()
    os.mkfifo(theirs / ".alive")  # opening it waits for a writer
    os.utime(theirs / ".alive", (0, 0))
    os.chown(theirs, OTHER_USER, OTHER_USER)
    scratch._sweep.cache_clear()
    sweep = threading.Thread(target=scratch._sweep, daemon=True)
    sweep.start()
    sweep.join(10)
    assert not sweep.is_alive() and (theirs / ".alive").exists()
