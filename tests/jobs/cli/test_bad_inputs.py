"""Bad inputs of every verb end with 2, a sentence and a hint, without a traceback and without a new file."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest

from jobs.checks.place import check_new_root
from jobs.cli.main import main
from jobs.cli.options import DatasetName
from jobs.cli.parse import ABOUT_ALL_VERSIONS
from jobs.cli.verbs import VERBS, load_verb
from pipeline import storage
from tests.pipeline import synthetic

# The words of each verb. NAME is a dataset or run that should exist; SOURCE and FILE are files that do.
COMMANDS: dict[str, tuple[str, ...]] = {
    "demo": ("--drawn",),
    "pipeline": ("NAME", "--source", "SOURCE"), "shard": ("NAME", "--source", "SOURCE"),
    "rebuild": ("NAME", "--source", "SOURCE"), "style": ("NAME", "--source", "SOURCE"),
    **dict.fromkeys(("embed", "index", "neighbors", "versions", "rollback", "repair", "gc"), ("NAME",)),
    "score": ("NAME", "--head", "good=FILE"), "latents": ("NAME", "--first-stage", "SOURCE"),
    "train": ("run", "--dataset", "NAME"), "evaluate": ("NAME",), "export": ("NAME", "--out", "OUT"),
    "convert": ("NAME", "--checkpoint", "FILE", "--database", "NAME"), "search": ("NAME", "red apple"),
    "sample": ("NAME", "--prompt", "red apple", "--database", "NAME"),
    "credits": ("FILE",), "forget": ("--key", "NAME/0000000001"),
    **dict.fromkeys(("status", "report", "verify", "plan", "recipes", "doctor"), ()), "init": ("demo", "OUT"),
    "show": ("0000000001", "--dataset", "NAME"), "rm": ("NAME", "--yes"), "ls": ("NAME",),
    "submit": ("embed", "NAME"),
}
_NO_DATASET = {"demo", "status", "report", "verify", "plan", "recipes", "credits", "init", "doctor"}
_MAKES = {"demo", "pipeline", "shard", "rebuild", "style"}
"""Verbs that make a root and datasets: any root and any name that is one are right."""
_READS_NO_ROOT = {"plan", "recipes", "credits", "init", "doctor"}
_ONLY_SUBMITS = {"submit"}
"""Nothing is known of a root of other machines: these words end with 0 where nothing is submitted."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, a file, a folder of something else, a root with a dataset and a run, and bad settings."""
    monkeypatch.chdir(tmp_path)
    for folder in ("source", "else/papers", "root/datasets/noto/v1", "root/runs/noto"):
        (tmp_path / folder).mkdir(parents=True)
    synthetic.noise(64, 64).save(tmp_path / "source/one.png")
    (tmp_path / "else/notes.txt").write_text("notes")
    (tmp_path / "file.bin").write_bytes(b"no weights")
    (tmp_path / "unknown.toml").write_text("[shard]\nimage_sise = 64\n[train]\nstep = 3\n[sample]\nstep = 3\n")
    return tmp_path


def _files(place: Path) -> dict[Path, int]:
    """The files and folders, and the times of the files."""
    return {path: path.stat().st_mtime_ns if path.is_file() else 0 for path in place.rglob("*")}


