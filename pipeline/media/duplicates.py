"""Which rows are copies of an earlier one: by equal hashes, or by near ones. Arrays in, arrays out."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

_PAIRS = 1 << 18  # compared at a time: a few MB, which stay in the processor's cache
_FEW = 512  # rows of which all pairs are compared
_MANY = 64, 1 << 20  # pairs to look at, for each row and besides, beyond which rows are taken in halves
_ONES = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)


def find_exact(hashes: np.ndarray, missing: np.ndarray | None = None) -> np.ndarray:
    """For each row the first row with the same hash, itself if there is none before it: int64 (N,).

    `hashes` is of bytes (N,), as S32 for sha256. Rows that are `missing` (bool) have no hash and stay.
    """
    rows = _present(len(hashes), missing)
    width = -(-hashes.dtype.itemsize // 8) * 8
    words = np.ascontiguousarray(hashes[rows].astype(f"S{width}")).view(">u8").reshape(len(rows), width // 8)
    result = np.arange(len(hashes))
    result[rows] = rows[_firsts([np.ascontiguousarray(words[:, number], np.uint64) for number in range(width // 8)])]
    return result


def find_near(phash: np.ndarray, colour: np.ndarray, bits: int = 3, colour_distance: int = 12,
              missing: np.ndarray | None = None) -> np.ndarray:
    """For each row the first row that it is a near copy of, itself if it stays: int64 (N,).

    Rows are taken in order. One goes if an earlier one that stayed differs from it in at most `bits` bits of `phash`
    (uint64, (N,)) and by at most `colour_distance` in each channel of `colour` (uint8, (N, 3)). Near is not
    transitive: with a near b near c, and c not near a, c stays. Rows that are `missing` (bool) have no hash and stay.
    """
    if not 0 <= bits <= 16:
        raise ValueError(f"bits = {bits}: must be within 0 and 16")
    if not 0 <= colour_distance <= 255:
        raise ValueError(f"colour_distance = {colour_distance}: must be within 0 and 255")
    rows = _present(len(phash), missing)
    hashes, colours = phash[rows].astype(np.uint64), colour[rows].astype(np.uint8)
    packed = colours.astype(np.uint64) @ np.array([1 << 16, 1 << 8, 1], np.uint64)
    firsts = _firsts([hashes, packed])  # what is equal shares its fate
    points = np.flatnonzero(firsts == np.arange(len(rows)))
    near_points = _NearDuplicates(hashes[points], colours[points], bits, colour_distance).first_copies()
    fate = np.empty(len(rows), np.int64)
    fate[points] = points[near_points]
    result = np.arange(len(phash))
    result[rows] = rows[fate[firsts]]
    return result


def _present(count: int, missing: np.ndarray | None) -> np.ndarray:
    if missing is None:
        return np.arange(count)
    if missing.shape != (count,):
        raise ValueError(f"missing has the shape {missing.shape}, wanted is {(count,)}")
    return np.flatnonzero(~missing.astype(bool))


def _firsts(columns: Sequence[np.ndarray]) -> np.ndarray:
    """For each row the first with the same values in all columns."""
    result = np.arange(len(columns[0]))
    # The first column tells nearly all apart: only where it does not are the others sorted too.
    order = np.argsort(columns[0], kind="stable")
    same = columns[0][order[1:]] == columns[0][order[:-1]]
    shared = order[np.append(same, False) | np.insert(same, 0, False)] if len(order) else order
    shared.sort()
    ordered = shared[np.lexsort([column[shared] for column in reversed(columns)])]
    new = np.ones(len(ordered), bool)
    for number, column in enumerate(columns):
        differs = column[ordered[1:]] != column[ordered[:-1]]
        new[1:] = differs if number == 0 else new[1:] | differs
    starts = np.flatnonzero(new)
    # lexsort is stable: the first of a run is the first row.
    result[ordered] = np.repeat(ordered[starts], np.diff(np.append(starts, len(ordered))))
    return result


class _NearDuplicates:
    """Points, no two of them equal, and who stays.

    Hashes that differ in `bits` bits at most agree in some of a few bands: sorting by each choice of bands brings them
    together. Colors that are near lie in the same or in neighboring cells of red, and near in green. If that leaves
    too many pairs, for the points are crowded, the first half is settled, and the second compared with those who
    stayed: of a crowd few stay.
    """

    def __init__(self, hashes: np.ndarray, colours: np.ndarray, bits: int, distance: int) -> None:
        self.hashes, self.bits, self.distance = hashes, bits, distance
        self.channels = [np.ascontiguousarray(colours[:, number]) for number in range(3)]
        self.cells = self.channels[0].astype(np.int64) // (distance + 1) << 8 | self.channels[1]
        self.choices = _choices(bits, len(hashes))
        self.target = np.full(len(hashes), -1)

    def first_copies(self) -> np.ndarray:
        """For each point the first near one that stays, or itself."""
        self._settle(0, len(self.hashes))
        return np.where(self.target < 0, np.arange(len(self.target)), self.target)

    def _undecided(self, low: int, high: int) -> np.ndarray:
        return low + np.flatnonzero(self.target[low:high] < 0)

    def _settle(self, low: int, high: int) -> None:
        """Decide on the points from `low` to `high`, of which those near one that stayed before `low` are gone."""
        points = self._undecided(low, high)
        pairs = self._all_pairs(points) if len(points) <= _FEW else self._close_pairs(points)
        if pairs is not None:
            self._resolve(*pairs)
            return
        middle = int(points[len(points) // 2])
        self._settle(low, middle)
        self._compare(self._undecided(low, middle), self._undecided(middle, high))
        self._settle(middle, high)

    def _all_pairs(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second = np.triu_indices(len(points), 1)
        return self._filter_pairs(points[first], points[second])

    def _close_pairs(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The pairs (earlier, later) among `points` that are near; None if there are too many to look at."""
        budget, pairs = _MANY[0] * len(points) + _MANY[1], [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for bands in self.choices:
            keys = self._keys(points, bands)
            order = np.argsort(keys)
            keys = keys[order]
            same = keys[1:] >> 16 == keys[:-1] >> 16
            shared = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
            ordered, keys = points[order[shared]], keys[shared]
            start, end = self._window(keys, keys, 0)
            windows = [(np.maximum(start, np.arange(1, len(keys) + 1)), end), self._window(keys, keys, 1)]
            budget -= sum(int((end - start).clip(0).sum()) for start, end in windows)
            if budget < 0:
                return None
            for start, end in windows:
                pairs += [self._filter_pairs(ordered[first], ordered[second])
                          for first, second in _pair_blocks(start, end)]
        first, second = (np.concatenate(side) for side in zip(*pairs, strict=True))
        return np.minimum(first, second), np.maximum(first, second)

    def _resolve(self, earlier: np.ndarray, later: np.ndarray) -> None:
        """Decide which points are removed, from all near pairs (earlier, later)."""
        order = np.lexsort([earlier, later])
        earlier, later = earlier[order], later[order]
        removed = bytearray(len(self.target))
        # In this order a point is decided before it can remove others.
        for first, second in zip(earlier.tolist(), later.tolist(), strict=True):
            if not removed[first]:
                removed[second] = 1
        stays = np.frombuffer(removed, np.uint8)[earlier] == 0
        points, positions = np.unique(later[stays], return_index=True)
        self.target[points] = earlier[stays][positions]

    def _compare(self, kept: np.ndarray, points: np.ndarray) -> None:
        """Send away those of `points` that are near one of `kept`, to the first such."""
        count = len(self.target)
        best = np.full(count, count)
        for bands in self.choices:
            base, keys = self._keys(kept, bands), self._keys(points, bands)
            order, key_order = np.argsort(base), np.argsort(keys)
            base, keys = base[order], keys[key_order]
            for step in (-1, 0, 1):
                for first, second in _pair_blocks(*self._window(base, keys, step)):
                    point, stayed = self._filter_pairs(points[key_order[first]], kept[order[second]])
                    np.minimum.at(best, point, stayed)
        duplicates = points[best[points] < count]
        self.target[duplicates] = best[duplicates]

    def _filter_pairs(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pairs that are near."""
        words = (self.hashes[first] ^ self.hashes[second]).view(np.uint16).reshape(-1, 4)
        close = _ONES[words].sum(1, dtype=np.uint8) <= self.bits
        first, second = first[close], second[close]
        for channel in self.channels:
            a, b = channel[first], channel[second]
            close = np.maximum(a, b) - np.minimum(a, b) <= self.distance
            first, second = first[close], second[close]
        return first, second

    def _keys(self, points: np.ndarray, bands: Sequence[tuple[int, int]]) -> np.ndarray:
        """The bits that near hashes share (at most 46), and the cell of red and green, in one int64."""
        hashes, key, room = self.hashes[points], np.zeros(len(points), np.uint64), 46
        for shift, width in bands:
            width = min(width, room)
            room -= width
            key = key << np.uint64(width) | hashes >> np.uint64(shift) & np.uint64((1 << width) - 1)
        return key.astype(np.int64) << 16 | self.cells[points]

    def _window(self, base: np.ndarray, keys: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """From where to where in `base`, sorted, the points are whose cell is `step` from that of `keys`."""
        green, cell = keys & 255, (keys >> 8 & 255) + step
        at = (keys & ~0xFFFF) + (cell << 8)
        start = np.searchsorted(base, at + np.maximum(green - self.distance, 0), "left")
        end = np.searchsorted(base, at + np.minimum(green + self.distance, 255), "right")
        return start, np.where((cell >= 0) & (cell < 256), end, start)


def _choices(bits: int, count: int) -> list[tuple[tuple[int, int], ...]]:
    """Choices of bands (shift, width), of which two hashes that differ in `bits` bits agree in one at least.

    n of `bits` + n bands agree. More and narrower bands need more sorting, and have fewer matches by chance.
    """
    def cost(agreeing: int) -> float:
        width = 64 * agreeing // (bits + agreeing)
        return math.comb(bits + agreeing, agreeing) * (count * 100 + count * count / 2.0 ** (width + 1) * 12)

    agreeing = min(range(1, 5), key=cost)
    edges = [64 * number // (bits + agreeing) for number in range(bits + agreeing + 1)]
    bands = [(low, high - low) for low, high in itertools.pairwise(edges)]
    return list(itertools.combinations(bands, agreeing))


def _pair_blocks(start: np.ndarray, end: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs (n, each from start[n] to end[n]), some at a time."""
    nonempty = np.flatnonzero(end > start)
    counts = (end - start)[nonempty]
    ends = np.cumsum(counts)
    for first in range(0, int(ends[-1]) if len(ends) else 0, _PAIRS):
        last = min(first + _PAIRS, int(ends[-1]))
        low, high = np.searchsorted(ends, [first, last - 1], "right")
        part = np.arange(low, high + 1)
        # A long range is cut where the part begins and ends.
        before = np.minimum(ends[part], last) - np.maximum(ends[part] - counts[part], first)
        source = np.repeat(part, before)
        yield nonempty[source], start[nonempty[source]] + np.arange(first, last) - (ends[source] - counts[source])
