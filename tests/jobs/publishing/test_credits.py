"""Credits name each image's own author, title, license and page; licenses are a filter and a gate of rebuild."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from jobs.publishing import credits
from jobs.publishing.rebuild import GatesFailed
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.versions.config import GatesConfig
from tests.jobs.publishing.published_art import SHARD, paint, published_dataset, rebuild

ROWS = [
    {"file": "0.png", "caption": "boats", "Author": "Ann", "Title": "Boats at Sea", "OriginalLandingURL":
     "https://photos.example/1", "License": "https://creativecommons.org/licenses/by/2.0/"},
    {"file": "1.png", "caption": "a hill", "Author": "", "Title": "", "OriginalLandingURL": "", "License": ""}]
SOURCES = {"name": "a museum", "author_name": "the museum", "license": "CC0"}


def credited(tmp_path: Path, sources: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """The credits of a sample whose neighbors are the two images of a database."""
    source, root = tmp_path / "source", tmp_path / "root"
    source.mkdir()
    with (source / "captions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0].keys())
        writer.writeheader()
        writer.writerows(ROWS)
    for number, row in enumerate(ROWS):
        paint(source / row["file"], number)
    (tmp_path / "sources.json").write_text(json.dumps(sources or {}))
    dataset = Dataset.parse(str(root), "art")
    manifest = run_stage(Shard(dataset, ShardConfig(source=(str(source),), image_size=32, format="png",
                                                    sources=str(tmp_path / "sources.json") if sources else "")))
    neighbors = [{"key": row["key"], "score": 0.5, "caption": row["caption"], "sha256": row["sha256"],
                  "file": f"neighbors/{row['key']}.png"} for row in metadata(dataset, manifest["items"][0])]
    folder = root / "runs/tiny/samples/first"
    folder.mkdir(parents=True)
    (folder / "samples.json").write_text(json.dumps({"pictures": [
        {"file": "art/00.png", "prompt": "boats", "seed": 0, "database": "art@v1", "neighbors": neighbors}]}))
    return credits.list_credits(str(folder / "samples.json"))[0]["pictures"]


def test_each_image_has_its_own_credits(tmp_path: Path) -> None:
    first, second = credited(tmp_path)
    assert {name: first[name] for name in ("authors", "title", "page", "spdx", "licence")} == {
        "authors": "Ann", "title": "Boats at Sea", "page": "https://photos.example/1", "spdx": "CC-BY-2.0",
        "licence": "https://creativecommons.org/licenses/by/2.0/"}
    assert (second["authors"], second["title"], second["spdx"], second["licence"]) == ("", "", "", "")
    lines = credits.credits_text([{"sample": "00.png", "prompt": "", "pictures": [first, second]}]).splitlines()
    assert lines[1].endswith("boats   https://photos.example/1  (Boats at Sea, Ann, CC-BY-2.0)")
    assert lines[2].endswith("a hill  1.png                     (license unknown)")


def test_samples_are_named_as_ls_prints_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    expected = credited(tmp_path)
    root = str(tmp_path / "root")
    assert main(["credits", "runs/tiny/samples/first", "--json", "--root", root]) == 0
    assert json.loads(capsys.readouterr().out)[0]["pictures"] == expected
    for text in ("runs/tiny/samples/first/", "runs/tiny/samples/first/art/00.png", f"{root}/runs/tiny/samples/first"):
        assert credits.list_credits(text, root)[0]["pictures"] == expected
    monkeypatch.chdir(root)
    assert len(credits.list_credits("runs/tiny/samples/first", "elsewhere")[0]["pictures"]) == len(expected)
    assert main(["credits", "runs/tiny/samples/secnd"]) == 2


def test_images_without_credits_have_those_of_their_source(tmp_path: Path) -> None:
    first, second = credited(tmp_path, SOURCES)
    assert (first["authors"], first["spdx"]) == ("Ann", "CC-BY-2.0")
    assert (second["authors"], second["spdx"], second["licence"]) == ("the museum", "CC0-1.0", "CC0")


def state_licenses(place: Path, licenses: list[str]) -> None:
    """Give the images of the source these licenses, in turn."""
    lines = (place / "source" / "captions.csv").read_text().splitlines()
    (place / "source" / "captions.csv").write_text("\n".join([f"{lines[0]},license", *(
        f"{line},{licenses[number % len(licenses)]}" for number, line in enumerate(lines[1:]))]) + "\n")


def test_a_rebuild_takes_images_of_some_licenses(place: Path) -> None:
    state_licenses(place, ["CC0-1.0", "CC BY 4.0", "CC BY-NC 4.0", ""])
    summary = rebuild(place / "root", place / "source", shard=replace(SHARD, licenses="CC0-1.0,CC-BY-*"),
                      gates=GatesConfig(max_lost=1.0, min_overlap=0.0))
    assert (summary["filtered_by_license"], summary["filtered_without_license"]) == (18, 18)
    assert summary["published"] == "v2" and summary["gates"]["other licenses"] == 0
    shards = published_dataset(place / "root").manifest("shards")
    assert shards["totals"]["samples"] == 36 and shards["info"]["filtered_by_license"] == 18
    # A change of its license takes an image out.
    captions = place / "source" / "captions.csv"
    captions.write_text(captions.read_text().replace("CC0-1.0", "all rights reserved", 1))
    summary = rebuild(place / "root", place / "source", shard=replace(SHARD, licenses="CC0-1.0,CC-BY-*"))
    assert (summary["removed"], summary["added"], summary["filtered_without_license"]) == (1, 0, 19)


def test_other_licenses_are_not_published(place: Path) -> None:
    state_licenses(place, ["CC0-1.0", "CC0-1.0", "CC BY-NC 4.0", ""])
    with pytest.raises(GatesFailed, match=r"other licenses: 18 CC-BY-NC-4.0, 18 unknown, none but CC0-1.0: v1 stays"):
        rebuild(place / "root", place / "source", gates=GatesConfig(only_licenses="CC0-1.0"))
    assert published_dataset(place / "root").version == "v1"


def test_a_sheet_has_a_line_for_the_author_and_one_for_the_license(tmp_path: Path) -> None:
    first, second = credited(tmp_path)
    first = first | {"title": "A very long title of an image " * 9}
    assert credits._below(first)[1:] == ("Ann", "CC-BY-2.0")
    assert credits._below(second) == ("0.50 a hill", "author unknown", "license unknown")
    assert credits._below(second | {"caption": ""})[0] == "0.50 1.png"


@pytest.mark.parametrize("flag", ["--key", "--sha256"])
def test_forget_names_samples_that_show_an_image_and_credits_say_so(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    first, second = credited(tmp_path)
    root, name = str(tmp_path / "root"), {"--key": f"art/{second['key']}", "--sha256": second["sha256"]}[flag]
    for more in (["--dry-run"], []):
        assert main(["forget", flag, name, "--json", *more, "--root", root]) == 0
        assert json.loads(capsys.readouterr().out)["samples"] == ["runs/tiny/samples/first"]
    assert main(["forget", flag, name, "--root", root]) == 0
    shown = capsys.readouterr().out
    assert f"to remove it: python -m jobs rm runs/tiny/samples/first --root {root}\n" in shown
    assert "which rebuild did not make" in shown
    assert f"to remove the version: python -m jobs rm datasets/art/v1 --root {root}\n" in shown
    pictures = credits.list_credits("runs/tiny/samples/first", root)[0]["pictures"]
    assert [picture.get("note") for picture in pictures] == [None, "this image was taken down"]
    shown = tmp_path / "root/runs/tiny/samples/first/neighbors"
    shown.mkdir()
    for file in ("00.png", Path(first["file"]).name):  # the sheet does not read the other neighbor
        paint(shown / file, 3)
    credits.save_sheet(credits.list_credits("runs/tiny/samples/first", root), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size
    assert first["sha256"] != second["sha256"]
    assert main(["forget", "--sha256", "0" * 64, "--json", "--root", root]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == []


def test_a_folder_that_is_not_there_is_said_to_be_absent(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"samples/none is not there\nhint: python -m jobs ls"):
        credits.list_credits("runs/tiny/samples/none", str(tmp_path))
