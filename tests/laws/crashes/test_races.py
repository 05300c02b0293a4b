"""Two commands change a root at the same time, and one pauses before any write. The root has no fault afterwards."""

import itertools
from pathlib import Path

import pytest

from tests.laws.crashes.roots import (
    PUBLISHING,
    REMOVE_PUBLISHED,
    STAGES,
    Place,
    check_end,
    check_published,
    count_writes,
    prepare_place,
    settle,
    sweep,
)

_REMOVALS = [*itertools.product((REMOVE_PUBLISHED,), PUBLISHING), *itertools.product(PUBLISHING, (REMOVE_PUBLISHED,)),
             (REMOVE_PUBLISHED, REMOVE_PUBLISHED)]
_FAST = [("rebuild", "rebuild"), ("rebuild", "gc"), ("gc", "rebuild"), ("forget", "rebuild"), ("rebuild", "forget"),
         ("rollback", "gc"), ("repair", "rebuild"), (REMOVE_PUBLISHED, "rebuild"), ("shard", "embed"),
         ("embed", "shard"), ("index", "neighbors"), ("forget", "shard")]
_SLOW = [*itertools.product(PUBLISHING, PUBLISHING[:-1]), ("embed", "embed"), ("shard", "forget"), *_REMOVALS,
         ("rm", "forget"), ("forget", "rm"), ("rm", "shard"), ("shard", "rm")]
_PAIRS = [*dict.fromkeys([*_FAST, *_SLOW, *itertools.product(PUBLISHING, repeat=2),
                          *itertools.product(STAGES, repeat=2), ("rebuild", "shard"), ("gc", "neighbors")])]
_FEW_ON_S3 = [("rebuild", "gc", 40), ("repair", "rebuild", 1)]


def race(template: Place, folder: Path, verbs: tuple[str, str], number: int, bucket: str = "") -> bool:
    """Pause a verb before one of its writes, run the other one, and check the laws.

    False if the first one ended before that write. If the other one waits for the first, the first one continues.
    """
    place = prepare_place(template, folder, verbs[0], bucket)
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
        check_published(place, unfinished=REMOVE_PUBLISHED if REMOVE_PUBLISHED in verbs else "")
        settle(place, stages=bool({*verbs} & {*STAGES}))
    except AssertionError as error:
        where = f"{' '.join(verbs)} paused before write {number} ({first.paused_before})"
        raise AssertionError(f"{where}:\n{error}") from None
    return event == "paused"


@pytest.mark.parametrize("verbs", [*_FAST, *(pytest.param(pair, marks=pytest.mark.slow) for pair in _SLOW
                                             if pair not in _FAST)], ids="-".join)
def test_a_pause_before_some_writes_keeps_the_laws(template: Place, tmp_path: Path, verbs: tuple[str, str]) -> None:
    writes = count_writes(template, tmp_path / "alone", verbs[0])
    # Each pair has another number, so that together they are a spread.
    number = (_PAIRS.index(verbs) * 7 + 3) % (writes - 1)
    race(template, tmp_path / "place", verbs, number)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "number"), _FEW_ON_S3)
def test_a_pause_before_a_write_on_s3_keeps_the_laws(template: Place, tmp_path: Path, s3: str, first: str, second: str,
                                                     number: int ) -> None:
    assert race(template, tmp_path / "place", (first, second), number, s3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verbs", _PAIRS, ids="-".join)
def test_a_pause_before_any_write_keeps_the_laws(template: Place, tmp_path: Path, verbs: tuple[str, str]) -> None:
    """RDM_SWEEP_STRIDE=3 pauses before every third write only."""
    sweep(lambda number: race(template, tmp_path / str(number), verbs, number))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verbs", [*itertools.product(PUBLISHING, repeat=2)], ids="-".join)
def test_a_pause_on_s3_keeps_the_laws(template: Place, tmp_path: Path, s3: str, verbs: tuple[str, str]) -> None:
    """A spread of six writes. RDM_SWEEP_STRIDE=1 pauses before every one."""
    writes = count_writes(template, tmp_path / "alone", verbs[0], s3)
    sweep(lambda number: race(template, tmp_path / str(number), verbs, number, s3), stride=max(writes // 6, 1))
