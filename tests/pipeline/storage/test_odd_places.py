"""Something else than a file or folder in its place, links, and places without the right to write."""

import contextlib
import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import storage

_SPECIAL = {"pipe": os.mkfifo, "folder": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero"),
            "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
            "dangling": lambda path: path.symlink_to("nowhere"), "loop": lambda path: path.symlink_to(path.name)}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", _SPECIAL)
def test_no_reader_waits_for_a_special_file(tmp_path: Path, kind: str) -> None:
    url, entry = str(tmp_path / "m"), {"name": "m", "bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    _SPECIAL[kind](tmp_path / "m")
    readers = [storage.read_bytes, storage.read_json, storage.sha256, storage.summarize_file,
               lambda url: storage.sha256_file(Path(url)), lambda url: storage.read_range(url, 0, 1),
               lambda url: storage.download(url, tmp_path / "copy"), lambda url: storage.fetch(url, entry),
               lambda url: storage.local_copy(url, entry), lambda url: storage.open_reader(url).__enter__()]
    for read in [*readers, storage.exists, storage.stamp]:
        with pytest.raises(storage.DamagedFile, match=r"/m is a .*: expected a file\nhint: remove /"):
            read(url)
    assert not storage.is_file(url)
    assert storage.list_files(str(tmp_path)) == ([] if kind == "folder" else ["m"])


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", sorted(_SPECIAL.keys() - {"folder"}))
def test_nothing_counts_as_missing_below_what_is_no_folder(tmp_path: Path, kind: str) -> None:
    _SPECIAL[kind](tmp_path / "m")
    url = str(tmp_path / "m" / "below" / "file")
    for use in (storage.exists, storage.read_bytes, storage.stamp, storage.list_files, storage.list_folders,
                lambda url: storage.put_bytes(b"", url), lambda url: storage.create_bytes(b"", url),
                lambda url: storage.swap_bytes(b"", url, None)):
        with pytest.raises(storage.DamagedFile, match=r"/m is a .*: expected a folder\nhint: remove /"):
            use(url)
    assert storage.list_folders(str(tmp_path)) == ["m"]


@pytest.mark.parametrize("kind", sorted(_SPECIAL))
def test_a_write_replaces_a_link_or_a_pipe_and_no_folder(tmp_path: Path, kind: str) -> None:
    url = str(tmp_path / "m")
    _SPECIAL[kind](tmp_path / "m")
    assert not storage.create_bytes(b"new", url)
    if kind == "folder":
        for write in (lambda: storage.put_bytes(b"new", url), lambda: storage.remove(url)):
            with pytest.raises(storage.DamagedFile, match=r"/m is a folder: expected a file"):
                write()
    else:
        storage.put_bytes(b"new", url)
        assert (tmp_path / "m").read_bytes() == b"new" and not (tmp_path / "m").is_symlink()
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("kind", [*sorted(_SPECIAL), "elsewhere"])
def test_a_lock_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    storage.put_bytes(b"old", str(tmp_path / "m"))
    there = tmp_path / "m.outside"
    (_SPECIAL | {"elsewhere": lambda path: path.symlink_to(there)})[kind](tmp_path / ".swap")
    with pytest.raises(storage.DamagedFile, match=r"/\.swap is a .*: expected a file\nhint: remove /"):
        storage.swap_bytes(b"new", str(tmp_path / "m"), b"old")
    assert (tmp_path / "m").read_bytes() == b"old" and not there.exists()


def test_links_to_files_and_folders_are_listed_as_what_they_lead_to(tmp_path: Path) -> None:
    for name in ("far/folder", "near"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "far" / "file.tar").write_bytes(b"1")
    for name in ("folder", "file.tar"):
        (tmp_path / "near" / name).symlink_to(tmp_path / "far" / name)
    near = str(tmp_path / "near")
    assert storage.list_folders(near) == ["folder"] and storage.list_files(near) == ["file.tar"]
    assert storage.glob(f"{near}/*.tar") == [f"{near}/file.tar"]
    assert list(storage.list_sizes_and_times(near)) == ["file.tar"]


@contextlib.contextmanager
def _without_rights(folder: Path) -> Iterator[None]:
    """Another user for root, or no right to write for others."""
    if os.geteuid():
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_without_rights_is_named_and_not_the_temporary_file(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (Path(folder) / "old").write_bytes(b"old")
        with _without_rights(Path(folder)):
            for write in (lambda: storage.put_bytes(b"", f"{folder}/new"), lambda: storage.remove(f"{folder}/old"),
                          lambda: storage.swap_bytes(b"", f"{folder}/old", b"old")):
                with pytest.raises(PermissionError) as caught:
                    write()
                assert storage.denial_message(caught.value) in {
                    f"this user may not write in {folder}", f"this user may not use {folder}/old"}


def test_a_lost_working_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "missing").read_bytes()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    with pytest.raises(FileNotFoundError) as lost:
        Path("file").absolute()
    assert storage.lost_folder_message(lost.value) == "the working folder of this process was removed while it ran"
    assert not storage.lost_folder_message(missing.value) and not storage.lost_folder_message(ValueError())
    monkeypatch.chdir(tmp_path)
    assert not storage.lost_folder_message(lost.value)
