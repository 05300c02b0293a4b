"""The one door to fsspec: files and objects under a root that is a local path or an `s3://` URL.

There is no rename on an object store, so nothing here writes in place: bytes are complete on the
local disk before the first of them travels, and a final name only ever shows a whole file.
S3 credentials and endpoint are boto's own environment (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, ...).
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec

_T = TypeVar("_T")
_CHUNK = 1 << 20
_END = 64 << 10
_S3, _ATTEMPTS = {"s3", "s3a"}, 6
_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_CACHE_BYTES = "50G"
_CACHED = re.compile(r"[0-9a-f]{64}")  # files of the cache are named by their sha256
_UNFINISHED = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}")  # as _beside names them
_IN_USE_S = 60.0  # from fetching a file to opening it no more may pass
_ABANDONED_S = 3600.0  # nothing was written into an unfinished file for so long: its process was killed


class StorageError(OSError):
    """The store did not answer, or answered with something other than success or absence."""


def full(error: BaseException) -> str:
    """A sentence if `error` says that a disk is full, "" if it says anything else."""
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return ""
    return f"no space is left on the disk of {error.filename}" if error.filename else "no space is left on a disk"


def is_local(url: str) -> bool:
    """Whether `url` is a path on this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local `url`."""
    assert is_local(url), url
    return Path(url.removeprefix("file://"))


def join(url: str, *parts: str) -> str:
    """`url` extended by `parts`, with single slashes between them."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def place(folder: str, name: str) -> str:
    """Where a manifest's file is: below `folder`, or at the whole address that an adopted file has for a name.

    A name with `../` before it is that of a file beside the folder: another version's, which is not copied.
    """
    if "://" in name or name.startswith("/"):
        return name
    base = folder.rstrip("/")
    while name.startswith("../"):
        base, name = base.rpartition("/")[0], name.removeprefix("../")
    return join(base, name)


def normal(url: str) -> str:
    """`url` made absolute when it is local, without a trailing slash."""
    return os.path.abspath(os.path.expanduser(local_path(url))) if is_local(url) else url.rstrip("/")


@cache
def _filesystem(protocol: str) -> fsspec.AbstractFileSystem:
    # Another process writes what we list: a cached listing would hide its records.
    options: dict[str, Any] = {} if protocol == "file" else {"use_listings_cache": False}
    if protocol in _S3 and not {"AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS"} & os.environ.keys():
        # All requests alike: boto's older mode gives up HEAD, whose answer has no body to say SlowDown, in seconds.
        options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": _ATTEMPTS}}
    try:
        made = fsspec.filesystem(protocol, **options)
        if protocol in _S3:
            made.retries = 2  # around boto's own, for answers that are cut off; five times would take minutes
        return made
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {protocol}:// addresses: {error}\nhint: use a local path or s3://") from error


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if is_local(url):
        return _filesystem("file"), str(local_path(url))
    protocol, path = url.split("://", 1)
    return _filesystem(protocol), path


