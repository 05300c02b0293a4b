"""Verbs as jobs of a cluster: a real one, started by infra/one-machine.sh, with its job server and a token."""

import hashlib
import json
import logging
import os
import re
import secrets
import shlex
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

from jobs.cli.main import main
from jobs.cli.parse import parse_command
from jobs.cli.submit import Submission, _entrypoint, _without_key, make_submission
from jobs.telemetry import interrupts
from pipeline import storage
from pipeline.stages.manifest import code_revision, read_manifest, without_run_facts

REPOSITORY = Path(__file__).parents[3]
ROOT = "s3://bucket/root"


def _submission(*words: str, own: tuple[str, ...] = ()) -> Submission:
    """What `submit OWN WORDS` would submit."""
    _, options = parse_command(["submit", *own, *words])
    _, inner = parse_command(options.words)
    return make_submission(options.words, inner, options)


def test_the_same_work_has_the_same_name_wherever_it_runs(tmp_path: Path) -> None:
    submission = _submission("embed", "noto", "--root", ROOT)
    assert re.fullmatch(r"embed-noto-v1-[0-9a-f]{8}", submission.name)
    assert submission.name == _submission("embed", "--root", f"{ROOT}/", "noto", "--workers", "64", "--gpus", "1").name
    (tmp_path / "settings.toml").write_text("[embed]\nbatch_size = 32\n[cluster]\nworkers = 7\n")
    by_file = _submission("embed", "noto", "--root", ROOT, "--config", str(tmp_path / "settings.toml"))
    others = ("embed noto --root s3://bucket/other", f"embed noto@v2 --root {ROOT}", f"index noto --root {ROOT}",
              f"embed noto --captions --root {ROOT}", f"neighbors noto --database x --root {ROOT}",
              f"neighbors noto --database y --root {ROOT}", f"rebuild noto --source s3://b/in --root {ROOT}",
              f"status --root {ROOT}")
    names = [submission.name, by_file.name, *(_submission(*words.split()).name for words in others)]
    assert len(set(names)) == len(names)
    assert by_file.words[-1] == "settings.toml" and by_file.config == str(tmp_path / "settings.toml")


def test_the_old_spelling_of_overwrite_names_the_same_job() -> None:
    new, old = (_submission("embed", "noto", "--root", ROOT, flag) for flag in ("--overwrite", "--rebuild"))
    assert new.name == old.name != _submission("embed", "noto", "--root", ROOT).name
    assert old.words[-1] == "--rebuild"  # nodes with an earlier version of the code know only this one


def test_a_shell_gives_the_words_back() -> None:
    words = ("sample", "run", "--prompt", "it's a \"red\" $HOME; rm *", "--database", "x y", "--root", ROOT)
    assert shlex.split(_entrypoint(_submission(*words))) == ["python", "-m", "jobs", *words]


