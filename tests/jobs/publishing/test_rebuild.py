"""Published databases: rebuilt, judged, swapped, rolled back, cleaned up, and kept from those who would change them."""

import hashlib
import http.client
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from jobs.cli.main import main
from jobs.publishing.config import RebuildConfig
from jobs.publishing.rebuild import GatesFailed, Rebuild, run_rebuild
from jobs.publishing.releases import GcConfig, collect_garbage, list_versions
from jobs.runs.run import Run
from pipeline import storage
from pipeline.datasets import hidden_rows, published
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.datasets.metadata import metadata
from pipeline.datasets.published import Published
from pipeline.embeddings.embed import EmbedConfig, dataset_encoder
from pipeline.indices.config import IndexConfig
from pipeline.indices.searcher import Searcher
from pipeline.sources.config import DownloadConfig, ShardConfig
from pipeline.stages import records
from pipeline.stages.driver import run_stage
from pipeline.storage import files
from pipeline.versions.gates import GatesConfig
from pipeline.versions.listing import read_listing
from tests.pipeline import synthetic

NAME = "drawn"


SHARD = ShardConfig(image_size=32, format="png", samples_per_shard=30)


def started(root: Path | str, source: Path | str, shard: ShardConfig = SHARD, key: str = "", **more: Any) -> Rebuild:
    """A rebuild of a folder of drawn pictures."""
    return Rebuild(str(root), NAME, replace(shard, source=(str(source),)), EmbedConfig(),
                   IndexConfig(bytes_per_vector=288, key=key), RebuildConfig(**more))


def rebuilt(root: Path | str, source: Path | str, **more: Any) -> dict[str, Any]:
    return run_rebuild(started(root, source, **more), run_stage)


def current(root: Path | str) -> Dataset:
    return published.open_dataset(str(root), NAME)


def by_content(dataset: Dataset) -> dict[str, np.ndarray]:
    """The vectors of what can be found, by the name of the picture and the hash of its bytes."""
    rows = [row for record in dataset.manifest("shards")["items"] for row in metadata(dataset, record)]
    gone = set(hidden_rows.read_hidden_rows(dataset).tolist())
    vectors = Embeddings(dataset).all()
    return {f"{row['url']} {row['original_sha256']} {row['caption']}": vectors[number]
            for number, row in enumerate(rows) if number not in gone}


