"""The command line: exit codes, sentences with hints, settings from recipe, file and flags."""

import ast
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.cli.parse import parse_command
from jobs.cli.verbs import VERBS
from jobs.config.recipes import RECIPES
from jobs.config.toml import resolve_sections, resolve_settings
from pipeline import storage
from pipeline.sources.folder import FolderSource
from pipeline.stages.types import StageFailed
from tests.laws.terminal import run_on_screen

ROOT = Path(__file__).parents[3]


def _pictures(folder: Path, count: int = 3) -> Path:
    from PIL import Image
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (20, 20), (number * 50, 0, 99)).save(folder / f"{number}.png")
    (folder / "captions.csv").write_text("file,caption\n" + "".join(f"{n}.png,picture {n}\n" for n in range(count)))
    return folder


def _shard(tmp_path: Path, *more: str) -> int:
    return main(["shard", "some", "--root", str(tmp_path / "root"), "--source", str(tmp_path / "in"), "--local", *more])


def test_every_flag_that_a_string_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Messages and help name flags of this program, or of the programs that it starts."""
    there = {"--query-gpu", "--no-deps", "--short", "--ignore-scripts", "--fetch-retries", "--loglevel", "--log_format",
             "--version", "--completion", "--complete", "--help-all", "--shm-size", "--disable-pip-version-check",
             "--force-reinstall"}
    for verb in VERBS:
        assert main([verb, "--help-all"]) == 0
        there |= set(re.findall(r"--[a-z][a-z0-9.-]*", capsys.readouterr().out))
    unknown = {}
    for path in (path for package in ("pipeline", "model", "jobs") for path in (ROOT / package).rglob("*.py")):
        if path.name == "style.py":  # CSS has variables of this form
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for flag in set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z0-9]", node.value)) - there:
                    unknown[flag] = f"{path.relative_to(ROOT)}:{node.lineno}"
    assert unknown == {}


def test_shard_and_status_do_not_load_torch(tmp_path: Path) -> None:
    """torch takes half a gigabyte and seconds, in every worker and for every call of `status`."""
    _pictures(tmp_path / "in")
    root = str(tmp_path / "root")
    code = ("import sys\nfrom jobs.cli.main import main\nassert main(sys.argv[1:]) == 0\n"
            "assert not {'torch', 'ray', 'open_clip', 'faiss'} & set(sys.modules)")
    for command in (["shard", "some", "--source", str(tmp_path / "in"), "--local", "--root", root],
                    ["status", "--root", root]):
        ended = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr


def test_stdout_is_one_document_and_a_second_run_does_nothing(tmp_path: Path, capsys) -> None:
    _pictures(tmp_path / "in")
    assert _shard(tmp_path) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["samples"] == 3 and said["folder"].endswith("datasets/some/v1/shards")
    manifest = tmp_path / "root/datasets/some/v1/shards/manifest.json"
    before = manifest.stat().st_mtime_ns
    assert _shard(tmp_path) == 0 and manifest.stat().st_mtime_ns == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys) -> None:
    _pictures(tmp_path / "in")
    assert _shard(tmp_path, "--dry-run", "--samples-per-shard", "2") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["items"] == said["left"] == 2
    assert (said["kind"], said["files"], said["rows"]) == ("pictures", 3, 3) and "ignored_files" not in said
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["fly"], "there is no verb 'fly'"),
    (["embed", "some", "--local"], "there is no dataset some in {root}, which has y\nhint: python -m jobs shard some"),
    (["embed", "y", "--local"], "is not sealed: it has no manifest.json\nhint: python -m jobs shard y"),
    (["style", "a/b", "--source", "nowhere"], "'a/b' is not a dataset name"),
    (["style", "some"], "no source is named"),
    (["style", "some", "--source", "nowhere"], "there is no file or folder nowhere\nhint: ls "),
    (["rebuild", "some", "--source", "roots"], "there is no file or folder roots\nhint: did you mean root?"),
    (["embed", "a/b", "--local"], "'a/b' is not a dataset name"),
    (["shard", "some", "--local"], "shard needs a source\nhint: --source"),
    (["shard", "some", "--local", "--source", "nowhere"], "nowhere"),
    (["sample", "run", "--local"], "sample needs a database: expected --database, got none; there are y\n"
                                   "hint: --database y"),
    (["sample", "run", "--local", "--prompt", "x", "--database", "y"], "there is no run run"),
    (["train", "run", "--dataset", "y", "--local"], "is not sealed"),
    (["status", "--recipe", "huge"], "there is no recipe 'huge'\nhint: here are tiny"),
    (["status", "--recipe", "tinny"], "there is no recipe 'tinny'\nhint: did you mean tiny?"),
    (["forget", "--key", "y"], "--key y: expected DATASET/KEY, got no dataset\nhint: python -m jobs show y"),
    (["status", "--config", "absent.toml"], "cannot read the settings absent.toml"),
    (["index", "some", "--max-memory", "much", "--local"], "index.max_memory = 'much': must be a size"),
    (["verify"], "nothing is sealed"),
    (["report"], "there is nothing in"),
    (["embed", "some", "--workers", "0"], "cluster.workers = 0: must be at least 1"),
    (["sample", "run", "--steps", "0", "--local"], "sample.steps = 0: must be at least 1"),
])
def test_invalid_usage_is_a_sentence_and_exit_2(arguments, sentence: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ("root/datasets" if arguments == ["report"] else "root/datasets/y/v1")).mkdir(parents=True)
    try:
        code = main([*arguments, *(["--root", "root"] if arguments[0] != "fly" else [])])
    except SystemExit as stopped:  # a flag's value, refused while the command line is read
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and sentence.format(root=tmp_path / "root") in error and "Traceback" not in error


@pytest.mark.parametrize(("error", "code", "words"), [
    (MemoryError(), 1, "MemoryError\nThe machine has too little memory"), (OSError(), 1, "OSError"),
    (ValueError(), 2, "ValueError"), (storage.DamagedFile(), 1, "DamagedFile"), (StageFailed("\n"), 1, "StageFailed")])
def test_an_error_without_a_text_is_named(error, code, words: str, tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(FolderSource, "identity", fail)
    _pictures(tmp_path / "in")
    assert _shard(tmp_path) == code
    said = capsys.readouterr().err
    assert f"error: {words}" in said
    assert "--batch-size" not in said


def test_an_unknown_flag_is_invalid_usage(tmp_path: Path) -> None:
    assert main(["status", "--rooot", str(tmp_path)]) == 2


def test_other_settings_on_a_sealed_folder_are_refused_by_name(tmp_path: Path, capsys) -> None:
    _pictures(tmp_path / "in")
    assert _shard(tmp_path) == 0
    assert _shard(tmp_path, "--image-size", "99") == 2
    assert "section.image_size: there 64, now 99" in capsys.readouterr().err
    assert _shard(tmp_path, "--image-size", "99", "--overwrite") == 0


def test_the_old_spelling_of_overwrite_works_and_is_hidden(tmp_path: Path, capsys) -> None:
    _pictures(tmp_path / "in")
    manifest, said = tmp_path / "root/datasets/some/v1/shards/manifest.json", []
    for flag in ("--overwrite", "--rebuild"):
        assert _shard(tmp_path) == 0
        size = json.loads(manifest.read_text())["section"]["image_size"] // 2
        capsys.readouterr()
        assert _shard(tmp_path, "--image-size", str(size), flag, "--dry-run") == 0
        plan = json.loads(capsys.readouterr().out)
        assert _shard(tmp_path, "--image-size", str(size), flag) == 0
        assert json.loads(manifest.read_text())["section"]["image_size"] == size
        del plan["worker_seconds"]
        said.append((plan, json.loads(capsys.readouterr().out)))
        shutil.rmtree(tmp_path / "root")
    assert said[0][1]["samples"] == 3 and said[0] == said[1]
    assert main(["shard", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert "--overwrite" in shown and "--rebuild" not in shown
    # The verb `rebuild` makes a version, and never had the flag.
    words = ["rebuild", "some", "--rebuild", "--source", str(tmp_path / "in"), "--root", str(tmp_path / "root")]
    assert main(words) == 2


def test_a_verb_reads_only_its_own_sections(tmp_path: Path, capsys) -> None:
    _pictures(tmp_path / "in")
    file = tmp_path / "settings.toml"
    file.write_text("[shard]\nimage_size = 16\n[train]\nsteps = -1\n[cluster]\nworkers = 3\n")
    assert _shard(tmp_path, "--config", str(file)) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 3
    assert main(["train", "run", "--dataset", "some", "--config", str(file), "--root", str(tmp_path / "root")]) == 2
    assert "steps" in capsys.readouterr().err
    file.write_text("[shards]\nimage_size = 16\n")
    assert _shard(tmp_path, "--config", str(file)) == 2 and "there is no setting 'shards'" in capsys.readouterr().err


def test_a_file_overrides_a_recipe_and_flags_override_a_file(tmp_path: Path, capsys) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('recipe = "imagenet_400m"\n[shard]\nimage_size = 48\nquality = 80\n'
                    "[train.unet]\nchannel_mult = [1, 2]\n")
    settings = resolve_settings("", str(file))
    assert (settings.shard.image_size, settings.train.unet.channel_mult) == (48, (1, 2))
    assert settings.train.unet.model_channels == RECIPES["imagenet_400m"]().train.unet.model_channels
    _pictures(tmp_path / "in")
    assert _shard(tmp_path, "--config", str(file), "--quality", "70") == 0
    section = json.loads((tmp_path / "root/datasets/some/v1/shards/plan.json").read_text())["section"]
    assert (section["image_size"], section["quality"], section["format"]) == (48, 70, "jpg")


@pytest.mark.parametrize(("text", "sentence"), [
    ("[shard]\nimage_sise = 3", "there is no setting 'image_sise'\nhint: did you mean image_size?"),
    ("[shard]\nimage_size = 'big'", "shard: image_size = 'big': must be of the type int"),
    ("shard = 3", "shard is a section"),
    ("[shard]\nformat = 'bmp'", "must be one of jpg, png, webp"),
    ("[shard\n", "is not TOML"),
])
def test_faulty_settings_are_named(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"settings\.toml") as raised:
        resolve_settings("", str(file))
    assert sentence in str(raised.value)
    if "there is no setting" in sentence:
        with pytest.raises(ValueError, match="there is no setting"):
            resolve_sections("", str(file), {"index"})  # of a verb that uses another section


def test_faults_are_exit_1_and_named(tmp_path: Path, capsys) -> None:
    _pictures(tmp_path / "in")
    assert _shard(tmp_path) == 0
    capsys.readouterr()
    tar = tmp_path / "root/datasets/some/v1/shards/000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(bytes(data))
    assert main(["verify", "--root", str(tmp_path / "root")]) == 1
    assert "datasets/some/v1/shards/000000.tar: has other bytes than when it was sealed" in capsys.readouterr().out


def test_status_distinguishes_stale_sealed_and_damaged(tmp_path: Path, capsys) -> None:
    _pictures(tmp_path / "in")
    root = ["--root", str(tmp_path / "root")]
    assert _shard(tmp_path) == 0 and main(["embed", "some", "--local", *root]) == 0
    assert _shard(tmp_path, "--image-size", "32", "--overwrite") == 0
    capsys.readouterr()
    main(["status", "--json", *root])
    states = {stage["path"].rsplit("/", 1)[1]: stage["state"] for stage in json.loads(capsys.readouterr().out)}
    assert states == {"shards": "sealed", "embeddings": "stale", "index": "absent"}
    (tmp_path / "root/datasets/some/v1/embeddings/plan.json").write_text("{")
    main(["status", "--json", *root])
    assert json.loads(capsys.readouterr().out)[1]["state"] == "damaged"


def test_a_stale_folder_is_no_input_and_a_fault(tmp_path: Path, capsys) -> None:
    _pictures(tmp_path / "in")
    root = ["--root", str(tmp_path / "root")]
    assert _shard(tmp_path) == 0 and main(["embed", "some", "--local", *root]) == 0
    assert main(["index", "some", "--local", *root]) == 0
    _pictures(tmp_path / "other", 4)
    shard = ["shard", "some", "--source", str(tmp_path / "other"), "--local", "--overwrite", *root]
    assert main(shard) == 0
    capsys.readouterr()
    assert main(["neighbors", "some", "--local", *root]) == 2
    assert "is stale: shards changed since" in capsys.readouterr().err
    assert main(["verify", *root]) == 1
    for verb in ("embed", "index"):
        assert main([verb, "some", "--local", "--overwrite", *root]) == 0
    assert main(["neighbors", "some", "--local", *root]) == 0 and main(["verify", *root]) == 0


def test_an_overwrite_that_cannot_be_planned_keeps_the_old_folder(tmp_path: Path) -> None:
    _pictures(tmp_path / "in")
    root = ["--root", str(tmp_path / "root")]
    assert _shard(tmp_path) == 0 and main(["embed", "some", "--local", *root]) == 0
    assert main(["shard", "some", "--source", str(tmp_path / "typo"), "--local", "--overwrite", *root]) == 2
    assert main(["embed", "some", "--model", "nonsense", "--local", "--overwrite", *root]) == 2
    assert main(["verify", *root]) == 0


@pytest.mark.parametrize("settings, said", [
    (["--key", "NONSENSE"], "faiss knows no index NONSENSE"), (["--key", "IVF5000,Flat"], "more lists than"),
    (["--max-memory", "1Ki", "--bytes-per-vector", "0"], "the smallest possible")])
def test_an_impossible_index_is_invalid_usage_and_keeps_the_old_one(prepared_root, tmp_path, settings, said,
                                                                    capsys) -> None:
    shutil.copytree(prepared_root, tmp_path / "root")
    manifest = tmp_path / "root/datasets/drawn/v1/index/manifest.json"
    before = manifest.read_bytes()
    assert main(["index", "drawn", "--root", str(tmp_path / "root"), "--local", "--overwrite", *settings]) == 2
    assert said in capsys.readouterr().err and manifest.read_bytes() == before


def test_an_index_without_a_measurable_recall_is_not_sealed(tmp_path: Path, capsys) -> None:
    _pictures(tmp_path / "in")
    common = ["--root", str(tmp_path / "root"), "--local"]
    assert _shard(tmp_path) == 0 and main(["embed", "some", *common]) == 0
    assert main(["index", "some", "--min-recall", "0.9", *common]) == 1
    assert "no recall can be measured" in capsys.readouterr().err
    assert not (tmp_path / "root/datasets/some/v1/index/manifest.json").exists()


def test_a_damaged_manifest_is_a_fault(tmp_path: Path, capsys) -> None:
    _pictures(tmp_path / "in")
    root = ["--root", str(tmp_path / "root")]
    for text in ("{", "[]", "{}"):
        assert _shard(tmp_path, "--overwrite") == 0
        (tmp_path / "root/datasets/some/v1/shards/manifest.json").write_text(text)
        assert main(["verify", *root]) == 1
        assert main(["embed", "some", "--local", *root]) == 1
        assert "Traceback" not in capsys.readouterr().err


def test_a_source_without_a_usable_image_is_a_failure(tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "words.png").write_text("no picture")
    assert _shard(tmp_path) == 1
    assert "no image of " in capsys.readouterr().err


def test_an_unreachable_store_is_a_sentence_and_exit_1(tmp_path: Path) -> None:
    with socket.socket() as bound_socket:
        bound_socket.bind(("127.0.0.1", 0))
        port = bound_socket.getsockname()[1]
    # The client retries for a while. A separate process has a time limit, so the test cannot hang.
    process = subprocess.run([sys.executable, "-m", "jobs", "status", "--root", "s3://bucket/root"],
                             capture_output=True, text=True, timeout=200,
                             env={**os.environ, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
                                  "AWS_MAX_ATTEMPTS": "1", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
    assert process.returncode == 1 and "error: cannot " in process.stderr and "Traceback" not in process.stderr


def test_an_address_without_a_cluster_is_named(tmp_path: Path) -> None:
    _pictures(tmp_path / "in")
    process = subprocess.run([sys.executable, "-m", "jobs", "shard", "some", "--root", str(tmp_path / "root"),
                              "--source", str(tmp_path / "in")], capture_output=True, text=True, timeout=200,
                             env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"})
    assert process.returncode == 2 and "no Ray cluster answers" in process.stderr and "Traceback" not in process.stderr


@pytest.mark.slow  # tests/laws/test_interruptions.py has a reader that leaves
def test_a_closed_pipe_is_no_error() -> None:
    for words, unbuffered in itertools.product((["plan", "--json"], ["status", "--help"], ["--help"]), ("", "1")):
        process = subprocess.Popen([sys.executable, "-m", "jobs", *words], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
        assert process.stdout and process.stderr
        process.stdout.close()
        said = [line for line in process.stderr.read().splitlines() if b"at work for" not in line]
        assert (process.wait(60), said) == (0, []), words


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error(tmp_path: Path, closed: str) -> None:
    (tmp_path / "runs").mkdir()
    for words in (["ls", "--root", str(tmp_path)], ["--help"]):
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "jobs", *words]
        ended = subprocess.run(shell, capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stderr, bool(ended.stdout)) == (0, "", closed == "2>&-")


def test_nothing_of_ray_stays_on_a_terminal() -> None:
    seen = run_on_screen([sys.executable, "-m", "jobs", "submit", "--address", "http://127.0.0.1:1", "doctor", "--root",
                          "/r"])
    assert (seen.code, seen.raw.partition("hint: ")[2].count("\x1b")) == (2, 0)


def test_a_verb_without_its_arguments_prints_an_example(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with pytest.raises(SystemExit, match="2"):
        parse_command(["init"])
    assert "for example: python -m jobs init photographs settings.toml" in caplog.text


@pytest.mark.parametrize(("words", "message", "hint"), [
    (["--verison"], "there is no flag '--verison'", "did you mean --version?"),
    (["train", "x", "--stps", "5"], "train has no flag --stps", "did you mean --steps?"),  # and --dataset is missing
    (["style", "--sorce", "y", "mine"], "style has no flag --sorce", "did you mean --source?"),
    (["style", "mine", "--image_sise=8"], "style has no flag --image_sise", "did you mean --image-size?"),
    (["pipeline", "--overwrite", "--source", "x"], "pipeline has no flag --overwrite",
     "python -m jobs pipeline --help-all"),
    (["submit", "--adress", "x", "ls"], "submit has no flag --adress", "did you mean --address?"),
    (["ls", "--wxyz"], "ls has no flag --wxyz", "python -m jobs ls --help-all"),
    (["--root", "data", "ls"], "there is no flag '--root'", "a verb comes before its flags: python -m jobs --help")])
def test_a_mistyped_flag_is_named(words: list[str], message: str, hint: str,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"error: {message}\nhint: {hint}\n")


def test_a_folder_of_roots_is_no_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data/demo/datasets").mkdir(parents=True)
    (tmp_path / "data/other").mkdir()
    (tmp_path / "data/lost").symlink_to(tmp_path / "nowhere")
    assert main(["ls", "--root", str(tmp_path / "data")]) == 2
    assert f"got a folder with demo, lost, other\nhint: --root {tmp_path}/data/demo\n" in capsys.readouterr().err


def test_each_prompt_is_one_argument() -> None:
    _, options = parse_command(["sample", "a rocket", "a flower", "--database", "art"])
    assert (options.run, options.words) == ("a rocket", ("a flower",))
