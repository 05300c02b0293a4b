"""Remove what processes that were killed left unfinished: hidden files, and uploads of large objects to S3."""

import logging
import os
from collections.abc import Iterator
from typing import Any

from pipeline.storage.addresses import S3_SCHEMES, is_local, join, local_path
from pipeline.storage.conditional import set_time
from pipeline.storage.errors import StorageError, first_line, storage_errors
from pipeline.storage.files import modified_time, open_url, remove
from pipeline.storage.listings import UNFINISHED, list_names

_log = logging.getLogger(__name__)
ABANDONED_S = 3600.0  # a process that wrote nothing into an unfinished file for so long is dead
_MOST_AHEAD_S = 15.0  # a file may have been written since `now` was read


def bounded_age(url: str, now: float) -> float:
    """Seconds since a file was written. One that is dated in the future gets the time of now, so that it ages.

    `now`: the time of the store. Its clock, or that of the machine with the disk, may have been ahead.
    """
    written = modified_time(url)
    if written - now > _MOST_AHEAD_S:
        set_time(url)
    return now - written


def remove_unfinished(folder: str, now: float, *, below: bool = False) -> int:
    """Remove abandoned files from a folder, and with `below` from the folders in it; how many there were.

    `now`: the time of the store. An object store has whole objects only, so the folders below are not listed there.
    S3 keeps the parts of an upload that was not completed: with `below` abandoned uploads are aborted.
    """
    removed = 0
    for url in _list_unfinished(folder, below):
        try:
            if bounded_age(url, now) > ABANDONED_S:
                remove(url)
                removed += 1
        except FileNotFoundError:  # finished meanwhile
            continue
    return removed + (_abort_uploads(folder, now) if below and folder.split("://")[0] in S3_SCHEMES else 0)


def _list_unfinished(folder: str, below: bool) -> Iterator[str]:
    if not (below and is_local(folder)):
        yield from (join(folder, name) for name in list_names(folder) if UNFINISHED.fullmatch(name))
        return
    for parent, _, names in os.walk(local_path(folder)):
        yield from (os.path.join(parent, name) for name in names if UNFINISHED.fullmatch(name))


def _abort_uploads(folder: str, now: float) -> int:
    """Abort abandoned uploads of objects below a folder of a bucket; how many there were.

    A listing does not show them, and the store charges for their parts. An upload is abandoned if no part of it came
    for `ABANDONED_S`. Clean-up needs rights that reading and writing do not need: without them it is a warning.
    """
    aborted = 0
    try:
        for upload in _list_uploads(folder):
            try:
                if now - _last_part_time(folder, upload) > ABANDONED_S:
                    _call(folder, "abort_multipart_upload", **_identity(upload))
                    aborted += 1
            except FileNotFoundError:  # completed or aborted meanwhile
                continue
    except (PermissionError, StorageError) as error:
        _log.warning("uploads below %s that were not completed may stay: %s\nhint: a lifecycle rule of the bucket with "
                     "AbortIncompleteMultipartUpload, see docs/guides/publish/safety.md", folder, first_line(error))
    return aborted


def _list_uploads(folder: str) -> Iterator[dict[str, Any]]:
    prefix = folder.split("://", 1)[1].partition("/")[2].rstrip("/")
    markers: dict[str, str] = {}
    while True:
        page = _call(folder, "list_multipart_uploads", **({"Prefix": f"{prefix}/"} if prefix else {}), **markers)
        yield from page.get("Uploads", [])
        if not page.get("IsTruncated"):
            return
        markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _last_part_time(folder: str, upload: dict[str, Any]) -> float:
    """When the upload began, or when its last part came, in seconds of the epoch."""
    times, marker = [upload["Initiated"].timestamp()], 0
    while True:
        page = _call(folder, "list_parts", PartNumberMarker=marker, **_identity(upload))
        times += [part["LastModified"].timestamp() for part in page.get("Parts", [])]
        if not page.get("IsTruncated"):
            return max(times)
        marker = page["NextPartNumberMarker"]


def _identity(upload: dict[str, Any]) -> dict[str, str]:
    return {"Key": upload["Key"], "UploadId": upload["UploadId"]}


def _call(folder: str, operation: str, **arguments: Any) -> dict[str, Any]:
    fs, path = open_url(folder)
    with storage_errors(folder, "clean up"):
        return fs.call_s3(operation, Bucket=path.partition("/")[0], **arguments)
