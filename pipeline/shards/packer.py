"""Fetch, transform and pack rows concurrently. The order of the samples is that of the rows."""

import asyncio
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from pipeline import storage
from pipeline.hardware import malloc
from pipeline.media import tars
from pipeline.media.types import BadImage
from pipeline.rows.rows import Row
from pipeline.shards.metadata import (
    NOT_FETCHED,
    NOT_USABLE,
    SUCCESS,
    add_image_positions,
    changed_types,
    column_types,
    metadata_table,
    reserved_names,
    stored_names,
)
from pipeline.shards.transform import NotFetched, RowResult, failed_row, transform_row
from pipeline.stages.progress import ProgressReporter
from pipeline.stages.types import Entry

if TYPE_CHECKING:
    from pipeline.downloads.downloader import Downloader
    from pipeline.downloads.host_gate import HostGate
    from pipeline.downloads.host_limits import HostLimits
    from pipeline.sources.config import ShardConfig
_READERS = 32  # images that are read in parallel from a remote store
_ROWS_WAITING = 4096  # downloads that wait for their hosts while others are under way
_ROWS_PER_TASK = 4  # rows in one task of a thread, where nothing is fetched for them
_ROWS_PER_WRITE = 64  # rows that are appended to the tar together; as many again may wait in memory

_Fetch = Callable[[Row], AbstractAsyncContextManager[None]]
"""The bytes of a row's image are in the row while the context lasts."""
StoredBytes = bytes | tuple[int, int]
"""Bytes in memory, or their offset and length in the spool."""


