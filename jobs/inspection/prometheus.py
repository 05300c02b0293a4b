"""`status --serve`: an exporter that serves the state of a root to Prometheus. The only file that imports its client.

Ray's own exporter ends with the job. Alerts also need what is known when no job runs: the age of the published version,
failed runs and dead drivers. This exporter reads them from the files.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from jobs.inspection import status
from jobs.runs.labels import NAMES
from jobs.runs.run import HOPELESS
from pipeline import storage
from pipeline.stages.documents import TIME_FORMAT
from pipeline.stages.progress import period
from pipeline.stages.types import count_row_failures

_log = logging.getLogger(__name__)
_requests = logging.getLogger(f"{__name__}.requests")
# Otherwise each invalid request would write a traceback, and anyone who can reach the port could fill the log.
_requests.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError)))
_REQUEST_S = 20.0  # from the connection, or the last answer, to the end of the next request's headers
_ANSWER_S = 60.0  # to read the root and to send the answer
_CONNECTIONS = 200  # more than Prometheus opens, and fewer than a process may have files open
_BACKLOG = 32  # connections that the system queues before the server accepts them
_STAGE = {
    "items": "Planned items.", "items_left": "Items without a record.", "items_failed": "Items that failed.",
    "rows": "Rows of the source that were read.", "samples": "Samples made.", "bytes": "Bytes written.",
    "sealed": "1 if it is finished.", "stale": "1 if an input was rebuilt later.", "damaged": "1 if unreadable.",
    "failed": "1 if a run ended with an error that a retry does not fix.",
    "published": "1 if its version is the published one.", "stopped": "1 if gates stopped its version.",
    "rows_per_second": "Rows per second of a running driver.", "seconds_left": "Time left, as the driver estimates it.",
    "heard_timestamp_seconds": "Last report of the driver.", "sealed_timestamp_seconds": "When it was finished.",
}
_TRAIN = {"step": "Updates done.", "loss": "Mean loss of the last interval.", "grad_norm": "Norm of the gradient.",
          "data_wait": "Share of the time that training waited for data.", "samples_per_s": "Images per second.",
          "mfu": "Share of the GPUs' operations used.", "memory_gb": "Most memory of a process, GB."}
_DATABASE = {"published_timestamp_seconds": "When the published version was published.",
             "checked_timestamp_seconds": "When the source was last compared with it.",
             "age_seconds": "Seconds since it was published.", "recall": "Its recall@10.",
             "number": "Number of the build."}


def serve_metrics(root: str, where: str) -> None:
    """Answer Prometheus at PORT of this machine, or at HOST:PORT, until interrupted."""
    host, _, port = where.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ValueError(f"--serve {where!r} is no port\nhint: --serve 9108, or 0.0.0.0:9108 for other machines")
    registry = CollectorRegistry()
    collector = RootMetrics(root)
    collector.look()  # fail immediately if the root cannot be read
    registry.register(collector)
    asyncio.run(_serve(registry, host.strip("[]") or "127.0.0.1", int(port)))


async def _serve(registry: CollectorRegistry, host: str, port: int) -> None:
    """Answer requests until cancelled. A connection costs a socket and no thread, and has time limits."""
    loop, reader = asyncio.get_running_loop(), ThreadPoolExecutor(1, "metrics")

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.method not in {"GET", "HEAD"}:
            return web.Response(status=405, headers={"Allow": "GET, HEAD"})
        try:
            async with asyncio.timeout(_ANSWER_S):
                response = await loop.run_in_executor(reader, _metrics_response, registry, request)
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()  # closing it would wait until the client reads what is sent
            return web.Response(status=503)
        return response

    server = web.Server(answer, keepalive_timeout=_REQUEST_S, lingering_time=0.0, access_log=None, logger=_requests)
    try:
        listener = await loop.create_server(
            lambda: server() if len(server.connections) < _CONNECTIONS else _Refusal(), host, port, backlog=_BACKLOG)
    except OSError as error:
        # The resolver of names has its own numbers, below 0.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        other = str(port + 1 if 1024 <= port < 65535 else 9108)  # lower ports may be reserved for root
        if error.errno == errno.EADDRINUSE and host != "127.0.0.1":
            other = f"{host}:{other}"
        raise ValueError(f"--serve {host}:{port}: cannot listen there: {reason}\n"
                         f"hint: python -m jobs status --serve {other}") from None
    _log.info("status: at http://%s:%d/metrics", host, listener.sockets[0].getsockname()[1])
    stopped = asyncio.Event()
    if (threading.current_thread() is threading.main_thread()  # others cannot handle signals
            and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN):
        # An exception raised at any moment could be lost inside a callback.
        loop.add_signal_handler(signal.SIGINT, stopped.set)
    try:
        await stopped.wait()
    finally:
        listener.close()
        reader.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(TimeoutError):
            await server.shutdown(timeout=1.0)


def _metrics_response(registry: CollectorRegistry, request: web.BaseRequest) -> web.Response:
    """All metrics in the format that the request accepts."""
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    response = web.Response(body=encode(registry), headers={"Content-Type": content_type})
    response.enable_compression()
    return response


class _Refusal(asyncio.Protocol):
    """Ends a connection above the limit."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.abort()  # type: ignore[attr-defined]


