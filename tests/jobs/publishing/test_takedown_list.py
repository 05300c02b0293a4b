"""The takedown list cannot be replaced by one of equal length, and the history counts its requests."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from pipeline.datasets.metadata import metadata
from pipeline.storage import DamagedFile
from pipeline.takedowns import hidden_rows, takedown_list, takedowns
from tests.jobs.publishing.published_art import NAME, paint, pointer, published_dataset, rebuild


@pytest.fixture
def forgotten(place: Path) -> Path:
    """A published version of which two images were forgotten, in two requests."""
    dataset = published_dataset(place / "root")
    keys = [row["key"] for row in metadata(dataset, dataset.manifest("shards")["items"][0], ["key"])]
    for key in (keys[4], keys[9]):
        assert main(["forget", "--key", f"{NAME}/{key}", "--root", str(place / "root")]) == 0
    return place


def _change(path: Path) -> bytes:
    """Replace the hashes in a list or a copy by others; what was there."""
    data = path.read_bytes()
    document = json.loads(data)
    for request in [document, *document.get("requests", [])]:
        request["sha256"] = ["0" * 64] * len(request["sha256"])
    path.write_text(json.dumps(document))
    return data


def test_a_list_of_equal_length_with_other_content_is_refused(forgotten: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    root = str(forgotten / "root")
    before = json.loads(_change(forgotten / "root/forgotten.json"))
    with pytest.raises(DamagedFile, match="its first 2 requests are not those that"):
        hidden_rows.read_hidden_rows(published_dataset(root))
    with pytest.raises(DamagedFile, match=r"its requests are not those that .*current\.json counts\nhint: "):
        rebuild(root, forgotten / "source")
    for flags in ([], ["--quick"]):
        assert main(["verify", *flags, "--root", root]) == 1
        assert f"hint: python -m jobs repair {NAME} --root {root}\n" in capsys.readouterr().err
    assert main(["repair", NAME, "--root", root]) == 0
    assert json.loads(capsys.readouterr().out)["takedown_list"] == "restored"
    assert json.loads((forgotten / "root/forgotten.json").read_text()) == before
    assert main(["verify", "--root", root]) == 0


def test_a_value_of_a_request_alone_still_counts(forgotten: Path) -> None:
    path = forgotten / "root/forgotten.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": []}))
    assert rebuild(forgotten / "root", forgotten / "source")["forgotten"] == 2


def test_rows_of_the_source_that_the_list_names_are_counted(place: Path) -> None:
    dataset = published_dataset(place / "root")
    name = metadata(dataset, dataset.manifest("shards")["items"][0], ["url"])[4]["url"]
    assert main(["forget", "--url", name, "--root", str(place / "root")]) == 0
    done = rebuild(place / "root", place / "source")
    assert done["filtered_by_takedown"] == 1 and done["gates"]["recall@10"] > 0.5  # measured, though nothing is added


def test_a_first_version_names_what_it_leaves_out(place: Path) -> None:
    dataset = published_dataset(place / "root")
    sha256 = metadata(dataset, dataset.manifest("shards")["items"][0], ["sha256"])[4]["sha256"]
    assert main(["forget", "--sha256", sha256, "--root", str(place / "root")]) == 0
    done = rebuild(place / "root", place / "source", name="other")
    assert (done["left_out"], done["embedded"]) == ({"forgotten": 1}, done["added"] - 1)


def test_changed_copies_are_named_and_restored(forgotten: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, copies = str(forgotten / "root"), [forgotten / f"root/takedowns/00000{number}.json" for number in (1, 2)]
    before = _change(copies[0])
    copies[1].write_text("{")
    assert main(["verify", "--quick", "--root", root]) == 1
    out, err = capsys.readouterr()
    assert out.count("is not this request of forgotten.json") == 2 and f"repair {NAME} --root {root}\n" in err
    assert main(["repair", NAME, "--root", root]) == 0
    assert copies[0].read_bytes() == before
    assert main(["verify", "--quick", "--root", root]) == 0


def test_a_list_that_no_copy_restores_needs_a_decision(forgotten: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(forgotten / "root")
    _change(forgotten / "root/forgotten.json")
    _change(forgotten / "root/takedowns/000001.json")
    for verb in (["repair", NAME], ["forget", "--sha256", "1" * 64]):
        assert main([*verb, "--root", root]) == 1
        assert f"python -m jobs repair {NAME} --accept-lost-requests --root {root}" in capsys.readouterr().err
    assert main(["repair", NAME, "--accept-lost-requests", "--root", root]) == 0
    assert json.loads(capsys.readouterr().out)["accepted_changes"] is True
    assert main(["verify", "--root", root]) == 0
    assert rebuild(root, forgotten / "source")["forgotten"] == 2  # what versions hide stays out
    assert main(["verify", "--root", root]) == 0


def test_the_history_counts_requests(forgotten: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(forgotten / "root")
    paint(forgotten / "source" / "added.png", 1)
    assert rebuild(root, forgotten / "source")["published"] == "v2"
    assert json.loads(pointer(forgotten).read_text())["takedown_list"]["requests"] == 2
    for version in ("v1", "v2"):
        (forgotten / "root/datasets" / NAME / version / "forgotten.json").unlink(missing_ok=True)
    (forgotten / "root/forgotten.json").unlink()
    shutil.rmtree(forgotten / "root/takedowns")
    document = json.loads(pointer(forgotten).read_text())
    del document["takedown_list"]
    pointer(forgotten).write_text(json.dumps(document | {"takedowns": 0}))
    for verb in (["repair", NAME], ["forget", "--sha256", "1" * 64]):
        assert main([*verb, "--root", root]) == 1
        assert f"are lost: published/{NAME}/000002.json counts them" in capsys.readouterr().err


def test_pointers_without_the_hash_are_read_and_get_one(forgotten: Path) -> None:
    root, document = str(forgotten / "root"), json.loads(pointer(forgotten).read_text())
    known = document.pop("takedown_list")
    pointer(forgotten).write_text(json.dumps(document))
    assert list(hidden_rows.read_hidden_rows(published_dataset(root))) == [4, 9]
    assert main(["verify", "--root", root]) == 0
    assert takedown_list.describe_list(root) == known
    assert main(["forget", "--sha256", "1" * 64, "--root", root]) == 0
    listed = json.loads(pointer(forgotten).read_text())["takedown_list"]
    assert listed == takedown_list.describe_list(root) and listed["requests"] == 3


def test_a_version_that_gc_removes_meanwhile_leaves_no_other_one_visible(
        second: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    at_root = ["--root", str(second / "root")]
    dataset = published_dataset(second / "root")
    key = metadata(dataset, dataset.manifest("shards")["items"][0], ["key"])[4]["key"]
    hide = takedowns.hide_rows

    def hide_beside_gc(*arguments: Any) -> int:
        monkeypatch.setattr(takedowns, "hide_rows", hide)
        assert main(["gc", NAME, "--keep", "0", "--lease", "0", *at_root]) == 0
        return hide(*arguments)

    monkeypatch.setattr(takedowns, "hide_rows", hide_beside_gc)
    assert main(["forget", "--key", f"{NAME}/{key}", *at_root]) == 0
    said = capsys.readouterr().out
    assert "v1  removed: " in said and f"{NAME}@v1 was removed meanwhile" in caplog.text
    assert f"\n{NAME}@v2: 1 image, hidden from searches" in said and f"\n{NAME}@v1" not in said
    assert len(hidden_rows.read_hidden_rows(published_dataset(second / "root"))) == 1
    assert main(["verify", *at_root]) == 0
    assert main(["gc", NAME, "--keep", "0", "--lease", "0", *at_root]) == 0
    assert not (second / "root/datasets" / NAME / "v1/forgotten.json").exists()
