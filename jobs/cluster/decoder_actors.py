"""Actors that decode images for the workers of embed, on nodes without a GPU.

They receive encoded images and return decoded ones. No other data crosses Ray, and only a bounded number of portions
at a time. A decoder has no state. If one dies, the worker decodes the portion itself, and Ray starts the actor again.
"""

import os
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.cluster import connect
from pipeline.embeddings import decode_batch
from pipeline.stages.decoder_pool import DecodedBatch

_PATIENCE_S = 60.0  # after which a worker decodes a portion itself
_AGAIN_S = 1.0  # between checks for lost decoders
_EACH = 2  # portions that keep a decoder busy: one in hand, one on its way


@ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=1)
class Decoder:
    """A process that decodes portions of images."""

    def ping(self) -> tuple[int, str]:
        """Answer once the process runs: which, on which node."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def decode(self, data: list[bytes], preprocessing: dict[str, Any]) -> DecodedBatch:
        """Encoded images as the encoder of that preprocessing takes them."""
        return decode_batch.decode_by_description(data, preprocessing)


def start_decoders(count: int) -> list[Any]:
    """So many decoders, spread over the nodes without a GPU, or over all where each has one."""
    connect.connect()
    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    nodes = [node for node in alive if not node["Resources"].get("GPU")]
    # Soft: if its node is gone, it starts again on another.
    places: list[Any] = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=True) for node in nodes] or ["SPREAD"]
    remote: Any = Decoder  # `ray.remote` hides from type checkers that it adds `options`
    return [remote.options(scheduling_strategy=places[number % len(places)]).remote() for number in range(count)]


class Decoders:
    """Decoders as a worker asks them: of those that answer the one with the least to do."""

    def __init__(self, handles: Sequence[Any], workers: int) -> None:
        self.at_once = max(_EACH, -(-_EACH * len(handles) // workers))
        self._silent: dict[Any, tuple[Any, float]] = {handle: (handle.ping.remote(), 0.0) for handle in handles}
        self._asked: dict[Any, int] = {}  # who answers, and with how many portions
        self._lock = threading.Lock()

    def __call__(self, data: list[bytes], preprocessing: dict[str, Any]) -> DecodedBatch | None:
        if (handle := self._free()) is None:
            return None
        try:
            decoded = ray.get(handle.decode.remote(data, preprocessing), timeout=_PATIENCE_S)
        except RayError:
            self._lost(handle)
            return None
        self._done(handle)
        if decoded.pictures is not None:
            decoded.pictures = decoded.pictures.copy()  # or it stays in the store as long as anybody looks at it
        return decoded

    def _free(self) -> Any | None:
        with self._lock:
            self._listen()
            if not self._asked:
                return None
            least = min(self._asked.values())
            handle = random.choice([decoder for decoder, count in self._asked.items() if count == least])
            self._asked[handle] += 1
            return handle

    def _listen(self) -> None:
        """Count those in that answer (again)."""
        for handle, (ping, since) in list(self._silent.items()):
            if time.monotonic() - since < _AGAIN_S or not ray.wait([ping], timeout=0)[0]:
                continue
            try:
                ray.get(ping)
                del self._silent[handle]
                self._asked[handle] = 0
            except RayError:
                self._silent[handle] = handle.ping.remote(), time.monotonic()

    def _done(self, handle: Any) -> None:
        with self._lock:
            if handle in self._asked:
                self._asked[handle] -= 1

    def _lost(self, handle: Any) -> None:
        with self._lock:
            if self._asked.pop(handle, None) is not None:
                self._silent[handle] = handle.ping.remote(), time.monotonic()
