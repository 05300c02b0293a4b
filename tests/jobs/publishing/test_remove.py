"""`rm` removes only folders that no other folder needs."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from pipeline import storage
from pipeline.releases.published import Published, open_dataset
from pipeline.releases.signatures import publishing_keys
from tests.jobs.publishing.published_art import rebuild
from tests.jobs.publishing.signing.key_files import openssl_key


@pytest.fixture
def root(trained_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_root, tmp_path / "a root"))


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _rm(root: Path, *words: str) -> int:
    return main(["rm", *words, "--root", str(root)])


@pytest.mark.parametrize(("target", "folder"), [
    ("flat", "datasets/flat/"), ("flat@v1", "datasets/flat/"), ("datasets/flat/v1/index", "datasets/flat/v1/index/"),
    ("runs/small", "runs/")])
def test_rm_removes_only_the_named_folder(root: Path, target: str, folder: str,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(root)
    assert _rm(root, target, "--yes") == 0
    removed = {name: data for name, data in before.items() if name.startswith(folder)}
    assert _files(root) == {name: data for name, data in before.items() if name not in removed}
    assert not (root / folder).exists() and (root / "datasets").exists()
    printed = json.loads(capsys.readouterr().out)
    assert (printed["files"], printed["bytes"]) == (len(removed), sum(map(len, removed.values())))
    assert main(["verify", "--root", str(root)]) == 0
    assert _rm(root, target, "--yes") == 2
    assert "there is no " in capsys.readouterr().err


def test_inputs_of_other_folders_are_not_removed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "small", "--prompt", "a", "--database", "flat", "--steps", "2", "--name", "first", "--root",
                 str(root), "--local"]) == 0
    for target, user in (("flat", "runs/small/samples/first"), ("drawn", "runs/small"),
                         ("datasets/drawn/v1/shards", "datasets/drawn/v1/embeddings"),
                         ("datasets/drawn/v1/neighbors/drawn", "runs/small")):
        before = _files(root)
        assert _rm(root, target, "--yes") == 2
        error = capsys.readouterr().err
        assert " made from it: " in error and user in error and _files(root) == before
    # A dry run names all of them, in an order that works.
    assert _rm(root, "drawn", "--dry-run") == 2
    planned = json.loads(capsys.readouterr().out)
    assert planned["stages"] and planned["blocked_by"] == ["runs/small"] and _files(root) == before
    assert _rm(root, "datasets/drawn/v1/shards", "--dry-run") == 2
    blocked = json.loads(capsys.readouterr().out)["blocked_by"]
    assert blocked[0] == "runs/small" and blocked[-1] == "datasets/drawn/v1/embeddings" and len(blocked) == 4
    assert _rm(root, "drawn", "--yes") == 2
    hinted = shlex.split(re.findall(r"hint: python -m jobs (.*)", capsys.readouterr().err)[0])
    assert main([*hinted, "--yes"]) == 0  # the run, with the samples in it
    assert not (root / "runs").exists() and _rm(root, "drawn", "--yes") == _rm(root, "flat", "--yes") == 0


def test_files_that_another_version_uses_stay(second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = second / "root"
    for path in (*root.glob("datasets/*/*/release.json"), *root.glob("datasets/*/*/mark.json"),
                 *root.glob("datasets/*/current.json")):
        path.unlink()
    shutil.rmtree(root / "published")
    assert _rm(root, "drawn@v1", "--yes") == 2
    assert "datasets/drawn/v1 cannot be removed: 1 folder made from it: datasets/drawn/v2" in capsys.readouterr().err
    assert _rm(root, "drawn@v2", "--yes") == _rm(root, "drawn@v1", "--yes") == 0


@pytest.mark.parametrize("target", ["drawn", "drawn@v1", "drawn@v2", "datasets/drawn/v2/index"])
def test_published_versions_are_not_removed(second: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(second / "root")
    assert _rm(second / "root", target, "--yes") == 2
    error = capsys.readouterr().err
    other = "versions" if "v" in target.removeprefix("drawn") else "rm"
    assert "published" in error and "python -m jobs gc" in error and f"python -m jobs {other}" in error
    assert _files(second / "root") == before


def test_a_published_dataset_goes_and_its_numbers_are_not_used_again(second: Path, capsys: pytest.CaptureFixture[str]
                                                                     ) -> None:
    root = second / "root"
    before = {name: data for name, data in _files(root).items() if name.startswith("published/")}
    assert _rm(root, "drawn", "--published") == 2 and "rm datasets/drawn --published --yes" in re.sub(
        r" --root '?[^ ]*( root')?", "", capsys.readouterr().err)
    assert _rm(root, "drawn", "--published", "--yes") == 0
    after = _files(root)
    assert {name for name in after if name.startswith("datasets/")} == {
        "datasets/drawn/current.json", "datasets/drawn/v1/mark.json", "datasets/drawn/v2/mark.json",
        "datasets/drawn/.swap"}
    assert before.items() < after.items()  # the history has one entry more
    pointer = json.loads(after["datasets/drawn/current.json"])
    assert pointer["sequence"] == 3 and pointer["removed"]["number"] == 2
    capsys.readouterr()
    for words in (["search", "drawn", "a"], ["search", "drawn@v1", "a"], ["gc", "drawn"], ["rollback", "drawn"],
                  ["repair", "drawn"], ["rm", "drawn", "--published", "--yes"]):
        assert main([*words, "--root", str(root)]) == 2
        assert "drawn was removed on 20" in capsys.readouterr().err
    assert main(["ls", "--root", str(root)]) == 0 and json.loads(capsys.readouterr().out) == []
    assert rebuild(root, second / "source")["published"] == "v3"
    assert Published.load(str(root), "drawn").document["sequence"] == 4
    assert main(["verify", "--root", str(root)]) == 0
    assert main(["search", "drawn@v1", "a", "--root", str(root)]) == 1
    assert "drawn@v1 was removed on 20" in capsys.readouterr().err


def test_a_published_dataset_that_is_used_stays(second: Path, trained_root: Path, capsys: pytest.CaptureFixture[str]
                                                ) -> None:
    root = second / "root"
    shutil.copytree(trained_root / "datasets/flat", root / "datasets/flat")
    assert main(["neighbors", "flat", "--database", "drawn", "--root", str(root), "--local"]) == 0
    before = _files(root)
    assert _rm(root, "drawn", "--published", "--yes") == 2
    assert "made from it: datasets/flat/v1/neighbors/drawn" in capsys.readouterr().err and _files(root) == before


@pytest.mark.parametrize("damage", [b"{", None])
def test_a_damaged_pointer_does_not_bring_a_removed_dataset_back(second: Path, damage: bytes | None,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not if `rm` was killed before it removed the first file."""
    root = second / "root"
    with monkeypatch.context() as patch:
        patch.setattr("jobs.publishing.remove.version_marks.mark_removing", _interrupt)
        assert _rm(root, "drawn", "--published", "--yes") == 130
    pointer = root / "datasets/drawn/current.json"
    pointer.write_bytes(damage) if damage else pointer.unlink()
    assert main(["repair", "drawn", "--root", str(root)]) == 0
    assert Published.load(str(root), "drawn").is_removed
    assert _rm(root, "drawn", "--published", "--yes") == 0
    assert not list(root.glob("datasets/drawn/*/shards"))


