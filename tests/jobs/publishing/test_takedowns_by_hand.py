"""Takedowns in datasets that `shard` made: no pointer counts the requests, and the shards may be made again."""

import json
import os
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata
from pipeline.storage import DamagedFile
from pipeline.takedowns import hidden_rows, takedown_list, takedowns
from tests.jobs.publishing.published_art import paint


def _shard(place: Path, name: str = "hand", *flags: str) -> None:
    assert main(["shard", name, "--source", str(place / "source"), "--image-size", "32", "--local",
                 "--root", str(place / "root"), *flags]) == 0


def _hidden(place: Path, name: str = "hand") -> list[str]:
    """The names of the images that searches leave out."""
    dataset = Dataset.parse(str(place / "root"), name)
    names = [row["url"] for record in dataset.manifest("shards")["items"] for row in metadata(dataset, record)]
    return [names[row] for row in hidden_rows.read_hidden_rows(dataset)]


@pytest.fixture
def hand(tmp_path: Path) -> Path:
    """A dataset of six images, of which c.png was forgotten."""
    (tmp_path / "source").mkdir()
    for number, letter in enumerate("abcdef"):
        paint(tmp_path / "source" / f"{letter}.png", number)
    _shard(tmp_path)
    assert _hidden(tmp_path) == []
    assert main(["forget", "--url", "c.png", "--root", str(tmp_path / "root")]) == 0
    assert _hidden(tmp_path) == ["c.png"]
    return tmp_path


def test_shards_that_are_made_again_hide_the_same_images(hand: Path) -> None:
    os.remove(hand / "source" / "a.png")
    _shard(hand, "hand", "--overwrite")
    assert _hidden(hand) == ["c.png"]
    assert main(["forget", "--url", "d.png", "--root", str(hand / "root")]) == 0
    assert _hidden(hand) == ["c.png", "d.png"]


