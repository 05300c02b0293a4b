"""Verbs as jobs of a cluster: a real one, started by infra/one-machine.sh, with its job server and a token."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.cli.main import main
from jobs.telemetry import interrupts
from pipeline import storage
from pipeline.stages.manifest import code_revision, read_manifest, without_run_facts

REPOSITORY = Path(__file__).parents[3]


def test_a_held_signal_arrives_at_the_end_of_the_block() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        before, reached = signal.getsignal(signal.SIGINT), False
        with pytest.raises(KeyboardInterrupt), interrupts.defer_interrupts():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as Ray does
            os.kill(os.getpid(), number)
            time.sleep(0.05)
            reached = True
        assert reached and signal.getsignal(signal.SIGINT) is before
    with interrupts.defer_interrupts():
        pass


class Machine:
    """A cluster of infra/one-machine.sh, with its variables in the environment."""

    def __init__(self, home: Path) -> None:
        ports = _free_ports()
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_AUTH", "RDM_"))}
        self.environment |= {"HOME": str(home), "RDM_STATE": str(home / "state"), "PORT": str(ports[0]),
                             "DASHBOARD_PORT": str(ports[1]), "PYTHONPATH": "",
                             "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def up(self) -> None:
        process = subprocess.run([REPOSITORY / "infra/one-machine.sh", "up"], env=self.environment, text=True,
                                 timeout=300, stdout=subprocess.PIPE)
        assert process.returncode == 0
        assigned = dict(assignment.split("=", 1) for assignment in re.findall(r"\w+=\S+", process.stdout))
        self.environment |= assigned
        self.variables = {*assigned}

    def down(self) -> None:
        process = subprocess.run([REPOSITORY / "infra/one-machine.sh", "down"], env=self.environment, check=True,
                                 timeout=120, stdout=subprocess.PIPE, text=True)
        assert process.stdout.startswith("unset ") and {*process.stdout.split()[1:]} == self.variables

    def start(self, *words: Any) -> "subprocess.Popen[str]":
        """`python -m jobs submit WORDS`, from this tree."""
        return subprocess.Popen([sys.executable, "-m", "jobs", "submit", *map(str, words)], cwd=REPOSITORY, text=True,
                                env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def submit(self, *words: Any) -> tuple[int, dict[str, Any], str]:
        return _wait_for_end(self.start(*words))

    def ask(self, path: str, method: str = "GET") -> Any:
        """The job server itself."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
        request = urllib.request.Request(f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{path}", method=method,
                                         headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


def _wait_for_end(process: "subprocess.Popen[str]") -> tuple[int, dict[str, Any], str]:
    """The exit code, the JSON on stdout, and the log."""
    out, log = process.communicate(timeout=300)
    return process.returncode, json.loads(out) if out else {}, log


def _free_ports() -> tuple[int, int]:
    while True:
        first = 20000 + secrets.randbelow(10000)
        try:
            for port in (first, first + 1):
                with socket.socket() as candidate:
                    candidate.bind(("127.0.0.1", port))
            return first, first + 1
        except OSError:
            continue


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    cluster = Machine(tmp_path_factory.mktemp("machine"))
    try:
        with socket.socket() as other:
            with contextlib.suppress(OSError):  # it is in use already, as it should be
                other.bind(("127.0.0.1", 52365))  # the agent of another Ray
                other.listen()
            cluster.up()
            yield cluster
    finally:
        cluster.down()
        shutil.rmtree(f"/tmp/rdm-ray-{os.getuid()}-{cluster.environment['PORT']}", ignore_errors=True)


@pytest.mark.ray
def test_submit_returns_the_exit_code_of_the_verb(machine: Machine, tmp_path: Path) -> None:
    misused = machine.start("--wait", "--retries", "3", "verify", "--root", tmp_path)
    code, summary, log = machine.submit("--wait", "status", "--root", tmp_path, "--json")
    assert (code, summary["status"], summary["exit_code"], summary["attempt"]) == (0, "SUCCEEDED", 0, 1), log
    assert "\n[]\n" in log  # what the verb said
    code, summary, log = _wait_for_end(misused)
    assert (code, summary["status"], summary["exit_code"], summary["attempt"]) == (2, "FAILED", 2, 1), log
    assert "error: nothing is sealed in" in log
    for info in machine.ask(""):
        assert info["metadata"]["verb"] in info["entrypoint"]
        assert info["metadata"]["revision"] == code_revision()
    assert Path(machine.environment["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o600
    machine.environment["RAY_AUTH_TOKEN"] = "a" * 64
    code, _, log = machine.submit("status", "--root", tmp_path)
    del machine.environment["RAY_AUTH_TOKEN"]
    assert code == 2 and "rejected the token" in log and "~/.ray/auth_token" in log


def _pictures(folder: Path, count: int = 60) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.effect_noise((300, 300), number + 1).save(folder / f"{number:02}.png")
    return folder


def _until_records(root: Path, count: int) -> list[str]:
    end = time.monotonic() + 120
    while len(records := storage.list_files(str(root / "datasets/some/v1/shards/records"))) < count:
        assert time.monotonic() < end, records
        time.sleep(0.02)
    return records


@pytest.fixture
def work(tmp_path: Path) -> list[str]:
    """A verb that takes a while: sixty items, one after another."""
    return ["shard", "some", "--source", str(_pictures(tmp_path / "in")), "--samples-per-shard", "1", "--workers", "1",
            "--image-size", "1000", "--root", str(tmp_path / "root")]


def _undisturbed(tmp_path: Path, work: list[str]) -> dict[str, Any]:
    assert main([*work[:-1], str(tmp_path / "plain"), "--local"]) == 0
    return without_run_facts(read_manifest(str(tmp_path / "plain/datasets/some/v1/shards"), ""))


@pytest.mark.slow
@pytest.mark.ray
def test_a_stopped_job_resumes_and_a_running_one_is_joined(machine: Machine, work: list[str], tmp_path: Path) -> None:
    waiting = machine.start("--wait", "--retries", "2", *work)
    _until_records(tmp_path / "root", 3)
    code, joined, log = machine.submit(*work, "--workers", "2")  # elsewhere, but the same work
    assert code == 0 and joined["status"] == "RUNNING" and joined["attempt"] == 1 and "runs already" in log
    machine.ask(f"{joined['submission_id']}/stop", "POST")
    code, summary, log = _wait_for_end(waiting)
    assert (code, summary["status"], summary["attempt"]) == (130, "STOPPED", 1), log  # on purpose: not tried again
    assert "stopped; the same command continues from here" in log
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "root/datasets/some/v1/shards/records").iterdir()}
    assert 3 <= len(before) < 60
    code, summary, log = machine.submit("--wait", *work)
    assert (code, summary["submission_id"]) == (0, joined["submission_id"].replace("-a1", "-a2")), log
    assert before == {path: path.stat().st_mtime_ns for path in before}
    manifest = without_run_facts(read_manifest(str(tmp_path / "root/datasets/some/v1/shards"), ""))
    assert manifest == _undisturbed(tmp_path, work)


@pytest.mark.slow
@pytest.mark.ray
def test_a_lost_driver_or_cluster_is_retried(machine: Machine, work: list[str], tmp_path: Path) -> None:
    waiting = machine.start("--wait", "--retries", "2", *work)
    drivers = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        done = len(_until_records(tmp_path / "root", 1 if not drivers else len(drivers[-1][1]) + 5))
        drivers.append((_driver(work, drivers[-1][0] if drivers else 0), _until_records(tmp_path / "root", done)))
        os.kill(drivers[-1][0], number)
    code, summary, log = _wait_for_end(waiting)
    assert (code, summary["attempt"]) == (0, 3), log
    assert "ended with 130; retrying, 2 retries left" in log and "the driver ended with" in log
    expected = _undisturbed(tmp_path, work)
    work[-1] = str(tmp_path / "again")
    waiting = machine.start("--wait", "--retries", "1", *work)
    _until_records(tmp_path / "again", 3)
    machine.down()
    machine.up()
    code, summary, log = _wait_for_end(waiting)
    assert code == 0 and "it was restarted" in log, log
    assert without_run_facts(read_manifest(str(tmp_path / "again/datasets/some/v1/shards"), "")) == expected


@pytest.mark.slow
@pytest.mark.ray
def test_a_suspended_job_resumes_on_a_new_cluster_with_equal_bytes(
        machine: Machine, work: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Kueue suspends a RayJob so: the driver gets SIGTERM, the cluster ends, a new one gets the same entrypoint."""
    plain, root = tmp_path / "plain", tmp_path / "root"
    embed = ["embed", "some", "--workers", "1", "--batch-size", "1", "--root", str(root)]
    for words in (work, embed):
        assert main([*words[:-1], str(plain), "--local"]) == 0
    for words, folder in ((work, "shards"), (embed, "embeddings")):
        before = _suspend(words, root / "datasets/some/v1" / folder, tmp_path_factory.mktemp("first"))
        assert not (root / "datasets/some/v1" / folder / "manifest.json").exists()
        code, summary, log = machine.submit("--wait", *words)
        assert (code, summary["attempt"]) == (0, 1), log  # the new cluster does not know the job
        assert before == {path: path.stat().st_mtime_ns for path in before}  # recorded work is not repeated
    assert _contents(root) == _contents(plain)


def _suspend(words: list[str], folder: Path, home: Path) -> dict[Path, int]:
    """Interrupt a job after some of its records, and end its cluster; the records and their times."""
    first = Machine(home)
    try:
        first.up()
        waiting = first.start("--wait", *words)
        end = time.monotonic() + 120
        while len(records := list((folder / "records").glob("*.json"))) < 3:
            assert time.monotonic() < end and waiting.poll() is None, records
            time.sleep(0.01)
        os.kill(_driver(words, 0), signal.SIGTERM)
        code, summary, log = _wait_for_end(waiting)
        assert (code, summary["attempt"]) == (130, 1), log
    finally:
        first.down()
        shutil.rmtree(f"/tmp/rdm-ray-{os.getuid()}-{first.environment['PORT']}", ignore_errors=True)
    times = {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    assert 3 <= len(times) < 60
    return times


def _contents(root: Path) -> dict[str, Any]:
    """The hash of every file that the dataset's two stages sealed, and their manifests without times."""
    folders = [root / "datasets/some/v1" / name for name in ("shards", "embeddings")]
    hashes: dict[str, Any] = {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders for path in folder.iterdir() if path.suffix != ".json" and path.is_file()}
    assert len(hashes) >= 2 * 60
    return hashes | {folder.name: without_run_facts(read_manifest(str(folder), "")) for folder in folders}


def _driver(work: list[str], before: int) -> int:
    """The process id of the driver, another one than `before`."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode().split("\0")[:-1]
            except OSError:
                continue
            if words[1:3] == ["-m", "jobs"] and words[3:] == work and int(path.parent.name) != before:
                return int(path.parent.name)
        time.sleep(0.05)
    raise AssertionError("there is no driver")


@pytest.mark.slow
@pytest.mark.ray
def test_a_pipeline_is_submitted_with_the_settings_of_this_machine(machine: Machine, tmp_path: Path,
                                                                   drawn_pictures: Path) -> None:
    (tmp_path / "mine.toml").write_text('[train]\nsteps = 3\nglobal_batch = 8\nprecision = "fp32"\nimage_size = 16\n'
                                        "[train.unet]\nmodel_channels = 32\n")
    words = ["pipeline", "some", "--source", drawn_pictures, "--captions", drawn_pictures / "train.csv",
             "--only-captioned", "--image-size", "16", "--root", tmp_path / "root", "--config", tmp_path / "mine.toml",
             "--train", "run"]
    code, summary, log = machine.submit("--wait", *words)
    assert (code, summary["attempt"]) == (0, 1), log
    assert json.loads((tmp_path / "root/runs/run/manifest.json").read_text())["info"]["steps"] == 3
    plan = json.loads((tmp_path / "root/runs/run/plan.json").read_text())
    assert plan["code"] == code_revision()  # the job's folder has no git
    code, summary, log = machine.submit("--wait", *words)
    assert (code, summary["attempt"]) == (0, 2), log


@pytest.mark.slow
@pytest.mark.ray
def test_the_first_rebuild_job_of_a_cluster_measures_the_overlap(machine: Machine, tmp_path: Path) -> None:
    """Its driver loads the encoder late, after the workers have got the code of the job."""
    machine.down()
    machine.up()
    source = _pictures(tmp_path / "in")
    words = ["rebuild", "some", "--source", str(source), "--root", str(tmp_path / "root")]
    assert main([*words, "--local"]) == 0
    shutil.copytree(source, source / "more")
    for path in (source / "more").iterdir():
        Image.open(path).rotate(90).save(path)
    code, summary, log = machine.submit("--wait", *words)
    assert (code, summary["attempt"]) == (0, 1) and "gate overlap@10" in log, log


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("cluster_of", ["its own", "the machine's"])
def test_sigterm_at_any_moment_of_the_start_ends_with_130(cluster_of: str, request: pytest.FixtureRequest,
                                                          tmp_path: Path, work: list[str]) -> None:
    environment = dict(os.environ)
    if cluster_of != "its own":
        environment = request.getfixturevalue("machine").environment
    for number in range(8):
        process = subprocess.Popen([sys.executable, "-m", "jobs", *work[:-1], str(tmp_path / str(number))], text=True,
                                   cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        time.sleep(0.4 + 0.5 * number)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=120)
        assert process.returncode == 130 and "stopped" in log, (number, log)
