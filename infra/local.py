"""The steps of infra/local.sh: jobs and faults against a running cluster and store."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import fsspec
from PIL import Image

STYLES = ("noto", "openmoji", "twemoji", "fluent-emoji-flat")
ROOT, SOURCES = "s3://local/rdm", "s3://local/sources"
SHARD = ("--image-size", "64", "--format", "png", "--samples-per-shard", "250", "--workers", "2")
FOLDER = Path(sys.argv[1])
CHANGED, ADDED, REMOVED = 30, 40, 20
_seen: list[tuple[str, str, bool]] = []
_began = time.monotonic()


def saw(what: str, value: object, good: bool) -> None:
    """Print an observation, and whether it is right."""
    _seen.append((what, str(value), good))
    print(f"[{time.monotonic() - _began:4.0f} s] {'ok   ' if good else 'WRONG'} {what}: {value}", flush=True)


def jobs(*words: str, log: str = "local") -> subprocess.CompletedProcess[str]:
    """Run `python -m jobs` here; its stderr is added to a log."""
    with open(FOLDER / f"{log}.log", "a") as file:
        return subprocess.run([sys.executable, "-m", "jobs", *words], stdout=subprocess.PIPE, stderr=file, text=True)


class Job:
    """A rebuild that was submitted to the cluster, watched from here."""

    def __init__(self, name: str, *more: str, retries: int = 0) -> None:
        self.log = FOLDER / f"rebuild-{name}.log"
        self.began = self.log.stat().st_size if self.log.exists() else 0
        words = ["submit", "--wait", "--retries", str(retries), "rebuild", name, "--source", f"{SOURCES}/{name}",
                 "--root", ROOT, *SHARD, *more]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "jobs", *words], stdout=subprocess.DEVNULL,
                                            stderr=log, text=True)

    def wait(self) -> tuple[int, dict[str, Any]]:
        """The exit code, and the JSON that the verb printed, which is in the log of the job."""
        code = self.process.wait()
        lines = self.log.read_text()[self.began:].splitlines()
        said = [json.loads(line[line.index('{"dataset"'):]) for line in lines if '{"dataset"' in line]
        return code, said[-1] if said else {}

    def log_text(self) -> str:
        return self.log.read_text()[self.began:]


def store() -> Any:
    return fsspec.filesystem("s3", use_listings_cache=False)


def pointer(name: str) -> dict[str, Any]:
    """The published pointer of a database."""
    return json.loads(store().cat_file(f"{ROOT}/datasets/{name}/current.json"))


def sources() -> None:
    """Put the images of four styles, with captions, into the store."""
    from pipeline.corpora import emoji
    from pipeline.corpora.config import DemoCorpusConfig
    from pipeline.corpora.demo_corpus import DemoCorpus
    from pipeline.stages.driver import run_stage
    emoji.fetch(FOLDER / "npm")
    config = DemoCorpusConfig(corpus="emoji", size=64)
    pictures = DemoCorpus(str(FOLDER / "root"), config, FOLDER / "npm")
    run_stage(pictures)
    fs = store()
    while True:
        try:
            fs.mkdir("s3://local")
            break
        except Exception:  # the server is not up yet
            time.sleep(0.5)
    for name in STYLES:
        folder = Path(pictures.folder, name)
        lines = Path(pictures.folder, f"{name}.csv").read_text().replace(f"{name}/", "").splitlines(True)
        files = {path.name: path for path in folder.glob("*.png")}
        kept = [line for line in lines[1:] if line.split(",")[0] in files][:600]
        fs.pipe_file(f"{SOURCES}/{name}/captions.csv", (lines[0] + "".join(kept)).encode())
        for line in kept:
            file = line.split(",")[0]
            fs.pipe_file(f"{SOURCES}/{name}/{file}", files[file].read_bytes())
        saw(f"images of {name} in the store", len(kept), len(kept) > 300)


class Reader(threading.Thread):
    """A reader that samples from a database all the time. Each image must come from one whole version."""

    def __init__(self, name: str) -> None:
        super().__init__(daemon=True)
        self.database, self.ended, self.sampled = name, threading.Event(), 0
        self.versions: list[str] = []
        self.faults: list[str] = []

    def run(self) -> None:
        """Sample and check the version of the neighbors, until it is stopped."""
        from jobs.cli.main import main
        from pipeline.datasets.dataset import Dataset
        from pipeline.datasets.metadata import metadata
        os.environ.pop("RAY_ADDRESS", None)  # in this process alone, without the cluster
        assert main(["convert", "emoji_32", "--checkpoint", "model/emoji_32", "--root", ROOT,
                         "--database", self.database]) == 0
        while not self.ended.is_set():
            name = f"reader-{self.sampled:04d}"
            code = main(["sample", "emoji_32", "--recipe", "emoji_32", "--prompt", "red apple", "--prompt", "cat",
                             "--steps", "6", "--database", self.database, "--name", name, "--seed", str(self.sampled),
                             "--root", ROOT, "--local"])
            if code:
                self.faults.append(f"{name} ended with {code}")
                return
            samples = json.loads(store().cat_file(f"{ROOT}/runs/emoji_32/samples/{name}/samples.json"))
            label = samples["databases"][0]
            version = Dataset.parse(ROOT, label)
            there = {(row["key"], row["sha256"]) for record in version.manifest("shards")["items"]
                     for row in metadata(version, record, ["key", "sha256"])}
            used = {(neighbor["key"], neighbor["sha256"])
                    for image in samples["pictures"] for neighbor in image["neighbors"]}
            if not used <= there or {image["database"] for image in samples["pictures"]} != {label}:
                self.faults.append(f"{name} used images that {label} does not have")
            self.sampled += 1
            self.versions.append(version.version)
            self.ended.wait(3)


def until(what: str, there: Any, seconds: float = 240) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + seconds
    while not there():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.2)


def drivers(*words: str) -> list[int]:
    """Process ids of drivers of a verb in the cluster (not of processes that wait for them here)."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if line[1:4] == [b"-m", b"jobs", words[0].encode()] and words[1].encode() in line[4:5]:
            pids.append(int(path.parent.name))
    return pids