@contextlib.contextmanager
def _speaking(url: str, doing: str) -> Iterator[None]:
    """Turn a client library's own exceptions into one sentence; a disk's OSErrors pass as they are."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(error.errno, os.strerror(error.errno), url) from error
        if getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") == "NoSuchBucket":
            raise StorageError(f"cannot {doing} {url}: there is no such bucket\n"
                               f"hint: make it, or see whether it is spelled right") from error
        if type(error) is not OSError or (error.errno is not None and is_local(url)):
            raise
        raise StorageError(f"cannot {doing} {url}: {error.strerror or error}") from error
    except Exception as error:
        # botocore and aiohttp derive from Exception; anything else here is a fault of ours.
        if type(error).__module__.split(".")[0] in {"botocore", "aiobotocore", "aiohttp", "s3fs"}:
            raise StorageError(f"cannot {doing} {url}: {error}") from error
        raise


def exists(url: str) -> bool:
    """Whether a file or object stands at `url`."""
    fs, path = _open(url)
    with _speaking(url, "look at"):
        try:
            # Not fs.isfile, which takes a store that does not answer for one without the file.
            return fs.info(path)["type"] == "file"
        except FileNotFoundError:
            return False


def size(url: str) -> int:
    """Bytes of the file at `url`; FileNotFoundError if there is none."""
    fs, path = _open(url)
    with _speaking(url, "look at"):
        return int(fs.info(path)["size"])


def names(url: str) -> list[str]:
    """Sorted names of the files directly below the folder `url`; empty if there is no such folder."""
    fs, path = _open(url)
    with _speaking(url, "list"):
        try:
            return sorted(entry["name"].rsplit("/", 1)[-1] for entry in fs.ls(path, detail=True)
                          if entry["type"] == "file")
        except (FileNotFoundError, NotADirectoryError):
            return []


def folders(url: str) -> list[str]:
    """Sorted names of the folders directly below `url`."""
    fs, path = _open(url)
    with _speaking(url, "list"):
        try:
            return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=True)
                          if entry["type"] == "directory")
        except (FileNotFoundError, NotADirectoryError):
            return []


def walk(url: str) -> Iterator[tuple[str, int | None]]:
    """Every file below `url` as (relative name, bytes), in no fixed order; hidden names left out.

    None instead of bytes: a link that leads nowhere, or no regular file. OSError for a folder that cannot be read.
    """
    if is_local(url):
        base = str(local_path(url))
        seen = set()
        for folder, inner, files in os.walk(base, onerror=_raise, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link to a folder above or beside
                inner.clear()
                continue
            seen.add(real)
            inner[:] = [name for name in inner if not name.startswith(".")]
            for name in files:
                full = os.path.join(folder, name)
                if not name.startswith("."):
                    length = os.path.getsize(full) if os.path.isfile(full) else None
                    yield os.path.relpath(full, base).replace(os.sep, "/"), length
        return
    fs, path = _open(url)
    with _speaking(url, "list"):
        found = fs.find(path, detail=True)
    for full, info in found.items():
        name = full[len(path):].lstrip("/")
        if name and not any(part.startswith(".") for part in name.split("/")):
            yield name, int(info["size"])


def stamps(url: str) -> dict[str, str]:
    """What each file below `url` looks like from outside, by relative name: size and time, or size and ETag.

    A file with the same stamp as before is taken to have the same bytes. Hidden names are left out.
    """
    if is_local(url):
        base = local_path(url)
        found = ((name, os.stat(base / name)) for name, length in walk(url) if length is not None)
        return {name: f"{stat.st_size}-{stat.st_mtime_ns}" for name, stat in found}
    fs, path = _open(url)
    with _speaking(url, "list"):
        listed = fs.find(path, detail=True)
    return {full[len(path):].lstrip("/"): f"{info['size']}-{info.get('ETag') or info.get('mtime')}".replace('"', "")
            for full, info in listed.items()}


def modified(url: str) -> float:
    """When the file at `url` was written, in seconds of the epoch; FileNotFoundError if there is none."""
    fs, path = _open(url)
    with _speaking(url, "look at"):
        return fs.modified(path).timestamp()


def glob(pattern: str) -> list[str]:
    """Sorted addresses of the files that match a pattern (*, **, ?)."""
    fs, path = _open(normal(pattern))
    prefix = "" if is_local(pattern) else pattern.split("://", 1)[0] + "://"
    with _speaking(pattern, "list"):
        return sorted(prefix + name for name, info in fs.glob(path, detail=True).items() if info["type"] == "file")


@contextlib.contextmanager
def reader(url: str) -> Iterator[Any]:
    """A file object to seek in and read from, that fetches what is read and not the whole."""
    fs, path = _open(url)
    with _speaking(url, "read"), fs.open(path, "rb") as file:
        yield file


def download(url: str, path: Path) -> Path:
    """The file at `url` as the local file `path`."""
    fs, remote = _open(url)
    with _speaking(url, "read"):
        fs.get_file(remote, str(path))
    return path


def glance(url: str) -> list[Any]:
    """What tells a large file from another without reading it: its name, size, and a hash of both ends."""
    fs, path = _open(url)
    with _speaking(url, "read"):
        length = int(fs.info(path)["size"])
        ends = fs.cat_file(path, start=0, end=min(_END, length))
        if length > _END:
            ends += fs.cat_file(path, start=max(_END, length - _END), end=length)
    return [url.rsplit("/", 1)[-1], length, hashlib.sha256(ends).hexdigest()]


def read_bytes(url: str) -> bytes:
    """The whole content of `url`."""
    fs, path = _open(url)
    with _speaking(url, "read"):
        return fs.cat_file(path)


def read_json(url: str) -> Any:
    """The JSON document at `url`; ValueError with its address if it is not JSON."""
    return json_of(read_bytes(url), url)


def json_of(data: bytes, url: str) -> Any:
    """The JSON document that was read from `url`; ValueError with its address if it is not JSON."""
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise ValueError(f"{url} is not JSON ({error})\nhint: was it edited or cut?") from error


def put_file(local: Path, url: str, *, give: bool = False) -> None:
    """Put the finished local file at `url`, whole or not at all; with `give` nobody needs it any more where it is."""
    fs, path = _open(url)
    with _speaking(url, "write"):
        if is_local(url):
            with _beside(path) as temporary:
                if not (give and _moved(local, temporary)):
                    fs.put_file(str(local), temporary)
                _settle(temporary)
                os.replace(temporary, path)
        else:
            fs.put_file(str(local), path)


def _moved(local: Path, path: str) -> bool:
    """Rename a file; False where that is no matter of a name, for it is another file system."""
    try:
        os.replace(local, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True


def put_bytes(data: bytes, url: str) -> None:
    """Put `data` at `url`, whole or not at all."""
    fs, path = _open(url)
    with _speaking(url, "write"):
        if is_local(url):
            with _beside(path) as temporary:
                fs.pipe_file(temporary, data)
                _settle(temporary)
                os.replace(temporary, path)
        else:
            fs.pipe_file(path, data)


def create_bytes(data: bytes, url: str) -> bool:
    """Put `data` at `url` unless something stands there; whether it was put. Of two racers one wins."""
    fs, path = _open(url)
    with _speaking(url, "create"):
        try:
            if is_local(url):
                with _beside(path) as temporary:
                    fs.pipe_file(temporary, data)
                    _settle(temporary)
                    _link(temporary, path)
            else:
                _create_object(fs, path, data)
        except FileExistsError:
            return False
    return True


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


def _create_object(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    for left in reversed(range(5)):
        try:
            return fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            raise
        except OSError as error:
            # 409: somebody is creating it at this moment, and may yet fail.
            if left == 0 or "ConditionalRequestConflict" not in str(error):
                raise
            time.sleep(0.2)


def swap_bytes(data: bytes, url: str, expected: bytes | None) -> bool:
    """Put `data` at `url` if `expected` stands there (None: nothing); whether it was put. Of two racers one wins.

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
    # A pointer is small enough to be put in one piece, and the ETag of such an object is the MD5 of its bytes;
    # where it is not (some encryption), the store's own answer is asked for.
    fs, path = _open(url)
    with _speaking(url, "look at"):
        try:
            etag = fs.info(path, refresh=True)["ETag"]
        except FileNotFoundError:
            return False
    return read_bytes(url) == expected and _put_if(fs, url, data, IfMatch=etag)


