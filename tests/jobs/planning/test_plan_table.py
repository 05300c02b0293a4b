"""The `plan` verb: its table, its JSON, and invalid usage."""

import json
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.planning import rates


def table(text: str) -> list[list[str]]:
    """The cells of the rows of a Markdown table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_the_table_has_stages_hours_bytes_and_the_source_of_rates(capsys, planned_root: Path):
    assert main(["plan", "--pictures", "1M", "--database-rows", "2M", "--workers", "8"]) == 0
    output = capsys.readouterr().out
    rows = table(output)
    assert rows[0] == ["stage", "on", "hours", "worker hours", "read", "written", "kept"]
    assert [row[0] for row in rows[2:]] == ["shard", "embed", "index", "neighbors, exact", "neighbors, index",
                                            "train", "total"]
    assert rows[2][1] == "8 workers" and len({len(line) for line in output.splitlines() if line[:1] == "|"}) == 1
    assert f"Default rates (shard, embed, index, exact, approximate, train): {rates.built_in().machine}" in output
    assert main(["plan", "--pictures", "1M", "--from", str(planned_root)]) == 0
    output = capsys.readouterr().out
    assert "Rates of shard, embed, index, exact, approximate, train" in output and "Default rates" not in output


def test_every_combination_has_its_stages_and_totals(capsys):
    flags = ["plan", "--pictures", "1M", "10M", "--database-rows", "0", "2.5M"]
    assert main(flags) == 0
    rows = table(capsys.readouterr().out)
    assert [(row[0], row[1]) for row in rows[2:] if row[0]] == [
        ("1 M", "itself"), ("1 M", "2.5 M"), ("10 M", "itself"), ("10 M", "2.5 M")] and len(rows) == 2 + 4 * 7
    assert main([*flags, "--totals", "--price-cpu-hour", "0.04"]) == 0
    rows = table(capsys.readouterr().out)
    assert len(rows) == 2 + 4 and rows[0][2:4] == ["shard", "embed"] and rows[0][-1] == "money"


def test_json_adds_up(capsys):
    assert main(["plan", "--pictures", "1M", "--price-cpu-hour", "0.1", "--price-gb-month", "0.02", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    build = document["builds"][0]
    counted = [stage for stage in build["stages"] if stage["stage"] != "neighbors, exact"]
    for name in ("hours", "worker_hours", "read", "written", "money"):
        assert build["total"][name] == pytest.approx(sum(stage[name] for stage in counted))
    assert build["pictures"] == build["database_rows"] == 1_000_000 and build["total"]["gpu_hours"] == 0
    assert document["rates"]["defaults"] == list(rates.SECTIONS)
    shard = build["stages"][0]
    assert shard["money"] == pytest.approx(shard["worker_hours"] * 0.1 + shard["kept"] / 1e9 * 0.02, abs=0.006)


def test_gpu_hours_are_separate(capsys, tmp_path: Path):
    (tmp_path / "rates.json").write_text('{"train": {"gpu": true, "flop_per_s": 1e14}}')
    assert main(["plan", "--rates", str(tmp_path / "rates.json"), "--gpus", "3"]) == 0
    rows = {row[0]: row for row in table(capsys.readouterr().out)}
    assert rows["train"][1] == "3 GPUs" and rows["embed"][1] == "2 workers"
    assert rows["total"][3].endswith(f"+ {rows['train'][3]} GPU")


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--pictures", "many"], "--pictures 'many': must be a number\nhint: with K, M or B"),
    (["--pictures", "0"], "--pictures 0: there is nothing to plan"),
    (["--gpus", "2"], "the rates are those of workers without a GPU"),
    (["--workers", "-1"], "plan.workers = -1: must be at least 0"),
    (["--price-cpu-hour", "-2"], "plan.price_cpu_hour = -2.0: must be at least 0"),
    (["--from", "nowhere"], "nothing sealed below"),
    (["--rates", "absent.json"], "cannot read the rates absent.json"),
    (["--recipe", "imagenet_400m", "--pictures", "1B", "--database-rows", "0"], "no index of 1000000000 vectors"),
])
def test_invalid_usage_is_a_sentence_and_exit_2(flags: list[str], sentence: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["plan", *flags])
    except SystemExit as stopped:  # a flag's value, refused while the command line is read
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and sentence in error and "Traceback" not in error
