"""Leases on folders: which commands may run together, and how the lease of a dead command ends."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from pipeline import storage
from pipeline.storage import lease
from pipeline.storage.lease import LeaseConflict, find_holders, hold_lease

_HOLD = """
import sys, time
from pipeline.storage.lease import hold_lease
with hold_lease(sys.argv[1], "datasets/d/v1/shards"):
    print("held", flush=True)
    time.sleep(60)
"""


def _lease_files(root):
    return sorted((root / "leases").glob("*"))


def test_several_commands_share_a_folder(tmp_path):
    with hold_lease(str(tmp_path), "datasets/d"), hold_lease(str(tmp_path), "datasets/d"):
        assert len(_lease_files(tmp_path)) == 2
    assert not _lease_files(tmp_path)


def test_an_exclusive_lease_needs_an_unused_folder_and_all_below_it(tmp_path):
    for folder in ("datasets/d", "datasets/d/v1"):
        with hold_lease(str(tmp_path), folder), pytest.raises(LeaseConflict, match=f"{tmp_path}/datasets/d: process"), \
                hold_lease(str(tmp_path), "datasets/d", exclusive=True):
            pass
    for folder in ("datasets", "datasets/d2", "datasets/other"):
        with hold_lease(str(tmp_path), folder), hold_lease(str(tmp_path), "datasets/d", exclusive=True):
            pass
    assert not _lease_files(tmp_path)


def test_a_shared_lease_waits_for_an_exclusive_one(tmp_path):
    order = []

    def share():
        with hold_lease(str(tmp_path), "d"):
            order.append("shared")

    with hold_lease(str(tmp_path), "d", exclusive=True) as exclusive:
        thread = threading.Thread(target=share)
        thread.start()
        time.sleep(0.3)
        order.append("emptied")
        exclusive.share()
        thread.join(20)
    assert order == ["emptied", "shared"]


def test_one_of_two_commands_empties_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_CLAIM_S", 5.0)
    barrier, held, refused = threading.Barrier(2), [], []

    def empty():
        barrier.wait()
        try:
            with hold_lease(str(tmp_path), "d", exclusive=True) as exclusive:
                held.append(time.monotonic())
                exclusive.share()
                time.sleep(6)
        except LeaseConflict:
            refused.append(time.monotonic())

    threads = [threading.Thread(target=empty) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == len(refused) == 1


def test_the_lease_of_a_killed_process_of_this_machine_ends_with_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(LeaseConflict, match=f"process {process.pid} on "), \
            hold_lease(str(tmp_path), "datasets/d/v1/shards", exclusive=True):
        pass
    process.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # the process stays a zombie, as in a container without an init
        with contextlib.suppress(LeaseConflict), hold_lease(str(tmp_path), "datasets/d/v1/shards", exclusive=True):
            assert len(_lease_files(tmp_path)) == 1
            break
    else:
        pytest.fail("the lease of a killed process did not end")
    process.wait()


def test_a_pid_that_is_used_again_holds_nothing(tmp_path):
    with hold_lease(str(tmp_path), "d"):
        file, = _lease_files(tmp_path)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"started": "1"}))
        with hold_lease(str(tmp_path), "d", exclusive=True):
            assert file not in _lease_files(tmp_path)


def test_the_lease_of_another_machine_ends_when_nothing_renews_it(tmp_path):
    with hold_lease(str(tmp_path), "d"):
        file, = _lease_files(tmp_path)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "another"}))
        with pytest.raises(LeaseConflict), hold_lease(str(tmp_path), "d", exclusive=True):
            pass
        age = os.stat(file).st_mtime - lease.EXPIRE_S - 1
        os.utime(file, (age, age))
        with hold_lease(str(tmp_path), "d", exclusive=True):
            pass


@pytest.mark.parametrize("seconds", [60.0, 30 * 3600.0])
def test_a_lease_from_a_clock_that_was_ahead_ends(tmp_path, seconds):
    with hold_lease(str(tmp_path), "d"):
        file, = _lease_files(tmp_path)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "another"}))
        now = time.time()
        os.utime(file, (now + seconds, now + seconds))
        assert len(find_holders(str(tmp_path), "d", now)) == 1  # its holder may be alive, and renew it
        assert os.stat(file).st_mtime < now + 10
        assert not find_holders(str(tmp_path), "d", now + lease.EXPIRE_S + 10)


def test_a_lease_from_a_clock_that_was_ahead_ends_on_s3(s3):
    with hold_lease(s3, "d"):
        name, = storage.list_files(f"{s3}/leases")
        url = f"{s3}/leases/{name}"
        storage.put_json(storage.read_json(url) | {"machine": "another"}, url)
        now = time.time()
        assert len(find_holders(s3, "d", now - 3600)) == 1  # a store whose clock was an hour ahead
        assert abs(storage.modified_time(url) - now) < 10
        assert not find_holders(s3, "d", now + lease.EXPIRE_S + 10)
    assert not storage.list_files(f"{s3}/leases")


def test_a_lease_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    with hold_lease(str(tmp_path), "d"):
        file, = _lease_files(tmp_path)
        os.utime(file, (1, 1))
        deadline = time.monotonic() + 20
        while os.stat(file).st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(find_holders(str(tmp_path), "d", time.time())) == 1


def test_a_damaged_lease_is_no_lease(tmp_path):
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / "d.0123456789abcdef.json").write_text('{"pid": 1}')
    with hold_lease(str(tmp_path), "d", exclusive=True):
        pass


def test_leases_work_on_s3(s3):
    with hold_lease(s3, "d"), pytest.raises(LeaseConflict), hold_lease(s3, "d", exclusive=True):
        pass
    with hold_lease(s3, "d", exclusive=True) as exclusive:
        assert abs(exclusive.now() - time.time()) < 5


def test_a_lease_counts_for_the_folders_in_it(tmp_path):
    program = _HOLD.replace("datasets/d/v1/shards", "datasets/d/v1")
    held = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert held.stdout.readline() == "held\n"
        with pytest.raises(LeaseConflict, match="process"), \
                hold_lease(str(tmp_path), "datasets/d/v1/shards", exclusive=True):
            pass
        with hold_lease(str(tmp_path), "datasets/d/v1/shards"):  # both share it
            pass
        with hold_lease(str(tmp_path), "datasets/d/v11", exclusive=True):
            pass
    finally:
        held.kill()
        held.wait()
    # A process with a shared lease on a folder may take an exclusive one below it.
    with hold_lease(str(tmp_path), "datasets/d/v1"), hold_lease(str(tmp_path), "datasets/d/v1/shards", exclusive=True):
        pass


def test_a_lease_leaves_no_new_folder(tmp_path):
    root = tmp_path / "new root"
    with hold_lease(str(root), "d"):
        with hold_lease(str(root), "e"):
            pass
        assert len(_lease_files(root)) == 1
    assert not root.exists()


def test_leases_in_a_folder_that_others_remove(tmp_path, monkeypatch):
    def hold():
        for _ in range(200):
            with hold_lease(str(tmp_path), "d"):
                pass
    threads = [threading.Thread(target=hold) for _ in range(3)]
    failures = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and not list(tmp_path.iterdir())
