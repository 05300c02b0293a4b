"""Rebuilding and publishing: only what changed is processed, and readers always have a whole version."""

import json
import logging
import os
import shlex
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cli.main import main
from jobs.inspection import watch
from jobs.inspection.contents import contents_table, list_contents
from jobs.inspection.status import read_status, status_table
from jobs.planning import rates, rates_from_manifests
from jobs.publishing.rebuild import GatesFailed, run_rebuild
from jobs.publishing.releases import list_versions, versions_table
from jobs.report.report import write_report
from pipeline import storage
from pipeline.datasets import find_row
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.embeddings import Embeddings
from pipeline.datasets.metadata import metadata
from pipeline.downloads.config import DownloadConfig
from pipeline.indices.searcher import Searcher
from pipeline.media import tars
from pipeline.releases import published, release_files
from pipeline.releases.published import Published
from pipeline.stages.driver import run_stage
from pipeline.storage import files
from pipeline.takedowns import hidden_rows
from pipeline.versions.compare_files import Compare
from pipeline.versions.config import GatesConfig
from pipeline.versions.update_shards import Update
from tests.jobs.publishing.published_art import (
    NAME,
    SHARD,
    drop,
    make_rebuild,
    paint,
    pictures,
    published_dataset,
    rebuild,
    vectors_by_content,
)


def test_only_changed_images_are_processed_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, source, files = place / "root", place / "source", pictures(place)
    for path in files:
        os.utime(path)  # all look new, and hardly any is
    paint(files[3], 1)
    paint(source / "added.png", 2)
    drop(place, files[10])
    captions = source / "captions.csv"
    captions.write_text(captions.read_text().replace(captions.read_text().splitlines()[20].split(",")[1], "other words",
                                                     1))
    summary = rebuild(root, source)
    assert {name: summary[name] for name in ("kept", "added", "changed", "removed", "embedded")} == {
        "kept": 69, "added": 1, "changed": 2, "removed": 1, "embedded": 3}
    assert summary["published"] == "v2" and published_dataset(root).version == "v2"
    rebuild(place / "anew", source)
    rebuilt_vectors = vectors_by_content(published_dataset(root))
    expected_vectors = vectors_by_content(published_dataset(place / "anew"))
    assert rebuilt_vectors.keys() == expected_vectors.keys() and len(rebuilt_vectors) == 72
    for name, vector in rebuilt_vectors.items():
        assert np.abs(vector.astype(np.float32) - expected_vectors[name].astype(np.float32)).max() < 2e-2, name
    assert main(["verify", "--root", str(root)]) == 0
    ids = Searcher(published_dataset(root)).search(Embeddings(published_dataset(root)).all().astype(np.float32), 80)[0]
    hidden = hidden_rows.read_hidden_rows(published_dataset(root))
    assert np.isin(hidden, ids).sum() == 0 and len(hidden) == 3
    capsys.readouterr()
    assert main(["status", "--root", str(root)]) == 0
    shown = capsys.readouterr().out
    assert [shown.count(words) for words in ("; 72 samples, ", "; 3 removed")] == [3, 3]
    assert [entry["rows"] for entry in list_contents(str(root)) if entry["path"].endswith("drawn/v2")] == [72]
    # Bytes of shards that stayed were not copied.
    tars = [path.name for path in (root / "datasets" / NAME / "v2" / "shards").glob("*.tar")]
    assert tars == ["000003.tar"]
    unchanged_summary = rebuild(root, source)
    assert unchanged_summary["unchanged"] and unchanged_summary["published"] == "v2"
    assert list_versions(str(root), NAME)[-1]["version"] == "v2"


