"""Rollback, takedowns, garbage collection, and protection of published versions."""

import hashlib
import io
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from jobs.cli.main import main
from jobs.publishing.config import GcConfig
from jobs.publishing.garbage_collect import collect_garbage
from jobs.publishing.releases import list_versions
from jobs.runs.run import Run
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.datasets.metadata import metadata
from pipeline.embeddings.embed import dataset_encoder
from pipeline.releases import published
from pipeline.stages import records
from pipeline.takedowns import hidden_rows
from pipeline.versions.listing import read_listing
from tests.jobs.publishing.published_art import NAME, paint, pictures, published_dataset, rebuild, vectors_by_content
from tests.pipeline import synthetic


def test_a_version_that_was_rolled_back_is_not_published_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, source = str(place / "root"), place / "source"
    paint(source / "added.png", 1)
    rebuild(root, source)
    assert main(["rollback", NAME, "--root", root]) == 0 and published_dataset(root).version == "v1"
    assert rebuild(root, source)["rolled_back"] == "v2" and published_dataset(root).version == "v1"
    paint(source / "more.png", 2)
    assert rebuild(root, source)["published"] == "v3"
    assert main(["rollback", NAME, "--to", "v2", "--root", root]) == 0 and published_dataset(root).version == "v2"
    pointer = storage.read_bytes(f"{root}/datasets/{NAME}/current.json")
    # The same command after a kill: the pointer names the version already.
    assert main(["rollback", NAME, "--to", "v2", "--root", root]) == 0
    assert '"already": true' in capsys.readouterr().out
    assert storage.read_bytes(f"{root}/datasets/{NAME}/current.json") == pointer
    assert main(["rollback", NAME, "--to", "v9", "--root", root]) == 2
    assert f"hint: python -m jobs versions {NAME} --root {root}" in capsys.readouterr().err
    assert main(["versions", NAME, "--root", root]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [re.split("  +", line)[:2] for line in lines] == [["v1", "earlier"], ["v2", "published"],
                                                             ["v3", "rolled back"]]
    assert len({line.index(re.split("  +", line)[1]) for line in lines}) == 1  # aligned
    day = time.strftime("%Y-%m-%d", time.gmtime())
    assert all(re.search(rf"published {day} \d\d:\d\d UTC; ", line) for line in lines)
    assert main(["embed", NAME, "--overwrite", "--root", root, "--local"]) == 2
    assert "never changes" in capsys.readouterr().err


def test_changes_to_a_published_version_are_detected(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(place / "root")
    held = published_dataset(root)
    file = Path(held.folder("embeddings")) / "000001.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
    with pytest.raises(ValueError, match="is not the file its manifest describes"):
        Embeddings(Dataset(held.root, held.name, held.version, (*held.trusted, ("other", "process"))))
    assert main(["verify", "--against", "current", "--root", root]) == 1
    # A careful attacker replaces a few vectors and changes the manifests to fit.
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
        Embeddings(published_dataset(root))
    assert main(["verify", "--against", "current", "--root", root]) == 1
    assert "is not the one that was published" in capsys.readouterr().out
    release = Path(root, "datasets", NAME, "v1", "release.json")
    release.write_text(release.read_text().replace('"samples"', '"Samples"'))
    with pytest.raises(ValueError, match="the release of drawn@v1 is not the one"):
        published_dataset(root)


def test_forgotten_images_are_hidden_and_removed(place: Path, capsys: pytest.CaptureFixture[str],
                                                 caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    root, source, files = str(place / "root"), place / "source", pictures(place)
    dataset = published_dataset(root)
    rows = [row for record in dataset.manifest("shards")["items"] for row in metadata(dataset, record)]
    by_key, by_name, by_hash = rows[2], rows[35], rows[70]
    assert main(["forget", "--key", f"{NAME}/{by_key['key']}", "--url", by_name["url"], "--sha256",
                 by_hash["sha256"], "--note", "asked by mail", "--root", root]) == 0
    said = capsys.readouterr().out
    assert "drawn@v1: 3 images, hidden from searches" in said
    assert (f"python -m jobs rebuild drawn --source SOURCE --root {root} && python -m jobs gc drawn --keep 1 "
            f"--lease 0 --root {root}\n") in said
    # Immediately, in the published version.
    assert list(hidden_rows.read_hidden_rows(published_dataset(root))) == [2, 35, 70]
    copy = source / "renamed.png"
    shutil.copy(source / by_key["url"], copy)  # the same bytes under another name
    done = rebuild(root, source)
    assert (done["forgotten"], done["published"], done["embedded"]) == (3, "v2", 0)
    assert "compares all" not in caplog.text  # nor does a reader of the new version
    dataset = published_dataset(root)
    tars = b"".join(storage.read_bytes(storage.manifest_file_url(dataset.folder("shards"), entry["name"]))
                    for record in dataset.manifest("shards")["items"] for entry in record["files"]
                    if entry["name"].endswith((".tar", ".parquet")))
    for row in (by_key, by_name, by_hash):
        assert (source / row["url"]).read_bytes() not in tars and row["key"].encode() not in tars
    assert (source / rows[3]["url"]).read_bytes() in tars
    assert rebuild(root, source)["unchanged"]
    assert {row["name"] for row in read_listing(dataset).to_pylist() if row["status"] == "forgotten"} == {
        by_key["url"], by_hash["url"], "renamed.png"}
    assert main(["verify", "--root", root]) == 0
    for flags in ([], ["--sha256", "12"], ["--key", f"{NAME}/none"], ["--key", "none"]):
        assert main(["forget", *flags, "--root", root]) == 2
    assert len(files) == 72


def test_gc_keeps_versions_in_use(place: Path) -> None:
    root, source = str(place / "root"), place / "source"
    for number in range(4):
        paint(source / f"added{number}.png", number)
        rebuild(root, source)
    run = place / "root" / "runs" / "consumer"
    run.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps({
        "stage": "train", "items": [],
        "section": {"encoder": dataset_encoder(published_dataset(root)), "database": f"{NAME}@v2"},
        "inputs": {"database": {"path": f"datasets/{NAME}/v2/embeddings", "digest": ""}}}))
    assert published.open_dataset(root, NAME, Run(root, "consumer").planned()["database"]).version == "v2"
    assert all(version["kept"] for version in collect_garbage(root, NAME, GcConfig(keep=1)))  # the lease
    kept = {version["version"]: version["kept"] for version in collect_garbage(root, NAME, GcConfig(keep=1, lease=0))}
    assert kept == {"v1": "", "v2": "pinned by runs/consumer", "v3": "", "v4": "", "v5": "published"}
    assert not (place / "root/datasets" / NAME / "v3/shards/manifest.json").exists()
    for version in ("v2", "v5"):
        assert len(vectors_by_content(Dataset(root, NAME, version))) == {"v2": 73, "v5": 76}[version]
    assert [version["removed"] for version in list_versions(root, NAME)] == [True, False, True, True, False]
    paint(source / "more.png", 9)
    assert rebuild(root, source)["published"] == "v6"
    assert main(["verify", "--only", f"datasets/{NAME}/v6", "--root", root]) == 0
    assert main(["rollback", NAME, "--to", "v3", "--root", root]) == 2