def test_the_removal_of_a_signed_dataset_is_signed(second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, (key, _) = second / "root", openssl_key(second, "release")
    assert main(["repair", "drawn", "--root", str(root), "--sign", str(key), "--accept-unsigned"]) == 0
    before = _files(root)
    assert _rm(root, "drawn", "--published", "--yes") == 2 and "--sign KEYFILE" in capsys.readouterr().err
    assert _files(root) == before
    assert _rm(root, "drawn", "--published", "--yes", "--sign", str(key)) == 0
    with pytest.raises(ValueError, match="drawn was removed on"):
        open_dataset(str(root), "drawn", keys=publishing_keys(str(key)))


def _interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_folder_in_use_by_a_command_is_not_removed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with storage.hold_lease(str(root), "datasets/flat/v1/embeddings"):
        before = _files(root)
        assert _rm(root, "flat", "--yes") == 1
        assert "another command works on" in capsys.readouterr().err and _files(root) == before
    assert _rm(root, "flat", "--yes") == 0


def test_rm_asks_for_confirmation_only_on_a_terminal(root: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(root)
    assert _rm(root, "flat") == 2 and "rm does not ask without a terminal" in capsys.readouterr().err
    assert _rm(root, "flat", "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] and _files(root) == before

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer, code in (("\n", 1), ("no\n", 1), ("", 1), ("y\n", 0)):
        assert _files(root) == before
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        monkeypatch.setattr("sys.stdout", shown := Terminal())
        assert _rm(root, "flat") == code
        assert "Remove datasets/flat (" in shown.getvalue() and ("removed datasets/flat: " in shown.getvalue()) != code
    assert not (root / "datasets/flat").exists()


def test_a_killed_removal_is_finished(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The removal is cut off after all files are gone: the same command still ends well."""
    remove = storage.remove

    def cut_off(url: str) -> None:
        if "removing" in url:
            raise KeyboardInterrupt
        remove(url)

    with monkeypatch.context() as patch:
        patch.setattr("jobs.publishing.remove.storage.remove", cut_off)
        assert _rm(root, "flat@v1", "--yes") == 130
    assert not (root / "datasets/flat").exists() and (root / "removing+datasets+flat+v1.json").exists()
    assert _rm(root, "flat@v1", "--yes") == 0
    assert not list(root.glob("removing*"))


def test_damaged_plans_do_not_prevent_removal(root: Path) -> None:
    for plan in root.glob("datasets/flat/v1/*/plan.json"):
        plan.write_bytes(b"{")
    assert _rm(root, "flat", "--yes") == 0
    documents: dict[str, Any] = _files(root)
    assert not [name for name in documents if "flat" in name]


def test_a_damaged_plan_outside_prevents_removal(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, code in (("plan.json", 2), ("manifest.json", 1)):  # the manifest of a sealed folder tells its inputs too
        (root / "runs/small" / file).write_bytes(b"{")
        assert _rm(root, "drawn", "--yes") == code
    assert "what runs/small needs is unknown" in capsys.readouterr().err
    assert (root / "datasets/drawn").exists()