def test_a_shard_that_lost_much_is_written_again(place: Path) -> None:
    for path in pictures(place)[:12]:
        drop(place, path)
    summary = rebuild(place / "root", place / "source")
    assert summary["removed"] == 12 and summary["embedded"] == 0
    assert len(vectors_by_content(published_dataset(place / "root"))) == 60
    dataset = published_dataset(place / "root")
    assert dataset.manifest("shards")["totals"]["samples"] == 60 and not dataset.is_sealed("tombstones")
    assert main(["verify", "--root", str(place / "root")]) == 0
    for record in dataset.manifest("shards")["items"]:
        positions = [(row["image_offset"], row["image_bytes"])
                     for row in metadata(dataset, record, ["image_offset", "image_bytes"])]
        np.testing.assert_array_equal(positions, tars.image_positions(dataset.fetch("shards", file_of(record, ".tar"))))
    # From a version of which nothing is left but what was taken over, another.
    paint(place / "source" / "added.png", 5)
    assert rebuild(place / "root", place / "source")["embedded"] == 1


def test_a_damaged_image_is_counted_once_in_every_version(place: Path) -> None:
    root, source = place / "root", place / "source"
    for name in ("bad.png", "worse.png"):
        (source / name).write_text(f"{name} is no picture")
    paint(source / "new.png", 7)
    assert rebuild(root, source)["added"] == 3

    def failures() -> tuple[dict[str, int], int, list[str], list[str]]:
        dataset = published_dataset(root)
        return (dataset.manifest("shards")["totals"]["skipped"], list_versions(str(root), NAME)[-1]["left_out"],
                *([entry["reason"] for entry in find_row.ledger_entries(dataset, {name}) if not entry["kept"]]
                  for name in ("bad.png", "worse.png")))

    assert failures() == ({"not_a_picture": 2}, 2, ["not_a_picture"], ["not_a_picture"])
    os.utime(source / "bad.png")  # looks new, and has the same bytes
    (source / "worse.png").unlink()
    paint(source / "newer.png", 8)
    summary = rebuild(root, source)
    assert (summary["kept"], summary["added"], summary["changed"], summary["removed"]) == (74, 1, 0, 1)
    assert failures() == ({"not_a_picture": 1}, 1, ["not_a_picture"], [])
    # The shard of the damaged image has no other image any more.
    (source / "new.png").unlink()
    rebuild(root, source)
    assert failures() == ({"not_a_picture": 1}, 1, ["not_a_picture"], []) and main(["verify", "--root", str(root)]) == 0
    (source / "bad.png").write_text("still no picture")
    assert rebuild(root, source)["changed"] == 1
    assert failures() == ({"not_a_picture": 1}, 1, ["not_a_picture"], [])
    assert list_versions(str(root), NAME)[-1]["samples"] == 73


