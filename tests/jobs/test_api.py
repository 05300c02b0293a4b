"""The Python interface gives the results of the verbs."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.api import DatasetVersion, open_root
from jobs.cli.main import main
from jobs.sampling.config import SampleConfig
from pipeline.batches.batches import Batches
from pipeline.datasets.dataset import Dataset
from tests.jobs.cli.test_imports import HEAVY

REPOSITORY = Path(__file__).parents[2]


def test_the_import_loads_nothing_heavy() -> None:
    code = f"import sys, jobs.api; assert not {HEAVY!r} & sys.modules.keys(), {HEAVY!r} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_datasets_are_listed_with_their_counts(trained_root: Path) -> None:
    listed = open_root(str(trained_root)).datasets()
    assert [entry.name for entry in listed] == ["drawn", "flat", "hatched", "outline"]
    assert all(isinstance(entry, DatasetVersion) and entry.version == "v1" and not entry.published
               and entry.samples == Dataset(str(trained_root), entry.name).manifest("shards")["totals"]["samples"]
               for entry in listed)


def test_a_search_gives_the_results_of_the_verb(trained_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matches = open_root(str(trained_root)).search("flat", "a red square", count=4)
    assert main(["search", "flat", "a red square", "--count", "4", "--json", "--root", str(trained_root)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [match.document() for match in matches] == printed
    assert all(match.distance == 1 - match.score and match.image().size == (32, 32) for match in matches)
    like = open_root(str(trained_root)).search("flat", like=matches[0].key, minus="a blue circle", count=2)
    assert matches[0].key not in [match.key for match in like]


def test_samples_are_those_of_the_verb(trained_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained_root, root)
    threads = torch.get_num_threads()
    sampled = open_root(str(root)).sample(["a red square", "a star"], "flat", config=SampleConfig(steps=2))
    assert torch.get_num_threads() == threads
    words = ["--prompt", "a red square", "--prompt", "a star", "--database", "flat", "--steps", "2", "--local"]
    assert main(["sample", "small", *words, "--root", str(root)]) == 0
    folder = json.loads(capsys.readouterr().out)["folder"]  # the verb finds them there
    assert [image.address.rsplit("/", 2)[0] for image in sampled] == [folder, folder]
    assert [image.prompt for image in sampled] == ["a red square", "a star"]
    assert all(image.image().size == (16, 16) and len(image.neighbors) == 4 for image in sampled)
    named = open_root(str(root)).sample("a star", "flat", run="small", config=SampleConfig(steps=2))
    assert [image.prompt for image in named] == ["a star"]


def test_batches_are_those_of_training(trained_root: Path) -> None:
    batch = open_root(str(trained_root)).batches("drawn", k=3, batch_size=8, image_size=16, seed=5).at(2)
    dataset = Dataset(str(trained_root), "drawn")
    expected = Batches(dataset, dataset, k=3, global_batch=8, size=16, seed=5).at(2)
    assert batch.keys() == {"image", "neighbors", "rows"} and batch["image"].shape == (8, 16, 16, 3)
    assert all(np.array_equal(batch[name], expected[name]) for name in batch)


def test_numbers_out_of_bounds_are_refused(trained_root: Path) -> None:
    root = open_root(str(trained_root))
    for name, call in {"count = 0": lambda: root.search("flat", "a star", count=0),
                       "k = -1": lambda: root.batches("drawn", k=-1), "size = -8": lambda: root.batches(
                           "drawn", image_size=-8), "seed = -1": lambda: root.batches("drawn", seed=-1),
                       "step = -1": lambda: root.batches("drawn").at(-1),
                       "batch of 0": lambda: root.batches("drawn", batch_size=0)}.items():
        with pytest.raises(ValueError, match=name):
            call()


def test_hints_name_the_root_as_a_shell_reads_it(tmp_path: Path) -> None:
    root = tmp_path / "my root"
    with pytest.raises(ValueError, match=r"holds no datasets and no runs\nhint: python -m jobs style") as no_root:
        open_root(str(root))
    (root / "datasets/noto/v1").mkdir(parents=True)
    with pytest.raises(ValueError, match="hint: python -m jobs shard noto") as unsealed:
        open_root(str(root)).batches("noto")
    for error in (no_root, unsealed):
        assert shlex.split(str(error.value))[-2:] == ["--root", str(root)]
