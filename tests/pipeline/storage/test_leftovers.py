"""Unfinished files and uploads of killed processes."""

import os
import time
from pathlib import Path

import fsspec
import pytest
from aiobotocore.client import AioBaseClient
from botocore.exceptions import ClientError

from pipeline import storage


def _leave(path: Path, hours: float) -> Path:
    """Leave an unfinished file of `put_bytes`, whose process was killed some hours ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda temporary, _: names.append(temporary))
        patch.setattr(os, "unlink", lambda _: None)
        storage.put_bytes(b"x", str(path))
    os.utime(names[0], (time.time() - 3600 * hours,) * 2)
    return Path(names[0])


def test_abandoned_files_are_removed_and_no_others(tmp_path: Path) -> None:
    old, below = _leave(tmp_path / "a.json", 2), _leave(tmp_path / "records" / "000000.json", 2)
    kept = [_leave(tmp_path / "b.json", 0.5), tmp_path / "c.json", tmp_path / ".swap"]
    for path in kept[1:]:
        path.write_text("x")
        os.utime(path, (0, 0))
    now = time.time()
    assert storage.remove_unfinished(str(tmp_path), now) == 1
    assert not old.exists() and below.exists()
    assert storage.remove_unfinished(str(tmp_path), now, below=True) == 1
    assert not below.exists() and all(path.exists() for path in kept)
    assert storage.remove_unfinished(str(tmp_path / "absent"), now, below=True) == 0


def test_leases_of_killed_commands_are_removed(tmp_path: Path) -> None:
    with storage.hold_lease(str(tmp_path), "datasets/x") as lease:
        living, ended = next((tmp_path / "leases").iterdir()), tmp_path / "leases" / "datasets+y.0123456789abcdef.json"
        ended.write_bytes(living.read_bytes())
        os.utime(ended, (time.time() - 100,) * 2)
        abandoned = _leave(tmp_path / "leases" / "z.json", 2)
        storage.remove_ended_leases(str(tmp_path), lease.now())
        assert living.exists() and not ended.exists() and not abandoned.exists()


def test_a_file_from_scratch_is_not_taken_for_an_abandoned_one(tmp_path: Path) -> None:
    waited = tmp_path / "scratch"
    waited.write_text("x")
    os.utime(waited, (0, 0))
    storage.put_file(waited, str(tmp_path / "put"), give=True)
    assert (tmp_path / "put").stat().st_mtime > time.time() - 60


def test_leftovers_on_an_object_store_are_removed(s3: str) -> None:
    for name in ("probe-0123456789abcdef", "current.json"):
        storage.put_bytes(b"x", f"{s3}/datasets/x/{name}")
    now = storage.modified_time(f"{s3}/datasets/x/current.json")
    assert storage.remove_unfinished(f"{s3}/datasets/x", now, below=True) == 0
    assert storage.remove_unfinished(f"{s3}/datasets/x", now + 4000, below=True) == 1
    assert storage.list_files(f"{s3}/datasets/x") == ["current.json"]


def _start_upload(url: str, parts: int) -> None:
    """Upload parts of an object and do not complete it, as a process that is killed."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    client = fsspec.filesystem("s3")
    upload = client.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
    for number in range(1, parts + 1):
        client.call_s3("upload_part", Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=b"x")


def _uploads(url: str) -> list[str]:
    listed = fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket=url.removeprefix("s3://"))
    return sorted(upload["Key"] for upload in listed.get("Uploads", []))


def test_abandoned_uploads_are_aborted_and_no_others(s3: str) -> None:
    storage.put_bytes(b"x", f"{s3}/datasets/x/current.json")
    now = storage.modified_time(f"{s3}/datasets/x/current.json")
    _start_upload(f"{s3}/datasets/x/v1/shards/000000.tar", 2)
    _start_upload(f"{s3}/datasets/x/v1/shards/000001.tar", 0)  # the test server says that each began in 2010
    _start_upload(f"{s3}/datasets/xy/v1/shards/000000.tar", 2)
    assert storage.remove_unfinished(f"{s3}/datasets/x", now) == 0
    assert storage.remove_unfinished(f"{s3}/datasets/x", now, below=True) == 1
    assert _uploads(s3) == ["datasets/x/v1/shards/000000.tar", "datasets/xy/v1/shards/000000.tar"]
    assert storage.remove_unfinished(f"{s3}/datasets/x", now + 4000, below=True) == 1
    assert _uploads(s3) == ["datasets/xy/v1/shards/000000.tar"]
    assert storage.remove_unfinished(s3, now + 4000, below=True) == 1
    assert _uploads(s3) == [] and storage.list_files(f"{s3}/datasets/x") == ["current.json"]


@pytest.mark.parametrize("code", ["AccessDenied", "NotImplemented"])
def test_a_store_that_refuses_to_list_uploads_is_named(s3: str, monkeypatch: pytest.MonkeyPatch,
                                                       caplog: pytest.LogCaptureFixture, code: str) -> None:
    call = AioBaseClient._make_api_call

    async def refuse(client: AioBaseClient, operation: str, parameters: dict[str, object]) -> object:
        if operation == "ListMultipartUploads":
            raise ClientError({"Error": {"Code": code, "Message": f"{code} by a test"}}, operation)
        return await call(client, operation, parameters)
    monkeypatch.setattr(AioBaseClient, "_make_api_call", refuse)
    storage.put_bytes(b"x", f"{s3}/datasets/x/probe-0123456789abcdef")
    now = storage.modified_time(f"{s3}/datasets/x/probe-0123456789abcdef") + 4000
    assert storage.remove_unfinished(f"{s3}/datasets/x", now, below=True) == 1
    assert f"{code} by a test" in caplog.text and "AbortIncompleteMultipartUpload" in caplog.text
