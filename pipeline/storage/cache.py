"""Verified local copies of remote files. The least recently used copies are removed first.

A copy is `<cache>/<sha256>`. Beside it, `<sha256>.checked` has the size, modification time and inode that the copy had
when its hash was found right.
"""

import contextlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pipeline.formats.sizes import parse_size
from pipeline.storage.addresses import ATTEMPTS, is_local, local_path
from pipeline.storage.errors import DamagedFile, StorageError, refuse_special_file, storage_errors
from pipeline.storage.files import UNFINISHED_NAME, flush_to_disk, open_url, sha256_file, unfinished_file
from pipeline.storage.private_folder import make_private_folder

# Why not a cache of fsspec: it names files by a hash of their URL and removes them by age. Here a file is named by its
# sha256, so equal files of two versions are stored once, a damaged file is noticed, and the cache has a size limit.
_T = TypeVar("_T")
_CACHE_BYTES = "50Gi"
_CACHED = re.compile(r"[0-9a-f]{64}")  # files of the cache are named by their sha256
_IN_USE_S = 60.0  # from fetching a file to opening it no more may pass
_ABANDONED_S = 3600.0  # nothing was written into an unfinished file for so long: its process was killed


def fetch(url: str, entry: dict[str, Any], *, check: bool = False) -> Path:
    """A local path with the bytes that a manifest's file `entry` (name, bytes, sha256) describes.

    A local file stays where it is. A remote one goes into a cache named by hash, so one node downloads each once.
    Sizes are always compared, hashes with `check`. Without `check`, the hash of a file of the cache is compared if the
    file is new or changed since its last check. A damaged file of the cache is downloaded again. Open the path within
    a minute: later it may be removed to make room for others (or use `fetch_and_open`).

    Raises:
        DamagedFile: the bytes are not those of the manifest.
    """
    if is_local(url):
        path = local_path(url)
        with _missing_named(url):
            refuse_special_file(url)
            byte_count = path.stat().st_size
        if byte_count != entry["bytes"] or (check and sha256_file(path) != entry["sha256"]):
            raise DamagedFile(f"{url} is not the file its manifest describes\nhint: python -m jobs verify")
        return path
    cached = cache_folder() / entry["sha256"]
    if _is_cached(cached, entry, check):
        return cached
    _make_room(cached.parent, entry["bytes"])
    fs, remote = open_url(url)
    with unfinished_file(str(cached)) as temporary:
        with _missing_named(url), storage_errors(url, "read", copy=cached.parent):
            fs.get_file(remote, temporary)
        status = os.lstat(temporary)
        if sha256_file(Path(temporary)) != entry["sha256"]:
            raise DamagedFile(f"{url} is not the file its manifest describes\nhint: python -m jobs verify")
        flush_to_disk(temporary)
        os.replace(temporary, cached)
    _note_check(cached, status)
    return cached


@contextlib.contextmanager
def _missing_named(url: str) -> Iterator[None]:
    """DamagedFile if the file of a manifest is not there."""
    try:
        yield
    except FileNotFoundError as error:
        if error.filename not in {url, str(local_path(url)) if is_local(url) else url}:
            raise
        raise DamagedFile(f"{url} is in its manifest but not there\nhint: python -m jobs verify") from None


def local_copy(url: str, entry: dict[str, Any]) -> Path | None:
    """The path that `fetch` would give, None if it would download the file."""
    if is_local(url):
        return fetch(url, entry)
    path = cache_folder() / entry["sha256"]
    return path if _is_cached(path, entry, check=False) else None


def fetch_and_open(url: str, entry: dict[str, Any], open_path: Callable[[Path], _T], *, check: bool = False) -> _T:
    """Open the local path of a file of a manifest. It is fetched again if another process just removed it."""
    for _ in range(ATTEMPTS):
        path = fetch(url, entry, check=check)
        try:
            return open_path(path)
        except FileNotFoundError:
            if is_local(url):
                raise
    raise StorageError(f"{url} is removed from {cache_folder()} faster than it can be opened\n"
                       f"hint: a larger RDM_CACHE_BYTES, now {_cache_bytes()}")


def _is_cached(path: Path, entry: dict[str, Any], check: bool) -> bool:
    """Whether the cache has a file with the right hash; if so, it counts as used now."""
    try:
        status = path.lstat()
        if status.st_size != entry["bytes"] or not stat.S_ISREG(status.st_mode):
            return False
        if check or not _was_checked(path, status):
            if sha256_file(path) != entry["sha256"]:
                return False
            flush_to_disk(path)
            _note_check(path, status)
        with contextlib.suppress(PermissionError):  # root put it there: its age is that of its download
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _was_checked(path: Path, status: os.stat_result) -> bool:
    """Whether an earlier process found the hash of this very file right."""
    try:
        return _check_note(path).read_text() == _stamp(status)
    except (OSError, ValueError):
        return False


def _note_check(path: Path, status: os.stat_result) -> None:
    """Remember that the hash of a file was right when it had this `status`: processes after this need not read it."""
    with contextlib.suppress(OSError):  # the disk is full: the next process reads the file again
        _check_note(path).write_text(_stamp(status))


def _check_note(path: Path) -> Path:
    return path.with_name(f"{path.name}.checked")


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}\n"


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    _check_note(path).unlink(missing_ok=True)


def _make_room(folder: Path, wanted: int) -> None:
    """Remove files of the cache, the least recently used first, until `wanted` bytes more are within its bound.

    Only names go: a process that has a file open or mapped reads on. Files that were fetched or used
    within the last minute stay, because a process may be about to open them. Other processes may run this too.
    """
    bound, finished, total, now = _cache_bytes(), [], wanted, time.time()
    for used, length, path in _cached_files(folder):
        if _CACHED.fullmatch(path.name):
            finished.append((used, length, path))
        elif now - used > _ABANDONED_S:
            path.unlink(missing_ok=True)
            continue
        total += length
    for used, length, path in sorted(finished):
        if total <= bound or now - used < _IN_USE_S:
            return
        _remove(path)
        total -= length


def _cached_files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When last used, bytes and path of each file in the cache that was fetched or is being fetched."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _CACHED.fullmatch(entry.name) or UNFINISHED_NAME.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):  # removed or finished meanwhile
                    status = entry.stat(follow_symlinks=False)
                    yield max(status.st_atime, status.st_mtime), status.st_size, Path(entry.path)


def _cache_bytes() -> int:
    return parse_size(os.environ.get("RDM_CACHE_BYTES") or _CACHE_BYTES, "RDM_CACHE_BYTES")


def cache_folder() -> Path:
    """The folder of this node's fetched files: `$RDM_CACHE`, or a folder of this user for temporary files.

    The files of `fetch` take at most `$RDM_CACHE_BYTES` (50Gi). PermissionError if others can put files into it.
    """
    folder = Path(os.environ.get("RDM_CACHE") or Path(tempfile.gettempdir()) / f"rdm-cache-{os.getuid()}")
    return make_private_folder(folder, "RDM_CACHE")