def _put_if(fs: fsspec.AbstractFileSystem, url: str, data: bytes, **condition: str) -> bool:
    """Put an object if the store finds the condition true."""
    bucket, _, key = url.split("://", 1)[1].partition("/")
    for left in reversed(range(5)):
        try:
            with _speaking(url, "write"):
                fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
            return True
        except FileNotFoundError:  # it went meanwhile
            return False
        except OSError as error:
            text = str(error.__cause__ or error)
            if "PreconditionFailed" in text or "At least one of the pre-conditions" in text:
                return False
            # 409: somebody is writing it at this moment, and may yet fail.
            if left == 0 or "ConditionalRequestConflict" not in text:
                raise
            time.sleep(0.2)
    raise AssertionError


def can_swap(folder: str) -> bool:
    """Whether the store of `folder` keeps the conditions of `swap_bytes`: it is tried on an object of its own."""
    if is_local(folder):
        return True
    url = join(folder, f"probe-{secrets.token_hex(8)}")
    fs, _ = _open(url)
    try:
        if not create_bytes(b"1", url) or create_bytes(b"2", url):
            return False
        if _put_if(fs, url, b"3", IfMatch=f'"{hashlib.md5(b"other", usedforsecurity=False).hexdigest()}"'):
            return False
        return swap_bytes(b"4", url, b"1") and read_bytes(url) == b"4"
    except StorageError as error:
        if "NotImplemented" in str(error.__cause__ or error):
            return False
        raise
    finally:
        remove(url)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Alone among the processes that swap files of a folder."""
    os.makedirs(folder, exist_ok=True)
    descriptor = os.open(os.path.join(folder, ".swap"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _raise(error: OSError) -> None:
    raise error


def put_json(document: Any, url: str) -> None:
    """Put `document` as JSON at `url`."""
    put_bytes(json_bytes(document), url)


def json_bytes(document: Any) -> bytes:
    """`document` as the bytes that this project writes for it: equal documents, equal bytes."""
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def remove(url: str) -> None:
    """Remove the file at `url` if it is there."""
    fs, path = _open(url)
    with _speaking(url, "remove"), contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def remove_tree(url: str) -> None:
    """Remove everything below `url`."""
    fs, path = _open(url)
    with _speaking(url, "remove"), contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def sha256_file(path: Path) -> str:
    """sha256 of a local file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(url: str) -> str:
    """sha256 of the file at `url`, read in pieces."""
    if is_local(url):
        return sha256_file(local_path(url))
    fs, path = _open(url)
    digest = hashlib.sha256()
    with _speaking(url, "read"), fs.open(path, "rb", block_size=8 * _CHUNK) as file:
        while chunk := file.read(8 * _CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(url: str, entry: dict[str, Any], *, check: bool = False) -> Path:
    """A local path with the bytes that a manifest's file `entry` (name, bytes, sha256) describes.

    Local files are used where they are; remote ones are kept in a cache named by hash, so one node downloads each
    once. Sizes are compared always; hashes when a file is downloaded, and with `check` whenever it is asked for.
    What is damaged in the cache is downloaded again. ValueError if the bytes are not those of the manifest. Open the
    path within a minute, for later it may be removed to make room for others (or let `opened` do it).
    """
    if is_local(url):
        path = local_path(url)
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{url} is in its manifest but not there\nhint: python -m jobs verify") from None
        if found != entry["bytes"] or (check and sha256_file(path) != entry["sha256"]):
            raise ValueError(f"{url} is not the file its manifest describes\nhint: python -m jobs verify")
        return path
    cached = cache_folder() / entry["sha256"]
    if _is_cached(cached, entry, check):
        return cached
    _make_room(cached.parent, entry["bytes"])
    fs, remote = _open(url)
    with _beside(str(cached)) as temporary:
        with _speaking(url, "read"):
            fs.get_file(remote, temporary)
        if sha256_file(Path(temporary)) != entry["sha256"]:
            raise ValueError(f"{url} is not the file its manifest describes\nhint: python -m jobs verify")
        os.replace(temporary, cached)
    return cached


def opened(url: str, entry: dict[str, Any], open_: Callable[[Path], _T], *, check: bool = False) -> _T:
    """What `open_` makes of the local path of a manifest's file; fetched again if another process just removed it."""
    for _ in range(_ATTEMPTS):
        path = fetch(url, entry, check=check)
        try:
            return open_(path)
        except FileNotFoundError:
            if is_local(url):
                raise
    raise StorageError(f"{url} is removed from {cache_folder()} faster than it can be opened\n"
                       f"hint: a larger RDM_CACHE_BYTES, now {_cache_bytes()}")


def _is_cached(path: Path, entry: dict[str, Any], check: bool) -> bool:
    """Whether the cache has a file; if so, it counts as used now."""
    try:
        found = path.stat()
        if found.st_size != entry["bytes"] or (check and sha256_file(path) != entry["sha256"]):
            return False
        with contextlib.suppress(PermissionError):  # another user's: its age is that of its download
            os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _make_room(folder: Path, wanted: int) -> None:
    """Remove files of the cache, the least recently used first, until `wanted` bytes more are within its bound.

    Only names go: a process that has a file open or mapped reads on. What was fetched or used within the last minute
    stays, for somebody may be about to open it. Other processes may be doing the same at this moment.
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
        path.unlink(missing_ok=True)
        total -= length


def _cached_files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When last used, bytes and path of each file in the cache that was fetched or is being fetched."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _CACHED.fullmatch(entry.name) or _UNFINISHED.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):  # removed or finished meanwhile
                    found = entry.stat(follow_symlinks=False)
                    yield max(found.st_atime, found.st_mtime), found.st_size, Path(entry.path)


def _cache_bytes() -> int:
    return size_of(os.environ.get("RDM_CACHE_BYTES") or _CACHE_BYTES, "RDM_CACHE_BYTES")


def size_of(text: str, name: str) -> int:
    """Bytes of a size like 4G, 512K or 1000; ValueError with the `name` of the setting if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{name}: {text!r} is not a size\nhint: a number with K, M, G or T, as in 4G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def each(function: Callable[[str], _T], urls: Iterable[str], *, threads: int = 16) -> list[_T]:
    """`function` of every URL, in order; in threads because on S3 each call is a round trip."""
    urls = list(urls)
    if len(urls) < 2:
        return [function(url) for url in urls]
    with ThreadPoolExecutor(min(threads, len(urls))) as pool:
        return list(pool.map(function, urls))


_SECRET = re.compile(r"([?&](?:x-amz-[a-z-]+|awsaccesskeyid|signature|sig|token|access_token|auth|api_?key|password|"
                     r"secret|policy|key-pair-id)=)[^&#\s]+", re.IGNORECASE)


def without_credentials(text: str) -> str:
    """`text` with passwords, keys and signatures in its URLs taken out."""
    return _SECRET.sub(r"\1***", re.sub(r"(\w+://)[^/?#\s]*@", r"\1***@", text))


def short_hash(text: str) -> str:
    """Twelve hexadecimal digits that stand for `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def cache_folder() -> Path:
    """Where this node keeps what it fetched: `$RDM_CACHE`, or a folder of this user for temporary files.

    What `fetch` puts there takes at most `$RDM_CACHE_BYTES` (50G).
    """
    folder = Path(os.environ.get("RDM_CACHE") or Path(tempfile.gettempdir()) / f"rdm-cache-{os.getuid()}")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


@contextlib.contextmanager
def _beside(path: str) -> Iterator[str]:
    """A random hidden name in the folder of `path`, gone afterwards whatever happened."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    # Random and not the pid: after a crash the pid may come again.
    temporary = os.path.join(folder, f".{name[:80]}.{secrets.token_hex(8)}")
    try:
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _settle(path: str) -> None:
    """Bytes onto the disk before the name: a crash must not leave a name without its bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
