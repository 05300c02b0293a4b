"""`sample --prompts FILE --count N`: prompts from texts and tables, and several images of each."""

import json
import os
import shutil
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.cli.main import main
from jobs.sampling.queries import build_queries, read_image, read_prompts
from pipeline.datasets import lookup
from pipeline.datasets.dataset import Dataset

_PROMPTS = ("a red circle", "a blue, or green square")


def _write(folder: Path, kind: str) -> str:
    path = folder / f"prompts.{kind}"
    rows = [{"id": number, "caption": prompt} for number, prompt in enumerate(_PROMPTS)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        path.write_text("id,caption\n" + "".join(f'{row["id"]},"{row["caption"]}"\n' for row in rows))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text("\ufeff" + "\r\n\n".join(_PROMPTS))
    return str(path)


@pytest.mark.timeout(20)
def test_an_image_that_never_ends_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as huge:
        huge.truncate(2 << 30)
    for path in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path / "huge"), str(tmp_path)):
        with pytest.raises(ValueError, match=rf"^cannot read the image {path}: .*\nhint: --image takes the path of a "):
            read_image(path)


@pytest.mark.parametrize("kind", ["txt", "prompts", "csv", "jsonl", "parquet"])
def test_prompts_are_read_from_files(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_prompts(_write(tmp_path, kind)) == _PROMPTS
    assert not caplog.records


def test_repeated_and_empty_captions_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": null}\n{"text": " a "}\n')
    assert read_prompts(str(tmp_path / "p.jsonl")) == ("a", "b")
    assert "2 prompts; left out: 1 empty, 1 repeated" in caplog.text


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("p.txt", b"\n \n", "has no prompt\nhint: "), ("p.txt", b"\xff\xfe\x00", "is no UTF-8 text"),
    ("p.csv", b"file,size\na,1\n", "has no column of prompts: expected one of caption, "),
    ("p.csv", b'caption,size\n"a,1\nb\n', "cannot be read"), ("p.jsonl", b'{"caption": "a"}\n{oops\n', "p.jsonl"),
    ("p.parquet", b"PAR1", "p.parquet cannot be read"), ("absent.txt", None, "there is no file "),
    ("absent.csv", None, "absent.csv")])
def test_a_file_without_prompts_is_refused(name: str, content: bytes | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_prompts(str(tmp_path / name))
    assert sentence in str(error.value)


def test_a_repeated_prompt_is_named() -> None:
    with pytest.raises(ValueError, match=r"given twice: 'b'\nhint: --count 2"):
        build_queries(["a", "b", "b"], (), 0)


def test_each_prompt_and_image_has_several_samples(trained_root: Path, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    root = str(shutil.copytree(trained_root, tmp_path / "root"))
    (tmp_path / "apple.png").write_bytes(lookup.samples(Dataset(root, "flat"), [0])[0].picture)
    command = ["sample", "small", "--prompts", _write(tmp_path, "txt"), "--image", str(tmp_path / "apple.png"),
               "--count", "3", "--unconditional", "1", "--database", "drawn", "--steps", "2", "--name", "many",
               "--root", root, "--local"]
    assert main([*command, "--dry-run"]) == 0
    forecast = json.loads(capsys.readouterr().out)
    weights = sum(file.stat().st_size for file in Path(root, "runs/small/checkpoints").rglob("*.safetensors"))
    assert forecast["left"] == 1 and forecast["input_bytes"] > weights > 0
    assert main(command) == 0
    folder = Path(root, "runs/small/samples/many")
    document = json.loads((folder / "samples.json").read_text())
    pictures = document["pictures"]
    assert document["count"] == 3 and document["prompts"] == list(_PROMPTS) and len(document["images"]) == 1
    assert [picture["position"] for picture in pictures] == list(range(10))
    assert [(kind, len(list(group))) for kind, group in groupby(picture["kind"] for picture in pictures)] == [
        ("prompt", 6), ("image", 3), ("p_D", 1)]
    assert [picture["prompt"] for picture in pictures[:6]] == [prompt for prompt in _PROMPTS for _ in range(3)]
    assert pictures[0]["neighbors"][0]["row"] == pictures[2]["neighbors"][0]["row"]
    images = {Image.open(folder / picture["file"]).tobytes() for picture in pictures}
    assert len(images) == len({picture["file"] for picture in pictures}) == 10
    capsys.readouterr()
    assert main(["verify", "--only", "runs", "--root", root]) == 0
    assert main(["report", "--root", root, "--out", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").read_text().count(_PROMPTS[1]) >= 3
    assert main(["credits", str(folder / "grid.png"), "--json", "--root", root]) == 0
