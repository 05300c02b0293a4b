"""Claim the folder of a stage: write its plan, or compare the plan that is there."""

import bisect
import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.stages import records
from pipeline.stages.documents import FORMAT, check_more_items, check_plan, check_release
from pipeline.stages.manifest import code_revision
from pipeline.stages.scratch import scratch_folder
from pipeline.stages.stage import Stage, fingerprint
from pipeline.stages.types import Claim, Item, PlanReplaced, StageFailed
from pipeline.storage.hashing import name_by_content


def prepare(stage: Stage) -> Sequence[Item]:
    """Claim the folder of `stage`: write plan.json, or find that the one there is ours.

    ValueError naming the field that differs where the folder is claimed by other settings or inputs.
    """
    return claim_folder(stage)[0]


def claim_folder(stage: Stage) -> tuple[Sequence[Item], bool]:
    """The items of a folder that is ours now, and whether its plan was there before, or another driver came first."""
    inputs = stage.inputs()
    url = storage.join(stage.folder, "plan.json")
    joined = storage.exists(url)
    if not joined:
        listed = write_item_list(stage.plan(), "items", partial(_put_beside_plan, stage))
        joined = not _create_plan(stage, inputs, listed)
    stamp, plan = storage.stamp(url), storage.read_json(url)
    check_plan(plan, url)
    later = (stage.optional_inputs | stage.growing_inputs) - plan["inputs"].keys()
    inputs = {name: described for name, described in inputs.items() if name not in later}
    inputs |= {name: plan["inputs"][name] for name in stage.growing_inputs & inputs.keys()}
    if plan["fingerprint"] != fingerprint(stage, inputs):
        raise ValueError(_disagreement(stage, plan, inputs))
    stage.claim = Claim(plan["fingerprint"], plan["inputs"], stamp)
    return _all_items(stage.folder, plan), joined


def replace_plan(stage: Stage) -> bool:
    """Remove the folder of `stage` and write a new plan there; False if another driver wrote one first.

    Everything is planned before anything is removed: a plan that fails costs nothing. The files that items carry wait
    in a scratch folder.
    """
    inputs = stage.inputs()
    with scratch_folder(f"{stage.name}-plan") as scratch:
        (carried := scratch / "carried").mkdir()
        listed = write_item_list(stage.plan(), "items", partial(_write_local, carried))
        _refuse_empty(stage, listed)
        _refuse_released(stage)
        empty_folder(stage.folder)
        for name, _ in sorted(storage.walk(str(carried))):
            storage.put_file(carried / name, storage.join(stage.folder, name), give=True)
    return _create_plan(stage, inputs, listed)


def _create_plan(stage: Stage, inputs: dict[str, dict[str, Any]], listed: Any) -> bool:
    """Write plan.json unless there is one; whether it was written."""
    _refuse_empty(stage, listed)
    return storage.create_bytes(storage.json_bytes({
        "format": FORMAT, "stage": stage.name, "fingerprint": fingerprint(stage, inputs), "section": stage.section(),
        "inputs": inputs, "items": listed, "code": code_revision(),
    }), storage.join(stage.folder, "plan.json"))


def _refuse_empty(stage: Stage, listed: Any) -> None:
    if not records.count(listed):
        raise ValueError(f"{stage.name}: nothing to do: the inputs of {stage.folder} are empty")


def _refuse_released(stage: Stage) -> None:
    """StageFailed if the folder belongs to a release: another command may have published it since this one began."""
    if _is_released(stage):
        raise StageFailed(f"{stage.name}: {stage.folder} was published while this command began, and a published "
                          f"version never changes\nhint: {stage.alternative}")


def _is_released(stage: Stage) -> bool:
    version, _, name = stage.folder.rpartition("/")
    try:
        url = storage.join(version, "release.json")
        return name in check_release(storage.read_json(url), url)["manifests"]
    except FileNotFoundError:
        return False


def _put_beside_plan(stage: Stage, name: str, data: bytes) -> None:
    storage.put_bytes(data, storage.join(stage.folder, name))


