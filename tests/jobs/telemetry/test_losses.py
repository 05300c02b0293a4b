"""A command ends with its losses, then its warnings, and the path of the ledger."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.telemetry.progress_bar import describe_losses
from tests.pipeline.media.sample_images import photo
from tests.pipeline.synthetic import encoded


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """A corpus with a good, a damaged and a broken image, and what `shard` said of it."""
    folder = tmp_path_factory.mktemp("losses")
    (folder / "in").mkdir()
    jpeg = encoded(photo(64, 64), "JPEG")
    for name, data in {"good.jpg": jpeg, "damaged.jpg": jpeg[:-2], "broken.jpg": jpeg[:200]}.items():
        (folder / "in" / name).write_bytes(data)
        (folder / "in" / name).with_suffix(".txt").write_text(name)
    command = ["shard", "some", "--source", str(folder / "in"), "--root", str(folder / "root"), "--local"]
    return folder / "root", subprocess.run([sys.executable, "-m", "jobs", *command], capture_output=True, text=True,
                                           check=False)


def test_a_summary_names_losses_before_warnings_and_their_ledger(sharded):
    root, process = sharded
    ledger = root / "datasets/some/v1/shards/ledger"
    assert process.returncode == 0
    last = process.stderr.splitlines()[-1]
    assert last.endswith(f"shard: left out 1 corrupt; kept with a warning: 1 damaged; {ledger} names each")
    summary = json.loads(process.stdout)
    assert summary["ledger"] == str(ledger) and list(summary).index("skipped") < list(summary).index("noted")
    entries = [json.loads(line) for file in ledger.iterdir() for line in file.read_text().splitlines()]
    assert {(entry["key"], entry["reason"]) for entry in entries} == {("broken.jpg", "corrupt"),
                                                                     ("damaged.jpg", "damaged")}


def test_status_and_the_report_agree(sharded, capsys):
    root, _ = sharded
    assert main(["status", "--root", str(root)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("datasets/some/v1/shards"))
    assert "left out 1 corrupt; kept with a warning: 1 damaged; datasets/some/v1/shards/ledger names each" in line
    assert main(["report", "--root", str(root)]) == 0
    page = (root / "report.html").read_text()
    ledger = page[page.index("datasets/some/v1/shards/ledger: 2 ledger entries"):]
    assert ledger.index("broken.jpg") < ledger.index("damaged.jpg") and "66.7 % of the rows of their sources" in page


def test_a_stage_without_losses_prints_no_summary():
    assert describe_losses({"skipped": {}, "noted": {}}, "root/shards") == ""


def test_too_many_failures_name_the_ledger(tmp_path, sharded):
    root, _ = sharded
    source = root.parent / "in"
    command = ["shard", "some", "--source", str(source), "--root", str(tmp_path), "--local", "--max-failed", "0.1"]
    process = subprocess.run([sys.executable, "-m", "jobs", *command], capture_output=True, text=True, check=False)
    assert process.returncode == 1 and "1 of 3 rows failed (33%" in process.stderr
    assert f"{tmp_path}/datasets/some/v1/shards/ledger names each" in process.stderr
