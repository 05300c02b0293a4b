"""A source -> the next published version of a dataset: build what is new, check the gates, swap the pointer.

The same command resumes the version that was begun for the same source. Another source gets another version.
"""

import contextlib
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from jobs.publishing.config import RebuildConfig
from jobs.publishing.consumers import list_consumer_encoders
from jobs.publishing.whole_versions import describe_missing, find_release_fault
from jobs.telemetry import logs
from pipeline import storage
from pipeline.datasets.dataset import RELEASED_STAGES, Dataset
from pipeline.datasets.names import version_number
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import dataset_encoder
from pipeline.indices.choose import budget_bytes
from pipeline.indices.config import IndexConfig
from pipeline.indices.extend import Drifted, Extension
from pipeline.indices.index import Index, build_index
from pipeline.indices.searcher import search_kind
from pipeline.releases import release_files, version_marks
from pipeline.releases.published import Published
from pipeline.releases.release_files import find_missing_files
from pipeline.releases.signatures import ReleaseKeys, read_release_keys
from pipeline.scores.config import ScoreConfig
from pipeline.scores.score import Score
from pipeline.sources.config import ShardConfig
from pipeline.stages.documents import check_plan, check_shape
from pipeline.stages.plan import clear_folder
from pipeline.stages.scratch import scratch_folder
from pipeline.stages.stage import Stage
from pipeline.stages.types import StageFailed, count_row_failures
from pipeline.takedowns import takedown_list, takedowns
from pipeline.takedowns.hidden_rows import Tombstones
from pipeline.versions import gates
from pipeline.versions.compare_files import Compare
from pipeline.versions.gates import Gate
from pipeline.versions.listing import DEAD
from pipeline.versions.retry_formats import read_last_listing
from pipeline.versions.reuse_embeddings import Reuse, ReuseCaptions
from pipeline.versions.source_diff import Hashes, SourceDiff
from pipeline.versions.update_shards import Update

_log = logging.getLogger(__name__)
_CLAIM = "rebuild.json"
_CLAIM_SHAPE = {"digest": str, "source": str, "from": (str, type(None))}
_COUNTS = ("kept", "added", "changed", "removed", "forgotten")
Seal = Callable[[Stage], dict[str, Any]]


class GatesFailed(StageFailed):
    """A version is not published, because it fails a gate."""


