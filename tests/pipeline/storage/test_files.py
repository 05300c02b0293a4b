import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import threading
from pathlib import Path

import fsspec
import pytest

from pipeline import storage
from pipeline.storage import files
from tests.pipeline import synthetic


def _create(results, start, number, urls):
    # A connection does not survive a fork.
    files._filesystem.cache_clear()
    if "://" in urls[0]:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        fsspec.asyn.reset_lock()
    for url in urls:
        start.wait()
        if storage.create_bytes(str(number).encode() * 1000, url):
            results.put((url, number))


@pytest.mark.parametrize("where", ["local", "s3"])
def test_one_of_eight_writers_creates_a_name(where, tmp_path, request):
    root = str(tmp_path) if where == "local" else request.getfixturevalue("s3")
    context = multiprocessing.get_context("fork")
    results, start = context.SimpleQueue(), context.Barrier(8)
    urls = [storage.join(root, f"plan-{number}.json") for number in range(5)]
    processes = [context.Process(target=_create, args=(results, start, number, urls)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    winners = []
    while not results.empty():
        winners.append(results.get())
    assert sorted(url for url, _ in winners) == urls
    for url, number in winners:
        assert not storage.create_bytes(b"late", url)
        assert storage.read_bytes(url) == str(number).encode() * 1000


def test_a_reader_never_sees_half_a_file(tmp_path):
    url, sizes, stop = str(tmp_path / "file"), set(), threading.Event()
    storage.put_bytes(b"a" * 3_000_000, url)

    def read():
        while not stop.is_set():
            data = storage.read_bytes(url)
            sizes.add((len(data), len(set(data))))

    reader = threading.Thread(target=read)
    reader.start()
    for letter in b"bcdefghij":
        storage.put_bytes(bytes([letter]) * 3_000_000, url)
    stop.set()
    reader.join()
    assert sizes == {(3_000_000, 1)}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """With a limit on the size of files, as with a full disk, writing ends in the middle."""
    old, big = str(tmp_path / "out" / "old"), tmp_path / "big"
    storage.put_bytes(b"before", old)
    big.write_bytes(b"x" * 100_000)

    def writes():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        for name in ("old", "new"):
            url = str(tmp_path / "out" / name)
            for write in (lambda: storage.put_bytes(b"y" * 100_000, url),  # noqa: B023
                          lambda: storage.put_file(big, url),  # noqa: B023
                          lambda: storage.create_bytes(b"z" * 100_000, url)):  # noqa: B023
                try:
                    write()
                except OSError as error:
                    assert error.errno == errno.EFBIG
                else:
                    raise AssertionError("it was written")

    assert synthetic.in_child(writes) == 0
    assert synthetic.files_below(tmp_path / "out") == {"old": b"before"}


def test_a_full_disk_leaves_nothing(tmp_path):
    disk, big = tmp_path / "disk", tmp_path / "big"
    disk.mkdir()
    big.write_bytes(b"x" * 1_000_000)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        for write in (lambda: storage.put_file(big, str(disk / "a" / "b")),
                      lambda: storage.put_bytes(b"x" * 1_000_000, str(disk / "c")),
                      lambda: storage.create_bytes(b"x" * 1_000_000, str(disk / "d"))):
            with pytest.raises(OSError) as caught:
                write()
            assert caught.value.errno == errno.ENOSPC
        assert synthetic.files_below(disk) == {}
        storage.put_bytes(b"fits", str(disk / "e"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_error_while_fetching_publishes_nothing(s3, monkeypatch):
    url = storage.join(s3, "object")
    storage.put_bytes(b"content", url)
    wrong = {"name": "object", "bytes": 7, "sha256": "0" * 64}
    with pytest.raises(ValueError, match="is not the file its manifest describes"):
        storage.fetch(url, wrong)
    assert not (storage.cache_folder() / ("0" * 64)).exists()
    assert not [name for name in os.listdir(storage.cache_folder()) if name.startswith(".")]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_written_object_can_be_read(where, tmp_path, request):
    root = str(tmp_path) if where == "local" else request.getfixturevalue("s3")
    local = tmp_path / "source"
    local.write_bytes(os.urandom(200_000))
    for name in ("plain.bin", "folder/with space.bin", "folder/zażółć ß 名.bin", "folder/[a]*?.bin",
                 "f#r%20/x&y=z.bin"):
        url = storage.join(root, name)
        assert not storage.exists(url)
        storage.put_file(local, url)
        assert storage.exists(url) and storage.size(url) == 200_000
        assert storage.read_bytes(url) == local.read_bytes()
        assert storage.sha256(url) == storage.sha256_file(local)
        entry = {"name": name, "bytes": 200_000, "sha256": storage.sha256_file(local)}
        assert storage.fetch(url, entry, check=True).read_bytes() == local.read_bytes()
    assert "plain.bin" in storage.list_files(root)
    assert storage.list_files(storage.join(root, "folder")) == sorted([
        "with space.bin", "zażółć ß 名.bin", "[a]*?.bin"])
    assert {"folder", "f#r%20"} <= set(storage.list_folders(root))
    storage.put_bytes(b"", storage.join(root, "folder2/x"))
    below = dict(storage.walk(storage.join(root, "folder")))
    assert below == dict.fromkeys(["with space.bin", "zażółć ß 名.bin", "[a]*?.bin"], 200_000)
    storage.remove_tree(storage.join(root, "folder"))
    assert storage.list_files(storage.join(root, "folder")) == [] and storage.exists(storage.join(root, "folder2/x"))
    storage.remove(storage.join(root, "plain.bin"))
    storage.remove(storage.join(root, "plain.bin"))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "plain.bin"))
    with pytest.raises(FileNotFoundError):
        storage.size(storage.join(root, "plain.bin"))


def test_files_of_another_process_are_listed(s3):
    folder = storage.join(s3, "records")
    assert storage.list_files(folder) == []
    storage.put_bytes(b"1", storage.join(folder, "1.json"))
    assert storage.list_files(folder) == ["1.json"]
    other = fsspec.filesystem("s3", skip_instance_cache=True)
    other.pipe_file(storage.join(folder, "2.json"), b"2")
    assert storage.list_files(folder) == ["1.json", "2.json"]
    other.rm_file(storage.join(folder, "1.json"))
    assert not storage.exists(storage.join(folder, "1.json"))


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_file_is_read_up_to_a_limit(where, tmp_path, request):
    root = str(tmp_path) if where == "local" else request.getfixturevalue("s3")
    for content in (b"", b"four"):
        storage.put_bytes(content, storage.join(root, "file"))
        assert storage.read_at_most(storage.join(root, "file"), 4) == content
    with pytest.raises(storage.FileTooLarge, match="more than 3 bytes"):
        storage.read_at_most(storage.join(root, "file"), 3)
    with pytest.raises(FileNotFoundError):
        storage.read_at_most(storage.join(root, "none"), 3)


def test_a_missing_bucket_is_an_error(s3):
    with pytest.raises(storage.StorageError, match=r"there is no such bucket\nhint: make it") as caught:
        storage.put_bytes(b"x", "s3://no-such-bucket-here/plan.json")
    with pytest.raises(storage.StorageError, match="there is no such bucket"):
        storage.list_files("s3://no-such-bucket-here/folder")
    assert "not-to-be-seen" not in str(caught.value) and "AKIATESTING" not in str(caught.value)


@pytest.fixture
def dead_server(s3_server, monkeypatch):
    """A store at a closed port."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    clear = fsspec.get_filesystem_class("s3").clear_instance_cache
    files._filesystem.cache_clear()
    clear()
    filesystem = files._filesystem("s3")
    filesystem.retries = 1
    yield "s3://bucket"
    files._filesystem.cache_clear()
    clear()


@pytest.mark.parametrize("look", [storage.exists, storage.size, storage.list_files, storage.list_folders,
                                  storage.read_bytes, storage.sha256, lambda url: list(storage.walk(url)),
                                  lambda url: storage.put_bytes(b"x", url),
                                  lambda url: storage.create_bytes(b"x", url)])
def test_a_silent_store_is_an_error_and_not_empty(dead_server, look):
    with pytest.raises(OSError) as caught:
        look(storage.join(dead_server, "datasets/x/manifest.json"))
    assert not isinstance(caught.value, FileNotFoundError)
    assert "s3://bucket/datasets/x/manifest.json" in str(caught.value)
    assert "not-to-be-seen" not in str(caught.value) and "AKIATESTING" not in str(caught.value)


def test_cut_json_names_its_path(tmp_path):
    (tmp_path / "plan.json").write_text('{"items": [')
    with pytest.raises(ValueError, match=r"plan\.json is not JSON"):
        storage.read_json(str(tmp_path / "plan.json"))
    assert storage.json_bytes({"b": 1, "a": "é"}) == storage.json_bytes({"a": "é", "b": 1})


def test_unknown_protocols_are_refused():
    with pytest.raises(ValueError, match="cannot open nowhere://"):
        storage.exists("nowhere://bucket/key")


@pytest.mark.parametrize("other_disk", [False, True])
def test_a_file_moves_or_is_copied_from_another_file_system(tmp_path, other_disk):
    folder = Path("/dev/shm") if other_disk else tmp_path
    if other_disk and (not folder.is_dir() or folder.stat().st_dev == tmp_path.stat().st_dev):
        pytest.skip("no second file system")
    local = folder / f"rdm-given-{os.getpid()}"
    try:
        local.write_bytes(b"whole")
        storage.put_file(local, str(tmp_path / "there" / "file"), give=True)
        assert (tmp_path / "there" / "file").read_bytes() == b"whole" and local.exists() == other_disk
        assert os.listdir(tmp_path / "there") == ["file"]
    finally:
        local.unlink(missing_ok=True)
