"""Read, write, list and remove files on local disks and S3. The only file that opens fsspec file systems."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import fsspec
import fsspec.exceptions

from pipeline.storage.addresses import ATTEMPTS, S3_SCHEMES, is_local, local_path
from pipeline.storage.errors import (
    FILE,
    DamagedFile,
    FileTooLarge,
    NoAnswer,
    find_kind,
    refuse_special_file,
    refuse_special_folder,
    storage_errors,
)
from pipeline.storage.remembered import forget_after, recall

FileSystem: TypeAlias = fsspec.AbstractFileSystem
_T = TypeVar("_T")
_CHUNK = 1 << 20
_END = 64 << 10
UNFINISHED_NAME = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}")  # as _beside names them


@cache
def _filesystem(protocol: str) -> FileSystem:
    # Another process writes what we list: a cached listing would hide its records.
    options: dict[str, Any] = {} if protocol == "file" else {"use_listings_cache": False}
    if protocol in S3_SCHEMES and not {"AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS"} & os.environ.keys():
        # boto retries requests, so this package has no retry loop and no retry library.
        # The same for all requests: boto's older mode stops to retry HEAD in seconds, because its answer has no body.
        options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": ATTEMPTS}}
    try:
        filesystem = fsspec.filesystem(protocol, **options)
        if protocol in S3_SCHEMES:
            filesystem.retries = 2  # around boto's own, for answers that are cut off; five times would take minutes
        return filesystem
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {protocol}:// paths: {error}\nhint: use a local path or s3://") from error


def open_url(url: str) -> tuple[FileSystem, str]:
    """The file system of `url`, and the path in it."""
    if is_local(url):
        return _filesystem("file"), str(local_path(url))
    protocol, path = url.split("://", 1)
    return _filesystem(protocol), path


def exists(url: str) -> bool:
    """Whether a file or object stands at `url`.

    DamagedFile if something else does, such as a folder or a link that leads nowhere, or if it lies below such a link.
    """
    if is_local(url):
        with contextlib.suppress(FileNotFoundError):
            refuse_special_file(url)
            return True
        return False
    return _object_exists(url)


def is_file(url: str) -> bool:
    """Whether a file or object stands at `url`, a path of the user that may as well be a folder or something else."""
    return find_kind(local_path(url)) == FILE if is_local(url) else _object_exists(url)


def _object_exists(url: str) -> bool:
    try:
        # Not fs.isfile, which takes a store that does not answer for one without the file.
        return _info(url)["type"] == "file"
    except FileNotFoundError:
        return False


def _info(url: str) -> dict[str, Any]:
    """Size, time and ETag of an object, as the store has them; FileNotFoundError if there is none."""
    def ask() -> dict[str, Any]:
        fs, path = open_url(url)
        with storage_errors(url, "look at"):
            return fs.info(path)
    return recall("info", url, ask)


def check_store(url: str, seconds: float | None = None) -> None:
    """StorageError or OSError unless the S3 store of `url` lists it to these credentials. One request.

    NoAnswer after so many seconds without an answer; None: after all retries, which take minutes.
    """
    fs, path = open_url(url)
    if url.split("://", 1)[0] not in S3_SCHEMES:
        return
    bucket, _, prefix = path.partition("/")
    with storage_errors(url, "list"):
        try:
            fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1, timeout=seconds)
        except fsspec.exceptions.FSTimeoutError as error:
            raise NoAnswer(f"cannot list {url}: no answer within {seconds:g} s\nhint: python -m jobs doctor; "
                           f"AWS_ENDPOINT_URL names the store") from error


def size(url: str) -> int:
    """Bytes of the file at `url`; FileNotFoundError if there is none."""
    return int(_info(url)["size"])


def stamp(url: str) -> str:
    """The size of the file at `url` with its time and inode, or with its ETag: another one if the file was replaced.

    Empty if the store tells neither a time nor an ETag. FileNotFoundError if there is no file.
    """
    if is_local(url):
        with storage_errors(url, "look at"):
            refuse_special_file(url)
            stat = os.stat(local_path(url))
            return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"
    info = _info(url)
    mark = info.get("ETag") or info.get("mtime")
    return f"{info['size']}-{mark}" if mark else ""


def modified_time(url: str) -> float:
    """When the file at `url` was written, in seconds of the epoch; FileNotFoundError if there is none."""
    fs, path = open_url(url)
    if is_local(url):
        with storage_errors(url, "look at"):
            return os.stat(path, follow_symlinks=os.path.exists(path)).st_mtime  # or of a link that leads nowhere
    if modified := _info(url).get("LastModified"):
        return modified.timestamp()
    with storage_errors(url, "look at"):
        return fs.modified(path).timestamp()


def _open_to_read(url: str) -> tuple[FileSystem, str]:
    """The file system of `url`, and the path in it. DamagedFile if what stands there is no file."""
    refuse_special_file(url)
    return open_url(url)


@contextlib.contextmanager
def open_reader(url: str) -> Iterator[Any]:
    """A file object to seek in and read from, that fetches what is read and not the whole."""
    fs, path = _open_to_read(url)
    with storage_errors(url, "read"), fs.open(path, "rb") as file:
        yield file


def download(url: str, path: Path) -> Path:
    """The file at `url` as the local file `path`."""
    fs, remote = _open_to_read(url)
    with storage_errors(url, "read", copy=path):
        fs.get_file(remote, str(path))
    return path


def summarize_file(url: str) -> list[Any]:
    """An identity of a large file without reading all of it: its name, size, and a hash of both ends."""
    fs, path = _open_to_read(url)
    with storage_errors(url, "read"):
        length = int(fs.info(path)["size"])
        ends = fs.cat_file(path, start=0, end=min(_END, length))
        if length > _END:
            ends += fs.cat_file(path, start=max(_END, length - _END), end=length)
    return [url.rsplit("/", 1)[-1], length, hashlib.sha256(ends).hexdigest()]


def read_bytes(url: str) -> bytes:
    """The whole content of `url`."""
    return recall("bytes", url, lambda: _request_bytes(url))


def _request_bytes(url: str) -> bytes:
    fs, path = _open_to_read(url)
    with storage_errors(url, "read"):
        # One request. By default s3fs asks for the size first, to read parts of large objects at the same time. The
        # object may be replaced between two parts.
        return fs.cat_file(path, **({"max_concurrency": 1} if url.split("://", 1)[0] in S3_SCHEMES else {}))


def read_at_most(url: str, most: int) -> bytes:
    """The whole content of `url`; FileTooLarge if that is more than `most` bytes, of which no more are read then."""
    fs, path = _open_to_read(url)
    with storage_errors(url, "read"):
        if is_local(url):
            length = os.stat(path).st_size
            data = fs.cat_file(path) if length <= most else b""
        else:
            data = _first_bytes(fs, path, most + 1)  # one request, which need not know the size
            length = len(data)
    if length > most:
        raise FileTooLarge(f"{url} has more than {most:,} bytes")
    return data


def read_small_file(path: str | Path, most: int = 16 << 20) -> bytes:
    """The content of a file or pipe of this machine that the user names. FileTooLarge after `most` bytes."""
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FileTooLarge(f"{path} has more than {most:,} bytes")
    return data


def _first_bytes(fs: FileSystem, path: str, count: int) -> bytes:
    try:
        return fs.cat_file(path, start=0, end=count)
    except OSError as error:
        if error.errno != errno.EINVAL:  # an empty object has no first byte
            raise
        return b""


def read_range(url: str, start: int, end: int) -> bytes:
    """The bytes of `url` from the offset `start` up to `end`."""
    fs, path = _open_to_read(url)
    with storage_errors(url, "read"):
        return fs.cat_file(path, start=start, end=end)


def read_json(url: str) -> Any:
    """The JSON document at `url`; DamagedFile with its address if it is not JSON."""
    return parse_json(read_bytes(url), url)


def parse_json(data: bytes, url: str) -> Any:
    """The JSON document that was read from `url`; DamagedFile with its address if it is not JSON."""
    try:
        return json.loads(data)
    # Bytes that are not UTF-8, numbers of thousands of digits, thousands of brackets.
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{url} is not JSON ({error})\nhint: python -m jobs verify") from error


def put_file(local: Path, url: str, *, give: bool = False) -> None:
    """Put the finished local file at `url`, whole or not at all. give: the local file may be moved."""
    fs, path = open_url(url)
    with storage_errors(url, "write"):
        if is_local(url):
            with unfinished_file(path) as temporary:
                move_or_copy(fs, local, temporary, give)
                os.replace(temporary, path)
        else:
            with forget_after():
                fs.put_file(str(local), path)


def move_or_copy(fs: FileSystem, local: Path, path: str, give: bool) -> None:
    """Give the bytes of a local file the name `path`, on the disk: by a rename if `give` and if that can be."""
    if not (give and _moved(local, path)):
        fs.put_file(str(local), path)
    flush_to_disk(path)


def _moved(local: Path, path: str) -> bool:
    """Rename a file; False where that is no matter of a name, for it is another file system."""
    try:
        os.replace(local, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    os.utime(path)  # it may have waited in scratch for hours, and an old unfinished file counts as abandoned
    return True


def put_bytes(data: bytes, url: str) -> None:
    """Put `data` at `url`, whole or not at all."""
    fs, path = open_url(url)
    with storage_errors(url, "write"):
        if is_local(url):
            with unfinished_file(path) as temporary:
                fs.pipe_file(temporary, data)
                flush_to_disk(temporary)
                os.replace(temporary, path)
        else:
            with forget_after():
                fs.pipe_file(path, data)


def put_json(document: Any, url: str) -> None:
    """Put `document` as JSON at `url`."""
    put_bytes(json_bytes(document), url)


def json_bytes(document: Any) -> bytes:
    """`document` as the bytes that this project writes for it: equal documents, equal bytes."""
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def remove(url: str) -> None:
    """Remove the file at `url` if it is there."""
    fs, path = open_url(url)
    with storage_errors(url, "remove"), contextlib.suppress(FileNotFoundError), forget_after():
        fs.rm_file(path)


def remove_tree(url: str) -> None:
    """Remove everything below `url`."""
    fs, path = open_url(url)
    with storage_errors(url, "remove"), contextlib.suppress(FileNotFoundError), forget_after():
        fs.rm(path, recursive=True)


def sha256_file(path: Path) -> str:
    """sha256 of a local file in hexadecimal."""
    refuse_special_file(str(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(url: str) -> str:
    """sha256 of the file at `url`, read in pieces."""
    if is_local(url):
        return sha256_file(local_path(url))
    if size(url) <= _CHUNK:  # one request
        return hashlib.sha256(read_bytes(url)).hexdigest()
    fs, path = open_url(url)
    digest = hashlib.sha256()
    with storage_errors(url, "read"), fs.open(path, "rb", block_size=8 * _CHUNK) as file:
        while chunk := file.read(8 * _CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def map_urls(function: Callable[[str], _T], urls: Iterable[str], *, threads: int = 16) -> list[_T]:
    """`function` of every URL, in order; in threads because on S3 each call is a round trip."""
    urls = list(urls)
    if len(urls) < 2:
        return [function(url) for url in urls]
    with ThreadPoolExecutor(min(threads, len(urls))) as pool:
        return list(pool.map(function, urls))


@contextlib.contextmanager
def unfinished_file(path: str) -> Iterator[str]:
    """A random hidden name in the folder of `path`, gone afterwards whatever happened."""
    folder, name = os.path.split(path)
    refuse_special_folder(folder)
    os.makedirs(folder, exist_ok=True)
    # Random and not the pid: after a crash the pid may come again.
    temporary = os.path.join(folder, f".{name[:80]}.{secrets.token_hex(8)}")
    try:
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def flush_to_disk(path: str | Path) -> None:
    """Bytes onto the disk before the name: a crash must not leave a name without its bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