class Rebuild:
    """One rebuild: a source, the published version, and the next version."""

    def __init__(self, root: str, name: str, shard: ShardConfig, embed: EmbedConfig, index: IndexConfig,
                 config: RebuildConfig, keys: ReleaseKeys | None = None) -> None:
        self.root, self.name = root, name
        self.shard, self.embed, self.index, self.config = shard, embed, index, config
        self.keys = read_release_keys() if keys is None else keys
        self.before = Published.load(root, name, self.keys)
        if not storage.can_swap(self.before.folder):
            raise ValueError(f"the store of {root} ignores If-Match and If-None-Match of a write: two rebuilds could "
                             f"publish at the same time\nhint: a store that obeys them (AWS S3, MinIO, R2), or a file "
                             f"system")
        if shard.duplicates != "keep":
            raise ValueError(f"a rebuild takes every image of the source, so it cannot remove duplicates: expected "
                             f"shard.duplicates = keep, got {shard.duplicates}\nhint: --duplicates keep")
        with contextlib.ExitStack() as stack:
            scratch = stack.enter_context(scratch_folder("rebuild"))
            self.source = SourceDiff.read(shard, takedown_list.read_takedowns(root), str(scratch))
            weakref.finalize(self, stack.pop_all().close)  # removes the scratch folder with this object
        if not self.source.count:
            raise ValueError(f"{', '.join(shard.source)} has no usable image: nothing is published")

    @cached_property
    def last(self) -> Dataset | None:
        """The published version, if any part of it can be reused."""
        if self.config.full or (last := self._base) is None:
            return None
        now = Update.section_of(self.shard)
        there = {key: value for key, value in last.manifest("shards")["section"].items() if key != "rewrite"}
        if differing := sorted(key for key in now.keys() | there.keys() if there.get(key) != now.get(key)):
            _log.info("rebuild: %s was made with other settings (%s): nothing is reused", last.label,
                      ", ".join(differing))
            return None
        return last

    @cached_property
    def _base(self) -> Dataset | None:
        return self._open_base(self.before)

    def _open_base(self, before: Published) -> Dataset | None:
        """The published version. None if nothing is published, or if it is damaged and needs a replacement."""
        if not before.version:
            return None
        fault = ""
        try:
            base = before.open()
            tuple(map(base.is_sealed, RELEASED_STAGES))  # refuses one that the signature does not name
            read = self.config.full or self.config.thorough
            if missing := find_missing_files(base, dict(base.trusted), read=read):
                fault = describe_missing(missing)
        except ValueError as error:
            fault = storage.first_line(error)
        if not fault:
            return base
        if Published.load(self.root, self.name, self.keys).version != before.version:
            raise StageFailed(f"another command published or removed a version of {self.name} meanwhile\n"
                              f"hint: run the same command again")
        _log.warning("rebuild: the published %s@%s is damaged (%s): every image is read again, and the gates do not "
                     "compare with it", self.name, before.version, fault)
        return None

    def forecast(self) -> dict[str, Any]:
        """Estimate a rebuild from the names, sizes and times of the source. Writes nothing."""
        before = read_last_listing(self.last)
        diff = self.source.against(before, Hashes.none())
        return {"dataset": self.name, "published": self.before.version or None,
                **{name: diff.counts[name] for name in _COUNTS}, "to_be_read": len(self.source.suspects(before))}

    def claim(self) -> tuple[Dataset, bool]:
        """The version to make, begun for this source or the next free number, and whether it was published before."""
        last = self.last
        source = storage.digest([self.source.digest, Update.section_of(self.shard), self._settings()])
        claim = {"digest": storage.digest([source, self.config.rewrite, self.config.thorough, last is None,
                                         self.before.document.get("content", "")]), "source": source,
                 "from": self.before.version or None}
        data = storage.json_bytes(claim)
        past = {document["version"] for document in Published.load(self.root, self.name, self.keys).history()}
        broken = set()
        for version in reversed(self.before.versions()):
            if version_number(version) <= self.before.number or self._is_gone(version):
                continue
            earlier = self._claimed(version)
            # A version that was rolled back stays so, unless the published one needs a replacement.
            if not earlier or not (earlier == claim or (
                    version in past and earlier["source"] == source and self._base)):
                continue
            if not (fault := find_release_fault(Dataset(self.root, self.name, version))):
                return Dataset(self.root, self.name, version), version in past
            _log.warning("rebuild: %s@%s is unpublished and damaged (%s): this command makes another version",
                         self.name, version, fault)
            broken.add(version)
        number = self.before.number
        while True:
            number += 1
            version = f"v{number}"
            # If two rebuilds begin at the same time, the second one finds the claim of the first.
            if version not in broken and not self._taken(version) and (
                    storage.create_bytes(data, self._address(version)) or self._claimed(version) == claim):
                return Dataset(self.root, self.name, version), False

    def _taken(self, version: str) -> bool:
        """Whether a version was made by hand or was removed. Such a version has no claim and cannot be claimed."""
        base = storage.join(self.before.folder, version)
        return self._is_gone(version) or (self._claimed(version) is None and any(
            storage.exists(storage.join(base, file))
            for file in ("release.json", *(f"{stage}/plan.json" for stage in RELEASED_STAGES))))

    def _is_gone(self, version: str) -> bool:
        return version_marks.is_removing(Dataset(self.root, self.name, version))

    def _settings(self) -> list[Any]:
        embedding = Reuse(Dataset(self.root, self.name), self.embed, None).section()
        scoring = [[score.path.rpartition("/")[2], score.section()] for score in
                   self._scores(Dataset(self.root, self.name))]
        return [embedding, Index(Dataset(self.root, self.name), self.index).section(), self.config.embed_captions,
                *([scoring, self.config.hide] if scoring or self.config.hide else [])]

    def _scores(self, dataset: Dataset) -> list[Score]:
        return [Score(dataset, spec, ScoreConfig()) for spec in self.config.scores]

    def _address(self, version: str) -> str:
        return storage.join(self.before.folder, version, _CLAIM)

    def _claimed(self, version: str) -> Any:
        try:
            return check_shape(storage.read_json(self._address(version)), self._address(version), _CLAIM_SHAPE, "")
        except (FileNotFoundError, ValueError):
            return None

    def compare(self, dataset: Dataset, seal: Seal) -> SourceDiff:
        """Compare the source with the last version. Reads the files whose size, time or ETag changed."""
        before = read_last_listing(self.last)
        suspects = self.source.suspects(before)
        if self.config.thorough and before.num_rows and self.source.source.fetch == "file":
            suspects = np.arange(self.source.count)
        if not len(suspects):
            return self.source.against(before, Hashes.none())
        stage = Compare(dataset, self.source, suspects)
        return self.source.against(before, stage.hashes(seal(stage)))

    def build(self, dataset: Dataset, diff: SourceDiff, seal: Seal) -> None:
        """Make every stage of the version."""
        last = self.last
        seal(Update(dataset, self.shard, last, diff, self.config.rewrite))
        seal(Reuse(dataset, self.embed, last))
        if self.config.embed_captions or (last and last.is_sealed("text_embeddings")):
            seal(ReuseCaptions(dataset, self.embed, last))
        for score in self._scores(dataset):
            seal(score)
        dead = storage.join(dataset.folder("shards"), DEAD)
        if storage.exists(dead) or self.config.hide:
            seal(Tombstones(dataset, dead if storage.exists(dead) else "", self.config.hide))
        self._index(dataset, last, seal)

    def _index(self, dataset: Dataset, last: Dataset | None, seal: Seal) -> None:
        if dataset.is_sealed("index"):
            return
        whole = Index(dataset, self.index)
        begun = self._begun_index(whole)  # perhaps with another --retrain
        if last and (begun == "extended" or (not begun and self._extends(dataset, last))):
            try:
                seal(Extension(dataset, last, self.index))
                return
            except Drifted as error:
                _log.info("%s; training it again", storage.first_line(error))
                clear_folder(whole)
        build_index(whole, seal)

    def _begun_index(self, whole: Index) -> str:
        """How an index was planned: `whole` (trained from the start) or `extended`; "" without a plan."""
        plan = storage.join(whole.folder, "plan.json")
        inputs = check_plan(storage.read_json(plan), plan)["inputs"] if storage.exists(plan) else None
        return "" if inputs is None else "extended" if "base" in inputs else "whole"

    def _extends(self, dataset: Dataset, last: Dataset) -> bool:
        """Whether the index of the last version can be taken over."""
        counts = dataset.manifest("shards")["info"]["change"]
        moved = sum(counts.get(name, 0) for name in ("added", "changed", "removed", "forgotten"))
        if (share := moved / max(sum(counts.values()), 1)) > self.config.retrain:
            _log.info("rebuild: %.0f %% of the images changed: the index is trained again", 100 * share)
            return False
        count = sum(counts.get(name, 0) for name in ("kept", "added", "changed"))
        if last.manifest("index")["info"]["bytes_per_vector"] * count > budget_bytes(count, self.index):
            _log.info("rebuild: the extended index would be larger than its limit: the index is trained again")
            return False
        return (search_kind(last) != "graph" and dataset_encoder(last) == dataset_encoder(dataset))

    def judge(self, dataset: Dataset, before: Published) -> tuple[list[Gate], list[str]]:
        """The gates of a version against the published version, and the texts of their queries."""
        base = self._open_base(before)
        release = release_files.read_release(base)[0] if base else None
        texts = gates.choose_queries(self.config.gates, release, dataset)
        pinned = {} if self.config.allow_encoder else list_consumer_encoders(self.root, self.name, base)
        limits = replace(self.config.gates, only_licenses=self.config.gates.only_licenses or self.shard.licenses)
        return gates.measure_gates(dataset, base, texts, self.embed.clip(), limits, pinned), texts

    def publish(self, dataset: Dataset) -> dict[str, Any]:
        """Check the gates of a version and publish it; GatesFailed if it fails one.

        If another command published a later build in the meantime, that one stays. If it published an earlier build,
        the gates compare with that.
        """
        number = version_number(dataset.version)
        while True:
            before = Published.load(self.root, self.name, self.keys)
            if before.version == dataset.version:
                return {"published": dataset.version, "by": "another"}
            if before.is_removed and before.number >= number:
                raise StageFailed(f"{dataset.name} was removed while {dataset.version} was built\n"
                                  f"hint: the same rebuild makes another version")
            if before.number > number:
                _log.info("rebuild: another command published %s: %s is older and is not published", before.version,
                          dataset.version)
                return {"published": before.version, "superseded": dataset.version}
            takedowns.apply_list(dataset)  # or each gate compares all rows with the takedown list, and says so
            results, texts = self.judge(dataset, before)
            for gate in results:
                _log.info("gate %s%s", gate, "" if gate.passed else "  FAILED")
            if failed := [gate for gate in results if not gate.passed]:
                storage.put_json([gate.document() for gate in results],
                                 storage.join(before.folder, dataset.version, "gates.json"))
                kept = f"{before.version} stays published" if before.version else "nothing is published"
                raise GatesFailed(f"{dataset.name}@{dataset.version} is not published: "
                                  f"{'; '.join(map(str, failed))}: {kept}\nhint: check the source; if the version is "
                                  f"right, {' and '.join(gate.cure for gate in failed)}")
            shards = dataset.manifest("shards")
            hidden = takedowns.apply_list(dataset)  # first: a version with a release must hide its rows
            data = release_files.write_release(dataset, {
                "number": number, "base": before.version or None, "source": self.source.digest,
                "samples": shards["totals"]["samples"] - shards["info"].get("dead", 0),
                "left_out": count_row_failures(shards["totals"]["skipped"]),
                "recall@10": gates.recall(dataset), "encoder": dataset_encoder(dataset), "queries": texts,
                "change": shards["info"]["change"], "gates": [gate.document() for gate in results]})
            if before.publish(dataset, data, number, **hidden):
                return {"published": dataset.version, "gates": {gate.name: gate.value for gate in results}}

    def unchanged(self, dataset: Dataset, diff: SourceDiff) -> bool:
        """Whether the published version holds all of the source already.

        If so, the version that was begun is removed. It stays if files were read, so that the next rebuild skips them.
        """
        if self.last is None or any(
                diff.counts[name] for name in ("added", "changed", "removed", "forgotten")):
            return False
        if self._pending() or self._has_other_scores():
            return False
        if not dataset.is_sealed("compare"):
            storage.remove_tree(storage.join(self.before.folder, dataset.version))
        self.keep_published()
        return True

    def keep_published(self) -> None:
        """Note that the source was compared, and sign the published version if this key has not."""
        if not self.before.needs_signature:
            self.before.mark_checked()
        elif not self.before.sign_again():
            raise StageFailed(f"another command published a version of {self.name} meanwhile\n"
                              f"hint: run the same command again")
        else:
            _log.info("rebuild: %s@%s has a signature by this key now", self.name, self.before.version)

    def _has_other_scores(self) -> bool:
        """Whether the published version lacks a score or vectors of captions, or hides rows for another reason."""
        last = self.last
        assert last
        hide = last.manifest("tombstones")["section"].get("hide", "") if last.is_sealed("tombstones") else ""
        captions = self.config.embed_captions and not last.is_sealed("text_embeddings")
        return captions or hide != self.config.hide or any(
            not last.is_sealed(stage) or last.manifest(stage)["section"] != score.section()
            for score in self._scores(last) for stage in [score.path.split("/", 3)[3]])

    def _pending(self) -> bool:
        """Whether shards of the published version still have the bytes of forgotten images."""
        last = self.last
        return last is not None and len(takedowns.read_forgotten_rows(last)) > 0


