"""Local copies of remote files: checked, bounded, shared by processes."""

import hashlib
import mmap
import multiprocessing
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline import storage
from pipeline.storage import cache, files


def test_local_files_are_compared_with_their_entry(tmp_path):
    path = tmp_path / "000000.tar"
    path.write_bytes(b"12345678")
    entry = {"name": path.name, "bytes": 8, "sha256": storage.sha256_file(path)}
    assert storage.fetch(str(path), entry, check=True) == path
    path.write_bytes(b"12345679")
    with pytest.raises(ValueError, match="not the file"):
        storage.fetch(str(path), entry, check=True)
    path.write_bytes(b"1234567")
    with pytest.raises(ValueError, match="not the file"):
        storage.fetch(str(path), entry)
    path.unlink()
    with pytest.raises(ValueError, match="not there"):
        storage.fetch(str(path), entry)


@pytest.fixture
def objects(s3, tmp_path, monkeypatch):
    """Paths and manifest entries of ten objects of 1,000 bytes; the cache is empty and has room for 3,500."""
    monkeypatch.setenv("RDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RDM_CACHE_BYTES", "3500")
    objects = []
    for number in range(10):
        data, url = bytes([number]) * 1000, storage.join(s3, f"{number}.bin")
        storage.put_bytes(data, url)
        objects.append((url, {"name": f"{number}.bin", "bytes": 1000, "sha256": hashlib.sha256(data).hexdigest()}))
    return objects


def _age_cache(minutes):
    """Set the times of all files in the cache back."""
    for path in storage.cache_folder().iterdir():
        status = path.stat()
        os.utime(path, (status.st_atime - 60 * minutes, status.st_mtime - 60 * minutes))


def _cached_numbers(objects):
    return [number for number, (_, entry) in enumerate(objects)
            if (storage.cache_folder() / entry["sha256"]).exists()]


def test_the_cache_keeps_its_bound_and_the_last_used_files(objects):
    for number in (0, 1, 2):
        storage.fetch(*objects[number])
        _age_cache(2)
    storage.fetch(*objects[0])
    _age_cache(2)
    for number, kept in ((3, [0, 2, 3]), (4, [0, 3, 4])):
        assert storage.fetch(*objects[number]).read_bytes() == bytes([number]) * 1000
        assert _cached_numbers(objects) == kept
        _age_cache(2)


def test_files_fetched_within_a_minute_stay(objects):
    storage.fetch(*objects[0])
    _age_cache(2)
    paths = [storage.fetch(*stored_object) for stored_object in objects[1:]]
    assert _cached_numbers(objects) == list(range(1, 10)) and all(path.stat().st_size == 1000 for path in paths)
    _age_cache(2)
    storage.fetch(*objects[0])
    assert len(_cached_numbers(objects)) == 3


