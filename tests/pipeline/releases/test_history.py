"""Entries of a history that are in the place of others get their places back, and a kill loses none of them."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.releases.history import history_folder, history_url, list_copies, list_history, read_entry, restore_places


class _Killed(BaseException):
    pass


def _entry(sequence: int) -> dict[str, Any]:
    return {"version": f"v{sequence}", "number": sequence, "sequence": sequence, "release": "0", "published": 0.0}


def _make(root: str, numbers: list[int]) -> None:
    """A history whose files 1, 2, ... have the entries of these numbers. The file of entry 0 is damaged."""
    for place, number in enumerate(numbers, 1):
        storage.put_json(_entry(number) if number else {}, history_url(root, "d", place))


def _kill_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """The write of that number ends this command in place of changing a file."""
    writes_left = itertools.count(number, -1)

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any) -> Any:
            if next(writes_left) == 0:
                raise _Killed
            return function(*arguments)
        return write

    patch.setattr(storage, "put_json", killing(storage.put_json))
    patch.setattr(storage, "remove", killing(storage.remove))


@pytest.mark.parametrize("numbers", [[2, 1], [2, 3, 1], [1, 1, 3], [3, 0, 2], [2, 2, 1]], ids=str)
def test_a_kill_before_any_write_loses_no_entry(tmp_path: Path, numbers: list[int]) -> None:
    expected = {number: _entry(number) for number in numbers if number}
    for number in itertools.count():
        root = str(tmp_path / str(number))
        _make(root, numbers)
        with pytest.MonkeyPatch.context() as patch:
            _kill_at(patch, number)
            try:
                restore_places(root, "d", lambda document: True)
                ended = True
            except _Killed:
                ended = False
        urls = [*list_history(root, "d"), *list_copies(root, "d")]
        assert {entry["sequence"]: entry for url in urls if (entry := read_entry(url))} == expected
        restore_places(root, "d", lambda document: True)
        assert all(read_entry(history_url(root, "d", place)) == entry for place, entry in expected.items())
        names = storage.list_names(history_folder(root, "d"))
        assert {int(name.removesuffix(".json")) for name in names} >= {*expected}
        if ended:
            assert number
            return