class RootMetrics:
    """The state of a root as metrics. Requests share one read for a few seconds."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._read = 0.0
        self._families: list[Metric] = []

    def describe(self) -> list[Metric]:
        """Empty, so that registration does not read the root."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics. If the root cannot be read, only `rdm_root_readable`."""
        with self._lock:
            try:
                if time.monotonic() - self._read > period(self.root) or not self._families:
                    self.look()
            except (OSError, ValueError) as error:
                _log.warning("status: %s", storage.redact_credentials(storage.first_line(error)))
                self._families = []
            yield _gauge("rdm_root_readable", "1 if the root could be read.", float(bool(self._families)))
            yield from self._families

    def look(self) -> None:
        """Read the root."""
        families = [*_stage_metrics(status.read_status(self.root)),
                    *_database_metrics(status.read_published(self.root))]
        self._families, self._read = families, time.monotonic()


def _stage_metrics(states: list[dict[str, Any]]) -> Iterator[Metric]:
    gauges = {name: GaugeMetricFamily(f"rdm_stage_{name}", what, labels=NAMES) for name, what in _STAGE.items()}
    curves = {name: GaugeMetricFamily(f"rdm_train_{name}", what, labels=NAMES) for name, what in _TRAIN.items()}
    left_out = GaugeMetricFamily("rdm_stage_left_out", "Samples left out, by reason.", labels=(*NAMES, "reason"))
    recall = GaugeMetricFamily("rdm_index_recall", "Recall of an index.", labels=(*NAMES, "k"))
    faults = GaugeMetricFamily("rdm_train_fault", "1 if this ended the run for good.", labels=(*NAMES, "kind"))
    for stage in _one_of_each(states):
        known = [status.state_labels(stage["path"], stage)[name] for name in NAMES]
        for name, value in _stage_numbers(stage).items():
            gauges[name].add_metric(known, value)
        for reason, count in (stage.get("progress") or stage).get("skipped", {}).items():
            left_out.add_metric([*known, storage.escape_controls(reason)], count)
        for k, value in (stage.get("recall") or {}).items():
            recall.add_metric([*known, storage.escape_controls(k)], value)
        if curve := stage.get("curve"):
            for name in _TRAIN.keys() & curve.keys():
                curves[name].add_metric(known, curve[name])
        if stage.get("stage") == "train":
            ended = (stage.get("fault") or {}).get("kind")
            for kind in HOPELESS:
                faults.add_metric([*known, kind], float(kind == ended))
    yield from [*gauges.values(), *curves.values(), left_out, recall, faults]


def _one_of_each(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The states that have metrics: one for each set of labels, because Prometheus rejects equal series.

    If a run has several folders of samples, the unfinished or the newest one counts.
    """
    chosen: dict[tuple[str, ...], dict[str, Any]] = {}
    for state in sorted(states, key=lambda state: state.get("sealed") or "9"):
        if state["state"] != "absent":
            chosen[tuple(status.state_labels(state["path"], state).values())] = state
    return [state for state in states if any(state is other for other in chosen.values())]


def _stage_numbers(stage: dict[str, Any]) -> dict[str, float]:
    """The values of a stage, under the names of `_STAGE`."""
    state = {name: float(stage["state"] == name) for name in ("stale", "damaged", "failed")}
    state |= {"published": float(stage.get("published", False)), "stopped": float("failed_gates" in stage)}
    if stage["state"] == "damaged":
        return state
    now, whole = stage.get("progress"), "samples" in stage
    done = stage["items"] if whole else stage["done"]
    numbers = state | {"items": stage["items"], "items_left": stage["items"] - done, "sealed": float(whole),
                    "items_failed": stage.get("failed", 0)}
    if whole:
        numbers |= {"bytes": stage["bytes"], "sealed_timestamp_seconds": _unix(stage["sealed"])}
        if stage["stage"] not in status.COUNT_PARAMETERS:
            numbers |= {"rows": stage["samples"] + count_row_failures(stage["skipped"]), "samples": stage["samples"]}
    if now:
        numbers |= {name: now[name] for name in ("rows", "samples", "bytes")}
        numbers |= {"items_left": now["of_items"] - now["items"], "heard_timestamp_seconds": now["updated"],
                 "items_failed": max(stage["failed"], now["failed_items"])}
        if not status.seconds_silent(now):
            numbers |= {"rows_per_second": now["rows_per_s"]} | (
                {"seconds_left": now["seconds_left"]} if now["seconds_left"] is not None else {})
    return numbers


def _unix(stamp: str) -> float:
    from calendar import timegm
    return float(timegm(time.strptime(stamp, TIME_FORMAT)))


def _database_metrics(published: dict[str, dict[str, Any]]) -> Iterator[Metric]:
    gauges = {name: GaugeMetricFamily(f"rdm_database_{name}", what, labels=("dataset", "version"))
              for name, what in _DATABASE.items()}
    for name, pointer in published.items():
        numbers = {"recall": pointer.get("recall@10"), "number": pointer.get("number")}
        if (at := pointer.get("published")) is not None:
            numbers |= {"published_timestamp_seconds": at, "age_seconds": max(time.time() - at, 0.0),
                     "checked_timestamp_seconds": pointer.get("checked", at)}
        for key, value in numbers.items():
            if isinstance(value, int | float):
                gauges[key].add_metric([storage.escape_controls(name), pointer["version"]], value)
    yield from gauges.values()


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, value=value)
