"""The page docs/reference/output.md says what each verb prints in a pipe."""

import contextlib
import json
import re
from pathlib import Path
from typing import get_type_hints

import pytest

from jobs.cli.main import main
from jobs.cli.options import ResultAsJson
from jobs.cli.verbs import VERBS, load_verb

_PAGE = Path(__file__).parents[3] / "docs/reference/output.md"


def _documented() -> dict[str, bool]:
    """Whether the page says that a verb prints JSON in a pipe."""
    table = _PAGE.read_text().partition("## In a pipe")[2].partition("| result | verbs |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if "`" in line]
    listed = [(verb, "JSON" in result) for result, verbs in rows for verb in re.findall(r"`([a-z]+)`", verbs)]
    assert len(listed) == len(dict(listed))
    return dict(listed)


def test_help_and_page_name_the_same_verbs() -> None:
    documented = _documented()
    assert documented.keys() == VERBS.keys()
    for verb in VERBS.keys() - {"submit", "evaluate"}:  # submit has no --json, and evaluate a stage that prints text
        hints = get_type_hints(load_verb(verb)[0], include_extras=True)
        assert documented[verb] == ("stage" in hints or hints.get("json") == ResultAsJson), verb


@pytest.mark.parametrize("words", [
    ["ls"], ["ls", "drawn"], ["status"], ["versions", "drawn"], ["recipes"], ["verify", "--dry-run"],
    ["show", "0000000001"], ["rm", "drawn", "--dry-run"], ["init", "demo", "FILE"], ["embed", "drawn", "--dry-run"]])
def test_a_pipe_gets_what_the_page_says_and_json_on_request(words: list[str], prepared_root: Path, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    root = [] if words[0] == "init" else ["--root", str(prepared_root)]
    for number, flags in enumerate(([], ["--json"])):
        command = [word.replace("FILE", str(tmp_path / f"{number}.toml")) for word in words]
        assert main([*command, *root, *flags]) == 0
        printed = capsys.readouterr().out
        if flags or _documented()[words[0]]:
            json.loads(printed)
        else:
            with pytest.raises(json.JSONDecodeError):
                json.loads(printed)


def test_a_full_disk_behind_stdout_is_named(prepared_root: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        assert main(["ls", "--root", str(prepared_root)]) == 1
    with contextlib.suppress(OSError):  # its buffer is not empty
        full.close()
    assert "no space is left on the disk of stdout" in capsys.readouterr().err