def change(name: str) -> None:
    """Add, change and remove images of a source."""
    fs, chance = store(), random.Random(0)
    lines = fs.cat_file(f"{SOURCES}/{name}/captions.csv").decode().splitlines(True)
    rows = [line for line in lines[1:] if line.strip()]
    chance.shuffle(rows)
    for line in rows[:REMOVED]:
        fs.rm_file(f"{SOURCES}/{name}/{line.split(',')[0]}")
    kept = rows[REMOVED:]
    for number, line in enumerate(kept[:CHANGED + ADDED]):
        file = line.split(",")[0]
        picture = Image.open(io.BytesIO(fs.cat_file(f"{SOURCES}/{name}/{file}")))
        buffer = io.BytesIO()
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(buffer, "PNG")
        if number < CHANGED:
            fs.pipe_file(f"{SOURCES}/{name}/{file}", buffer.getvalue())
        else:
            fs.pipe_file(f"{SOURCES}/{name}/turned-{file}", buffer.getvalue())
            kept.append(f"turned-{line}")
    fs.pipe_file(f"{SOURCES}/{name}/captions.csv", (lines[0] + "".join(sorted(kept))).encode())


def spoil(name: str) -> None:
    """Replace half of a source's images by noise."""
    fs, chance = store(), random.Random(1)
    files = sorted(file for file in fs.ls(f"{SOURCES}/{name}", detail=False) if file.endswith(".png"))
    for file in files[::2]:
        buffer = io.BytesIO()
        Image.frombytes("RGB", (64, 64), chance.randbytes(64 * 64 * 3)).save(buffer, "PNG")
        fs.pipe_file(file, buffer.getvalue())


