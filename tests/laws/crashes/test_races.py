"""Two commands that change a root at the same time leave it in order, wherever one is paused for the other."""

import itertools
from pathlib import Path

import pytest

from tests.laws.crashes import roots
from tests.laws.crashes.roots import PUBLISHING, STAGES, Place, check_end, check_published, copy_place, settle

_FAST = [*itertools.product(PUBLISHING, PUBLISHING[:-1]), ("shard", "embed"), ("embed", "shard"), ("embed", "embed"),
         ("index", "neighbors"), ("forget", "shard"), ("shard", "forget")]
_PAIRS = [*dict.fromkeys([*_FAST, *itertools.product(PUBLISHING, repeat=2),
                          *itertools.product(STAGES, repeat=2), ("rebuild", "shard"), ("gc", "neighbors")])]


def race(template: Place, folder: Path, verbs: tuple[str, str], number: int) -> bool:
    """Pause a verb before one of its writes, run the other one, and check the laws.

    False if the first one ended before that write. If the other one waits for the first, the first one continues.
    """
    place = copy_place(template, folder)
    if verbs[0] == "repair":
        roots.damage_pointer(place)
    first = place.commands.start(place.folder, place.root, place.arguments(verbs[0]), pause=number)
    while (event := first.next_event()) == "waiting":
        pass
    second = place.commands.start(place.folder, place.root, place.arguments(verbs[1]))
    second.next_event()
    if event == "paused":
        first.resume()
    for ended in (first.end(), second.end()):
        check_end(ended)
    try:
        check_published(place)
        settle(place, stages=bool({*verbs} & {*STAGES}))
    except AssertionError as error:
        where = f"{' '.join(verbs)} paused before write {number} ({first.paused_before})"
        raise AssertionError(f"{where}:\n{error}") from None
    return event == "paused"


def count_writes(template: Place, folder: Path, verb: str) -> int:
    """How many writes a verb makes when it is alone."""
    place = copy_place(template, folder)
    if verb == "repair":
        roots.damage_pointer(place)
    return place.run(place.arguments(verb)).writes


@pytest.mark.parametrize("verbs", _FAST, ids="-".join)
def test_paused_before_a_write(template: Place, tmp_path: Path, verbs: tuple[str, str]) -> None:
    writes = count_writes(template, tmp_path / "alone", verbs[0])
    # Each pair has another number, so that together they are a spread.
    number = (_PAIRS.index(verbs) * 7 + 3) % (writes - 1)
    race(template, tmp_path / "place", verbs, number)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verbs", _PAIRS, ids="-".join)
def test_paused_before_every_write(template: Place, tmp_path: Path, verbs: tuple[str, str]) -> None:
    failed = []
    for number in itertools.count():
        try:
            if not race(template, tmp_path / str(number), verbs, number):
                break
        except AssertionError as error:
            failed.append(str(error))
    assert not failed, f"{len(failed)} of {number}:\n" + "\n".join(failed)
