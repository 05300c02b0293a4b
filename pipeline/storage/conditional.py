"""Writes that succeed for one writer only: create if absent, compare and swap."""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.storage.addresses import is_local, join, local_path
from pipeline.storage.errors import (
    DamagedFile,
    StorageError,
    refuse_special_file,
    refuse_special_folder,
    storage_errors,
)
from pipeline.storage.files import (
    FileSystem,
    exists,
    flush_to_disk,
    move_or_copy,
    open_url,
    put_bytes,
    read_bytes,
    remove,
    unfinished_file,
)
from pipeline.storage.remembered import forget_after, forget_reads


def create_bytes(data: bytes, url: str) -> bool:
    """Put `data` at `url` unless the object exists. Returns whether it was put. One of two racers wins."""
    fs, path = open_url(url)
    with storage_errors(url, "create"):
        try:
            if is_local(url):
                with unfinished_file(path) as temporary:
                    fs.pipe_file(temporary, data)
                    flush_to_disk(temporary)
                    _link(temporary, path)
            else:
                with forget_after():
                    _create_object(lambda: fs.pipe_file(path, data, mode="create"))
        except FileExistsError:
            return False
    return True


def put_checked(local: Path, url: str, check: Callable[[], None], *, give: bool = False) -> None:
    """Put a finished local file at `url` after `check`, which raises if this process may not write there any more.

    A file that came there after the check is not replaced unless another check allows it. With `give` the
    caller does not need `local` afterwards.
    """
    fs, path = open_url(url)
    with storage_errors(url, "write"):
        if is_local(url):
            with unfinished_file(path) as temporary:
                move_or_copy(fs, local, temporary, give)
                check()
                try:
                    _link(temporary, path)
                except FileExistsError:
                    check()
                    os.replace(temporary, path)
        else:
            forget_reads()
            check()
            with forget_after():
                try:
                    _create_object(lambda: fs.put_file(str(local), path, mode="create"))
                except FileExistsError:
                    check()
                    fs.put_file(str(local), path)


def _link(temporary: str, path: str) -> None:
    """Give a file its name unless that is taken: unlike a rename, a link fails then."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}:
            raise
        # A file system without links: the name is claimed first, and then given its bytes.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        os.replace(temporary, path)


# Only conflicts of conditional writes (409) are retried in this file. boto retries throttled and failed requests, but
# not this one.
def _create_object(create: Callable[[], None]) -> None:
    for retries in reversed(range(5)):
        try:
            return create()
        except FileExistsError:
            raise
        except OSError as error:
            if _is_refused(error):
                raise FileExistsError(str(error)) from error
            # 409: another writer is creating it now, and may fail.
            if retries == 0 or "ConditionalRequestConflict" not in str(error):
                raise
            time.sleep(0.2)


def _is_refused(error: OSError) -> bool:
    """Whether a store found the condition of a write false. s3fs recognizes only those that AWS names."""
    text = str(error.__cause__ or error)
    return "PreconditionFailed" in text or "At least one of the pre-conditions" in text


def swap_bytes(data: bytes, url: str, expected: bytes | None) -> bool:
    """Put `data` at `url` if the object has the bytes `expected` (None: no object).

    Returns whether it was put. One of two racers wins.

    On a file system a lock in the folder keeps other swappers out, and readers see a rename. On S3 the write has
    a condition (If-Match, If-None-Match) which not every store knows: `can_swap` asks it.
    """
    if expected is None:
        return create_bytes(data, url)
    if is_local(url):
        path = str(local_path(url))
        with _locked(os.path.dirname(path)):
            if not exists(url) or read_bytes(url) != expected:
                return False
            put_bytes(data, url)
        return True
    # The ETag of a small object is the MD5 of its bytes, but not with all kinds of encryption. So the store's ETag
    # is requested.
    forget_reads()
    fs, path = open_url(url)
    with storage_errors(url, "look at"):
        try:
            etag = fs.info(path, refresh=True)["ETag"]
        except FileNotFoundError:
            return False
    return read_bytes(url) == expected and _put_if(fs, url, data, IfMatch=etag)


def _put_if(fs: FileSystem, url: str, data: bytes, **condition: str) -> bool:
    """Put an object if the store finds the condition true."""
    bucket, _, key = url.split("://", 1)[1].partition("/")
    for retries in reversed(range(5)):
        try:
            with storage_errors(url, "write"), forget_after():
                fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
            return True
        except FileNotFoundError:  # it went meanwhile
            return False
        except OSError as error:
            if _is_refused(error):
                return False
            # 409: another writer is writing it now, and may fail.
            if retries == 0 or "ConditionalRequestConflict" not in str(error.__cause__ or error):
                raise
            time.sleep(0.2)
    raise AssertionError


def set_time(url: str) -> None:
    """Give a file the time of the store, unless another process replaces or removes it at this moment.

    Nothing happens to a file of another user that this one may not write.
    """
    if is_local(url):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.utime(local_path(url))
    else:
        data = read_bytes(url)
        swap_bytes(data, url, data)


def can_swap(folder: str) -> bool:
    """Whether the store of `folder` keeps the conditions of `swap_bytes`: it is tried on a probe object."""
    if is_local(folder):
        return True
    url = join(folder, f"probe-{secrets.token_hex(8)}")
    fs, _ = open_url(url)
    try:
        # boto repeats a write whose answer was lost, and the store refuses it then. No other command knows the name, so
        # the bytes tell whether the first try was accepted.
        created = create_bytes(b"1", url) or read_bytes(url) == b"1"  # if it is refused, there is nothing to remove
        try:
            if not created or create_bytes(b"2", url):
                return False
            if _put_if(fs, url, b"3", IfMatch=f'"{hashlib.md5(b"other", usedforsecurity=False).hexdigest()}"'):
                return False
            swap_bytes(b"4", url, b"1")
            return read_bytes(url) == b"4"
        finally:
            remove(url)
    except StorageError as error:
        if "NotImplemented" in str(error.__cause__ or error):
            return False
        raise


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Hold the lock of a folder, one process at a time.

    filelock takes the same lock (flock) by the same two calls on a file system, and it cannot lock on S3. There the
    store's conditional writes do the same work, so a lock is needed only here, for the length of one swap.
    """
    refuse_special_folder(folder)
    os.makedirs(folder, exist_ok=True)
    lock = os.path.join(folder, ".swap")
    with contextlib.suppress(FileNotFoundError):
        refuse_special_file(lock)
    if os.path.islink(lock):
        raise DamagedFile(f"{lock} is a link: expected a file\nhint: remove {lock}; then python -m jobs verify")
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)  # a link would make a file anywhere
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
