"""A process with warm imports. It forks a child for each command, and the child counts its writes below a root.

    python fork_server.py SOCKET [MODULE ...]

The modules are imported too. A connection is one command. Requests and events are lines of JSON, see `commands.py`. The
child is killed, or pauses, before the write of a given number. A write is a system call that changes a file (an audit
event), or a request that changes S3. So a new stage or verb needs no hook.
"""

import fcntl
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# First, because torch must be imported before faiss. No import here may start a thread: the children are forked.
_WARM = ("torch", "faiss", "open_clip", "pyarrow.parquet", "pyarrow.dataset", "tyro", "fsspec", "s3fs", "PIL.Image",
         "aiobotocore.session", "scipy.stats", "multiprocessing.pool")
_PACKAGES = ("pipeline", "jobs.publishing", "jobs.cli", "jobs.inspection", "jobs.telemetry", "jobs.config")
_COLD = ("jobs.telemetry.ray_metrics", "jobs.training.ray_train")  # import Ray
_CHANGES = {"os.rename": 1, "os.link": 1, "os.remove": 0, "os.rmdir": 0, "os.truncate": 0}  # which argument is changed
_REQUESTS = {"PutObject", "DeleteObject", "DeleteObjects", "CopyObject", "CreateMultipartUpload", "UploadPart",
             "CompleteMultipartUpload", "AbortMultipartUpload"}
_PART_BYTES = 4096  # so that tars of a few small images are uploaded in parts, as large ones are


class Writes:
    """The writes of this process below `root`. It dies or pauses right before number `at`."""

    def __init__(self, root: str, at: int | None, action: str, connection: "Connection") -> None:
        self.root, self.at, self.action, self.connection = root, at, action, connection
        self.count = 0
        self._counting = threading.Lock()
        self._inside = threading.local()

    def watch(self) -> None:
        """Count from now on."""
        if "://" not in self.root:
            sys.addaudithook(self._on_event)
            return
        import s3fs.core
        from aiobotocore.client import AioBaseClient
        s3fs.core.calculate_chunksize = lambda *arguments, **options: _PART_BYTES
        call = AioBaseClient._make_api_call

        async def counted(client: Any, operation: str, parameters: Any) -> Any:
            if operation in _REQUESTS:
                self._before(f"{operation} {parameters.get('Key', '')}")
            return await call(client, operation, parameters)
        AioBaseClient._make_api_call = counted

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if getattr(self._inside, "hook", False):
            return
        self._inside.hook = True
        try:
            if event == "fcntl.flock":
                self._report_wait(arguments)
            elif (path := _changed_path(event, arguments)).startswith(f"{self.root}/"):
                self._before(f"{event} {path.removeprefix(self.root)}")
        finally:
            self._inside.hook = False

    def _before(self, what: str) -> None:
        with self._counting:
            number, self.count = self.count, self.count + 1
        if number != self.at:
            return
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.connection.send(event="paused", before=what)
        self.connection.receive()

    def _report_wait(self, arguments: tuple[Any, ...]) -> None:
        """Send an event if the lock is not free now. The next call waits for the lock, or already has it."""
        descriptor, operation = arguments
        if operation == fcntl.LOCK_EX:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.connection.send(event="waiting")


def _changed_path(event: str, arguments: tuple[Any, ...]) -> str:
    """The absolute path that an audit event is about to change, "" if none."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str | bytes | os.PathLike) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return ""
        return os.path.abspath(os.fsdecode(path))
    if event not in _CHANGES:
        return ""
    path = arguments[_CHANGES[event]]
    if isinstance(path, int):
        return ""
    folder = arguments[-1] if event in {"os.remove", "os.rmdir"} else -1
    if folder != -1:  # shutil.rmtree removes by the descriptor of the folder
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
    return os.path.abspath(os.fsdecode(path))


class Connection:
    """Lines of JSON to and from the test."""

    def __init__(self, connected: socket.socket) -> None:
        self._file = connected.makefile("rwb", buffering=0)
        self._sending = threading.Lock()

    def send(self, **event: Any) -> None:
        """Send an event."""
        with self._sending:
            self._file.write(json.dumps(event).encode() + b"\n")

    def receive(self) -> Any:
        """The next document; SystemExit at the end."""
        line = self._file.readline()
        if not line:
            os._exit(1)
        return json.loads(line)


def serve(path: str, more: Sequence[str] = ()) -> None:
    """Fork a child for each connection, until stdin ends. `more`: modules and packages to import."""
    for name in _WARM:
        importlib.import_module(name)
    for package in map(importlib.import_module, (*_PACKAGES, *more)):
        for module in pkgutil.walk_packages(getattr(package, "__path__", ()), f"{package.__name__}."):
            if module.name not in _COLD:
                importlib.import_module(module.name)
    assert threading.active_count() == 1, threading.enumerate()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connected, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _serve_command(Connection(connected))
        connected.close()


def _serve_command(connection: Connection) -> None:
    request = connection.receive()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    output = os.open(request["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.fsync = lambda descriptor: None  # these children are killed, the machine is not
    writes = Writes(request["root"], request["at"], request["action"], connection)
    writes.watch()
    _report_sleep(connection)
    if request["all_abandoned"]:
        from pipeline.storage import leftovers
        leftovers.ABANDONED_S = -1.0
    code = 1
    try:
        code = _run(request["arguments"], request["root"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(event="ended", code=code, writes=writes.count)
    os._exit(0)


def _report_sleep(connection: Connection) -> None:
    sleep = time.sleep

    def reported(seconds: float) -> None:
        connection.send(event="waiting")
        sleep(seconds)
    time.sleep = reported


def _run(arguments: list[str], root: str) -> int:
    if arguments[0] == "search":
        return _search(root, arguments[1])
    from jobs.cli.main import main
    return main([*arguments, "--root", root])


def _search(root: str, name: str) -> int:
    """Open the published version, search in it, and read every image."""
    import torch  # noqa: F401

    from pipeline.datasets.embeddings import Embeddings
    from pipeline.indices.searcher import Searcher
    from pipeline.releases import published
    from pipeline.takedowns.hidden_rows import read_hidden_rows
    dataset = published.open_dataset(root, name)
    vectors = Embeddings(dataset).all()
    hidden = set(read_hidden_rows(dataset).tolist())
    rows, _ = Searcher(dataset).search(vectors, 3)
    nearest = set(rows.ravel().tolist()) - {-1}
    assert nearest and not nearest & hidden, (nearest, hidden)
    assert len(vectors) == dataset.manifest("shards")["totals"]["samples"]
    print(json.dumps({"version": dataset.version, "searched": len(vectors)}))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    serve(sys.argv[1], sys.argv[2:])
