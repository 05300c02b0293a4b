"""Leases: a command registers the folder it works on. Another command does not empty that folder meanwhile.

A lease on a folder counts for the folders in it too.

    <root>/leases/datasets+ukiyo-e+v1+shards.<token>.json    host, process, and whether the command empties the folder

A thread rewrites the file every few seconds. A lease ends if it is not renewed, or if its process ran on this machine
and has ended. Ages come from the file times of the store, never from the clock of a machine. A clock that was
ahead can give a lease a time in the future. Such a lease gets the time of now, and ends too if nothing renews it.
"""

import contextlib
import functools
import logging
import os
import platform
import random
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.storage.addresses import is_local, join, local_path
from pipeline.storage.errors import DamagedFile
from pipeline.storage.files import modified_time, put_json, read_json, remove
from pipeline.storage.leftovers import bounded_age, remove_unfinished
from pipeline.storage.listings import list_files

_log = logging.getLogger(__name__)
RENEW_S = 15.0
EXPIRE_S = 90.0
_POLL_S = 0.5
_CLAIM_S = 10.0  # how long two commands try that both want to empty a folder
_WRITE_TRIES = 10
_FOLDER = "leases"
_SEPARATOR = "+"  # stands in no name of a dataset or run


@dataclass(frozen=True)
class Holder:
    """The command that holds a lease."""

    host: str
    machine: str
    """Tells processes of one machine, boot and container from others."""
    pid: int
    started: str
    """When the process started, as the kernel counts. A pid is used again."""
    exclusive: bool

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_dead(self) -> bool:
        """Whether this was a process of this machine and is gone."""
        return self.is_on_this_machine and _process_start(self.pid) != self.started

    @property
    def is_on_this_machine(self) -> bool:
        """Whether this is a process of this machine, boot and container."""
        return self.machine == _machine()

    @property
    def is_this_process(self) -> bool:
        """Whether this process holds it."""
        return self.is_on_this_machine and self.pid == os.getpid()


class LeaseConflict(RuntimeError):
    """Another command works on the folder."""

    def __init__(self, folder: str, holder: Holder) -> None:
        self.folder, self.holder = folder, holder
        super().__init__(
            f"another command works on {folder}: {holder}\nhint: wait until it has ended, or stop it. A command that "
            f"was killed on another machine holds its folder for {EXPIRE_S:.0f} s")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.holder)


class Lease:
    """A lease on a folder. Several commands may share a folder; an exclusive lease allows no other beside it."""

    def __init__(self, root: str, folder: str, exclusive: bool) -> None:
        self._root, self._folder, self._exclusive = root, folder.strip("/"), exclusive
        # All leases lie in one folder: nothing has to remove empty folders, while others write into them.
        self._url = join(root, _FOLDER, f"{_file_stem(folder)}.{secrets.token_hex(8)}.json")
        self._ended, self._writing = threading.Event(), threading.Lock()
        # On a disk the folder goes with the last lease, and so does a root that a command then did not write to.
        self._folders = [join(root, _FOLDER), *([] if os.path.isdir(root) else [root])] if is_local(root) else []

    def acquire(self) -> None:
        """Wait for the lease. LeaseConflict if an exclusive one cannot be had because the folder is in use."""
        begun = time.monotonic()
        while True:
            self._write()  # first, so that of two commands at least one sees the other
            conflicts = [holder for holder in self.others() if self._exclusive or holder.exclusive]
            if not conflicts:
                break
            if self._exclusive and (any(not holder.exclusive for holder in conflicts)
                                    or time.monotonic() - begun > _CLAIM_S):
                self._remove()
                raise LeaseConflict(join(self._root, self._folder), conflicts[0])
            if self._exclusive:
                self._remove()
            time.sleep(_POLL_S * random.random())
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def share(self) -> None:
        """Allow others beside this one from now on."""
        if self._exclusive:
            with self._writing:  # a renewal that began before would make it exclusive again
                self._exclusive = False
                self._write()

    def release(self) -> None:
        """End the lease."""
        with self._writing:  # a renewal would bring the lease back
            self._ended.set()
            self._remove()

    def now(self) -> float:
        """The time of the store, in seconds of the epoch."""
        self._write()
        return modified_time(self._url)

    def others(self) -> list[Holder]:
        """The holders of other leases on this folder, on folders in it, and on the folders that it is in.

        Leases of this process on the latter do not count: `rebuild` holds a version and makes its stages.
        """
        return find_holders(self._root, self._folder, modified_time(self._url), self._url, above=True)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            with self._writing, contextlib.suppress(OSError):  # the next try may succeed, and the lease outlives a few
                if not self._ended.is_set():
                    self._write()

    def _write(self) -> None:
        holder = Holder(platform.node(), _machine(), os.getpid(), _process_start(os.getpid()), self._exclusive)
        for tries_left in reversed(range(_WRITE_TRIES)):
            try:
                return put_json(asdict(holder), self._url)
            except (FileNotFoundError, FileExistsError):  # another command removed the empty folder just now
                if not tries_left:
                    raise

    def _remove(self) -> None:
        with contextlib.suppress(OSError):  # it ends by itself
            remove(self._url)
            for folder in self._folders:
                os.rmdir(local_path(folder))  # not if there is something in it


