"""Errors of a store, and the files that no reader may open."""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from pipeline.storage.addresses import is_local, local_path

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM}
_OF_MACHINE = _FULL | {errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
_ODD = {errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENXIO}
"""Errors of a disk where something else stands in the place of a file or folder."""
FILE, FOLDER = "a file", "a folder"
_CLIENTS = {"botocore", "aiobotocore", "aiohttp", "s3fs"}
_UNREACHABLE = {"EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError",
                "gaierror", "ClientConnectorError", "ClientConnectorDNSError", "ConnectionRefusedError"}
_NO_KEYS = {"NoCredentialsError", "PartialCredentialsError"}
_QUERY = re.compile(r"\?[^\s\"]*=[^\s\"]*")  # of the URL of a request; it may have a signature


class StorageError(OSError):
    """The store did not answer, or answered with something other than success or absence."""


class NoAnswer(StorageError):
    """The store could not be reached, or did not answer in time. Whether an object exists is not known."""


class NoBucket(StorageError):
    """The bucket of a URL does not exist."""


class AccessDenied(StorageError, PermissionError):
    """The store refuses what these credentials ask for."""


class FileTooLarge(ValueError):
    """A file is larger than its reader allows."""


class DamagedFile(ValueError):
    """A file below a root is missing, or is not what this program wrote there. Commands end with exit code 1."""


def error_reason(error: BaseException) -> str:
    """One line that says why a file cannot be read. A file that this user may not read is not damaged."""
    return denial_message(error) or first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of the message of an error; the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_about_machine(error: BaseException) -> bool:
    """Whether `error` tells of this machine, this user or the store, and nothing of the content of a file."""
    return isinstance(error, StorageError | PermissionError | MemoryError) or (
        isinstance(error, OSError) and error.errno in _OF_MACHINE)


def disk_full_message(error: BaseException) -> str:
    """A sentence if `error` says that a disk is full, "" if it says anything else."""
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return ""
    return f"no space is left on the disk of {error.filename}" if error.filename else "no space is left on a disk"


def denial_message(error: BaseException) -> str:
    """A sentence if `error` says that a disk is read-only, or that this user may not use a file; "" if anything else.

    It names the folder where a file was to be written: the file may have had a temporary name.
    """
    if not isinstance(error, OSError) or error.filename is None or error.errno not in {errno.EROFS, *_DENIED}:
        return ""
    path = Path(os.fsdecode(error.filename))
    folder = next((parent for parent in path.parents if os.path.isdir(parent)), path.parent)
    if error.errno == errno.EROFS:
        return f"{folder} is on a read-only file system: expected a place to write"
    if not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
        return f"this user may not read {folder}"
    if os.access(folder, os.W_OK, effective_ids=True) or os.path.exists(path):
        return f"this user may not use {path}"
    return f"this user may not write in {folder}"


def lost_folder_message(error: BaseException) -> str:
    """A sentence if a file was not found because the working folder of this process is gone; "" if anything else.

    Such an error names no file.
    """
    if not isinstance(error, FileNotFoundError) or error.filename is not None:
        return ""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the working folder of this process was removed while it ran"
    return ""


@contextlib.contextmanager
def suppress_absence() -> Iterator[None]:
    """Ignore that a folder of a store does not exist, but not that its bucket does not."""
    try:
        yield
    except FileNotFoundError as error:
        if _lacks_bucket(error):
            raise


def _lacks_bucket(error: BaseException) -> bool:
    return getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") == "NoSuchBucket"


@contextlib.contextmanager
def storage_errors(url: str, doing: str, copy: Path | str = "") -> Iterator[None]:
    """Turn errors of a store into errors that name its URL; a disk's OSErrors pass as they are.

    `copy`: the local file into which an object is read. Its disk may be full.
    """
    try:
        yield
    except Exception as error:
        # botocore and aiohttp derive some errors from OSError and others from Exception.
        of_client = type(error).__module__.split(".")[0] in _CLIENTS
        if not (of_client or isinstance(error, OSError)):
            raise
        if isinstance(error, OSError) and error.errno in _FULL:
            raise StorageError(error.errno, os.strerror(error.errno), str(copy or url)) from error
        if is_local(url) and not of_client:
            if getattr(error, "errno", None) in _ODD:
                _explain_odd(url)
            if type(error) is not OSError or error.errno is not None:
                raise
        elif isinstance(error, StorageError | FileExistsError) or getattr(error, "filename", None) is not None:
            raise  # it is explained, an answer, or an error of a local disk
        text = _QUERY.sub("", str(getattr(error, "strerror", None) or error))
        if _lacks_bucket(error):
            raise NoBucket(f"cannot {doing} {url}: there is no such bucket\n"
                           f"hint: make it, or see whether it is spelled right") from error
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "there is no such object", url) from error
        if isinstance(error, PermissionError):
            raise AccessDenied(f"cannot {doing} {url}: {text}\nhint: AWS_PROFILE or AWS_ACCESS_KEY_ID must name "
                               f"credentials that may do this and have not expired") from error
        kinds = {type(cause).__name__ for cause in _causes(error)}
        if kinds & _UNREACHABLE:
            raise NoAnswer(f"cannot {doing} {url}: {text}\nhint: the store does not answer: is the network up, and is "
                           f"AWS_ENDPOINT_URL right? Whether the object exists is not known") from error
        if kinds & _NO_KEYS:
            raise StorageError(f"cannot {doing} {url}: {text}\nhint: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a "
                               f"profile of ~/.aws with AWS_PROFILE") from error
        raise StorageError(f"cannot {doing} {url}: {text}") from error


def _explain_odd(url: str) -> None:
    """DamagedFile if something odd stands at a local `url` or above it."""
    with contextlib.suppress(FileNotFoundError):
        refuse_special_file(url)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def find_kind(path: Path) -> str:
    """The kind of what stands at a local path: "a file", "a folder", or the name of something odd; "" for nothing."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link that leads nowhere" if path.is_symlink() else ""
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return "a link that leads in a circle" if path.is_symlink() else ""  # else a folder above is that link
    return FILE if stat.S_ISREG(mode) else FOLDER if stat.S_ISDIR(mode) else "a pipe, a socket or a device"


def refuse_special_file(url: str) -> None:
    """DamagedFile if something else than a file stands at a local `url`: a folder, a pipe, a link that leads nowhere.

    Opening a named pipe waits for a writer, and a device may have no end. FileNotFoundError if nothing is there.
    """
    if is_local(url):
        path = local_path(url)
        kind = find_kind(path)
        if not kind:
            refuse_special_folder(str(path.parent))
            os.stat(path)  # an error, unless the file came at this moment
        elif kind != FILE:
            _refuse(path, kind, FILE)


def refuse_special_folder(url: str) -> None:
    """DamagedFile if a local folder, or one above it, is something else, such as a link that leads nowhere.

    Nothing counts as missing below such a link: it is not known.
    """
    if is_local(url):
        path = local_path(url)
        for folder in (path, *path.parents):
            if kind := find_kind(folder):
                if kind != FOLDER:
                    _refuse(folder, kind, FOLDER)
                return


def _refuse(path: Path, kind: str, expected: str) -> NoReturn:
    raise DamagedFile(f"{path} is {kind}: expected {expected}\nhint: remove {path}; then python -m jobs verify")


@contextlib.contextmanager
def verify_replaced(find_command: Callable[[], str]) -> Iterator[None]:
    """Let the hint of a DamagedFile name the command that repairs it, in the place of `verify`, which looks for it."""
    try:
        yield
    except DamagedFile as error:
        error.args = (str(error).replace("python -m jobs verify", find_command()),)
        raise
