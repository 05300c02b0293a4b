"""Two commands overwrite one folder with different settings: one wins, and all files are those of the winner."""

import io
import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from pipeline.media import tars
from tests.laws.crashes.commands import Ended
from tests.laws.crashes.roots import NAME, Place, check_end, check_published, copy_place, settle

_NAME = "contested"


def _arguments(place: Place, size: int, overwrite: bool = True) -> tuple[str, ...]:
    return ("shard", _NAME, "--source", str(place.source), "--image-size", str(size), "--format", "png",
            "--samples-per-shard", "4", *(["--overwrite"] if overwrite else []), "--local")


def _check(place: Place, ended: dict[int, Ended]) -> None:
    """Manifest, plan and tars are of one size, that of a command that ended well. The other one says why it did not."""
    for end in ended.values():
        check_end(end)
    folder = Path(place.root, "datasets", _NAME, "v1", "shards")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    size = manifest["section"]["image_size"]
    assert ended[size].code == 0, ended[size]
    assert json.loads((folder / "plan.json").read_bytes())["fingerprint"] == manifest["fingerprint"]
    tar_files = sorted(folder.glob("*.tar"))
    assert [path.name for path in tar_files] == sorted(entry["name"] for record in manifest["items"]
                                                       for entry in record["files"] if entry["name"].endswith(".tar"))
    sides = {Image.open(io.BytesIO(tars.sample_image(sample))).size for path in tar_files for sample in tars.read(path)}
    assert sides == {(size, size)}
    place.run(("verify", "--only", f"datasets/{_NAME}"))
    loser = ended[80 - size]
    if loser.code:
        assert "another command works on" in loser.output or "planned" in loser.output, loser


def _race(template: Place, folder: Path, number: int) -> bool:
    place = copy_place(template, folder)
    place.run(_arguments(place, 24))
    first = place.commands.start(place.folder, place.root, _arguments(place, 32), pause=number)
    event = first.next_event()
    second = place.commands.start(place.folder, place.root, _arguments(place, 48))
    second.next_event()
    if event == "paused":
        first.resume()
    _check(place, {32: first.end(), 48: second.end()})
    return event == "paused"


@pytest.mark.parametrize("number", [0, 5, 40, 83])
def test_one_of_two_overwrites_is_paused(template: Place, tmp_path: Path, number: int) -> None:
    assert _race(template, tmp_path / "place", number)


@pytest.mark.slow
def test_one_of_two_overwrites_is_paused_before_every_write(template: Place, tmp_path: Path) -> None:
    for number in itertools.count():
        if not _race(template, tmp_path / str(number), number):
            assert number > 60
            break


@pytest.mark.parametrize("overwrite", [True, False])
def test_two_overwrites_run_together(template: Place, tmp_path: Path, overwrite: bool) -> None:
    for number in range(2):
        place = copy_place(template, tmp_path / str(number))
        if overwrite:
            place.run(_arguments(place, 24))
        sizes = (32, 48) if number % 2 else (48, 32)
        started = {size: place.commands.start(place.folder, place.root, _arguments(place, size, overwrite))
                   for size in sizes}
        _check(place, {size: command.end() for size, command in started.items()})


@pytest.mark.parametrize("number", [0, 3, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 9))])
def test_a_version_published_during_an_overwrite_is_not_emptied(template: Place, tmp_path: Path, number: int) -> None:
    place = copy_place(template, tmp_path / "place")
    writes = copy_place(template, tmp_path / "alone").run(place.arguments("rebuild")).writes
    killed = place.commands.run(place.folder, place.root, place.arguments("rebuild"), kill=writes - 25)
    assert killed.code is None
    embed = place.commands.start(place.folder, place.root, ("embed", f"{NAME}@v3", "--overwrite", "--local"),
                                 pause=number)
    event = embed.next_event()
    rebuild = place.commands.start(place.folder, place.root, place.arguments("rebuild"))
    rebuild.next_event()
    if event == "paused":
        embed.resume()
    for ended in (embed.end(), rebuild.end()):
        check_end(ended)
    check_published(place)
    settle(place, stages=False)
