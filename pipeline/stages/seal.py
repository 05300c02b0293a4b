"""Collect the records of all items and write the manifest."""

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from pipeline import storage
from pipeline.stages import records
from pipeline.stages.documents import TIME_FORMAT, check_manifest, check_plan, check_record, refuse_outside_files
from pipeline.stages.manifest import code_revision, read_manifest, stale_inputs
from pipeline.stages.plan import claim_of, item_ids, refuse_replaced_plan
from pipeline.stages.records import content, totals
from pipeline.stages.scratch import scratch_folder
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, StageFailed
from pipeline.storage.hashing import describe_file, name_by_content

_AT_ONCE = 5000  # records in memory as dicts
_log = logging.getLogger(__name__)
_NAMED: set[str] = set()  # damaged records that the log of this process has


def read_records(stage: Stage, ids: Sequence[str]) -> records.Collected:
    """The records of the items `ids`. Records of another plan and damaged records do not count."""
    folder = storage.join(stage.folder, "records")
    plan = claim_of(stage).fingerprint
    packs = storage.join(stage.folder, "packs", plan[:12])
    collected = records.Collected(partial(_pack, packs))
    names = storage.list_files(folder)
    for name in storage.list_files(packs):
        _add_pack(collected, storage.join(packs, name))
    alone = {item_id for name in names if (item_id := name.removesuffix(".json")) not in collected.ids}
    missing = [item_id for item_id in ids if item_id in alone]
    for first in range(0, len(missing), _AT_ONCE):
        urls = [storage.join(folder, f"{item_id}.json") for item_id in missing[first:first + _AT_ONCE]]
        for record in storage.map_urls(partial(read_record, stage), urls):
            if record is not None:
                collected.add(record)
    return collected


def read_record(stage: Stage, url: str) -> dict[str, Any] | None:
    """The record at `url`. None if it is missing, damaged, or of another plan: the driver then makes the item again."""
    try:
        record = check_record(storage.read_json(url), url, stage.record_info)
        if any(storage.is_whole_address(entry["name"]) for entry in record["files"]):
            refuse_outside_files({"stage": stage.name, "section": stage.section(), "items": [record], "files": []}, url)
    except FileNotFoundError:
        return None
    except storage.DamagedFile as error:
        if url not in _NAMED:
            _NAMED.add(url)
            _log.warning("%s: %s; the item is processed again", stage.name, storage.first_line(error))
        return None
    return record if record["plan"] == claim_of(stage).fingerprint else None


def _add_pack(collected: records.Collected, url: str) -> None:
    try:
        collected.add_pack(storage.read_bytes(url))
    except (ValueError, OSError) as error:  # Arrow's errors are of these kinds
        if isinstance(error, storage.StorageError):
            raise
        _log.warning("%s is damaged (%s): this command reads its records one by one", url, storage.first_line(error))


def _pack(folder: str, data: bytes) -> None:
    """Store thousands of records in one file, so that a resumed stage does not read a million files."""
    storage.put_bytes(data, storage.join(folder, name_by_content("records.parquet", data)))


def seal_stage(stage: Stage, items: Sequence[Item], done: Sequence[dict[str, Any]] | None = None,
               retired: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Write manifest.json from the records of all items; the folder is finished from then on.

    StageFailed if an item has no record, or an input changed since the plan. PlanReplaced if the plan is another now.
    """
    ids = item_ids(items)
    if done is None:
        done = read_records(stage, ids).in_order(ids)
    if len(done) != len(ids):
        missing = sorted(set(ids) - {record["id"] for record in done})
        raise StageFailed(f"{stage.name}: {len(missing)} of {len(ids)} items have no record, the first is "
                          f"{missing[0]}\nhint: run the same command again")
    with scratch_folder(f"{stage.name}-seal") as scratch:
        extra = stage.finish(done, scratch)
        described = [describe_file(name, path) for name, path in sorted(extra.files.items())]
        if stale := stale_inputs(stage, claim_of(stage)):
            raise StageFailed(stale)
        for name, path in sorted(extra.files.items()):
            storage.put_checked(path, storage.join(stage.folder, name), partial(refuse_replaced_plan, stage))
    url = storage.join(stage.folder, "plan.json")
    plan = check_plan(storage.read_json(url), url)
    refuse_replaced_plan(stage)
    manifest = {key: plan[key] for key in ("format", "stage", "fingerprint", "section", "inputs")} | {
        "items": done, "files": described, "info": extra.info, "totals": totals(done),
        "content": content(plan["fingerprint"], described, done), "run": _run_facts(done, retired)}
    return _create_manifest(stage, manifest, storage.json_bytes(manifest | {"items": _listed(stage, done)}))


def _create_manifest(stage: Stage, manifest: dict[str, Any], data: bytes) -> dict[str, Any]:
    """Write manifest.json, or accept the one that another driver of the same plan wrote: a release may name its hash.

    A manifest of another plan is replaced: a driver that was late wrote it.
    """
    url = storage.join(stage.folder, "manifest.json")
    while not storage.create_bytes(data, url):
        there = storage.read_bytes(url)
        sealed = check_manifest(storage.parse_json(there, url), url)
        if sealed.get("fingerprint") == manifest["fingerprint"]:
            if sealed["content"] != manifest["content"]:
                raise StageFailed(f"{stage.name}: another command sealed {stage.folder} with other content: expected "
                                  f"{manifest['content'][:12]}, got {sealed['content'][:12]}\n"
                                  f"hint: {stage.replacement}, once no other command works on this folder")
            return read_manifest(stage.folder, stage.command)
        refuse_replaced_plan(stage)
        if storage.swap_bytes(data, url, there):
            break
    return manifest


def _run_facts(done: Sequence[dict[str, Any]], retired: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts of a manifest about the run, not the result: date, code, seconds, devices, retired workers."""
    facts: dict[str, Any] = {"sealed": time.strftime(TIME_FORMAT, time.gmtime()), "code": code_revision(),
                             "seconds": round(records.seconds(done), 3)}
    if any(devices := records.devices(done)):
        facts["devices"] = devices
    if retired:
        facts["retired"] = list(retired)
    if halved := records.halved(done):
        facts["items_with_halved_batches"] = halved
    return facts


def _listed(stage: Stage, done: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | dict[str, Any]:
    """The records as manifest.json holds them: all of them, or a reference to a file beside it that this writes."""
    if len(done) <= records.INLINE:
        return list(done)
    data = done.data if isinstance(done, records.Rows) else records.to_bytes([records.table(done)])
    listed = records.reference(name_by_content("manifest.parquet", data), data, len(done))
    storage.put_bytes(data, storage.join(stage.folder, listed["file"]["name"]))
    return listed
