"""Names, captions and messages of others cannot control a terminal, and appear in their stored order."""

import csv
import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.report.render import render_page
from jobs.telemetry import logs, output
from pipeline import storage
from tests.laws.terminal import HOSTILE, PNG, RAW, SHOWN, check_verbs, run_on_terminal


def _tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hostile sources, and a root with hostile documents."""
    folder = tmp_path_factory.mktemp("hostile")
    pictures = folder / "pictures"
    pictures.mkdir()
    (pictures / f"{HOSTILE}.png").write_bytes(PNG.getvalue())
    (pictures / f"broken {HOSTILE}.png").write_bytes(b"no picture")
    with open(pictures / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "caption"), (f"{HOSTILE}.png", HOSTILE)])
    _tar(folder / "tars/good.tar", {f"{HOSTILE}.png": PNG.getvalue(), f"{HOSTILE}.txt": HOSTILE.encode()})
    _tar(folder / "tars_bad/bad.tar", {f"{HOSTILE}.txt": b"no picture", f"{HOSTILE}.cls": b"1"})
    (folder / "list.csv").write_text(f'address,"{HOSTILE}"\na,b\n')
    (folder / "list.jsonl").write_text('{"url": "' + HOSTILE + '\n')
    (folder / "settings.toml").write_text(f'[{json.dumps(HOSTILE)}]\na = 1\n')
    (folder / "keys.txt").write_text(HOSTILE + "\n")
    root = folder / "root"
    neighbor = {"database": "art@v1", "key": HOSTILE, "score": 0.5, "caption": HOSTILE, "sha256": "0" * 64,
                "file": "a.png"}
    samples = root / "runs/run/samples/0123456789ab"
    samples.mkdir(parents=True)
    (samples / "samples.json").write_text(json.dumps({"pictures": [{
        "file": "0000.png", "prompt": HOSTILE, "neighbors": [neighbor], "database": "art@v1", "seed": 0}]}))
    for name, document in {
            "damaged/current.json": {"version": HOSTILE, "number": HOSTILE, "recall@10": HOSTILE},
            "planned/v1/shards/plan.json": {"format": 2, "stage": HOSTILE, "items": HOSTILE},
            "planned/v1/embeddings/manifest.json": {"format": HOSTILE, "stage": HOSTILE}}.items():
        path = root / "datasets" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(document))
    folder_of_name = root / "datasets/named/v1/shards" / HOSTILE
    folder_of_name.mkdir(parents=True)
    return folder


def test_no_verb_prints_control_characters_of_others(place: Path) -> None:
    root = str(place / "root")
    commands = [
        ["shard", "art", "--source", str(place / "pictures"), "--image-size", "16"],
        ["shard", "tars", "--source", str(place / "tars/*.tar"), "--image-size", "16"],
        ["shard", "adopted", "--source", str(place / "tars/*.tar"), "--adopt"],
        ["shard", "bad", "--source", str(place / "tars_bad/*.tar"), "--adopt"],
        ["shard", "list", "--source", str(place / "list.csv")],
        ["shard", "lines", "--source", str(place / "list.jsonl")],
        ["index", "art", "--tombstone", str(place / "keys.txt")],
        ["credits", f"{root}/runs/run/samples/0123456789ab/0000.png"],
        ["credits", f"{root}/runs/run/samples/0123456789ab/0000.png", "--json"],
        ["forget", "--key", f"art/{HOSTILE}", "--dry-run"],
        ["forget", "--url", f"{HOSTILE}.png", "--dry-run"],
        ["status"], ["status", "--json"], ["verify"], ["verify", "--json"],
        ["versions", "damaged"], ["rollback", "damaged"], ["repair", "damaged"], ["gc", "damaged"],
        ["shard", "art2", "--source", str(place / "pictures"), "--config", str(place / "settings.toml")],
        ["report"],
    ]
    shown = check_verbs([[*words, "--root", root] if words[0] == "credits" else [*words, "--root", root, "--local"]
                         for words in commands])
    for verb in ("shard bad", "shard list", "shard art2", f"credits {root}/runs/run/samples/0123456789ab/0000.png"):
        assert "evil" in shown[verb] and r"\u202e" in shown[verb], shown[verb]
    page = (place / "root/report.html").read_text()
    assert not RAW.search(page)


def test_a_live_bar_and_bold_heads_are_the_only_control_sequences(place: Path) -> None:
    root = str(place / "root")
    said = run_on_terminal([["shard", "bar", "--source", str(place / "pictures"), "--image-size", "16", "--root", root,
                          "--local"], ["status", "--root", root]], "xterm")
    assert "\x1b[" in said
    assert not RAW.search(re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "", said))


def test_text_and_styles_of_others_are_escaped() -> None:
    assert storage.escape_controls(HOSTILE) == SHOWN
    assert storage.escape_controls("a\tb\nc\ud800", "\n\t") == "a\tb\nc\\ud800"
    plain = "café 日本 👩‍👩‍👧 العربية"
    assert storage.escape_controls(plain) == plain
    assert output.escape_document({HOSTILE: [HOSTILE, 1, None]}) == {SHOWN: [SHOWN, 1, None]}
    assert output.plain_log("\x1b[36m(worker)\x1b[0m \x1b]0;x\x07") == r"(worker) \x1b]0;x\x07"


def test_errors_warnings_and_tracebacks_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    logs.log_exit(HOSTILE)
    logs._print_exception(RuntimeError, RuntimeError(HOSTILE), None)
    said = capsys.readouterr().err
    assert said.splitlines()[0] == f"error: {SHOWN}" and SHOWN in said.splitlines()[1]
    assert not RAW.search(said + logs._format_warning(HOSTILE, UserWarning, "file.py", 1, ""))


def test_a_page_shows_marks_of_writing_direction() -> None:
    page = render_page(title=HOSTILE, written="", code="", root="", headline=None, failures="", best="", sections=[],
                       is_empty=False, left_out=0).decode()
    assert SHOWN in page and not RAW.search(page)


@pytest.mark.parametrize("words", [["doctor", HOSTILE], ["ls", f"--{HOSTILE}"], ["status", "--json", HOSTILE]])
def test_refused_arguments_are_escaped(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words)
    except SystemExit as stopped:  # tyro refused them
        code = stopped.code
    assert code == 2
    printed = "".join(capsys.readouterr())
    assert not RAW.search(printed) and "evil" in printed