def run_rebuild(rebuild: Rebuild, seal: Seal) -> dict[str, Any]:
    """Publish a version of a dataset that matches its source. Returns a report."""
    rebuild.keys.refuse_unsigned(rebuild.name, rebuild.before.document)
    with contextlib.ExitStack() as leases:
        if rebuild.before.version:  # gc must not remove the files that the new version takes over
            # Not on the version itself: other commands may make its neighbor lists again meanwhile.
            leases.enter_context(storage.hold_lease(
                rebuild.root, f"datasets/{rebuild.name}/{rebuild.before.version}/base"))
        while True:
            dataset, past = rebuild.claim()
            lease = storage.Lease(rebuild.root, f"datasets/{dataset.name}/{dataset.version}", exclusive=False)
            lease.acquire()
            leases.callback(lease.release)
            if not version_marks.is_removing(dataset):  # removed between the claim and the lease
                break
        try:
            return _rebuild_claimed(rebuild, dataset, past, seal)
        except ValueError:
            if not version_marks.is_removing(dataset):
                raise
            raise StageFailed(f"{dataset.name}@{dataset.version} was removed while it was built: this command slept "
                              f"longer than its lease\nhint: the same rebuild makes another version") from None


def _rebuild_claimed(rebuild: Rebuild, dataset: Dataset, past: bool, seal: Seal) -> dict[str, Any]:
    with logs.label_events({"dataset": dataset.name, "version": dataset.version, "stage": "rebuild", "run": ""}):
        return _made(rebuild, dataset, past, seal)


