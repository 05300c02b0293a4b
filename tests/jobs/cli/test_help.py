"""The help of the program: verbs by group, flags that a verb uses, examples that work, completion, suggestions."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jobs.cli import help as help_pages
from jobs.cli.main import main
from jobs.cli.parse import parse_command
from jobs.cli.verbs import GROUPS, VERBS, load_verb
from jobs.config.field_docs import field_docs

ROOT = Path(__file__).parents[3]
_SCREENS_LINES = 100  # two screens of 50 lines


def _printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 0
    return capsys.readouterr().out


def _flags(text: str) -> set[str]:
    return set(re.findall(r"^\W*?(--[a-z][\w.-]*)", text, re.MULTILINE))


@pytest.mark.parametrize("columns", ["40", "80"])
def test_every_verb_is_in_one_group(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
                                    ) -> None:
    assert sorted(verb for verbs in GROUPS.values() for verb in verbs) == sorted(VERBS)
    monkeypatch.setenv("COLUMNS", columns)
    overview = _printed(capsys, "--help")
    assert all(len(line) <= int(columns) for line in overview.splitlines())
    assert all(f"\n  {verb} " in overview for verb in VERBS) and all(f"\n{group}\n" in overview for group in GROUPS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_on_two_screens_and_ends_with_two_examples(
        verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown, everything = _printed(capsys, verb, "--help"), _printed(capsys, verb, "--help-all")
    assert shown.count("\n") <= _SCREENS_LINES
    examples = shown.partition("Examples:\n")[2].splitlines()
    assert len(examples) == 2 and everything.endswith("\n".join(["Examples:", *examples, ""]))
    hidden = _flags(everything) - _flags(shown)
    assert _flags(shown) < _flags(everything) if hidden else _flags(shown) == _flags(everything)
    assert (f"{len(hidden)} more flags: " in shown) == bool(hidden), hidden
    assert "more flags" not in everything


def test_texts_of_flags_have_no_line_breaks_of_the_source(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert field_docs(load_verb("shard")[0])["retry_failed"] in _printed(capsys, "shard", "--help-all")


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_commands(verb: str) -> None:
    for example in load_verb(verb)[0].examples:  # type: ignore[attr-defined]
        first, *words = shlex.split(example)
        assert first == verb
        run, options = parse_command([first, *words])
        assert run.__name__ == f"run_{verb}"
        if verb == "submit":
            parse_command(options.words)


@pytest.mark.parametrize(("verb", "unused"), [
    ("index", {"--gpus", "--decoders", "--resize-every"}), ("embed", {"--max-failures", "--min-workers"}),
    ("status", {"--dry-run", "--local", "--recipe"}), ("versions", {"--local", "--dry-run"}),
    ("rollback", {"--local", "--recipe"}), ("train", {"--decoders"}), ("shard", {"--gpus", "--decoders"})])
def test_help_lists_no_flag_that_the_verb_does_not_use(
        verb: str, unused: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = _flags(_printed(capsys, verb, "--help-all"))
    assert "--root" in flags and not flags & unused


def test_flags_of_the_work_are_those_of_verbs_that_have_a_runner(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        kind, run = load_verb(verb)
        source = Path(sys.modules[run.__module__].__file__ or "").read_text()
        body = source.partition(f"def run_{verb}(")[2].partition("\n@dataclass")[0]
        shown = _flags(_printed(capsys, verb, "--help-all"))
        if "--dry-run" not in shown:
            assert "dry_run" not in body, verb
        if "cluster" in kind.__dataclass_fields__:  # type: ignore[attr-defined]
            assert {"--local", "--workers", "--dry-run"} <= shown, verb


def test_the_help_of_json_says_what_a_pipe_gets(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, words in (("evaluate", "JSON instead of text"), ("index", "This is the default without a terminal")):
        assert words in " ".join(_printed(capsys, verb, "--help-all").replace("│", " ").split())


def test_submit_has_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--secret" in _printed(capsys, "submit", "--help")
    assert "--gates.min-recall" not in _printed(capsys, "submit", "--help")


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert _printed(capsys, "--version").split()[-1] == project["project"]["version"]


def test_rdm_is_the_same_program() -> None:
    module, _, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["rdm"].partition(":")
    code = f"import sys; sys.argv[0] = '/somewhere/rdm'; from {module} import {name} as run; sys.exit(run())"
    for words, exit_code, sentence in ((["--version"], 0, "rdm 0"), (["shard", "--help"], 0, "rdm shard"),
                                       ([], 2, "usage: rdm VERB")):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == exit_code and sentence in done.stdout, done.stderr


@pytest.mark.parametrize(("words", "sentence"), [
    (["shrad"], "there is no verb 'shrad'\nhint: did you mean shard?"),
    (["embed", "nota", "--local"], "there is no dataset nota in {root}, which has art, noto\nhint: did you mean noto?"),
    *((words, "there is no dataset zzz in {root}, which has art, noto\nhint: ") for words in (
        ["search", "zzz", "cat"], ["search", "noto", "cat", "--database", "zzz"],
        ["sample", "cat", "--database", "zzz"], ["sample", "cat", "--database", "noto:2+zzz:1"],
        ["neighbors", "noto", "--database", "zzz"],
        ["train", "run", "--dataset", "noto", "--validation", "zzz"], ["evaluate", "run", "--database", "zzz"],
        ["show", "1", "--dataset", "zzz"], ["ls", "zzz"], ["ls", "zzz@v2"], ["rm", "zzz"], ["versions", "zzz"],
        ["rollback", "zzz"], ["gc", "zzz"], ["repair", "zzz"], ["embed", "zzz"], ["index", "zzz"],
        ["latents", "zzz", "--first-stage", "vae"], ["forget", "--key", "zzz/1"])),
    (["sample", "emoji32", "--prompt", "x", "--database", "noto", "--local"],
     "there is no run emoji32 in {root}\nhint: did you mean emoji_32?"),
    (["--completion", "tcsh"], "--completion tcsh: must be one of bash, zsh, fish\nhint: --completion bash")])
def test_mistyped_names_are_suggested(words: list[str], sentence: str, tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("datasets/noto/v1", "datasets/art/v1", "runs/emoji_32"):
        (tmp_path / folder).mkdir(parents=True)
    assert main([*words, *(["--root", str(tmp_path)] if words[0] in VERBS else [])]) == 2
    assert sentence.format(root=tmp_path) in capsys.readouterr().err


def test_mistyped_flags_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "some", "--max-memori", "1G"]) == 2
    assert "--max-memory" in capsys.readouterr().err


def test_completion_gives_verbs_flags_and_names(tmp_path: Path) -> None:
    for folder in ("datasets/noto/v1", "datasets/nova/v1", "datasets/art/v1", "runs/emoji_32"):
        (tmp_path / folder).mkdir(parents=True)
    assert help_pages.complete(["s"]) == ["shard", "score", "sample", "style", "search", "status", "show", "submit"]
    assert help_pages.complete(["shard", "--sou"]) == ["--source", "--sources"]
    assert "--decoders" not in help_pages.complete(["index", "--"])
    assert help_pages.complete(["embed", "--root", str(tmp_path), "no"]) == ["noto", "nova"]
    assert help_pages.complete(["--root", "embed", str(tmp_path), "zzz"]) == []
    assert help_pages.complete(["embed", f"--root={tmp_path}", "no"]) == ["noto", "nova"]
    assert help_pages.complete(["train", "--root", str(tmp_path), ""]) == ["emoji_32"]


@pytest.mark.parametrize(("words", "expected"), [
    ("train x --tracker w", ["wandb"]), ("train x --recipe emoji_3", ["emoji_32"]), ("shard x --format j", ["jpg"]),
    ("train x --tracker = w", ["wandb"]), ("shard x --format =", ["jpg", "png", "webp"]),
    ("embed --root = ROOT no", ["noto"]),
    ("submit --wait emb", ["embed"]), ("submit --wait embed --mod", ["--model"]), ("submit --retr", ["--retries"]),
    ("train x --root ROOT --dataset no", ["noto"]), ("pipeline a --root ROOT --train em", ["emoji_32"]),
    ("shard x --root ROOT --source ", []), ("shard x --root ROOT --image-size ", [])])
def test_completion_gives_the_values_of_a_flag(words: str, expected: list[str], tmp_path: Path) -> None:
    for folder in ("datasets/noto/v1", "runs/emoji_32"):
        (tmp_path / folder).mkdir(parents=True)
    assert help_pages.complete(words.replace("ROOT", str(tmp_path)).split(" ")) == expected


_BASH = ("source <(rdm --completion bash); COMP_WORDS=(rdm {words}); COMP_CWORD={last}; _rdm; "
         'printf "%s\\n" "${{COMPREPLY[@]}}"')
_ZSH = ('_files() {{ :; }}; compdef() {{ :; }}; compadd() {{ printf "%s\\n" "${{(@P)2}}"; }}; '
        "source <(rdm --completion zsh); words=(rdm {words}); CURRENT=$(({last}+1)); _rdm")
_FISH = "rdm --completion fish | source; complete -C 'rdm {line}' | string split -f 1 \\t"


@pytest.mark.parametrize(("shell", "script"), [("bash", _BASH), ("zsh", _ZSH), ("fish", _FISH)])
def test_completion_works_in_shells(shell: str, script: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    program = tmp_path / "bin/rdm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncd "{ROOT}" && exec "{sys.executable}" -m jobs "$@"\n')
    program.chmod(0o755)
    for words, expected in ((["sha"], ["shard"]), (["shard", "--sou"], ["--source", "--sources"]),
                            (["train", "--recipe", "emo"], ["emoji_32", "emoji_64"])):
        filled = script.format(words=" ".join(words), last=len(words), line=" ".join(words))
        done = subprocess.run([shell, "-c", filled], capture_output=True, text=True,
                              env={"PATH": f"{program.parent}:/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)})
        assert done.stdout.split() == expected, done.stderr
    if shell == "bash":  # it completes files itself where there are no words at all, not even an empty one
        script = script.replace('"%s\\n" "${{COMPREPLY[@]}}"', '"%s" "${{#COMPREPLY[@]}}"')
        words = ["style", "mine", "--source", str(tmp_path)]
        done = subprocess.run([shell, "-c", script.format(words=" ".join(words), last=len(words))], text=True,
                              capture_output=True,
                              env={"PATH": f"{program.parent}:/usr/bin:/bin", "HOME": str(tmp_path)})
        assert done.stdout == "0", done.stderr


@pytest.mark.parametrize(("verb", "hint", "expected"), [
    ("embed", "--embed.pretrained FILE", "--pretrained FILE"),
    ("pipeline", "--pretrained FILE", "--embed.pretrained FILE"),
    ("pipeline", "--workers 2; or python -m jobs embed x --pretrained FILE",
     "--workers 2; or python -m jobs embed x --pretrained FILE"),
    ("status", "--pretrained FILE", "--pretrained FILE"), ("fly", "--a b", "--a b")])
def test_hints_spell_flags_as_the_verb_has_them(verb: str, hint: str, expected: str) -> None:
    assert help_pages.fit_flags(f"wrong\nhint: {hint}", verb) == f"wrong\nhint: {expected}"


@pytest.mark.parametrize(("words", "hint", "expected"), [
    ("train little --dataset mine --recipe emo --steps 30",
     "give the run another name; or replace this one: python -m jobs train little --dataset mine@v5 --database "
     "mine@v5 --root data --overwrite",
     "give the run another name; or replace this one: python -m jobs train little --dataset mine --recipe emo "
     "--steps 30 --overwrite"),
    ("shard mine --source 'a b' --image-size 64",
     "python -m jobs shard mine --source 'a b' --overwrite, once no other command works here",
     "python -m jobs shard mine --source 'a b' --image-size 64 --overwrite, once no other command works here"),
    ("index mine@v2 --extend mine", "train it again: python -m jobs index mine@v2 --overwrite",
     "train it again: python -m jobs index mine@v2 --overwrite"),  # without --extend
    ("index mine@v2 --extend mine", "python -m jobs index mine --overwrite", "python -m jobs index mine --overwrite"),
    ("pipeline mine --train emo", "python -m jobs train emo --dataset mine --overwrite",
     "python -m jobs train emo --dataset mine --overwrite"),
    ("train other", "python -m jobs train little --overwrite", "python -m jobs train little --overwrite")])
def test_a_hint_to_replace_a_folder_keeps_what_the_user_typed(words: str, hint: str, expected: str) -> None:
    assert help_pages.repeat_command(f"wrong\nhint: {hint}", shlex.split(words)) == f"wrong\nhint: {expected}"
