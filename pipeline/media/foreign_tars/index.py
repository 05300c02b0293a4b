"""Find the members of each sample in a foreign tar before any content is read.

The members of a sample may lie apart: all images first, then all texts. The index has about 40 bytes for each member,
and no keys or contents.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np

from pipeline.media.sample_names import IMAGE_SUFFIXES, split_at_last_dot
from pipeline.media.tar_members import Member

MOST_MEMBERS = 1 << 24
_MOST_SUFFIXES = 1000
"""Different suffixes whose names are in memory."""
_MOST_STEPS = 8
"""Samples on each side of a damage among which a whole one is looked for, to compare with."""
_MEMBERS_AT_ONCE = 1024
_PLAIN, _DOTTED_IMAGE = 1, 2


MemberRow: TypeAlias = tuple[str | None, int, int, int]
"""Suffix (None: not in memory), offset of the first header, offset and size of the content."""


class SampleMembers(NamedTuple):
    """The places of the members of one sample."""

    start: int
    """Offset of the first header of its first member."""
    end: int
    """Offset of the end of its last member."""
    members: Iterable[MemberRow]
    is_divided: bool
    """Whether the names are divided at the last dot, instead of the first."""
    damage: int | None
    """The number of the damage beside it, if the sample lacks a member that samples nearby have."""


class TarIndex:
    """Members by sample. Add all members with their key and suffix, then call `finish` and iterate."""

    def __init__(self) -> None:
        self._places, self._keys = array("q"), array("q")  # three numbers of each member, and one
        self._suffixes, self._flags = array("H"), array("B")
        self._dotted, self._dotted_keys, self._dotted_suffixes = array("q"), array("q"), array("H")
        self._numbers: dict[str, int] = {}
        self.divided_keys = 0
        """Keys whose names are divided at the last dot, because they have several images and no name with one dot."""
        self.is_apart = False
        """Whether the members of a sample lie apart."""
        self.has_repeats = False
        """Whether samples with the same key follow each other."""

    @property
    def endings(self) -> frozenset[str]:
        """The parts of the names after their last dot."""
        return frozenset(suffix.rpartition(".")[2] for suffix in self._numbers)

    def add(self, member: Member, key: str, suffix: str) -> None:
        """Add a member with the key and the suffix that webdataset gives it."""
        flag = _PLAIN
        if "." in suffix:
            long_key, ending = split_at_last_dot(key, suffix)
            flag = _DOTTED_IMAGE if ending in IMAGE_SUFFIXES else 0
            self._dotted.append(len(self._keys))
            self._dotted_keys.append(hash(long_key))
            self._dotted_suffixes.append(self._number(ending))
        self._places.extend((member.start, member.offset, member.size))
        self._keys.append(hash(key))
        self._suffixes.append(self._numbers.get(suffix) or self._number(suffix))
        self._flags.append(flag)

    def _number(self, suffix: str) -> int:
        """A number above 0 for a suffix; 0 if there are too many."""
        if suffix not in self._numbers and len(self._numbers) == _MOST_SUFFIXES:
            return 0
        return self._numbers.setdefault(suffix, len(self._numbers) + 1)

    def finish(self, gaps: list[int], *, divide: bool) -> None:
        """Group the members. `gaps`: how many members were there before each damage.

        `divide`: divide names at the last dot where that makes several samples of one key.
        """
        self._keys_array, self._suffixes_array = np.array(self._keys, np.int64), np.array(self._suffixes, np.uint16)
        self._divided = self._divide() if divide and len(self._dotted) else np.zeros(len(self._keys), bool)
        # All images are of one kind: an image of another format, further on, is no part of the same sample.
        kind_of = np.array([0, *(1 if suffix in IMAGE_SUFFIXES else number + 1
                                 for suffix, number in self._numbers.items())], np.uint16)
        kinds = kind_of[self._suffixes_array]
        self._suffix_of = [None, *self._numbers]
        _, firsts, groups = np.unique(self._keys_array, return_index=True, return_inverse=True)
        samples = firsts[groups]  # the first member of each member's sample
        run_starts = np.flatnonzero(np.diff(samples, prepend=-1))
        if repeats := _find_repeats(self._suffixes_array, run_starts):
            self.has_repeats = True
            run_starts = np.union1d(run_starts, repeats)
        if len(run_starts) > len(firsts):
            _split_repeats(samples, kinds, run_starts)
            self.is_apart = len(np.unique(samples)) < len(run_starts)
        self._order = np.argsort(samples, kind="stable")
        begins = np.diff(samples[self._order], prepend=-1) != 0
        self._bounds = np.append(np.flatnonzero(begins), len(samples))
        numbers = np.empty(len(samples), np.int64)
        numbers[self._order] = np.cumsum(begins) - 1
        self._damaged = self._find_incomplete(gaps, numbers, kinds)

    def __iter__(self) -> Iterator[SampleMembers]:
        places, bounds, number = np.frombuffer(self._places, np.int64).reshape(-1, 3), self._bounds, 0
        while number < len(bounds) - 1:
            # A block of samples, or one sample with very many members.
            after = max(int(np.searchsorted(bounds, bounds[number] + _MEMBERS_AT_ONCE, "right")) - 1, number + 1)
            first, past = bounds[number], bounds[after]
            rows = self._rows(first, past) if past - first <= _MEMBERS_AT_ONCE else None
            first_members = self._order[bounds[number:after]]
            last_members = self._order[bounds[number + 1:after + 1] - 1]
            starts, ends = places[first_members, 0].tolist(), places[last_members, 1:].sum(1).tolist()
            divided, local = self._divided[first_members].tolist(), (bounds[number:after + 1] - first).tolist()
            for index, (start, end, is_divided) in enumerate(zip(starts, ends, divided, strict=True)):
                members = rows[local[index]:local[index + 1]] if rows else self._rows_in_parts(first, past)
                yield SampleMembers(start, end, members, is_divided, self._damaged.get(number + index))
            number = after

    def _rows(self, first: int, past: int) -> list[MemberRow]:
        members = self._order[first:past]
        names = [self._suffix_of[number] for number in self._suffixes_array[members].tolist()]
        places = np.frombuffer(self._places, np.int64).reshape(-1, 3)[members]
        return list(zip(names, *places.T.tolist(), strict=True))

    def _rows_in_parts(self, first: int, past: int) -> Iterator[MemberRow]:
        for part in range(first, past, _MEMBERS_AT_ONCE):
            yield from self._rows(part, min(part + _MEMBERS_AT_ONCE, past))

    def _divide(self) -> np.ndarray:
        """Divide names at the last dot where keys need it. Returns for which members that was done."""
        keys, flags = self._keys_array, np.frombuffer(self._flags, np.uint8)
        image_keys, counts = np.unique(keys[flags == _DOTTED_IMAGE], return_counts=True)
        without_plain = ~np.isin(image_keys, keys[flags == _PLAIN])
        if not (counts[without_plain] > 1).any():
            return np.zeros(len(keys), bool)
        self.divided_keys = int(without_plain.sum())
        divided = np.isin(keys, image_keys[without_plain])
        dotted = np.frombuffer(self._dotted, np.int64)
        chosen = divided[dotted]
        keys[dotted[chosen]] = np.frombuffer(self._dotted_keys, np.int64)[chosen]
        self._suffixes_array[dotted[chosen]] = np.frombuffer(self._dotted_suffixes, np.uint16)[chosen]
        return divided

    def _find_incomplete(self, gaps: list[int], numbers: np.ndarray, kinds: np.ndarray) -> dict[int, int]:
        """Samples beside a damage that lack a member, with the number of the damage."""
        touching = {int(numbers[member]): damage for damage, gap in reversed(list(enumerate(gaps)))
                  for member in (gap - 1, gap) if 0 <= member < len(numbers)}

        def kinds_of(number: int) -> set[int]:
            return set(kinds[self._order[self._bounds[number]:self._bounds[number + 1]]].tolist())

        incomplete = {}
        for number, damage in touching.items():
            others = [number + step * side for side in (-1, 1) for step in range(1, _MOST_STEPS)]
            others = [other for other in others if 0 <= other < len(self._bounds) - 1]
            others.sort(key=touching.__contains__)
            if others and kinds_of(others[0]) - kinds_of(number):
                incomplete[number] = damage
        return incomplete


def _find_repeats(suffixes: np.ndarray, run_starts: np.ndarray) -> list[int]:
    """The members whose suffix occurred before in the same run of members of one key: another sample starts there."""
    runs = np.repeat(np.arange(len(run_starts)), np.diff(run_starts, append=len(suffixes)))
    runs_and_suffixes = runs << 16 | suffixes
    firsts = np.unique(runs_and_suffixes, return_index=True)[1]
    if len(firsts) == len(suffixes):
        return []
    repeats = np.ones(len(suffixes), bool)
    repeats[firsts] = False
    starts = []
    for run in np.unique(runs[repeats]).tolist():
        start, end = int(run_starts[run]), int(run_starts[run + 1]) if run + 1 < len(run_starts) else len(suffixes)
        seen = set[int]()
        for number, suffix in enumerate(suffixes[start:end].tolist(), start):
            if suffix and suffix in seen:  # 0: the suffix is not in memory
                starts.append(number)
                seen.clear()
            seen.add(suffix)
    return starts


def _split_repeats(samples: np.ndarray, kinds: np.ndarray, run_starts: np.ndarray) -> None:
    """Begin another sample, in place, where a key occurs again with a kind of member that its sample has already."""
    run_ends = np.append(run_starts[1:], len(samples))
    keys = samples[run_starts]
    repeated, counts = np.unique(keys, return_counts=True)
    runs = np.argsort(keys, kind="stable")
    runs = runs[np.isin(keys[runs], repeated[counts > 1])]
    current, first, seen = -1, 0, set[int]()
    for run in runs:
        key, start, end = int(keys[run]), int(run_starts[run]), int(run_ends[run])
        kinds_here = set(kinds[start:end].tolist())
        if key != current or seen & kinds_here:
            current, first, seen = key, start, kinds_here
        else:
            seen |= kinds_here
        samples[start:end] = first
