"""Claim the folder of a stage: write its plan, or compare the plan that is there."""

import bisect
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from pipeline import storage
from pipeline.stages import records
from pipeline.stages.manifest import code_revision
from pipeline.stages.stage import FORMAT, Stage, fingerprint
from pipeline.stages.types import Item
from pipeline.storage.hashing import name_by_content

_PLAN_KEYS = {"format", "stage", "fingerprint", "section", "inputs", "items"}


def prepare(stage: Stage) -> Sequence[Item]:
    """Claim the folder of `stage`: write plan.json, or find that the one there is ours.

    ValueError naming the field that differs where the folder is claimed by other settings or inputs.
    """
    return claim_folder(stage)[0]


def claim_folder(stage: Stage) -> tuple[Sequence[Item], bool]:
    """The items of a folder that is ours now, and whether it was before, or another driver came first."""
    inputs = stage.inputs()
    print_ = fingerprint(stage, inputs)
    address = storage.join(stage.folder, "plan.json")
    joined = storage.exists(address)
    if not joined:
        listed = write_item_list(stage, stage.plan(), "items")
        if not records.count(listed):
            raise ValueError(f"{stage.name}: nothing to do: the inputs of {stage.folder} are empty")
        joined = not storage.create_bytes(storage.json_bytes({
            "format": FORMAT, "stage": stage.name, "fingerprint": print_, "section": stage.section(),
            "inputs": inputs, "items": listed, "code": code_revision(),
        }), address)
    claimed = storage.read_json(address)
    if not isinstance(claimed, dict) or not claimed.keys() >= _PLAN_KEYS:
        raise ValueError(f"{address} is damaged\nhint: --rebuild makes this folder anew")
    if claimed["fingerprint"] != print_:
        raise ValueError(_disagreement(stage, claimed, inputs))
    return read_items(stage.folder), joined


def read_items(folder: str) -> Sequence[Item]:
    """The items of the plan in a stage folder, and those that were added to it."""
    more = storage.join(folder, "more")
    documents = [storage.join(folder, "plan.json"), *(storage.join(more, name) for name in storage.list_files(more))]
    parts = [load_items(folder, storage.read_json(document)["items"]) for document in documents]
    return _Joined(parts) if len(parts) > 1 else parts[0]


def write_item_list(stage: Stage, items: Iterable[Item], name: str) -> Any:
    """Put what the items carry in place, and give their list as a plan holds it."""
    ready = ({"id": item.id, "inputs": item.inputs} for item in _carried(stage, items))
    few = list(itertools.islice(ready, records.INLINE + 1))
    if len(few) <= records.INLINE:
        return few
    data = records.items_to_bytes(itertools.chain(few, ready))
    name = name_by_content(f"{name}.parquet", data)
    storage.put_bytes(data, storage.join(stage.folder, name))
    return records.reference(name, data, len(records.items(data, Item)))


def _carried(stage: Stage, items: Iterable[Item]) -> Iterator[Item]:
    for item in items:
        for carried, data in item.carries:
            storage.put_bytes(data, storage.join(stage.folder, carried))
        yield item


def load_items(folder: str, listed: Any) -> Sequence[Item]:
    if isinstance(listed, list):
        return [Item(one["id"], one["inputs"]) for one in listed]
    return records.load(folder, listed, partial(records.items, element=Item))


class _Joined(Sequence[Item]):
    """Lists of items one after the other, none of them unpacked."""

    def __init__(self, parts: Sequence[Sequence[Item]]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[Item]:
        return itertools.chain.from_iterable(self._parts)

    def ids(self) -> list[str]:
        """The ids alone, in order."""
        return [one for part in self._parts for one in item_ids(part)]


def plan_fingerprint(folder: str) -> str:
    """The fingerprint that the plan of a folder fixed."""
    return storage.read_json(storage.join(folder, "plan.json"))["fingerprint"]


def item_ids(items: Sequence[Item]) -> list[str]:
    return items.ids() if isinstance(items, records.Rows | _Joined) else [item.id for item in items]


def check_and_clear(stage: Stage) -> None:
    """Remove the folder of a stage that can be planned; what cannot must not cost what is there."""
    stage.inputs()
    for _ in stage.plan():
        pass
    clear_folder(stage)


def clear_folder(stage: Stage) -> None:
    """Remove the folder of a stage, in an order such that whoever is killed leaves no old result for a new plan."""
    folder = stage.folder
    if storage.exists(storage.join(folder, "plan.json")):
        storage.remove(storage.join(folder, "manifest.json"))
        for name in [*storage.list_folders(folder), *storage.list_files(folder)]:
            if name != "plan.json":
                storage.remove_tree(storage.join(folder, name))
        storage.remove_tree(folder)


def _disagreement(stage: Stage, claimed: dict[str, Any], inputs: dict[str, Any]) -> str:
    wanted = {"format": FORMAT, "stage": stage.name, "section": stage.section(), "inputs": inputs}
    differing = "; ".join(f"{field}: there {there}, now {now}" for field, there, now in
                          _differences({key: claimed[key] for key in wanted}, wanted))
    moved = [name for name, one in inputs.items() if one != claimed["inputs"].get(name)]
    changed = f"; what it is made from has changed: {', '.join(moved)}" if moved else ""
    return (f"{stage.folder} was planned with other settings or inputs ({differing}){changed}\n"
            f"hint: {stage.elsewhere}, or make this one anew with --rebuild")


def _differences(there: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(there, dict) and isinstance(now, dict):
        for key in sorted(there.keys() | now.keys()):
            yield from _differences(there.get(key, "absent"), now.get(key, "absent"), f"{prefix}.{key}".strip("."))
    elif there != now:
        yield prefix, _short(there), _short(now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