def paint(path: Path, seed: int) -> None:
    synthetic.noise(32, 32, seed).save(path)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source of 72 drawn pictures, and a root with the version made of it; to be copied."""
    folder = tmp_path_factory.mktemp("first")
    synthetic.drawings(folder / "source")
    rebuilt(folder / "root", folder / "source")
    return folder


@pytest.fixture
def place(first: Path, tmp_path: Path) -> Path:
    shutil.copytree(first, tmp_path / "place")  # with the times of the files
    return tmp_path / "place"


def pictures(place: Path) -> list[Path]:
    return sorted((place / "source").rglob("*.png"))


def drop(place: Path, path: Path) -> None:
    """Take a picture and its caption out of the source."""
    path.unlink()
    captions = place / "source" / "captions.csv"
    name = str(path.relative_to(place / "source"))
    captions.write_text("".join(line for line in captions.read_text().splitlines(True) if not line.startswith(name)))


def test_only_what_changed_is_made_again(place: Path) -> None:
    root, source, files = place / "root", place / "source", pictures(place)
    for path in files:
        os.utime(path)  # all look new, and hardly any is
    paint(files[3], 1)
    paint(source / "added.png", 2)
    drop(place, files[10])
    captions = source / "captions.csv"
    captions.write_text(captions.read_text().replace(captions.read_text().splitlines()[20].split(",")[1], "other words",
                                                     1))
    done = rebuilt(root, source)
    assert {name: done[name] for name in ("kept", "added", "changed", "removed", "embedded")} == {
        "kept": 69, "added": 1, "changed": 2, "removed": 1, "embedded": 3}
    assert done["published"] == "v2" and current(root).version == "v2"
    rebuilt(place / "anew", source)
    now, anew = by_content(current(root)), by_content(current(place / "anew"))
    assert now.keys() == anew.keys() and len(now) == 72
    for name, vector in now.items():
        assert np.abs(vector.astype(np.float32) - anew[name].astype(np.float32)).max() < 2e-2, name
    assert main(["verify", "--root", str(root)]) == 0
    found = Searcher(current(root)).search(Embeddings(current(root)).all().astype(np.float32), 80)[0]
    hidden = hidden_rows.read_hidden_rows(current(root))
    assert np.isin(hidden, found).sum() == 0 and len(hidden) == 3
    # Bytes of shards that stayed were not copied.
    tars = [path.name for path in (root / "datasets" / NAME / "v2" / "shards").glob("*.tar")]
    assert tars == ["000003.tar"]
    again = rebuilt(root, source)
    assert again["unchanged"] and again["published"] == "v2" and list_versions(str(root), NAME)[-1]["version"] == "v2"


def test_a_shard_that_lost_much_is_written_again(place: Path) -> None:
    for path in pictures(place)[:12]:
        drop(place, path)
    done = rebuilt(place / "root", place / "source")
    assert done["removed"] == 12 and done["embedded"] == 0 and len(by_content(current(place / "root"))) == 60
    dataset = current(place / "root")
    assert dataset.manifest("shards")["totals"]["samples"] == 60 and not dataset.sealed("tombstones")
    assert main(["verify", "--root", str(place / "root")]) == 0
    # From a version of which nothing is left but what was taken over, another.
    paint(place / "source" / "added.png", 5)
    assert rebuilt(place / "root", place / "source")["embedded"] == 1


def test_a_list_of_addresses(tmp_path: Path, place: Path) -> None:
    class Quiet(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = (place / "source" / self.path[1:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *given: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_port
    names = [str(path.relative_to(place / "source")) for path in pictures(place)]
    lines = [{"url": f"http://127.0.0.1:{port}/{name}", "caption": f"number {number}"}
             for number, name in enumerate(names)]

    def listed(some: list[dict[str, str]]) -> dict[str, Any]:
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some))
        return rebuilt(tmp_path / "root", tmp_path / "list.jsonl", shard=replace(
            SHARD, download=DownloadConfig(allow_hosts=(f"127.0.0.1:{port}",))))

    assert listed(lines[:60])["added"] == 60
    done = listed([*lines[5:60], *lines[66:70]])
    assert (done["added"], done["removed"], done["kept"], done["embedded"]) == (4, 5, 55, 4)
    # A picture from a domain that is to be forgotten is not even fetched.
    assert main(["forget", "--url", lines[66]["url"], "--root", str(tmp_path / "root")]) == 0
    assert listed([*lines[5:60], *lines[66:70]])["forgotten"] == 1
    assert not any(lines[66]["url"] in name for name in by_content(current(tmp_path / "root")))
    server.shutdown()


def test_half_of_it_noise_stays_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Published.load(str(place / "root"), NAME)
    for number, path in enumerate(pictures(place)[::2]):
        paint(path, number)
    command = ["rebuild", NAME, "--source", str(place / "source"), "--root", str(place / "root"), "--local",
               "--image-size", "32", "--samples-per-shard", "30"]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "v1 stays published" in told and "overlap@10: 0." in told and "at least 0.7" in told and "lost: 0.5" in told
    assert Published.load(str(place / "root"), NAME) == before
    gates = [one.get("failed_gates") for one in list_versions(str(place / "root"), NAME)]
    assert gates == [None, ["lost", "overlap@10"]]
    # Whoever knows better may say so; nothing is made again.
    assert main([*command, "--max-lost", "1", "--min-overlap", "0"]) == 0
    assert current(place / "root").version == "v2"


@pytest.mark.parametrize("what", ["recall@10", "failed", "encoder"])
def test_gates(place: Path, what: str) -> None:
    (place / "source" / "broken.png").write_bytes(b"no picture")
    # Two bits a vector find little; taking over the first index would find everything.
    more: dict[str, Any] = {"recall@10": {"key": "PQ1x2", "full": True}, "failed": {"gates": GatesConfig(max_failed=0)}}
    one = started(place / "root", place / "source", **more.get(what, {}))
    if what == "encoder":
        run = place / "root" / "runs" / "consumer"
        run.mkdir(parents=True)
        (run / "plan.json").write_text(json.dumps({
            "stage": "train", "items": [], "inputs": {"database": {"path": f"datasets/{NAME}/v1/embeddings"}},
            "section": {"encoder": {"model": "another"}}}))
    with pytest.raises(GatesFailed, match=f"v2 is not published: .*{what}.*v1 stays published"):
        run_rebuild(one, run_stage)
    assert current(place / "root").version == "v1"


def test_of_two_at_once_one_publishes(place: Path) -> None:
    paint(place / "source" / "added.png", 1)
    one, other = (started(place / "root", place / "source") for _ in range(2))
    results: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda job=job: results.append(run_rebuild(job, run_stage)))
               for job in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done["published"] for done in results] == ["v2", "v2"]
    assert sum("by" in done for done in results) == 1
    assert [one["version"] for one in Published.load(str(place / "root"), NAME).history()] == ["v1", "v2"]


def test_a_slower_older_build_does_not_replace_a_newer_one(place: Path) -> None:
    paint(place / "source" / "added.png", 1)
    older = started(place / "root", place / "source")
    begun, _ = older.claim()
    paint(place / "source" / "more.png", 2)
    newer = rebuilt(place / "root", place / "source")
    assert (begun.version, newer["published"]) == ("v2", "v3")
    done = run_rebuild(older, run_stage)
    assert done["superseded"] == "v2" and done["published"] == "v3" and current(place / "root").version == "v3"
    # And a newer one replaces an older one that was published while it was under way.
    paint(place / "source" / "a.png", 3)
    first = started(place / "root", place / "source")
    first.claim()
    paint(place / "source" / "b.png", 4)
    second = started(place / "root", place / "source")
    assert run_rebuild(first, run_stage)["published"] == "v4"
    assert run_rebuild(second, run_stage)["published"] == "v5" and current(place / "root").version == "v5"


class Killed(BaseException):
    """The end of a process, as far as its code can tell."""


def test_whenever_it_ends_readers_have_a_whole_version(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(place / "source" / "added.png", 1)
    drop(place, pictures(place)[5])
    writes, ends = [0], [0]
    put, create, swap = storage.put_bytes, storage.create_bytes, storage.swap_bytes

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def write(*given: Any, **named: Any) -> Any:
            if "progress" not in given[1]:
                writes[0] += 1
                if writes[0] == ends[0]:
                    raise Killed
            return function(*given, **named)
        return write

    for name, function in (("put_bytes", put), ("create_bytes", create), ("swap_bytes", swap)):
        monkeypatch.setattr(storage, name, counted(function))
    monkeypatch.setattr(files, "put_bytes", storage.put_bytes)  # put_json calls it there
    seen, tries = set(), 0
    while True:
        tries, writes[0], ends[0] = tries + 1, 0, ends[0] + 3
        try:
            rebuilt(place / "root", place / "source")
            break
        except Killed:
            dataset = published.open_dataset(str(place / "root"), NAME)
            seen.add(dataset.version)
            assert len(Searcher(dataset).search(Embeddings(dataset).all()[:1].astype(np.float32), 4)[0]) == 1
    assert tries > 3 and seen <= {"v1", "v2"} and current(place / "root").version == "v2"
    monkeypatch.undo()
    assert main(["verify", "--root", str(place / "root")]) == 0
    assert [one["version"] for one in Published.load(str(place / "root"), NAME).history()] == ["v1", "v2"]


def test_rollback_and_what_was_rolled_back_stays_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, source = str(place / "root"), place / "source"
    paint(source / "added.png", 1)
    rebuilt(root, source)
    assert main(["rollback", NAME, "--root", root]) == 0 and current(root).version == "v1"
    assert rebuilt(root, source)["rolled_back"] == "v2" and current(root).version == "v1"
    paint(source / "more.png", 2)
    assert rebuilt(root, source)["published"] == "v3"
    assert main(["rollback", NAME, "--to", "v2", "--root", root]) == 0 and current(root).version == "v2"
    for wrong in ("v2", "v9"):
        assert main(["rollback", NAME, "--to", wrong, "--root", root]) == 2
    assert main(["versions", NAME, "--root", root]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [re.split("  +", line)[:2] for line in lines] == [["v1", "released"], ["v2", "published"],
                                                             ["v3", "rolled back"]]
    assert len({line.index(re.split("  +", line)[1]) for line in lines}) == 1  # aligned
    assert main(["embed", NAME, "--overwrite", "--root", root, "--local"]) == 2
    assert "never changes" in capsys.readouterr().err


def test_who_changes_a_published_version_is_found_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(place / "root")
    held = current(root)
    file = Path(held.folder("embeddings")) / "000001.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
    with pytest.raises(ValueError, match="is not the file its manifest describes"):
        Embeddings(Dataset(held.root, held.name, held.version, (*held.trusted, ("other", "process"))))
    assert main(["verify", "--against", "current", "--root", root]) == 1
    # Somebody who is careful changes the manifests too: a few vectors are poisoned, everything else fits.
    vectors = np.load(io.BytesIO(whole))
    vectors[:3] = vectors[5]
    file.write_bytes(synthetic.npy(vectors))
    for name in ("manifest.json", "records/000001.json"):
        path = Path(held.folder("embeddings")) / name
        document = json.loads(path.read_text())
        for record in document.get("items", [document]):
            if record["id"] == "000001":
                record["files"][0]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        if "items" in document:
            document["content"] = records.content(document["fingerprint"], document["files"], document["items"])
        path.write_bytes(storage.json_bytes(document))
    capsys.readouterr()
    with pytest.raises(ValueError, match="is not the one that was published"):
        Embeddings(current(root))
    assert main(["verify", "--against", "current", "--root", root]) == 1
    assert "is not the one that was published" in capsys.readouterr().out
    release = Path(root, "datasets", NAME, "v1", "release.json")
    release.write_text(release.read_text().replace('"samples"', '"Samples"'))
    with pytest.raises(ValueError, match="the release of drawn@v1 is not the one"):
        current(root)


def test_what_is_forgotten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, source, files = str(place / "root"), place / "source", pictures(place)
    dataset = current(root)
    rows = [row for record in dataset.manifest("shards")["items"] for row in metadata(dataset, record)]
    by_key, by_name, by_hash = rows[2], rows[35], rows[70]
    assert main(["forget", "--key", f"{NAME}/{by_key['key']}", "--url", by_name["url"], "--sha256",
                     by_hash["sha256"], "--note", "asked by mail", "--root", root]) == 0
    assert "drawn@v1: 3 pictures, no longer found" in capsys.readouterr().out
    assert list(hidden_rows.read_hidden_rows(current(root))) == [2, 35, 70]  # at once, in the version that is published
    copy = source / "renamed.png"
    shutil.copy(source / by_key["url"], copy)  # the same bytes under another name
    done = rebuilt(root, source)
    assert (done["forgotten"], done["published"], done["embedded"]) == (3, "v2", 0)
    dataset = current(root)
    tars = b"".join(storage.read_bytes(storage.manifest_file_url(dataset.folder("shards"), entry["name"]))
                    for record in dataset.manifest("shards")["items"] for entry in record["files"]
                    if entry["name"].endswith((".tar", ".parquet")))
    for row in (by_key, by_name, by_hash):
        assert (source / row["url"]).read_bytes() not in tars and row["key"].encode() not in tars
    assert (source / rows[3]["url"]).read_bytes() in tars
    assert rebuilt(root, source)["unchanged"]
    assert {row["name"] for row in read_listing(dataset).to_pylist() if row["status"] == "forgotten"} == {
        by_key["url"], by_hash["url"], "renamed.png"}
    assert main(["verify", "--root", root]) == 0
    for wrong in ([], ["--sha256", "12"], ["--key", f"{NAME}/none"]):
        assert main(["forget", *wrong, "--root", root]) == 2
    assert len(files) == 72


def test_gc_leaves_what_is_needed(place: Path) -> None:
    root, source = str(place / "root"), place / "source"
    for number in range(4):
        paint(source / f"added{number}.png", number)
        rebuilt(root, source)
    run = place / "root" / "runs" / "consumer"
    run.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps({
        "stage": "train", "items": [], "section": {"encoder": dataset_encoder(current(root)), "database": f"{NAME}@v2"},
        "inputs": {"database": {"path": f"datasets/{NAME}/v2/embeddings", "digest": ""}}}))
    assert published.open_dataset(root, NAME, Run(root, "consumer").planned()["database"]).version == "v2"
    assert all(one["kept"] for one in collect_garbage(root, NAME, GcConfig(keep=1)))  # the lease
    kept = {one["version"]: one["kept"] for one in collect_garbage(root, NAME, GcConfig(keep=1, lease=0))}
    assert kept == {"v1": "", "v2": "pinned by runs/consumer", "v3": "", "v4": "", "v5": "published"}
    assert not (place / "root/datasets" / NAME / "v3/shards/manifest.json").exists()
    for version in ("v2", "v5"):
        assert len(by_content(Dataset(root, NAME, version))) == {"v2": 73, "v5": 76}[version]
    assert [one["removed"] for one in list_versions(root, NAME)] == [True, False, True, True, False]
    paint(source / "more.png", 9)
    assert rebuilt(root, source)["published"] == "v6"
    assert main(["verify", "--only", f"datasets/{NAME}/v6", "--root", root]) == 0
    assert main(["rollback", NAME, "--to", "v3", "--root", root]) == 2


class Forgetful(ThreadingHTTPServer):
    """A proxy before a store, which drops the conditions of writes: so does a store that does not know them."""

    def __init__(self, store: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                connection = http.client.HTTPConnection(store.removeprefix("http://"))
                kept = {name: value for name, value in self.headers.items() if not name.lower().startswith("if-")}
                connection.request(self.command, self.path, body, kept)
                got = connection.getresponse()
                data = got.read()
                self.send_response(got.status)
                for name, value in got.getheaders():
                    if name.lower() not in {"transfer-encoding", "connection", "server", "date"}:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

            def log_message(self, *given: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def forgetful(s3_server: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    proxy = Forgetful(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    for clear in (files._filesystem.cache_clear, fsspec.get_filesystem_class("s3").clear_instance_cache):
        clear()
    yield s3
    for clear in (files._filesystem.cache_clear, fsspec.get_filesystem_class("s3").clear_instance_cache):
        clear()
    proxy.shutdown()


def test_a_store_without_conditions_is_refused(forgetful: str, place: Path) -> None:
    with pytest.raises(ValueError, match="does not keep the conditions If-Match"):
        started(f"{forgetful}/root", place / "source")


def test_on_s3(s3: str, place: Path) -> None:
    root = f"{s3}/root"
    fsspec.filesystem("s3").put(str(place / "source"), f"{s3}/source", recursive=True)
    source = f"{s3}/source"
    assert rebuilt(root, source)["published"] == "v1"
    image = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(image, "PNG")
    fsspec.filesystem("s3").pipe_file(f"{s3}/source/added.png", image.getvalue())
    one, other = started(root, source), started(root, source)
    assert run_rebuild(one, run_stage)["embedded"] == 1
    assert run_rebuild(other, run_stage)["by"] == "another"
    assert Published.load(root, NAME).version == "v2" and len(by_content(current(root))) == 73
    nothing = Published(root, NAME, None, {})
    assert not nothing.publish(current(root), b'{"content": "", "samples": 0, "recall@10": 1}', 3)
    assert main(["rollback", NAME, "--root", root]) == 0 and current(root).version == "v1"
    assert {one["version"]: one["kept"] for one in collect_garbage(root, NAME, GcConfig(keep=0, lease=0))} == {
        "v1": "published", "v2": ""}
    assert main(["verify", "--against", "current", "--root", root]) == 0


def test_what_a_stranger_tried(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, source = str(place / "root"), place / "source"
    (source / "cut.png").write_bytes(pictures(place)[0].read_bytes()[:200])
    assert rebuilt(root, source)["added"] == 1
    for _ in range(2):  # what cannot be read is no change, however thoroughly it is looked at
        assert rebuilt(root, source, thorough=True)["unchanged"]
    assert main(["rollback", NAME, "--root", root]) == 0
    assert rebuilt(root, source, thorough=True)["rolled_back"] == "v2"
    for command in (["rollback", f"{NAME}@v9"], ["gc", f"{NAME}@v1"], ["versions", f"{NAME}@v1"],
                    ["forget", "--domain", ""], ["forget", "--domain", "http://x y/.."], ["forget", "--url", ""]):
        assert main([*command, "--root", root]) == 2, command
    assert current(root).version == "v1" and not storage.exists(f"{root}/forgotten.json")
    assert main(["forget", "--domain", "https://Example.org/a?b", "--root", root]) == 0
    assert storage.read_json(f"{root}/forgotten.json")["domains"] == ["example.org"]
    paint(source / "added.png", 1)
    assert rebuilt(root, source)["published"] == "v4"  # v3 holds what the thorough look had read
    assert main(["gc", NAME, "--keep", "1", "--root", root]) == 0
    assert main(["gc", NAME, "--keep", "0", "--lease", "0", "--root", root]) == 0
    assert main(["rollback", NAME, "--root", root]) == 2
    assert "v1 was removed" not in capsys.readouterr().err
    assert main(["rollback", NAME, "--to", "v1", "--root", root]) == 2
    assert "v1 was removed by gc" in capsys.readouterr().err