@pytest.mark.parametrize("adopt", [(), ("--adopt",)])
def test_the_bytes_of_tars_are_removed_as_forget_says(adopt: tuple[str, ...], hand: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    root, tars = str(hand / "root"), hand / "tars"
    tars.mkdir()
    shutil.copy(hand / "root/datasets/hand/v1/shards/000000.tar", tars / "a.tar")
    make = ["shard", "t", "--source", str(tars), *adopt, "--local", "--root", root]
    assert main(make) == 0
    capsys.readouterr()
    assert main(["forget", "--key", "t/0000000001", "--root", root]) == 0
    said = capsys.readouterr().out
    again = f"python -m jobs {shlex.join([*make[:2], '--source', 'SOURCE', *adopt, '--overwrite', '--root', root])}"
    again = again.replace("shard t ", "shard t@v1 ")
    assert "python -m jobs rebuild" not in said and "python -m jobs gc" not in said
    assert f"    then {again}; or, to remove the version: python -m jobs rm datasets/t/v1 --root {root}\n" in said
    with tarfile.open(tars / "a.tar") as whole, tarfile.open(tars / "b.tar", "w") as rest:
        forgotten = whole.extractfile("0000000001.png").read()  # type: ignore[union-attr]
        for member in whole:
            if not member.name.startswith("0000000001."):
                rest.addfile(member, whole.extractfile(member))
    (tars / "a.tar").unlink()
    assert main([*shlex.split(again.replace("SOURCE", str(tars)))[3:], "--local"]) == 0
    assert Dataset(root, "t").manifest("shards")["totals"]["samples"] == 5
    left = [path for folder in (tars, hand / "root/datasets/t") for path in folder.rglob("*") if path.is_file()]
    assert not any(forgotten in path.read_bytes() for path in left)
    assert main(["verify", "--only", "datasets/t", "--root", root]) == 0
    assert main(["rm", "datasets/t/v1", "--yes", "--root", root]) == 0


def test_a_dataset_that_is_made_after_a_request_hides_the_image_under_any_name(hand: Path) -> None:
    (hand / "source" / "c.png").rename(hand / "source" / "z.png")
    _shard(hand, "other")
    assert _hidden(hand, "other") == ["z.png"]


@pytest.mark.parametrize("flags", [(), ("--adopt",), ("--duplicates", "exact"), ("--retry-failed",)])
def test_readers_of_a_dataset_that_is_made_after_a_request_do_not_compare_all_rows(
        hand: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(takedowns, "_SLOW", set())
    root, source = str(hand / "root"), hand / "source"
    if flags == ("--adopt",):
        tars = hand / "tars"
        shutil.copytree(hand / "root/datasets/hand/v1/shards", tars, ignore=shutil.ignore_patterns("*.json", "rows"))
        source = tars
    name = "hand" if flags == ("--retry-failed",) else "other"
    if name == "hand":
        (source / "bad.png").write_bytes(b"no picture")
        _shard(hand, "hand", "--overwrite")
    size = () if flags == ("--adopt",) else ("--image-size", "32")
    assert main(["shard", name, "--source", str(source), *size, *flags, "--local", "--root", root]) == 0
    made = f"{name}@v2" if flags == ("--retry-failed",) else name
    assert _hidden(hand, made) == ["c.png"]
    assert "compares all" not in caplog.text


def test_rows_that_were_found_in_earlier_shards_are_not_taken_for_those_of_the_new(hand: Path) -> None:
    dataset = Dataset.parse(str(hand / "root"), "hand")
    content = takedowns.shards_content(dataset)
    os.remove(hand / "source" / "a.png")
    _shard(hand, "hand", "--overwrite")  # while forget looks for the rows
    takedowns.hide_rows(dataset, [2], 1, content)
    assert _hidden(hand) == ["c.png"]


def test_a_request_that_comes_during_another_is_not_taken_for_applied(hand: Path, monkeypatch: pytest.MonkeyPatch
                                                                      ) -> None:
    root, read = str(hand / "root"), takedown_list.read_takedowns

    def read_while_another_is_killed(root: str) -> takedown_list.Forgotten:
        listed = read(root)
        monkeypatch.setattr(takedown_list, "read_takedowns", read)
        takedown_list.add_takedowns(root, takedown_list.Forgotten(urls=frozenset({"e.png"})), "")
        return listed

    monkeypatch.setattr(takedown_list, "read_takedowns", read_while_another_is_killed)
    assert main(["forget", "--url", "d.png", "--root", root]) == 0
    assert _hidden(hand) == ["c.png", "d.png", "e.png"]


def test_repair_does_not_end_well_while_hidden_rows_are_unknown(hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = hand / "root"
    assert main(["forget", "--sha256", "0" * 64, "--root", str(root)]) == 0
    (root / "datasets/hand/v1/shards/manifest.json").write_bytes(b"")
    assert main(["repair", "hand", "--root", str(root)]) == 1
    assert f"hint: python -m jobs shard hand --source FOLDER --overwrite --root {root}" in capsys.readouterr().err


def test_a_removed_list_is_missed_and_repaired(hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = hand / "root"
    os.remove(root / "datasets/hand/v1/forgotten.json")
    assert _hidden(hand) == ["c.png"]
    os.remove(root / "forgotten.json")
    with pytest.raises(DamagedFile, match=r"expected 1 requests, got 0\nhint: python -m jobs repair hand --root"):
        _hidden(hand)
    assert main(["verify", "--root", str(root)]) == 1
    assert "datasets/hand/v1/forgotten.json: " in capsys.readouterr().out
    assert main(["repair", "hand", "--root", str(root)]) == 0
    assert _hidden(hand) == ["c.png"]
    assert main(["verify", "--root", str(root)]) == 0


def test_the_rows_of_another_version_are_not_taken(hand: Path) -> None:
    os.remove(hand / "source" / "a.png")
    _shard(hand, "other")
    shutil.copy(hand / "root/datasets/hand/v1/forgotten.json", hand / "root/datasets/other/v1/forgotten.json")
    assert _hidden(hand, "other") == ["c.png"]


def test_forget_by_domain_reads_the_metadata_once(hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Dataset] = []

    def read(dataset: Dataset, record: dict[str, Any], columns: list[str] | None = None) -> list[dict[str, Any]]:
        reads.append(dataset)
        return metadata(dataset, record, columns)
    monkeypatch.setattr(takedowns, "metadata", read)
    for flags in (["--dry-run"], []):
        reads.clear()
        assert main(["forget", "--domain", "example.org", "--root", str(hand / "root"), *flags]) == 0
        assert len(reads) == 1, flags


def test_readers_name_the_command_that_ends_the_comparison_of_all_rows(
        hand: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(takedowns, "_SLOW", set())
    file = hand / "root/datasets/hand/v1/forgotten.json"
    document = json.loads(file.read_text())
    del document["digest"]  # as earlier versions of this program wrote it
    file.write_text(json.dumps(document))
    assert _hidden(hand) == _hidden(hand) == ["c.png"]
    assert caplog.text.count(f"each reader compares all 6 rows with the takedown list, because {file} is old") == 1
    assert f"hint: to end this: python -m jobs repair hand --root {hand / 'root'}" in caplog.text
    assert main(["repair", "hand", "--root", str(hand / "root")]) == 0
    caplog.clear()
    takedowns._SLOW.clear()
    assert _hidden(hand) == ["c.png"] and not caplog.text


def test_hints_name_the_version_made_by_hand_when_another_is_published(
        hand: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    root, source = str(hand / "root"), str(hand / "source")

    def call(*words: str) -> str:
        assert main([*words, "--root", root]) == 0, words
        return capsys.readouterr().out

    for verb in ("embed", "index", "neighbors"):
        call(verb, "hand", *(("--database", "hand", "--k", "2") if verb == "neighbors" else ()), "--local")
    train = ["train", "run", "--dataset", "hand@v1", "--recipe", "tiny", "--image-size", "16", "--k", "2", "--local"]
    call(*train, "--steps", "2", "--global-batch", "2")
    assert Dataset(root, "hand").name_in_commands == "hand"
    call("rebuild", "hand", "--source", source, "--local", "--index.bytes-per-vector", "288")
    assert [Dataset(root, "hand", version).name_in_commands for version in ("v1", "v2")] == ["hand@v1", "hand@v2"]
    said = call("forget", "--url", "d.png", "--note", "asked")
    assert "  once shard has made hand@v1 again, you can sample from runs/run, but no longer train further\n" in said
    os.remove(hand / "source" / "d.png")
    again = next(line for line in said.splitlines() if "shard hand@v1 --source SOURCE" in line)
    assert "to remove the version: python -m jobs rm runs/run " in said
    commands = [shlex.split(command)[3:] for command in
                again.partition("then ")[2].partition("; or")[0].replace("SOURCE", source).split(" && ")]
    assert [command[0] for command in commands] == ["shard", "embed", "index", "neighbors"]
    for words in commands:
        if words[0] == "neighbors":
            assert main([*train, "--steps", "4", "--root", root]) == 2
            hint = capsys.readouterr().err.rpartition("hint: ")[2]
            assert "settings: python -m jobs neighbors hand@v1 --database hand@v1 --overwrite" in hint
        call(*words[:words.index("--root")], *(("--image-size", "32") if words[0] == "shard" else ()), "--local")
    assert main([*train, "--steps", "4", "--root", root]) == 2
    assert "planned with other settings or inputs" in capsys.readouterr().err
    assert main(["verify", "--root", root]) == 0
    assert "since it was trained: sampling is as before, and training further is not possible" in caplog.text
    call("sample", "run", "--prompt", "a", "--database", "hand@v1", "--steps", "2")
    assert main(["verify", "--root", root]) == 0