def _write_local(folder: Path, name: str, data: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def read_claim(folder: str) -> Claim:
    """The claim of a folder: the facts of its plan that concern all items."""
    url = storage.join(folder, "plan.json")
    stamp, plan = storage.stamp(url), check_plan(storage.read_json(url), url)
    return Claim(plan["fingerprint"], plan["inputs"], stamp)


def claim_of(stage: Stage) -> Claim:
    """The claim of a stage. It is read from the plan if no driver claimed the folder in this process."""
    if stage.claim is None:
        stage.claim = read_claim(stage.folder)
    return stage.claim


def refuse_replaced_plan(stage: Stage) -> None:
    """PlanReplaced if the plan in the folder of a stage is not the one that the stage works on."""
    claim = claim_of(stage)
    try:
        if storage.stamp(storage.join(stage.folder, "plan.json")) == claim.stamp != "":
            return
        there = read_claim(stage.folder).fingerprint
    except FileNotFoundError:
        there = "no plan"
    if there != claim.fingerprint:
        raise PlanReplaced(f"{stage.name}: {stage.folder} was planned again or removed while this command ran: "
                           f"expected the plan {claim.fingerprint[:12]}, got {there[:12]}\n"
                           f"hint: {stage.replacement}, once no other command works on this folder")


def read_items(folder: str) -> Sequence[Item]:
    """The items of the plan in a stage folder, and those that were added to it."""
    url = storage.join(folder, "plan.json")
    return _all_items(folder, check_plan(storage.read_json(url), url))


def _all_items(folder: str, plan: dict[str, Any]) -> Sequence[Item]:
    more = storage.join(folder, "more")
    urls = [storage.join(more, name) for name in storage.list_files(more)]
    documents = [plan, *(check_more_items(storage.read_json(url), url) for url in urls)]
    parts = [load_items(folder, document["items"]) for document in documents]
    return _Joined(parts) if len(parts) > 1 else parts[0]


def count_rows(stage: Stage, items: Sequence[Item]) -> int:
    """How many rows the items of a plan are about, 0 if that is not known; DamagedFile if an item does not say it."""
    try:
        return sum(map(stage.rows, items))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise storage.DamagedFile(f"the items in {storage.join(stage.folder, 'plan.json')} are damaged: {error!r}\n"
                                  f"hint: {stage.replacement}") from error


def write_item_list(items: Iterable[Item], name: str, put: Callable[[str, bytes], None]) -> Any:
    """The list of items as a plan holds it; `put` gets the files (name, content) that belong beside the plan."""
    ready = ({"id": item.id, "inputs": item.inputs} for item in _carried(items, put))
    few = list(itertools.islice(ready, records.INLINE + 1))
    if len(few) <= records.INLINE:
        return few
    data = records.items_to_bytes(itertools.chain(few, ready))
    name = name_by_content(f"{name}.parquet", data)
    put(name, data)
    return records.reference(name, data, len(records.items(data, Item)))


def write_more_items(stage: Stage, items: Iterable[Item], number: int) -> tuple[bool, bool]:
    """Add the round `number` of items to a plan; whether there are any, and whether another driver added them first."""
    listed = write_item_list(items, f"more-{number:04d}", partial(_put_beside_plan, stage))
    if not records.count(listed):
        return False, False
    url = storage.join(stage.folder, "more", f"{number:04d}.json")
    return True, not storage.create_bytes(storage.json_bytes({"items": listed}), url)


def _carried(items: Iterable[Item], put: Callable[[str, bytes], None]) -> Iterator[Item]:
    for item in items:
        for name, data in item.carries:
            put(name, data)
        yield item


def load_items(folder: str, listed: Any) -> Sequence[Item]:
    """The items of a plan, from its list or from the parquet file that the list names."""
    if isinstance(listed, list):
        return [Item(planned["id"], planned["inputs"]) for planned in listed]
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
        return [item_id for part in self._parts for item_id in item_ids(part)]


def item_ids(items: Sequence[Item]) -> list[str]:
    """The ids of items, without unpacking long lists."""
    return items.ids() if isinstance(items, records.Rows | _Joined) else [item.id for item in items]


@contextlib.contextmanager
def hold_folder(stage: Stage, *, exclusive: bool = False) -> Iterator[storage.Lease]:
    """A lease on the folder of a stage; StageFailed if an exclusive one cannot be had, for others work there."""
    with contextlib.ExitStack() as stack:
        try:
            lease = stack.enter_context(storage.hold_lease(stage.root, stage.path, exclusive=exclusive))
        except storage.LeaseConflict as error:
            raise StageFailed(f"{stage.name}: {error}") from None
        yield lease


def clear_folder(stage: Stage) -> None:
    """Remove the folder of a stage; StageFailed if another command works there."""
    if storage.exists(storage.join(stage.folder, "plan.json")):
        with hold_folder(stage, exclusive=True):
            empty_folder(stage.folder)


def clear_finished(stage: Stage) -> None:
    """Remove the folder of a stage that nothing needs any more. The last command that works there does it."""
    with contextlib.suppress(StageFailed):
        clear_folder(stage)


def empty_folder(folder: str) -> None:
    """Remove a folder. The order matters: a process that is killed leaves no old result for a new plan."""
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
    moved = [name for name, described in inputs.items() if described != claimed["inputs"].get(name)]
    changed = f"; what it is made from has changed: {', '.join(moved)}" if moved else ""
    more = (f"; or python -m jobs rebuild {stage.path.split('/')[1]} --source SOURCE" if _is_released(stage) else
            f"; or replace this one: {stage.replacement}")
    return (f"{stage.folder} was planned with other settings or inputs ({differing}){changed}\n"
            f"hint: {stage.alternative}{more}")


_UNSET = object()


def _differences(there: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(there, dict) and isinstance(now, dict):
        for key in sorted(there.keys() | now.keys()):
            yield from _differences(there.get(key, _UNSET), now.get(key, _UNSET), f"{prefix}.{key}".strip("."))
    elif there != now:
        yield prefix, _short(there), _short(now)


def _short(value: Any) -> str:
    text = "not set" if value is _UNSET else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