def _refused(place: Path, verb: str, words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The message of a verb that must end with `code` and write nothing."""
    before = _files(place)
    assert main([verb, *words]) == code, capsys.readouterr()
    said = capsys.readouterr().err
    assert "Traceback" not in said and _files(place) == before
    if code:
        assert "error: " in said and "hint: " in said, said
    return said


def _words(place: Path, verb: str, name: str, root: str) -> list[str]:
    values = {"SOURCE": str(place / "source"), "FILE": str(place / "file.bin"), "OUT": str(place / "out")}
    words = [values.get(word, word.replace("NAME", name).replace("FILE", values["FILE"])) for word in COMMANDS[verb]]
    flags = set(load_verb(verb)[0].__dataclass_fields__)  # type: ignore[attr-defined]
    local = ["--local"] if "cluster" in flags or verb == "search" else []
    if verb == "submit":
        return ["--dry-run", *words, "--root", str(place / root)]
    return [*words, *local, "--root", str(place / root)]


def test_every_verb_has_its_bad_inputs() -> None:
    assert COMMANDS.keys() == VERBS.keys()


@pytest.mark.parametrize("root", ["absent", "else"])
@pytest.mark.parametrize("verb", sorted(VERBS.keys() - _MAKES - _READS_NO_ROOT - _ONLY_SUBMITS))
def test_a_missing_or_foreign_root_is_refused(verb: str, root: str, place: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    _refused(place, verb, _words(place, verb, "noto", root), capsys)


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - _READS_NO_ROOT - _ONLY_SUBMITS))
def test_a_root_that_is_a_file_is_refused(verb: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused(place, verb, _words(place, verb, "noto", "file.bin"), capsys)


@pytest.mark.parametrize("verb", sorted(_MAKES))
def test_a_dry_run_makes_no_root(verb: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused(place, verb, [*_words(place, verb, "noto", "absent"), "--dry-run"], capsys, code=0)


@pytest.mark.parametrize("root", ["source", "source/data", "linked/data"])
@pytest.mark.parametrize("verb", sorted(_MAKES - {"demo"}))
def test_a_new_root_in_its_source_is_refused(verb: str, root: str, place: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    (place / "linked").symlink_to(place / "source")
    assert "lies in the source" in _refused(place, verb, _words(place, verb, "noto", root), capsys)


def test_a_root_in_its_source_that_has_datasets_continues(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "source/data/datasets/noto").mkdir(parents=True)
    _refused(place, "shard", [*_words(place, "shard", "noto", "source/data"), "--dry-run"], capsys, code=0)


def test_other_files_in_a_new_root_are_named(place: Path, capsys: pytest.CaptureFixture[str],
                                             caplog: pytest.LogCaptureFixture) -> None:
    for root in ("else", "absent", "root"):
        caplog.clear()
        with caplog.at_level("INFO"):
            _refused(place, "shard", [*_words(place, "shard", "noto", root), "--dry-run"], capsys, code=0)
        assert ("has other files (notes.txt, papers)" in caplog.text) == (root == "else")


@pytest.mark.parametrize(("verb", "flag"), [("export", "--out"), ("show", "--out"), ("search", "--sheet"),
                                            ("credits", "--sheet")])
def test_a_store_is_no_place_for_a_local_file(verb: str, flag: str, place: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    (place / "root/runs/noto/plan.json").write_text('{"section": {}, "inputs": {}}')
    words = _words(place, verb, "noto", "root")
    for url in ("s3://bucket/out.png", "file:///out.png"):
        said = _refused(place, verb, [*words, flag, url], capsys)
        assert f"{flag} {url} is a URL: expected a path on this machine\nhint: {flag} out.png; " in said


@pytest.mark.timeout(60)
@pytest.mark.parametrize("words", [
    ["plan", "--config", "/dev/zero"], ["plan", "--rates", "/dev/zero"], ["verify", "--key", "/dev/zero"],
    ["sample", "noto", "--prompts", "/dev/zero", "--database", "noto"], ["index", "noto", "--tombstone", "/dev/zero"],
    ["pipeline", "n", "--source", "/dev/zero"], ["shard", "n", "--source", "/dev/zero"],
    ["shard", "n", "--source", "source", "--captions", "/dev/zero"], ["score", "noto", "--head", "good=/dev/zero"],
    ["convert", "n", "--checkpoint", "/dev/zero", "--database", "noto"]])
def test_a_device_without_an_end_is_refused(words: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused(place, words[0], [*words[1:], "--root", str(place / "root")], capsys)


def test_a_new_root_in_the_prefix_of_its_source_is_refused(s3: str) -> None:
    storage.put_bytes(b"image", f"{s3}/photos/1.png")
    for root in (f"{s3}/photos", f"{s3}/photos/rdm"):
        with pytest.raises(ValueError, match="lies in the source"):
            check_new_root(root, [f"{s3}/photos/"])
    check_new_root(f"{s3}/photos2", [f"{s3}/photos"])
    storage.put_json({}, f"{s3}/photos/rdm/datasets/noto/current.json")
    check_new_root(f"{s3}/photos/rdm", [f"{s3}/photos"])


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - _NO_DATASET))
def test_a_name_with_a_slash_is_refused(verb: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = _refused(place, verb, _words(place, verb, "no/to", "root"), capsys)
    assert "no/to" in said


@pytest.mark.parametrize("submitted", [False, True])
@pytest.mark.parametrize("verb", sorted(ABOUT_ALL_VERSIONS))
def test_a_version_is_refused_first(verb: str, submitted: bool, place: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    words = _words(place, verb, "noto@v2", "root")
    said = _refused(place, *(("submit", ["--dry-run", verb, *words]) if submitted else (verb, words)), capsys)
    assert said.startswith("error: noto@v2: ") and f"hint: python -m jobs {verb} noto" in said


def test_the_verbs_about_all_versions_take_names_alone() -> None:
    assert ABOUT_ALL_VERSIONS.keys() == {verb for verb in VERBS if get_type_hints(
        load_verb(verb)[0], include_extras=True).get("dataset") == DatasetName}


@pytest.mark.parametrize("words", [["pipeline", "noto", "--source", "SOURCE", "--train", "no/to"],
                                   ["train", "no/to", "--dataset", "noto"]])
def test_a_run_with_a_slash_is_refused_first(words: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(place / "source") if word == "SOURCE" else word for word in words]
    said = _refused(place, words[0], [*words[1:], "--local", "--root", str(place / "root")], capsys)
    assert said.startswith("error: 'no/to' is not a name of a run")


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - _NO_DATASET - _MAKES - _ONLY_SUBMITS))
def test_a_mistyped_name_is_refused(verb: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = _refused(place, verb, _words(place, verb, "nota", "root"), capsys)
    assert re.search(r"nota.*did you mean (datasets/)?noto\?", said, re.DOTALL)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_recipe_file_with_an_unknown_key_is_refused(verb: str, place: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    words = [*_words(place, verb, "noto", "root"), "--config", str(place / "unknown.toml")]
    (place / "unknown.toml").write_text("[shrad]\nimage_size = 64\n")
    assert "there is no setting 'shrad'" in _refused(place, verb, words, capsys)
