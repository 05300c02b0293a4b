"""Fetch, transform and pack rows concurrently. The order of the samples is that of the rows."""

import asyncio
import hashlib
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import uvloop

from pipeline import storage
from pipeline.hardware import malloc
from pipeline.media import tars
from pipeline.media.types import BadImage
from pipeline.shards.metadata import (
    COLUMNS,
    FORGOTTEN,
    HASH_COLUMNS,
    NOT_FETCHED,
    NOT_USABLE,
    PATCH_COLUMNS,
    SUCCESS,
    first_error,
    metadata_table,
)
from pipeline.shards.transform import NotFetched, RowResult, failed_row, source_name, transform_row
from pipeline.sources.rows import Row
from pipeline.stages.progress import Beat
from pipeline.stages.types import Entry

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig
_READERS = 32  # pictures that are read at once from a store that is far
_IN_HAND = 4  # rows that a thread takes at a time where nothing has to be fetched for them
_AT_ONCE = 64  # rows that are appended to the tar in one go; as many again may wait in memory


Place = bytes | tuple[int, int]
"""Bytes, or where they are in the spool."""


class Spool:
    """Bytes that wait in a file for their turn."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed by close)
        self._end = 0
        self._lock = threading.Lock()

    def put(self, data: bytes) -> tuple[int, int]:
        """Where the bytes are to be found."""
        with self._lock:
            place = self._end
            self._end += len(data)
        written = 0
        while written < len(data):  # a disk that is nearly full takes a part, and refuses the rest only
            written += os.pwrite(self._file.fileno(), memoryview(data)[written:], place + written)
        return place, len(data)

    def get(self, place: Place) -> bytes:
        """The bytes that are, or were put at, `place`."""
        return place if isinstance(place, bytes) else os.pread(self._file.fileno(), place[1], place[0])

    def close(self) -> None:
        """Done with it; its folder goes with the scratch."""
        self._file.close()


async def _downloaded(downloader: Any, row: Row) -> bytes:
    if row.missing:
        raise NotFetched("bad_url", row.missing)
    return await downloader.get(row.name)


class ShardPacker:
    """The shard under way: lanes that fetch, threads that decode and encode, a spool, and the counts."""

    def __init__(self, config: "ShardConfig", shard: str, digits: int, scratch: Path, beat: Beat,
                 known: Mapping[str, str], refused: frozenset[str] = frozenset()) -> None:
        self.config, self.shard, self.digits, self.beat = config, shard, digits, beat
        self._known, self._refused = known, refused
        self.tar, self.parquet = scratch / "shard.tar", scratch / "shard.parquet"
        self._spool, self._tar = Spool(scratch / "spool"), tars.TarWriter(self.tar)
        self._done = self._written = 0  # of the first rows
        self._writing = False
        self._results: dict[int, tuple[list[dict[str, Any]], list[Place], list[Entry]]] = {}
        self.rows = self.samples = self.length = 0
        self.skipped: Counter[str] = Counter()
        self.began = time.time()

    def run(self, rows: Iterator[Row], read: Callable[[Row], bytes] | None, *, far: bool = False) -> None:
        """Take every row; `read` gives the bytes of a row's picture (from `far` away it takes its time), None
        downloads it."""
        malloc.keep()
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._all(enumerate(rows), read, far))
        except BaseExceptionGroup as group:
            raise first_error(group) from group

    async def _all(self, rows: Iterator[tuple[int, Row]], read: Callable[[Row], bytes] | None, far: bool) -> None:
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        async with AsyncExitStack() as stack:
            # More than threads, so that none waits for its next rows until the loop has put the last ones away.
            lanes, fetch = 2 * threads, None
            if read is None:
                from pipeline.sources.downloader import Downloader
                downloader = await stack.enter_async_context(Downloader(self.config.download))
                lanes, threads = self.config.download.connections, threads + 1
                fetch = partial(_downloaded, downloader)
            elif far:
                readers = stack.enter_context(ThreadPoolExecutor(_READERS, "read"))
                lanes, fetch = _READERS, partial(asyncio.get_running_loop().run_in_executor, readers, read)
            pool = stack.enter_context(ThreadPoolExecutor(threads, "decode"))
            lane_tasks = await stack.enter_async_context(asyncio.TaskGroup())
            for _ in range(lanes):
                lane_tasks.create_task(self._lane(rows, read, fetch, pool))

    async def _lane(self, rows: Iterator[tuple[int, Row]], read: Callable[[Row], bytes] | None,
                    fetch: Callable[[Row], Awaitable[bytes]] | None, pool: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while some := list(itertools.islice(rows, 1 if fetch else _IN_HAND)):
            if fetch:
                number, row = some[0]
                try:
                    row.data = await fetch(row)
                except BadImage as bad:
                    self._take(number, failed_row(row, self._keys(number)[0],
                                              NotFetched(bad.reason, bad.detail)), [])
                    continue
            for number, made, places in await loop.run_in_executor(pool, self._make_all, some, read):
                self._take(number, made, places)
            if not self._writing and self._done - self._written >= _AT_ONCE:
                self._writing = True
                await loop.run_in_executor(pool, self._write)
                self._writing = False

    def _make_all(self, some: list[tuple[int, Row]],
                  read: Callable[[Row], bytes] | None) -> list[tuple[int, RowResult, list[Place]]]:
        made = []
        for number, row in some:
            made.append((number, *self._make(number, row, read)))
            row.data = None
        return made

    def _make(self, number: int, row: Row, read: Callable[[Row], bytes] | None) -> tuple[RowResult, list[Place]]:
        keys, data = self._keys(number), row.data
        try:
            if data is None and read is not None:
                try:
                    data = read(row)
                except BadImage as bad:
                    raise NotFetched(bad.reason, bad.detail) from None
            if data is None:
                raise NotFetched("picture_missing", row.missing)
            if self._refused and hashlib.sha256(data).hexdigest() in self._refused:
                raise BadImage(FORGOTTEN, "")
            made = transform_row(self.config, row, data, keys)
        except BadImage as bad:
            made = failed_row(row, keys[0], bad)
        made.entries += [Entry(source_name(row), reason, kept=True) for reason in row.remarks]
        soon = number - self._written < 2 * _AT_ONCE
        return made, [data if soon else self._spool.put(data) for data in made.pictures]

    def _keys(self, number: int) -> list[str]:
        key = f"{self.shard}{number:0{self.digits}d}"
        if not self.config.patches:
            return [key]
        digits = len(str(self.config.patches - 1))
        return [f"{key}{patch:0{digits}d}" for patch in range(self.config.patches)]

    def _take(self, number: int, made: RowResult, places: list[Place]) -> None:
        self._results[number] = made.metas, places, made.entries
        while self._done in self._results:
            self._done += 1
        self.rows += 1
        self.samples += len(places)
        self.length += sum(len(place) if isinstance(place, bytes) else place[1] for place in places)
        self.skipped.update(entry.reason for entry in made.entries if not entry.kept)
        self.beat(rows=self.rows, samples=self.samples, length=self.length, skipped=self.skipped)

    def _write(self) -> None:
        """Append to the tar what is its turn."""
        for number in range(self._written, self._done):
            metas, places, entries = self._results[number]
            for meta, place in zip(metas, places, strict=False):  # no places where a row failed
                document = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
                self._tar.add({"__key__": meta["key"], self.config.format: self._spool.get(place), "json": document,
                               "txt": meta["caption"].encode("utf-8", "replace")})
            self._results[number] = metas, [], entries
            self._written = number + 1

    def finish(self) -> list[Entry]:
        """End the tar and write its parquet, in the order of the rows; the lines of the ledger."""
        with self._tar:
            self._write()
        self._spool.close()
        results = [self._results[number] for number in range(self.rows)]
        types = self._types()
        ours = types.keys() - COLUMNS.keys()
        # Where a row failed, its source may have columns of these names, and anything in them.
        every = [meta if meta["status"] == SUCCESS else {name: cell for name, cell in meta.items() if name not in ours}
                 for metas, _, _ in results for meta in metas]
        pq.write_table(metadata_table(every, types, self._known), self.parquet)
        return [entry for _, _, entries in results for entry in entries]

    def stats(self) -> bytes:
        """What img2dataset says of a shard in its `_stats.json`."""
        statuses = Counter(metas[0]["status"] for metas, _, _ in self._results.values())
        end = time.time()
        return storage.json_bytes({
            "count": self.rows, "successes": statuses[SUCCESS], "failed_to_download": statuses[NOT_FETCHED],
            "failed_to_resize": statuses[NOT_USABLE], "duration": round(end - self.began, 3),
            "start_time": self.began, "end_time": end,
            "status_dict": dict(Counter({SUCCESS: statuses[SUCCESS]}) + self.skipped)})

    def _types(self) -> dict[str, pa.DataType]:
        types = dict(COLUMNS)
        if self.config.patches:
            types |= PATCH_COLUMNS
        if self.config.duplicates != "keep":
            names = ("pixel_sha256",) if self.config.duplicates == "exact" else tuple(HASH_COLUMNS)
            types |= {name: HASH_COLUMNS[name] for name in names}
        return types
