"""The rows of each training step, as a pure function of seed and step."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """Which global rows make the global batch of a step: a pure function of (seed, step).

    In every epoch the shards are shuffled, and the samples within windows of `window` shards, so
    that a reader holds one window at a time. An epoch's incomplete last batch is filled from the
    next one.
    """

    counts: tuple[int, ...]
    global_batch: int
    seed: int
    window: int = 16

    def epoch(self, number: int) -> np.ndarray:
        """All global rows in the order of one epoch, (N,) int64."""
        rng = np.random.default_rng((self.seed, 23, number))
        offsets = np.cumsum([0, *self.counts])
        shards = rng.permutation(len(self.counts))
        parts = []
        for start in range(0, len(shards), self.window):
            rows = np.concatenate([np.arange(offsets[shard], offsets[shard + 1])
                                   for shard in shards[start:start + self.window]])
            parts.append(rng.permutation(rows))
        return np.concatenate(parts)

    def windows(self, number: int) -> list[tuple[int, list[int]]]:
        """The windows of one epoch in its order: how many samples, and the shards that they are in."""
        shards = np.random.default_rng((self.seed, 23, number)).permutation(len(self.counts)).tolist()
        windows = [shards[start:start + self.window] for start in range(0, len(shards), self.window)]
        return [(sum(self.counts[shard] for shard in window), window) for window in windows]

    def ahead(self, first: int, last: int) -> tuple[range, list[int]]:
        """The windows with the positions `first` to `last` of the stream of all epochs, and the window after them.

        Their positions (without those of the window after them), and the shards of all in the order of their use.
        """
        number, shards, begin = first // sum(self.counts), [], None
        end = number * sum(self.counts)
        while True:
            for samples, window in self.windows(number):
                start, end = end, end + samples
                if end > first:
                    begin = start if begin is None else begin
                    shards += window
                    if start > last:
                        return range(begin, start), list(dict.fromkeys(shards))
            number += 1

    def rows(self, step: int) -> np.ndarray:
        """Global rows of the global batch of `step`, (global_batch,) int64."""
        total = sum(self.counts)
        positions = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        wanted = np.empty(len(positions), np.int64)
        for number in np.unique(positions // total):
            here = positions // total == number
            wanted[here] = self._epoch(int(number))[positions[here] % total]
        return wanted

    def _epoch(self, number: int) -> np.ndarray:
        # frozen, but a permutation of a million rows is not made again for every step
        memory = self.__dict__.setdefault("_memory", OrderedDict())
        if number not in memory:
            memory[number] = self.epoch(number)
            while len(memory) > 2:
                memory.popitem(last=False)
        return memory[number]