class Spool:
    """Bytes that wait in a file until the rows before them are done."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed by close)
        self._end = 0

    def put(self, data: bytes) -> tuple[int, int]:
        """Write the bytes. Returns their offset and length. For one thread at a time; `get` is for any."""
        offset, count = self._end, 0
        self._end += len(data)
        while count < len(data):  # a disk that is nearly full writes a part before it raises an error
            count += os.pwrite(self._file.fileno(), memoryview(data)[count:], offset + count)
        return offset, len(data)

    def get(self, stored: StoredBytes) -> bytes:
        """The bytes themselves, or those that `put` wrote."""
        return stored if isinstance(stored, bytes) else os.pread(self._file.fileno(), stored[1], stored[0])

    def close(self) -> None:
        """Close the file. The scratch folder is removed with it."""
        self._file.close()


class ShardPacker:
    """Packs the rows of one shard: tasks fetch, threads transform, one thread at a time writes the tar."""

    def __init__(self, config: "ShardConfig", shard: str, digits: int, scratch: Path, report_progress: ProgressReporter,
                 known: Mapping[str, str], refused: frozenset[str] = frozenset(),
                 limits: "HostLimits | None" = None) -> None:
        self.config, self.shard, self.digits, self.report_progress = config, shard, digits, report_progress
        self._refused, self._limits = refused, limits
        names = stored_names(known, reserved_names(config))
        self._known = {names[name]: kind for name, kind in known.items()}
        self.tar, self.parquet = scratch / "shard.tar", scratch / "shard.parquet"
        self._spool, self._tar = Spool(scratch / "spool"), tars.TarWriter(self.tar)
        self._done = self._written = 0  # rows from the first on, without a gap
        self._results: dict[int, tuple[list[dict[str, Any]], list[StoredBytes], list[Entry]]] = {}
        self.rows = self.samples = self.length = 0
        self.skipped: Counter[str] = Counter()
        self.started = time.time()

    async def pack(self, rows: Iterator[Row], read: Callable[[Row], bytes] | None, *, far: bool = False) -> None:
        """Pack all rows.

        read: returns the bytes of a row's image. None: they are downloaded. far: it reads from a remote store, so many
        rows are read in parallel.
        """
        malloc.keep_freed_memory()
        loop, numbered = asyncio.get_running_loop(), enumerate(rows)
        reserved = reserved_names(self.config)
        transform = partial(transform_row, self.config, read=read, refused=self._refused)
        finished: asyncio.Queue[asyncio.Future[Any] | None] = asyncio.Queue()
        async with AsyncExitStack() as stack:
            pool, most_pending, fetch = await self._open_pool(stack, read, far, lambda: finished.put_nowait(None))
            pending = await stack.enter_async_context(_cancelled_at_end())
            writing: asyncio.Future[None] | None = None
            while True:
                while len(pending) < most_pending() and (
                        batch := list(itertools.islice(numbered, 1 if fetch else _ROWS_PER_TASK))):
                    numbers, batch_rows = zip(*batch, strict=True)
                    keys = map(self._keys, numbers)
                    task: asyncio.Future[Any] = (
                        loop.create_task(_fetch_and_transform(batch_rows[0], next(keys), fetch, transform, pool,
                                                              reserved))
                        if fetch else loop.run_in_executor(pool, list, map(transform, batch_rows, keys)))
                    pending[task] = numbers
                    task.add_done_callback(finished.put_nowait)
                if not pending:
                    break
                if (ended := await finished.get()) is None:
                    continue  # a download waits for its host: there is room for another
                for number, result in zip(pending.pop(ended), ended.result() or (), strict=True):
                    self._record(number, result)
                if writing not in pending and self._done - self._written >= _ROWS_PER_WRITE:
                    writing = loop.run_in_executor(pool, self._append_to_tar)
                    pending[writing] = ()
                    writing.add_done_callback(finished.put_nowait)

    async def _open_pool(self, stack: AsyncExitStack, read: Callable[[Row], bytes] | None, far: bool,
                         on_wait: Callable[[], None]) -> tuple[ThreadPoolExecutor, Callable[[], int], _Fetch | None]:
        """The threads, the most tasks at a time, and what fetches the bytes of a row if they are far away.

        `on_wait` is called when a download waits for its host, so that one more task may run.
        """
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        # More tasks than threads, so that no thread waits while the loop records its last rows.
        most = 2 * threads
        fetch: _Fetch | None = None
        gate: HostGate | None = None
        if read is None:
            from pipeline.downloads.downloader import Downloader
            downloader = await stack.enter_async_context(Downloader(self.config.download, self._limits))
            most, threads = self.config.download.connections, threads + 1
            fetch, gate = partial(_download, downloader), downloader.gate
            gate.on_wait = on_wait
        elif far:
            readers = stack.enter_context(ThreadPoolExecutor(_READERS, "read"))
            most, fetch = _READERS, partial(_read_in_thread, readers, read)
        return (stack.enter_context(ThreadPoolExecutor(threads, "decode")),
                lambda: most + (min(gate.waiting, _ROWS_WAITING) if gate else 0), fetch)

    def _keys(self, number: int) -> list[str]:
        key = f"{self.shard}{number:0{self.digits}d}"
        if not self.config.patches:
            return [key]
        digits = len(str(self.config.patches - 1))
        return [f"{key}{patch:0{digits}d}" for patch in range(self.config.patches)]

    def _record(self, number: int, result: RowResult) -> None:
        is_soon = number - self._written < 2 * _ROWS_PER_WRITE
        stored: list[StoredBytes] = [data if is_soon else self._spool.put(data) for data in result.images]
        self._results[number] = result.metas, stored, result.entries
        while self._done in self._results:
            self._done += 1
        self.rows += 1
        self.samples += len(stored)
        self.length += sum(len(item) if isinstance(item, bytes) else item[1] for item in stored)
        self.skipped.update(entry.reason for entry in result.entries if not entry.kept)
        self.report_progress(rows=self.rows, samples=self.samples, length=self.length, skipped=self.skipped)

    def _append_to_tar(self) -> None:
        """Append the samples of all rows that have no unfinished row before them."""
        for number in range(self._written, self._done):
            metas, stored, entries = self._results[number]
            for meta, item in zip(metas, stored, strict=False):  # a row that failed has nothing stored
                # Bytes are in the parquet file only: JSON has none.
                cells = {name: cell for name, cell in meta.items() if not isinstance(cell, bytes)}
                document = json.dumps(cells, sort_keys=True, ensure_ascii=False).encode()
                self._tar.add({"__key__": meta["key"], self.config.format: self._spool.get(item), "json": document,
                               "txt": meta["caption"].encode("utf-8", "replace")})
            self._results[number] = metas, [], entries
            self._written = number + 1

    def finish(self) -> list[Entry]:
        """Write the end of the tar and its parquet file. Returns the lines of the ledger, in the order of the rows."""
        with self._tar:
            self._append_to_tar()
        self._spool.close()
        results = [self._results[number] for number in range(self.rows)]
        types = column_types(self.config)
        lines = [meta for metas, _, _ in results for meta in metas]
        table = metadata_table(lines, types, self._known)
        changed = [Entry(f"{self.shard}.tar", "column_type", detail, kept=True)
                   for detail in changed_types(table, self._known, types)]
        pq.write_table(add_image_positions(table, tars.image_positions(self.tar)), self.parquet)
        return [entry for _, _, entries in results for entry in entries] + changed

    def img2dataset_stats(self) -> bytes:
        """The `_stats.json` that img2dataset writes for a shard."""
        statuses = Counter(metas[0]["status"] for metas, _, _ in self._results.values())
        end = time.time()
        return storage.json_bytes({
            "count": self.rows, "successes": statuses[SUCCESS], "failed_to_download": statuses[NOT_FETCHED],
            "failed_to_resize": statuses[NOT_USABLE], "duration": round(end - self.started, 3),
            "start_time": self.started, "end_time": end,
            "status_dict": dict(Counter({SUCCESS: statuses[SUCCESS]}) + self.skipped)})


@asynccontextmanager
async def _cancelled_at_end() -> AsyncIterator[dict[asyncio.Future[Any], Sequence[int]]]:
    """Tasks with the numbers of their rows. The end cancels the tasks that an error has left."""
    pending: dict[asyncio.Future[Any], Sequence[int]] = {}
    try:
        yield pending
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _fetch_and_transform(row: Row, keys: list[str], fetch: _Fetch,
                               transform: Callable[[Row, list[str]], RowResult], pool: ThreadPoolExecutor,
                               reserved: Collection[str]) -> list[RowResult]:
    try:
        async with fetch(row):
            return [await asyncio.get_running_loop().run_in_executor(pool, transform, row, keys)]
    except BadImage as bad:
        return [failed_row(row, keys[0], NotFetched(bad.reason, bad.detail), reserved)]


@asynccontextmanager
async def _download(downloader: "Downloader", row: Row) -> AsyncIterator[None]:
    if row.missing:
        raise NotFetched(row.reason or "bad_url", row.missing)
    if row.data is not None:  # the URL itself holds the image
        yield
        return
    async with downloader.hold(row.name) as row.data:
        yield


@asynccontextmanager
async def _read_in_thread(readers: ThreadPoolExecutor, read: Callable[[Row], bytes], row: Row) -> AsyncIterator[None]:
    row.data = await asyncio.get_running_loop().run_in_executor(readers, read, row)
    yield