def test_open_files_survive_removal_and_are_fetched_again(objects):
    first = storage.fetch(*objects[0])
    with open(first, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for stored_object in objects[1:]:
            _age_cache(2)
            storage.fetch(*stored_object)
        assert not first.exists() and mapped[:] == bytes(1000)
    seen = []

    def read(path):
        seen.append(path)
        if len(seen) == 1:
            path.unlink()  # as another process may
        return path.read_bytes()

    assert storage.fetch_and_open(*objects[0], read) == bytes(1000) and len(seen) == 2
    with pytest.raises(storage.StorageError, match=r"faster than it can be opened\nhint: a larger RDM_CACHE_BYTES"):
        storage.fetch_and_open(*objects[0], lambda path: (path.unlink(), path.read_bytes()))


def _replace_keeping_times(path, data):
    """Change bytes of a file and keep its size and modification time."""
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_that_changed_in_the_cache_is_fetched_again(objects):
    path = storage.fetch(*objects[5])
    path.write_bytes(bytes([6]) * 1000)
    os.utime(path)  # two writes in one tick of the clock have the same time
    assert storage.local_copy(*objects[5]) is None
    assert storage.fetch(*objects[5]).read_bytes() == bytes([5]) * 1000
    path.write_bytes(bytes([5]) * 999)
    assert storage.fetch(*objects[5]).read_bytes() == bytes([5]) * 1000
    _replace_keeping_times(path, bytes([6]) * 1000)  # as a failing disk does
    assert storage.fetch(*objects[5], check=True).read_bytes() == bytes([5]) * 1000


@pytest.mark.parametrize("note", [None, "", "1000", "1000 0 0\n", "\udcff"])
def test_an_unchecked_file_of_the_right_size_is_not_used(objects, note):
    url, entry = objects[4]
    path = storage.cache_folder() / entry["sha256"]
    path.write_bytes(bytes([9]) * 1000)
    if note is not None:
        path.with_name(f"{path.name}.checked").write_text(note, errors="surrogateescape")
    assert storage.local_copy(url, entry) is None
    assert storage.fetch(url, entry).read_bytes() == bytes([4]) * 1000


def test_a_link_in_the_cache_is_replaced(objects, tmp_path):
    url, entry = objects[3]
    (tmp_path / "elsewhere").write_bytes(bytes([3]) * 1000)
    path = storage.cache_folder() / entry["sha256"]
    path.symlink_to(tmp_path / "elsewhere")
    assert storage.fetch(url, entry).read_bytes() == bytes([3]) * 1000 and not path.is_symlink()


def test_a_cached_file_is_read_for_its_hash_once(objects, monkeypatch):
    read = []
    monkeypatch.setattr(cache, "sha256_file", lambda path: read.append(Path(path).name) or files.sha256_file(path))
    path = storage.fetch(*objects[2])
    assert len(read) == 1 and storage.fetch(*objects[2]) == path and len(read) == 1
    os.utime(path, (0, 0))
    for _ in range(2):  # the second time as another process
        assert storage.fetch(*objects[2]) == path
    assert read[1:] == [path.name]
    assert storage.fetch(*objects[2], check=True) == path and read[1:] == [path.name] * 2


def test_evicted_files_leave_nothing_behind(objects):
    for stored_object in objects:
        storage.fetch(*stored_object)
        _age_cache(2)
    names = {entry["sha256"] for _, entry in objects[7:]}
    assert {path.name for path in storage.cache_folder().iterdir()} == names | {f"{name}.checked" for name in names}


def test_old_leftovers_in_the_cache_are_removed_and_other_files_stay(objects):
    old, new, others = f".{'a' * 64}.{'1' * 16}", f".{'b' * 64}.{'2' * 16}", "cache/npm"
    for name in (old, new):
        (storage.cache_folder() / name).write_bytes(bytes(1000))
    (storage.cache_folder() / others).mkdir(parents=True)
    os.utime(storage.cache_folder() / old, (0, 0))
    storage.fetch(*objects[0])
    assert not (storage.cache_folder() / old).exists()
    assert (storage.cache_folder() / new).exists() and (storage.cache_folder() / others).is_dir()


def _reads(objects, failures):
    files._filesystem.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fsspec.asyn.reset_lock()
    cache._IN_USE_S = 0.0
    try:
        for turn in range(4):
            for number in np.random.default_rng([os.getpid(), turn]).permutation(10):
                assert storage.fetch_and_open(*objects[number], Path.read_bytes) == bytes([number]) * 1000
    except BaseException as error:
        failures.put(repr(error))


def test_processes_that_share_a_small_cache_do_not_fail(objects):
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    processes = [context.Process(target=_reads, args=(objects, failures)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert failures.empty(), failures.get()


@pytest.mark.parametrize("text", ["much", "-1", "5X"])
def test_an_invalid_bound_is_named(objects, monkeypatch, text):
    monkeypatch.setenv("RDM_CACHE_BYTES", text)
    with pytest.raises(ValueError, match=r"RDM_CACHE_BYTES = .*: must be a size\nhint"):
        storage.fetch(*objects[0])