def test_a_list_of_urls_is_rebuilt(tmp_path: Path, place: Path) -> None:
    class Quiet(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = (place / "source" / self.path[1:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_port
    names = [str(path.relative_to(place / "source")) for path in pictures(place)]
    lines = [{"url": f"http://127.0.0.1:{port}/{name}", "caption": f"number {number}"}
             for number, name in enumerate(names)]

    def rebuild_from_list(records: list[dict[str, str]]) -> dict[str, Any]:
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return rebuild(tmp_path / "root", tmp_path / "list.jsonl", shard=replace(
            SHARD, download=DownloadConfig(allow_hosts=(f"127.0.0.1:{port}",))))

    assert rebuild_from_list(lines[:60])["added"] == 60
    summary = rebuild_from_list([*lines[5:60], *lines[66:70]])
    assert (summary["added"], summary["removed"], summary["kept"], summary["embedded"]) == (4, 5, 55, 4)
    # An image from a domain that is to be forgotten is not even fetched.
    assert main(["forget", "--url", lines[66]["url"], "--root", str(tmp_path / "root")]) == 0
    assert rebuild_from_list([*lines[5:60], *lines[66:70]])["forgotten"] == 1
    assert not any(lines[66]["url"] in name for name in vectors_by_content(published_dataset(tmp_path / "root")))
    server.shutdown()


def test_a_version_with_half_noise_is_not_published(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Published.load(str(place / "root"), NAME)
    for number, path in enumerate(pictures(place)[::2]):
        paint(path, number)
    command = ["rebuild", NAME, "--source", str(place / "source"), "--root", str(place / "root"), "--local",
               "--image-size", "32", "--samples-per-shard", "30"]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert "v1 stays published" in message and "overlap@10: 0." in message
    assert "at least 0.7" in message and "lost: 0.5" in message
    assert "if the version is right, raise --max-lost and lower --min-overlap" in message
    assert Published.load(str(place / "root"), NAME) == before
    gates = [version.get("failed_gates") for version in list_versions(str(place / "root"), NAME)]
    assert gates == [None, ["lost", "overlap@10"]]
    # Every place that shows states says so.
    root = str(place / "root")
    tables = (status_table(root, read_status(root)), contents_table(list_contents(root), root),
              versions_table(list_versions(root, NAME)), watch.snapshot_text(watch.read_snapshot(root)))
    write_report(root, f"{root}/report.html")
    for text in (*tables, (place / "root/report.html").read_text()):
        assert "stopped by lost, overlap@10" in text
    # A user may lower the gates. Then nothing is computed again.
    assert main([*command, "--max-lost", "1", "--min-overlap", "0"]) == 0
    assert published_dataset(place / "root").version == "v2"


@pytest.mark.parametrize("gate", ["recall@10", "failed", "encoder"])
def test_each_gate_stops_a_version(place: Path, gate: str) -> None:
    (place / "source" / "broken.png").write_bytes(b"no picture")
    # Two bits a vector find little; taking over the first index would find everything.
    settings: dict[str, Any] = {"recall@10": {"key": "PQ1x2", "full": True},
                                "failed": {"gates": GatesConfig(max_failed=0)}}
    job = make_rebuild(place / "root", place / "source", **settings.get(gate, {}))
    if gate == "encoder":
        run = place / "root" / "runs" / "consumer"
        run.mkdir(parents=True)
        (run / "plan.json").write_text(json.dumps({
            "stage": "train", "items": [], "inputs": {"database": {"path": f"datasets/{NAME}/v1/embeddings"}},
            "section": {"encoder": {"model": "another"}}}))
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "seconds": 1.0}) + "\n")
    with pytest.raises(GatesFailed, match=f"v2 is not published: .*{gate}.*v1 stays published"):
        run_rebuild(job, run_stage)
    assert published_dataset(place / "root").version == "v1"


def test_the_gate_of_the_encoder_names_its_consumers(place: Path) -> None:
    def encoder_gate() -> str:
        release = release_files.read_release(published_dataset(place / "root"))[0]
        assert release
        return next(f"{gate['value']}, {gate['limit']}" for gate in release["gates"] if gate["name"] == "encoder")

    demo = "tiny-clip-64 bundled (the bundled encoder, for the demo)"
    assert encoder_gate() == f"{demo}; no run or version uses this database yet, "
    paint(place / "source" / "added.png", 1)
    rebuild(place / "root", place / "source")
    assert encoder_gate() == f"{demo}, that of {NAME}"


def test_a_rebuild_with_another_encoder_is_refused_before_it_reads(place: Path, capsys: pytest.CaptureFixture[str]
                                                                    ) -> None:
    paint(place / "source" / "added.png", 1)
    again = ["rebuild", NAME, "--source", str(place / "source"), "--root", str(place / "root"), "--local", "--dry-run",
             "--image-size", "32", "--format", "png", "--embed.model", "ViT-B-32", "--embed.pretrained", "random"]
    assert main(again) == 2
    assert f"{NAME} was made with another encoder" in capsys.readouterr().err
    assert main([*again, "--allow-encoder"]) == 0
    (place / "root/datasets" / NAME / "v1/embeddings/manifest.json").write_bytes(b"{")
    assert main(again) == 0  # a damaged version is replaced


def test_one_of_two_equal_rebuilds_publishes(place: Path) -> None:
    paint(place / "source" / "added.png", 1)
    first, second = (make_rebuild(place / "root", place / "source") for _ in range(2))
    results: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda job=job: results.append(run_rebuild(job, run_stage)))
               for job in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [summary["published"] for summary in results] == ["v2", "v2"]
    assert sum("by" in summary for summary in results) == 1
    assert [version["version"] for version in Published.load(str(place / "root"), NAME).history()] == ["v1", "v2"]