def _made(rebuild: Rebuild, dataset: Dataset, past: bool, seal: Seal) -> dict[str, Any]:
    now = Published.load(rebuild.root, rebuild.name, rebuild.keys)
    if past and now.version == dataset.version:  # another command published it after this one began
        return {"dataset": rebuild.name, "published": dataset.version, "by": "another"}
    if past:
        _log.warning("rebuild: the source equals that of %s, which was rolled back\n"
                     "hint: python -m jobs rollback %s --to %s%s --root %s", dataset.version, rebuild.name,
                     dataset.version, now.sign_option, storage.redact_credentials(rebuild.root))
        rebuild.keep_published()
        return {"dataset": rebuild.name, "published": rebuild.before.version, "rolled_back": dataset.version}
    diff = rebuild.compare(dataset, seal)
    counts = {name: diff.counts[name] for name in _COUNTS} | diff.filtered_by
    _log.info("rebuild: rows of the source of %s%s: %s", rebuild.name,
              f" since {rebuild.before.version}" if rebuild.before.version else "",
              ", ".join(f"{count} {name}" for name, count in counts.items()))
    if rebuild.unchanged(dataset, diff):
        return {"dataset": rebuild.name, "published": rebuild.before.version, "unchanged": True, **counts}
    rebuild.build(dataset, diff, seal)
    totals, reused = dataset.manifest("shards")["totals"], dataset.manifest("embeddings")["info"]["reused"]
    return {"dataset": rebuild.name, **rebuild.publish(dataset), **counts, "reused": reused,
            "embedded": totals["samples"] - reused} | ({"left_out": totals["skipped"]} if totals["skipped"] else {})
