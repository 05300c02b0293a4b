"""A command that is killed before any of its writes leaves a root in order, and the same command ends well."""

from pathlib import Path

import pytest

from jobs.cli import verbs as cli_verbs
from tests.laws.crashes.roots import (
    REMOVE_PUBLISHED,
    RUNS,
    STAGES,
    VERBS,
    Place,
    check_published,
    count_writes,
    prepare_place,
    settle,
    sweep,
)

_READERS = {"recipes", "search", "show", "ls", "init", "doctor", "versions", "credits", "report", "status",
            "verify", "plan"}
_BY_THE_SAME_DRIVER = {"convert", "export", "evaluate", "style", "pipeline", "demo", "submit"}


def test_all_verbs_are_known() -> None:
    """A new verb that changes a root belongs into `roots.VERBS` or `roots.RUNS`."""
    verbs = {arguments[0] for arguments in (VERBS | RUNS).values()}
    assert verbs | _READERS | _BY_THE_SAME_DRIVER == {*cli_verbs.VERBS}


def test_forget_hides_an_image_of_each_version(template: Place, tmp_path: Path) -> None:
    """Otherwise the laws of `forget` say nothing."""
    place = prepare_place(template, tmp_path / "place", "forget")
    forgotten = place.run(place.arguments("forget"))
    assert forgotten.output.count("1 image, hidden from searches") == 3, forgotten


def kill_at(template: Place, folder: Path, verb: str, number: int, bucket: str = "") -> bool:
    """Kill a verb before one of its writes and check the laws; False if it ended before that write."""
    place = prepare_place(template, folder, verb, bucket)
    killed = place.commands.run(place.folder, place.root, place.arguments(verb), kill=number)
    if killed.code is not None:
        return False
    check_published(place, unfinished=verb)
    again = place.commands.run(place.folder, place.root, place.arguments(verb))
    assert again.code == 0, again
    check_published(place, unfinished=verb if verb == REMOVE_PUBLISHED else "")
    settle(place, stages=verb in STAGES)
    return True


@pytest.mark.parametrize("verb", VERBS)
def test_a_kill_before_some_writes_keeps_the_laws(template: Place, tmp_path: Path, verb: str) -> None:
    writes = count_writes(template, tmp_path / "whole", verb)
    assert writes > 5
    few = verb in STAGES or verb.startswith("repair-")
    for number in (writes * 2 // 3,) if few else (writes // 2, writes - 2):
        reached = kill_at(template, tmp_path / str(number), verb, number)
        assert reached or number == writes - 2  # a slow command also renews its lease and reports its progress


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", VERBS)
def test_a_kill_on_s3_keeps_the_laws(template: Place, tmp_path: Path, s3: str, verb: str) -> None:
    """A spread of eight writes. RDM_SWEEP_STRIDE=1 kills before every one."""
    writes = count_writes(template, tmp_path / "whole", verb, s3)
    sweep(lambda number: kill_at(template, tmp_path / str(number), verb, number, s3), stride=max(writes // 8, 1))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", VERBS)
def test_a_kill_before_any_write_keeps_the_laws(template: Place, tmp_path: Path, verb: str) -> None:
    """RDM_SWEEP_STRIDE=3 kills before every third write only."""
    sweep(lambda number: kill_at(template, tmp_path / str(number), verb, number))