def test_a_slower_older_build_does_not_replace_a_newer_one(place: Path) -> None:
    paint(place / "source" / "added.png", 1)
    older = make_rebuild(place / "root", place / "source")
    older_dataset, _ = older.claim()
    paint(place / "source" / "more.png", 2)
    newer_summary = rebuild(place / "root", place / "source")
    assert (older_dataset.version, newer_summary["published"]) == ("v2", "v3")
    older_summary = run_rebuild(older, run_stage)
    assert older_summary["superseded"] == "v2" and older_summary["published"] == "v3"
    assert published_dataset(place / "root").version == "v3"
    # And a newer one replaces an older one that was published while it was under way.
    paint(place / "source" / "a.png", 3)
    first = make_rebuild(place / "root", place / "source")
    first.claim()
    paint(place / "source" / "b.png", 4)
    second = make_rebuild(place / "root", place / "source")
    assert run_rebuild(first, run_stage)["published"] == "v4"
    assert run_rebuild(second, run_stage)["published"] == "v5" and published_dataset(place / "root").version == "v5"


class Killed(BaseException):
    """The end of a process, as far as its code can tell."""


def test_readers_have_a_whole_version_after_any_interruption(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(place / "source" / "added.png", 1)
    drop(place, pictures(place)[5])
    writes, ends = [0], [0]
    put, create, swap = storage.put_bytes, storage.create_bytes, storage.swap_bytes

    def count_writes(function: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any, **keywords: Any) -> Any:
            if "progress" not in arguments[1] and arguments[1].startswith(str(place)):
                writes[0] += 1
                if writes[0] == ends[0]:
                    raise Killed
            return function(*arguments, **keywords)
        return write

    for name, function in (("put_bytes", put), ("create_bytes", create), ("swap_bytes", swap)):
        monkeypatch.setattr(storage, name, count_writes(function))
    monkeypatch.setattr(files, "put_bytes", storage.put_bytes)  # put_json calls it there
    seen, tries = set(), 0
    while True:
        tries, writes[0], ends[0] = tries + 1, 0, ends[0] + 3
        try:
            rebuild(place / "root", place / "source")
            break
        except Killed:
            dataset = published.open_dataset(str(place / "root"), NAME)
            seen.add(dataset.version)
            assert len(Searcher(dataset).search(Embeddings(dataset).all()[:1].astype(np.float32), 4)[0]) == 1
    assert tries > 3 and seen <= {"v1", "v2"} and published_dataset(place / "root").version == "v2"
    monkeypatch.undo()
    assert main(["verify", "--root", str(place / "root")]) == 0
    assert [version["version"] for version in Published.load(str(place / "root"), NAME).history()] == ["v1", "v2"]


def test_hints_of_a_rebuild_name_flags_that_it_has(place: Path) -> None:
    job, dataset = make_rebuild(place / "root", place / "source"), Dataset(str(place / "root"), NAME, "v2")
    for stage in (Update(dataset, job.shard, job.last, job.source, 0.25), Compare(dataset, job.source, np.arange(2))):
        command = stage.replacement.replace("SOURCE", str(place / "source"))
        assert main([*shlex.split(command)[3:], "--local", "--dry-run"]) == 0


def test_unusual_commands_have_clear_results(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, source = str(place / "root"), place / "source"
    (source / "cut.png").write_bytes(pictures(place)[0].read_bytes()[:200])
    assert rebuild(root, source)["added"] == 1
    assert main(["rebuild", NAME, "--source", f"{place}/absent/*.png", "--root", root, "--local"]) == 2
    assert f"error: there is no folder {place}/absent\n" in capsys.readouterr().err
    for _ in range(2):  # what cannot be read is no change, however thoroughly it is looked at
        assert rebuild(root, source, thorough=True)["unchanged"]
    assert main(["rollback", NAME, "--root", root]) == 0
    assert rebuild(root, source, thorough=True)["rolled_back"] == "v2"
    for command in (["rollback", f"{NAME}@v9"], ["gc", f"{NAME}@v1"], ["versions", f"{NAME}@v1"],
                    ["forget", "--domain", ""], ["forget", "--domain", "http://x y/.."], ["forget", "--url", ""]):
        assert main([*command, "--root", root]) == 2, command
    assert published_dataset(root).version == "v1" and not storage.exists(f"{root}/forgotten.json")
    assert main(["forget", "--domain", "https://Example.org/a?b", "--root", root]) == 0
    assert storage.read_json(f"{root}/forgotten.json")["domains"] == ["example.org"]
    paint(source / "added.png", 1)
    assert rebuild(root, source)["published"] == "v4"  # v3 holds what the thorough look had read
    assert main(["gc", NAME, "--keep", "1", "--root", root]) == 0
    assert main(["gc", NAME, "--keep", "0", "--lease", "0", "--root", root]) == 0
    assert main(["rollback", NAME, "--root", root]) == 2
    assert "v1 was removed" not in capsys.readouterr().err
    assert main(["rollback", NAME, "--to", "v1", "--root", root]) == 2
    assert "v1 was removed" in capsys.readouterr().err
    assert main(["search", f"{NAME}@v1", "red", "--root", root]) == 1
    assert f"{NAME}@v1 was removed on 20" in capsys.readouterr().err


def test_missing_files_of_a_captions_table_count_as_removed(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for picture in pictures(place)[:2]:
        picture.unlink()
    captions = place / "source" / "captions.csv"
    last = captions.read_text().splitlines()[-1]
    captions.write_text(captions.read_text() + f"never.png,{last.partition(',')[2]}\n")
    summary = rebuild(place / "root", place / "source")
    assert {name: summary[name] for name in ("kept", "added", "changed", "removed")} == {
        "kept": 70, "added": 1, "changed": 0, "removed": 2}
    assert "3 images that captions.csv names are not in the folder, the first is " in caplog.text
    caplog.clear()
    assert rebuild(place / "root", place / "source")["unchanged"]
    assert "rows of the source of drawn since v2: 70 kept, 0 added, 0 changed, 0 removed" in caplog.text
    captions.write_text("".join(line for line in captions.read_text().splitlines(keepends=True)
                                if line.startswith("file") or (place / "source" / line.partition(",")[0]).exists()))
    assert rebuild(place / "root", place / "source")["unchanged"]  # the same images
    assert "@v3" not in caplog.text


def test_vectors_of_captions_can_be_added_to_an_unchanged_source(place: Path) -> None:
    assert rebuild(place / "root", place / "source", embed_captions=True)["published"] == "v2"
    assert published_dataset(place / "root").is_sealed("text_embeddings")
    assert rebuild(place / "root", place / "source", embed_captions=True)["unchanged"]


def test_a_version_that_reuses_another_does_not_change_the_rates_of_plan(first: Path, two_versions: Path):
    manifest = published_dataset(two_versions / "root").manifest("index")
    assert manifest["info"]["extends"] == NAME and "train_points" not in manifest["section"]
    whole, both = (rates_from_manifests.rates(str(place / "root"), rates.built_in()) for place in (first, two_versions))
    assert replace(both, machine=whole.machine) == whole and whole.index != rates.built_in().index