def test_no_secret_goes_along(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "WANDB_", "RDM_"))]:
        monkeypatch.delenv(name)
    for name, value in {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "hidden", "AWS_SESSION_TOKEN": "hidden",
                        "AWS_ENDPOINT_URL": "http://s3:9000", "AWS_PROFILE": "mine", "RDM_CACHE": "/here",
                        "RDM_CACHE_BYTES": "1G", "WANDB_API_KEY": "hidden", "WANDB_PROJECT": "p",
                        "WANDB_BASE_URL": "https://me:hidden@wandb", "HF_HOME": "/hub", "HF_TOKEN": "hidden"}.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO, "jobs")
    submission = _submission("embed", "noto", "--root", ROOT,
                             own=("--secret", "AWS_SECRET_ACCESS_KEY", "--env", "HF_HOME"))
    assert submission.variables == {
        "AWS_ENDPOINT_URL": "http://s3:9000", "RDM_CACHE_BYTES": "1G", "WANDB_PROJECT": "p", "HF_HOME": "/hub",
        "RDM_NEEDS": "AWS_SECRET_ACCESS_KEY", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert "hidden" not in json.dumps(submission.about) and submission.about["needs"] == "AWS_SECRET_ACCESS_KEY"
    assert "WANDB_API_KEY" in caplog.text and "hidden" not in caplog.text
    with pytest.raises(ValueError, match="HF_TOKEN: is a secret"):
        _submission("embed", "noto", "--root", ROOT, own=("--env", "HF_TOKEN"))


def test_keys_of_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = tmp_path / "key", tmp_path / "key.pub"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", private], check=True)
    monkeypatch.setenv("RDM_RELEASE_KEY", str(public))
    words = ("rebuild", "noto", "--source", "s3://b/in", "--root", ROOT)
    plain, signed = _submission(*words), _submission(*words, "--sign", str(private))
    assert signed.name == _submission(*words, "--sign", "/elsewhere/key").name != plain.name
    # Nodes get the public key itself. They have their own file with the private one.
    assert signed.variables["RDM_RELEASE_KEY"] == " ".join(public.read_text().split()[:2])
    sent = json.dumps([signed.name, signed.words, signed.about, signed.variables, signed.config])
    lines = [line for line in private.read_text().splitlines() if not line.startswith("-")]
    assert lines and not [line for line in lines if line in sent]
    for form in (_entrypoint(signed), shlex.join([*words, "--sign=/a/key", "--local"]),
                 shlex.join([*words, "--sign", "/a b/key"])):
        shown = _without_key(form)
        assert "/key" not in shown and str(tmp_path) not in shown and "KEYFILE" in shown
    assert _without_key(_entrypoint(plain)) == _entrypoint(plain)
    with pytest.raises(ValueError, match="takes the path of a private key") as refused:
        _submission(*words, f"--sign={private.read_text()}")
    assert lines[0] not in str(refused.value)
    with pytest.raises(ValueError, match="key is a folder of this machine"):
        _submission(*words, "--sign", "key")
    monkeypatch.setenv("RDM_RELEASE_KEY", str(private))
    with pytest.raises(ValueError, match="names a private key"):
        _submission(*words)


def test_only_named_variables_go_along_whatever_their_case(monkeypatch: pytest.MonkeyPatch,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    for name in [name for name in os.environ if name.casefold().startswith(("aws_", "wandb_", "rdm_"))]:
        monkeypatch.delenv(name)
    for name, value in {"AWS_REGION": "eu", "WANDB_NOTES": "hidden", "AWS_LAMBDA_RUNTIME_API": "hidden",
                        "RDM_OWN": "hidden", "aws_secret_access_key": "hidden", "Wandb_Api_Key": "hidden",
                        "WANDB_ENTITY": "https://host/team?jwt=hidden", "hf_token": "hidden", "my_setting": "sent",
                        "MY_URL": "https://host/a?X-Goog-Signature=hidden"}.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO, "jobs")
    submission = _submission("embed", "noto", "--root", ROOT, own=(
        "--secret", "WANDB_API_KEY", "--env", "my_setting", "--env", "MY_URL"))
    assert submission.variables == {"AWS_REGION": "eu", "my_setting": "sent", "RDM_NEEDS": "WANDB_API_KEY",
                                    "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    for name in ("WANDB_NOTES", "RDM_OWN", "aws_secret_access_key", "WANDB_ENTITY", "MY_URL"):
        assert name in caplog.text
    assert "hidden" not in caplog.text and "Wandb_Api_Key" not in caplog.text
    for name in ("hf_token", "Wandb_Api_Key", "aws_secret_access_key"):
        with pytest.raises(ValueError, match=f"{name}: is a secret"):
            _submission("embed", "noto", "--root", ROOT, own=("--env", name))


@pytest.mark.parametrize("url", ["https://me:secret@host/list.csv", "https://host/list.csv?sig=secret",
                                 "https://host/list.csv?X-Goog-Signature=secret", "https://host/list.csv?key=secret",
                                 "https://host/list.csv?other=secret#x", "https://host/list.csv#token=secret"])
def test_urls_with_credentials_are_not_submitted(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a URL in the command has a password or signature") as caught:
        _submission("shard", "x", "--source", url, "--root", ROOT)
    assert "secret" not in str(caught.value).split("hint")[0]
    (tmp_path / "settings.toml").write_text(f'[shard]\nsource = ["{url}"]\n')
    with pytest.raises(ValueError, match=r"settings\.toml has a password or signature"):
        _submission("shard", "x", "--config", str(tmp_path / "settings.toml"), "--root", ROOT)


@pytest.mark.parametrize("words, sentence", [
    (["--wait"], "submit needs a verb"), (["submit", "status"], "submit needs a verb"),
    (["embed", "noto"], "data is a folder of this machine"),
    (["report", "--root", ROOT, "--out", "report.html"], "report.html is a folder of this machine"),
    (["shard", "x", "--source", "https://me:secret@host/list.csv", "--root", ROOT], "has a password or signature"),
    (["--retries", "1", "status", "--root", ROOT], "--retries needs --wait"),
    (["--env", "NOT_SET", "status", "--root", ROOT], "NOT_SET: is not set here"),
    (["--address", "http://127.0.0.1:1", "status", "--root", ROOT], "no job server answers at http://127.0.0.1:1"),
])
def test_misuse_is_found_before_anything_is_submitted(words: list[str], sentence: str, monkeypatch, capsys) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert main(["submit", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "secret@" not in error


def test_a_job_looks_for_its_secrets_first(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("RDM_NEEDS", "SOME_SECRET")
    monkeypatch.delenv("SOME_SECRET", raising=False)
    assert main(["status", "--root", str(tmp_path)]) == 2
    assert "this node has no SOME_SECRET" in capsys.readouterr().err
    monkeypatch.setenv("SOME_SECRET", "there")
    assert main(["status", "--root", str(tmp_path)]) == 0


def test_a_signal_that_is_held_comes_at_the_end_and_only_then() -> None:
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


def test_a_pipeline_dry_run_tells_what_waits_for_what(tmp_path: Path, drawn_pictures: Path, capsys) -> None:
    pipeline = ["pipeline", "some", "--source", str(drawn_pictures), "--captions", str(drawn_pictures / "flat.csv"),
                "--only-captioned", "--root", str(tmp_path), "--local"]
    assert main([*pipeline, "--train", "run", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert [folder.rsplit("/", 1)[1] for folder in re.findall(r'"folder": "([^"]*)"', output)] == [
        "shards", "embeddings", "index", "some", "run"]
    assert output.count("waits_for") == 4 and not list(tmp_path.iterdir())
    assert main(pipeline) == 0
    folders = [Path(json.loads(line)["folder"]) for line in capsys.readouterr().out.splitlines()]
    assert [folder.name for folder in folders] == ["shards", "embeddings", "index"]
    times = {folder: (folder / "manifest.json").stat().st_mtime_ns for folder in folders}
    assert main(pipeline) == 0
    assert times == {folder: (folder / "manifest.json").stat().st_mtime_ns for folder in folders}


class Machine:
    """A cluster of infra/one-machine.sh, and this environment as it says it should be."""

    def __init__(self, home: Path) -> None:
        ports = _free_ports()
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_AUTH", "RDM_"))}
        self.environment |= {"HOME": str(home), "RDM_STATE": str(home / "state"), "PORT": str(ports[0]),
                             "DASHBOARD_PORT": str(ports[1]), "AGENT_PORT": str(ports[2]), "PYTHONPATH": "",
                             "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def up(self) -> None:
        process = subprocess.run([REPOSITORY / "infra/one-machine.sh", "up"], env=self.environment, text=True,
                                 timeout=300, stdout=subprocess.PIPE)
        assert process.returncode == 0
        self.environment |= dict(assignment.split("=", 1) for assignment in re.findall(r"\w+=\S+", process.stdout))

    def down(self) -> None:
        subprocess.run([REPOSITORY / "infra/one-machine.sh", "down"], env=self.environment, check=True, timeout=120)

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
    """Exit code, what stdout said, and the log."""
    out, log = process.communicate(timeout=300)
    return process.returncode, json.loads(out) if out else {}, log


def _free_ports() -> tuple[int, int, int]:
    while True:
        first = 20000 + secrets.randbelow(10000)
        try:
            for port in (*range(first, first + 5), first + 102):
                with socket.socket() as candidate:
                    candidate.bind(("127.0.0.1", port))
            return first, first + 1, first + 2
        except OSError:
            continue


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    cluster = Machine(tmp_path_factory.mktemp("machine"))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(f"/tmp/rdm-ray-{os.getuid()}-{cluster.environment['PORT']}", ignore_errors=True)


@pytest.mark.ray
def test_the_verbs_own_exit_code_comes_back(machine: Machine, tmp_path: Path) -> None:
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
    assert code == 2 and "wants another token" in log


def _pictures(folder: Path, count: int = 60) -> Path:
    from PIL import Image
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
def test_a_stopped_job_goes_on_as_the_next_attempt_and_the_same_one_is_joined(machine: Machine, work: list[str],
                                                                              tmp_path: Path) -> None:
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
def test_a_driver_or_a_cluster_that_is_lost_is_tried_again(machine: Machine, work: list[str], tmp_path: Path) -> None:
    waiting = machine.start("--wait", "--retries", "2", *work)
    drivers = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        done = len(_until_records(tmp_path / "root", 1 if not drivers else len(drivers[-1][1]) + 5))
        drivers.append((_driver(work, drivers[-1][0] if drivers else 0), _until_records(tmp_path / "root", done)))
        os.kill(drivers[-1][0], number)
    code, summary, log = _wait_for_end(waiting)
    assert (code, summary["attempt"]) == (0, 3), log
    assert "ended with 130; it is tried again, 2 more left" in log and "the driver ended with" in log
    expected = _undisturbed(tmp_path, work)
    work[-1] = str(tmp_path / "again")
    waiting = machine.start("--wait", "--retries", "1", *work)
    _until_records(tmp_path / "again", 3)
    machine.down()
    machine.up()
    code, summary, log = _wait_for_end(waiting)
    assert code == 0 and "it was started anew" in log, log
    assert without_run_facts(read_manifest(str(tmp_path / "again/datasets/some/v1/shards"), "")) == expected


@pytest.mark.slow
@pytest.mark.ray
def test_a_suspended_job_resumes_on_a_new_cluster_with_equal_bytes(
        machine: Machine, work: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As Kueue suspends a RayJob: the driver gets SIGTERM, the cluster goes, and a new one gets the same entrypoint."""
    plain, root = tmp_path / "plain", tmp_path / "root"
    embed = ["embed", "some", "--workers", "1", "--batch-size", "1", "--root", str(root)]
    for words in (work, embed):
        assert main([*words[:-1], str(plain), "--local"]) == 0
    for words, folder in ((work, "shards"), (embed, "embeddings")):
        before = _suspend(words, root / "datasets/some/v1" / folder, tmp_path_factory.mktemp("first"))
        assert not (root / "datasets/some/v1" / folder / "manifest.json").exists()
        code, summary, log = machine.submit("--wait", *words)
        assert (code, summary["attempt"]) == (0, 1), log  # the new cluster does not know the job
        assert before == {path: path.stat().st_mtime_ns for path in before}  # nothing recorded is done twice
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
def test_a_pipeline_as_a_job_with_settings_of_this_machine(machine: Machine, tmp_path: Path,
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
@pytest.mark.parametrize("cluster_of", ["its own", "the machine's"])
def test_sigterm_at_any_moment_of_a_start_ends_with_130(cluster_of: str, request: pytest.FixtureRequest,
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
