"""Errors of a store, and the files that no reader may open."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from pipeline.storage.addresses import is_local, local_path

_FULL = {errno.ENOSPC, errno.EDQUOT}


class StorageError(OSError):
    """The store did not answer, or answered with something other than success or absence."""


class DamagedFile(ValueError):
    """A file below a root is missing, or is not what this program wrote there. Commands end with exit code 1."""


def disk_full_message(error: BaseException) -> str:
    """A sentence if `error` says that a disk is full, "" if it says anything else."""
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return ""
    return f"no space is left on the disk of {error.filename}" if error.filename else "no space is left on a disk"


@contextlib.contextmanager
def storage_errors(url: str, doing: str) -> Iterator[None]:
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
        raise StorageError(f"cannot {doing} {url}: {error.strerror or error}{_network_hint(error)}") from error
    except Exception as error:
        # botocore and aiohttp derive from Exception; anything else here is a fault of ours.
        if type(error).__module__.split(".")[0] in {"botocore", "aiobotocore", "aiohttp", "s3fs"}:
            raise StorageError(f"cannot {doing} {url}: {error}{_network_hint(error)}") from error
        raise


def _network_hint(error: BaseException | None) -> str:
    """The hint for an object store that does not answer, or does not know the user. Empty for other errors."""
    while error is not None:
        kind = type(error).__name__
        if kind in {"NoCredentialsError", "PartialCredentialsError"}:
            return "\nhint: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile of ~/.aws with AWS_PROFILE"
        if kind in {"EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError", "gaierror",
                    "ClientConnectorError", "ClientConnectorDNSError", "ConnectionRefusedError"}:
            return ("\nhint: the store does not answer: is the network up, and is AWS_ENDPOINT_URL right? Whether the "
                    "object exists is not known")
        error = error.__cause__ or error.__context__
    return ""


def refuse_special_file(url: str) -> None:
    """DamagedFile if something else than a file stands at a local `url`: a folder, a pipe, a link that leads nowhere.

    Opening a named pipe waits for a writer, and a device may have no end. FileNotFoundError if nothing is there.
    """
    if is_local(url):
        path = local_path(url)
        try:
            mode = os.stat(path).st_mode
        except OSError:
            if not path.is_symlink():
                raise
            mode = stat.S_IFLNK
        if not stat.S_ISREG(mode):
            kind = ("a folder" if stat.S_ISDIR(mode) else "a link that leads nowhere" if stat.S_ISLNK(mode) else
                    "a pipe, a socket or a device")
            raise DamagedFile(f"{url} is {kind}: expected a file\nhint: remove {url}; then python -m jobs verify")