@contextlib.contextmanager
def hold_lease(root: str, folder: str, *, exclusive: bool = False) -> Iterator[Lease]:
    """Hold a lease on a `folder` below `root`; LeaseConflict if an exclusive one cannot be had."""
    lease = Lease(root, folder, exclusive)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def find_holders(root: str, folder: str, now: float, own: str = "", *, above: bool = False) -> list[Holder]:
    """The holders of living leases on a folder and on folders in it. Files of dead leases are removed.

    With `above` those of other processes on the folders that it is in. `now`: the time of the store. `own`: the URL of
    a lease that does not count.
    """
    base, wanted = join(root, _FOLDER), _file_stem(folder)
    holders = []
    for name in list_files(base):
        url, stem = join(base, name), name.rsplit(".", 2)[0]
        is_above = wanted.startswith(f"{stem}{_SEPARATOR}")
        if url == own or not (stem == wanted or stem.startswith(f"{wanted}{_SEPARATOR}") or (above and is_above)):
            continue
        holder = _read_living(url, now)
        if holder and not (is_above and holder.is_this_process):
            holders.append(holder)
    return holders


def remove_ended_leases(root: str, now: float) -> None:
    """Remove the leases of killed commands, whatever folder they are on. `now`: the time of the store."""
    base = join(root, _FOLDER)
    for name in list_files(base):
        if name.endswith(".json"):
            _read_living(join(base, name), now)
    remove_unfinished(base, now)


def _read_living(url: str, now: float) -> Holder | None:
    """The holder of a lease. None if the lease has ended; its file is removed then."""
    with contextlib.suppress(FileNotFoundError):  # it was released at this moment
        is_old = bounded_age(url, now) > EXPIRE_S
        holder = _read_holder(url)
        if holder and not is_old and not holder.is_dead:
            return holder
        if holder or is_old:
            remove(url)
        else:
            _log.warning("%s is damaged and does not count. A command removes it after %.0f s", url, EXPIRE_S)
    return None


def _read_holder(url: str) -> Holder | None:
    """The holder that a lease names; None if the file is damaged."""
    try:
        document = read_json(url)
    except DamagedFile:
        return None
    kinds = {field.name: field.type for field in fields(Holder)}
    if not isinstance(document, dict) or document.keys() != kinds.keys() or any(
            type(value) is not kinds[name] for name, value in document.items()):
        return None
    return Holder(**document)


def _file_stem(folder: str) -> str:
    return folder.replace("/", _SEPARATOR)


@functools.cache
def _machine() -> str:
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _process_start(pid: int) -> str:
    """When a process started; empty if it has ended, "?" if the system does not tell."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in {"Z", "X"} else fields[18]  # a killed process that its parent has not waited for
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "?"
