"""Making latents, training and sampling are killed and run again. The results equal those of an undisturbed run."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.stages.manifest import without_run_facts
from tests.laws.crashes.commands import serve_commands
from tests.laws.crashes.roots import RUNS, Place, copy_place, count_writes, make_trained, settle, sweep

_MODULES = ("model", "jobs.training", "jobs.sampling", "diffusers.models.autoencoders.autoencoder_kl")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def finished(template: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A copy of the template with a first stage and a run, and a server that has imported what these need."""
    with tempfile.TemporaryDirectory(prefix="rdm-runs-") as folder, serve_commands(Path(folder), *_MODULES) as commands:
        yield make_trained(template, commands, tmp_path_factory.mktemp("trained") / "place")


def _results(place: Place) -> dict[str, Any]:
    """The files of these commands, by the manifests of a place."""
    root = Path(place.root)
    paths = [*root.glob("runs/**/manifest.json"), *root.glob("datasets/*/*/latents/manifest.json")]
    manifests = {str(path.relative_to(root)): json.loads(path.read_bytes()) for path in paths}
    return {path: manifest.get("content") or without_run_facts(manifest) for path, manifest in manifests.items()}


def kill_at(finished: Place, folder: Path, verb: str, number: int, expected: dict[str, Any], bucket: str = "") -> bool:
    """Kill a verb before one of its writes, run it again, and check the laws; False if it ended before that write."""
    place = copy_place(finished, folder, bucket)
    killed = place.commands.run(place.folder, place.root, place.arguments(verb), kill=number)
    if killed.code is not None:
        return False
    place.run(place.arguments(verb))
    if not bucket:
        assert _results(place) == expected
    settle(place, stages=False)
    return True


@pytest.mark.parametrize("verb", RUNS)
def test_a_kill_before_any_write_keeps_the_laws(finished: Place, tmp_path: Path, verb: str) -> None:
    """RDM_SWEEP_STRIDE=3 kills before every third write only."""
    whole = copy_place(finished, tmp_path / "whole")
    whole.run(whole.arguments(verb))
    expected = _results(whole)
    assert len(expected) > len(_results(finished))
    sweep(lambda number: kill_at(finished, tmp_path / str(number), verb, number, expected))


@pytest.mark.parametrize("verb", RUNS)
def test_a_kill_on_s3_keeps_the_laws(finished: Place, tmp_path: Path, s3: str, verb: str) -> None:
    """A spread of four writes. RDM_SWEEP_STRIDE=1 kills before every one."""
    writes = count_writes(finished, tmp_path / "whole", verb, s3)
    sweep(lambda number: kill_at(finished, tmp_path / str(number), verb, number, {}, s3), stride=max(writes // 4, 1))
