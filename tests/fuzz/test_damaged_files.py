"""Files that others wrote are read, or refused by a sentence that names them, within limits of memory and time.

The known damaged files are read in every run of the tests. `make fuzz` looks for others: it ends after FUZZ_SECONDS
(600) of looking, shared among the formats.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.child import Broken, Child
from tests.fuzz.samples import Format, formats, write_whole

_SECONDS = float(os.environ.get("FUZZ_SECONDS", "600"))
_NAMES = ("bz2", "captions_csv", "captions_jsonl", "captions_parquet", "checkpoint_json", "ckpt", "csv", "failure",
          "fault", "gates", "gz", "index", "jsonl", "keys", "lease", "manifest", "mark", "metrics", "more_items", "npy",
          "npz", "parquet", "plan", "pointer", "progress", "record", "records", "release", "report", "run",
          "safetensors", "takedown_copy", "takedowns", "tar", "toml", "tsv", "zst")


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    folder = tmp_path_factory.mktemp("fuzz")
    write_whole(folder)
    child = Child(folder)
    yield child
    child.close()


def _read(child: Child, form: Format, reader: str, data: bytes) -> dict[str, str]:
    return child.read(reader, data, form.name, [child.folder / name for name in form.companions])


def test_every_format_is_listed() -> None:
    assert sorted(formats()) == list(_NAMES)


@pytest.mark.parametrize("name", _NAMES)
def test_known_damaged_files_are_refused_or_read(child: Child, name: str) -> None:
    form, broken = formats()[name], []
    for reader in form.readers:
        for data in form.damaged:
            try:
                _read(child, form, reader, data)
            except Broken as error:
                broken.append(f"{data[:80]!r}: {error}")
    assert not broken, "\n\n".join(broken)


@pytest.mark.parametrize("name", _NAMES)
def test_undamaged_files_are_read(child: Child, name: str) -> None:
    form = formats()[name]
    results = [_read(child, form, reader, form.whole[0]) for reader in form.readers if (name, reader) not in {
        # Weights of this project are no checkpoint of CompVis.
        ("safetensors", "compvis"), ("ckpt", "compvis")}]
    assert [result["result"] for result in results] == ["read"] * len(results), results


_HUGE = st.sampled_from([2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**6, 0, 1])


@st.composite
def _edited(draw: st.DrawFn, whole: tuple[bytes, ...]) -> bytes:
    """A whole file with a few edits."""
    data = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["byte", "cut", "remove", "insert", "repeat", "number"]))
        if kind == "byte" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place:]
        elif kind == "remove":
            del data[place:place + draw(st.integers(1, 64))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=32))
        elif kind == "repeat":
            data[place:place] = data[place:place + draw(st.integers(1, 64))] * draw(st.integers(1, 20))
        else:
            width = draw(st.sampled_from([4, 8]))
            data[place:place + width] = draw(_HUGE).to_bytes(8, "little")[:width]
    return bytes(data)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=5)


@st.composite
def _changed(draw: st.DrawFn, text: bytes) -> bytes:
    """A JSON document with another value in some places."""
    document: Any = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = None
        value, place = document, None
        while isinstance(value, dict | list) and value and (parent is None or draw(st.booleans())):
            parent = value
            place = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
            value = parent[place]
        if parent is not None:
            parent[place] = draw(_VALUES)
    return json.dumps(document).encode()


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", _NAMES)
def test_random_damaged_files_are_refused_or_read(child: Child, name: str) -> None:
    form = formats()[name]
    end = time.monotonic() + _SECONDS / len(_NAMES)
    broken: list[tuple[bytes, str]] = []
    files = _edited(form.whole) | st.binary(max_size=300)
    if form.name.endswith(".json"):
        files = _changed(form.whole[0]) | files

    @seed(int(os.environ.get("FUZZ_SEED", time.time_ns())))
    @settings(max_examples=1_000_000, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate, Phase.shrink])
    @given(files, st.sampled_from(form.readers))
    def look(data: bytes, reader: str) -> None:
        if time.monotonic() > end:
            pytest.skip("the time is over")
        try:
            _read(child, form, reader, data)
        except Broken as error:
            broken.append((data, str(error)))
            raise

    with contextlib.suppress(pytest.skip.Exception, Broken):
        look()
    if broken:
        data, error = min(broken, key=lambda pair: len(pair[0]))
        pytest.fail(f"{error}\nthe file: {data!r}")
