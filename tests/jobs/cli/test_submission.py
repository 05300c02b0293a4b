"""The parts of a job before it is sent: name, words, variables and files."""

import asyncio
import json
import logging
import os
import re
import shlex
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.cli.parse import parse_command
from jobs.cli.submit import Submission, _entrypoint, _tail, _without_key, make_submission

ROOT = "s3://bucket/root"


def _submission(*words: str, own: tuple[str, ...] = ()) -> Submission:
    """The submission of `submit OWN WORDS`."""
    _, options = parse_command(["submit", *own, *words])
    _, inner = parse_command(options.words)
    return make_submission(options.words, inner, options)


def test_the_same_work_has_the_same_name_wherever_it_runs(tmp_path: Path) -> None:
    submission = _submission("embed", "noto", "--root", ROOT)
    assert re.fullmatch(r"embed-noto-[0-9a-f]{8}", submission.name) and "version" not in submission.about
    named = _submission("embed", "noto@v2", "--root", ROOT)
    assert re.fullmatch(r"embed-noto-v2-[0-9a-f]{8}", named.name) and named.about["version"] == "v2"
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


def test_the_entrypoint_is_quoted_for_a_shell() -> None:
    words = ("sample", "run", "--prompt", "it's a \"red\" $HOME; rm *", "--database", "x y", "--root", ROOT)
    assert shlex.split(_entrypoint(_submission(*words))) == ["python", "-m", "jobs", *words]


def test_submit_sends_no_secret(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "WANDB_", "RDM_"))]:
        monkeypatch.delenv(name)
    for name, value in {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "hidden", "AWS_SESSION_TOKEN": "hidden",
                        "AWS_ENDPOINT_URL": "http://s3:9000", "AWS_PROFILE": "mine", "RDM_CACHE": "/here",
                        "RDM_CACHE_BYTES": "1G", "WANDB_API_KEY": "hidden", "WANDB_PROJECT": "p",
                        "WANDB_BASE_URL": "https://me:hidden@wandb", "HF_HOME": "/hub", "HF_TOKEN": "hidden"}.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO, "jobs")
    submission = _submission("embed", "noto", "--root", ROOT, own=(
        "--secret", "AWS_SECRET_ACCESS_KEY", "--env", "HF_HOME", "--env", "AWS_ENDPOINT_URL"))
    assert submission.variables == {
        "AWS_ENDPOINT_URL": "http://s3:9000", "HF_HOME": "/hub", "RDM_NEEDS": "AWS_SECRET_ACCESS_KEY",
        "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert "hidden" not in json.dumps(submission.about) and submission.about["needs"] == "AWS_SECRET_ACCESS_KEY"
    assert "WANDB_API_KEY" in caplog.text and "RDM_CACHE_BYTES" in caplog.text and "hidden" not in caplog.text
    with pytest.raises(ValueError, match="HF_TOKEN: its name looks secret"):
        _submission("embed", "noto", "--root", ROOT, own=("--env", "HF_TOKEN"))


def test_submit_sends_public_keys_of_releases_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = tmp_path / "key", tmp_path / "key.pub"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", private], check=True)
    monkeypatch.setenv("RDM_RELEASE_KEY", str(public))
    words = ("rebuild", "noto", "--source", "s3://b/in", "--root", ROOT)
    with pytest.raises(ValueError, match="RDM_RELEASE_KEY is set here, but the job would not have it"):
        _submission(*words)
    assert "RDM_RELEASE_KEY" not in _submission(*words, own=("--secret", "RDM_RELEASE_KEY")).variables
    own = ("--env", "RDM_RELEASE_KEY")
    plain, signed = _submission(*words, own=own), _submission(*words, "--sign", str(private), own=own)
    assert signed.name == _submission(*words, "--sign", "/elsewhere/key", own=own).name != plain.name
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
    with pytest.raises(ValueError, match="key is a relative path"):
        _submission(*words, "--sign", "key")
    monkeypatch.setenv("RDM_RELEASE_KEY", str(private))
    with pytest.raises(ValueError, match="names a private key"):
        _submission(*words, own=own)


def test_submit_sends_only_named_variables_in_any_case(monkeypatch: pytest.MonkeyPatch,
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
        "--secret", "WANDB_API_KEY", "--env", "my_setting"))
    assert submission.variables == {"my_setting": "sent", "RDM_NEEDS": "WANDB_API_KEY",
                                    "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    for name in ("AWS_REGION", "WANDB_NOTES", "RDM_OWN", "aws_secret_access_key", "WANDB_ENTITY"):
        assert name in caplog.text
    assert "hidden" not in caplog.text and "Wandb_Api_Key" not in caplog.text
    for name in ("hf_token", "Wandb_Api_Key", "aws_secret_access_key"):
        with pytest.raises(ValueError, match=f"{name}: its name looks secret"):
            _submission("embed", "noto", "--root", ROOT, own=("--env", name))
    with pytest.raises(ValueError, match="--env MY_URL: its value looks secret") as refused:
        _submission("embed", "noto", "--root", ROOT, own=("--env", "MY_URL"))
    assert "hidden" not in str(refused.value)


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
    (["embed", "noto"], "data is a relative path"),
    (["report", "--root", ROOT, "--out", "report.html"], "report.html is a relative path"),
    (["shard", "x", "--source", "https://me:secret@host/list.csv", "--root", ROOT], "has a password or signature"),
    (["--retries", "1", "status", "--root", ROOT], "--retries needs --wait"),
    (["--env", "NOT_SET", "status", "--root", ROOT], "NOT_SET: is not set here"),
    (["--address", "http://127.0.0.1:1", "status", "--root", ROOT], "no job server answers at http://127.0.0.1:1"),
])
def test_invalid_usage_is_found_before_submission(words: list[str], sentence: str, monkeypatch, capsys) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert main(["submit", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "secret@" not in error


def test_a_job_without_its_secrets_is_invalid_usage(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("RDM_NEEDS", "SOME_SECRET")
    monkeypatch.delenv("SOME_SECRET", raising=False)
    assert main(["status", "--root", str(tmp_path)]) == 2
    assert "this node has no SOME_SECRET" in capsys.readouterr().err
    monkeypatch.setenv("SOME_SECRET", "there")
    assert main(["status", "--root", str(tmp_path)]) == 0


def test_a_dry_run_of_a_pipeline_prints_dependencies(tmp_path: Path, drawn_pictures: Path, capsys) -> None:
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


def test_the_log_of_a_job_is_shown_in_whole_lines_without_colors(capsys: pytest.CaptureFixture[str]) -> None:
    class Client:
        async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
            for piece in ("seen al", "ready\nfirst\x1b[3", "6m line\nsec", "ond\n", "last\x1b", "[0m"):
                yield piece

    assert asyncio.run(_tail(Client(), "job", len("seen already\n"))) == len(
        "seen already\nfirst\x1b[36m line\nsecond\nlast\x1b[0m")
    assert capsys.readouterr().err == "first line\nsecond\nlast\n"
