"""`search` finds the nearest images of databases by words, images and samples."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.api import open_root
from jobs.cli.main import main
from pipeline.datasets import lookup
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.embeddings import Embeddings
from pipeline.embeddings import clip
from pipeline.embeddings.clip_weights import ClipConfig
from tests.pipeline import synthetic


@pytest.fixture(scope="module")
def databases(trained_root: Path) -> list[Dataset]:
    """Two databases of one root."""
    return [Dataset(str(trained_root), name) for name in ("flat", "outline")]


def _search(capsys: pytest.CaptureFixture[str], databases: list[Dataset], *words: str) -> list[dict]:
    more = [word for database in databases[1:] for word in ("--database", database.name)]
    assert main(["search", databases[0].name, *words, *more, "--json", "--root", databases[0].root]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def _nearest(databases: list[Dataset], vector: np.ndarray, count: int, without: tuple[str, int] = ("", 0)
             ) -> list[tuple[str, int]]:
    scores = {(database.name, row): float(score) for database in databases
              for row, score in enumerate(Embeddings(database).all().astype(np.float32) @ vector)}
    scores.pop(without, None)
    return sorted(scores, key=lambda row: -scores[row])[:count]


def _found(matches: list[dict]) -> list[tuple[str, int]]:
    return [(match["database"], match["row"]) for match in matches]


def test_a_text_query_finds_the_rows_of_exhaustive_search(databases: list[Dataset],
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    encoder = clip.load_encoder(ClipConfig())
    red, blue = encoder.texts(["a red square", "a blue circle"]).astype(np.float32)
    assert _found(_search(capsys, databases, "a red square", "--count", "7")) == _nearest(databases, red, 7)
    assert _found(_search(capsys, databases[:1], "a red square", "--count", "7")) == _nearest(databases[:1], red, 7)
    everything = _nearest(databases, red, 10**6)
    assert _found(_search(capsys, databases, "a red square", "--count", str(10**12))) == everything
    words = _search(capsys, databases, "a", "red", "square", "--count", "7")  # without quotation marks
    assert _found(words) == _nearest(databases, red, 7)
    vector = red - blue
    matches = _search(capsys, databases, "a red square", "--minus", "a blue circle", "--count", "7")
    assert _found(matches) == _nearest(databases, vector / np.linalg.norm(vector), 7)
    assert [match["score"] for match in matches] == sorted((match["score"] for match in matches), reverse=True)


def test_a_key_and_its_image_find_the_same_rows(databases: list[Dataset], tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    sample, = lookup.samples(databases[1], [3])
    vector = Embeddings(databases[1]).rows(np.array([3]))[0].astype(np.float32)
    like = _search(capsys, databases, "--like", f"outline/{sample.key}", "--count", "5")
    assert _found(like) == _nearest(databases, vector, 5, ("outline", 3))
    file = tmp_path / "query.png"
    file.write_bytes(sample.picture)
    by_image = _search(capsys, databases, "--image", str(file), "--count", "6")
    assert _found(by_image)[0] == ("outline", 3) and by_image[0]["score"] > 0.99
    assert by_image[0]["key"] == sample.key and by_image[0]["caption"] == sample.caption
    assert by_image[0]["sha256"] == sample.sha256


def test_a_sheet_shows_the_images(databases: list[Dataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sheet.png"
    root = databases[0].root
    assert main(["search", "flat", "a red square", "--count", "6", "--sheet", str(out), "--root", root]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["score", "database", "key", "name", "file"] and len(shown) == 7
    with Image.open(out) as sheet:
        assert sheet.width > 5 * 128 and sheet.height > 2 * 128


@pytest.mark.parametrize(("words", "sentence"), [
    ([], 'search needs words, an image or a sample\nhint: python -m jobs search DATASET "red apple" --root '),
    ([" "], "the words to search for are empty"),
    (["--like", "nothing"], "flat has no sample nothing\nhint: "),
    (["--like", "other/nothing"], "flat has no sample other/nothing\nhint: "),
    (["--image", "absent.png"], "absent.png"),
    (["--image", "/dev/zero"], "/dev/zero is a pipe, a socket or a device: expected a file or a folder\nhint: "),
    (["x", "--sheet", "s3://bucket/s.png"], "is a URL: expected a path on this machine\nhint: --sheet s.png"),
    (["x", "--sheet", "absent/s.png"], "there is no folder for --sheet absent/s.png\nhint: mkdir -p /"),
    (["x", "--minus", "x"], "the query has no direction"),
    (["x", "--count", "0"], "count = 0: must be at least 1\nhint: --count 10"),
    (["x", "--model", "ViT-B-32", "--pretrained", "random"], "flat belongs to another encoder than ViT-B-32")])
def test_an_invalid_query_is_a_sentence(
        words: list[str], sentence: str, databases: list[Dataset], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "flat", *words, "--root", databases[0].root]) == 2
    assert sentence in capsys.readouterr().err


def test_vectors_of_other_shards_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, place = tmp_path / "source", ["--root", str(tmp_path / "root")]
    source.mkdir()
    for seed in range(8):
        synthetic.noise(32, 32, seed).save(source / f"{seed}.png")
    shard = ["shard", "a", "--source", str(source), "--image-size", "32", "--local", *place]
    assert main(shard) == 0
    for verb in ("embed", "index", "neighbors"):
        assert main([verb, "a", "--local", *place]) == 0
    assert main(["search", "a", "red", *place]) == 0
    capsys.readouterr()
    assert main(["forget", "--url", "0.png", *place]) == 0
    root = " ".join(place)
    assert (f"python -m jobs shard a@v1 --source SOURCE --overwrite {root} && "
            f"python -m jobs embed a@v1 --overwrite {root} && "
            f"python -m jobs index a@v1 --overwrite {root} && "
            f"python -m jobs neighbors a@v1 --database a@v1 --overwrite {root}; or") in capsys.readouterr().out
    (source / "0.png").unlink()
    assert main([*shard, "--overwrite"]) == 0
    capsys.readouterr()
    for query in (["red"], ["--like", "0000000000"]):
        assert main(["search", "a", *query, *place]) == 2
        assert "is stale: shards changed since" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is stale"):
        open_root(str(tmp_path / "root")).batches("a")
    assert main(["embed", "a", "--overwrite", "--local", *place]) == 0
    assert main(["index", "a", "--overwrite", "--local", *place]) == 0
    assert main(["search", "a", "red", *place]) == 0
