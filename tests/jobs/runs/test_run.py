"""The files of a run that is in a store are read from the cache, and damage in it is noticed."""

import hashlib

from jobs.runs.run import Run
from pipeline import storage


def test_files_of_a_run_in_a_store_are_links_to_checked_files(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("RDM_CACHE", str(tmp_path / "cache"))
    contents = {"ema.safetensors": b"weights" * 100, "checkpoint.json": b"{}"}
    files = [{"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
             for name, data in contents.items()]
    for name, data in contents.items():
        storage.put_bytes(data, storage.join(s3, "run", name))
    for _ in range(2):
        folder = Run._fetched(storage.join(s3, "run"), files)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    for damaged in (folder / "ema.safetensors", storage.cache_folder() / files[0]["sha256"]):
        damaged.write_bytes(b"garbage" * 100)
        assert Run._fetched(storage.join(s3, "run"), files) == folder
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    (folder / "ema.safetensors").unlink()
    (folder / "ema.safetensors").write_bytes(b"another")
    Run._fetched(storage.join(s3, "run"), files)
    assert (folder / "ema.safetensors").samefile(storage.cache_folder() / files[0]["sha256"])