def show() -> None:
    """Run all steps in order."""
    sources()
    for name in STYLES:
        code, said = Job(name).wait()
        saw(f"rebuild {name}", f"exit {code}, {said.get('published')}, {said.get('embedded')} embedded", code == 0)
        if code:
            raise RuntimeError(f"the log is {FOLDER}/rebuild-{name}.log")
    reader = Reader("noto")
    reader.start()
    until("a first image of the reader", lambda: reader.sampled or reader.faults)
    change("noto")
    job = Job("noto", retries=2)
    until("the second version", lambda: store().exists(f"{ROOT}/datasets/noto/v2/shards/plan.json"))
    until("its driver", lambda: drivers("rebuild", "noto"))
    for pid in drivers("rebuild", "noto"):
        os.kill(pid, signal.SIGKILL)
    saw("driver of noto@v2", "killed in the middle", pointer("noto")["version"] == "v1")
    until("another driver", lambda: drivers("rebuild", "noto"))
    until("its embeddings", lambda: store().exists(f"{ROOT}/datasets/noto/v2/embeddings/plan.json"))
    worker = int(Path(os.environ["RDM_STATE"], "worker-2.pid").read_text())
    for pid in (*children(worker), worker):
        os.kill(pid, signal.SIGKILL)
    saw("node worker-2", "killed in the middle", pointer("noto")["version"] == "v1")
    code, said = job.wait()
    counts = {name: said.get(name) for name in ("added", "changed", "removed")}
    saw("noto@v2 published by the next attempt", f"exit {code}, {counts}", code == 0 and
        tuple(counts.values()) == (ADDED, CHANGED, REMOVED) and pointer("noto")["version"] == "v2")
    saw("images embedded again", f"{said.get('embedded')}; {said.get('reused')} vectors reused",
        said.get("embedded") == ADDED + CHANGED)
    spoil("twemoji")
    job = Job("twemoji")
    code, _ = job.wait()
    reason = next((line for line in job.log_text().splitlines() if "is not published" in line), "")
    saw("twemoji, half of it noise", f"exit {code}: {reason.partition('is not published: ')[2]}",
        code == 1 and pointer("twemoji")["version"] == "v1")
    until("the reader on v2", lambda: "v2" in reader.versions or reader.faults)
    done = jobs("rollback", "noto", "--root", ROOT)
    saw("rollback of noto", done.stdout.strip(), done.returncode == 0 and pointer("noto")["version"] == "v1")
    until("the reader after the rollback", lambda: reader.versions[-1] == "v1" or reader.faults)
    reader.ended.set()
    reader.join(60)
    order = [version for version, _ in groupby(reader.versions)]
    saw("versions that the reader sampled from", f"{reader.sampled} times: {' -> '.join(order)}; "
        f"{'; '.join(reader.faults) or 'each time one whole version'}",
        not reader.faults and order == ["v1", "v2", "v1"])
    done = jobs("verify", "--against", "current", "--root", ROOT)
    saw("verify --against current", f"exit {done.returncode}", done.returncode == 0)
    if "RDM_PROMETHEUS" in os.environ:
        until("Prometheus", lambda: query_prometheus("rdm_database_number").get("noto/") == 1, 60)
        numbers = query_prometheus("rdm_database_number")
        saw("published builds in Prometheus", numbers, sorted(numbers) == sorted(f"{name}/" for name in STYLES))
        embedded = query_prometheus(
            'sum by (dataset, stage) (max_over_time(ray_rdm_samples_total{stage="embed"}[30m]))')
        saw("embedded, in Prometheus", embedded, "noto/embed" in embedded)


def query_prometheus(query: str) -> dict[str, float]:
    """Results of a query of Prometheus, by database and stage."""
    url = f"{os.environ['RDM_PROMETHEUS']}/api/v1/query?{urlencode({'query': query})}"
    with urlopen(url, timeout=30) as answer:
        series = json.load(answer)["data"]["result"]
    return {entry["metric"].get("dataset", "") + "/" + entry["metric"].get("stage", ""): float(entry["value"][1])
            for entry in series}


def children(pid: int) -> list[int]:
    """Every process below another."""
    processes = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            processes += [*children(child), child]
    return processes


def table() -> str:
    """A table with a row for each observation."""
    rows = [f"| {what} | {value} | {'as it must be' if good else 'WRONG'} |" for what, value, good in _seen]
    return "\n".join(["| | seen | |", "|---|---|---|", *rows])


if __name__ == "__main__":
    try:
        show()
    finally:
        print(f"\n{table()}\n\n{time.monotonic() - _began:.0f} seconds", flush=True)
    sys.exit(0 if all(good for *_, good in _seen) else 1)
