"""Runs the Dockerfile's pip steps in a fresh environment, without Docker, and imports what the image must import."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

DOORS = """
import {first}, {second}
import torch, faiss, open_clip, ray, ray.train, webdataset, wandb, pyarrow, pandas, s3fs, diffusers
from autofaiss.external.metadata import IndexMetadata
from autofaiss.external.optimize import get_optimal_index_keys_v2
import numpy as np, jobs.cli, model, pipeline.index
rows = np.random.default_rng(0).standard_normal((2000, 16)).astype(np.float32)
index = faiss.index_factory(16, "OPQ8,IVF16,PQ8", faiss.METRIC_INNER_PRODUCT)
index.train(rows); index.add(rows); faiss.extract_index_ivf(index).nprobe = 16
assert (index.search(rows[:100], 5)[1] == np.arange(100)[:, None]).any(1).mean() > 0.9
assert hasattr(faiss, "StandardGpuResources"), "this is the CPU build of faiss"
assert get_optimal_index_keys_v2(200_000, 512, "100M") and IndexMetadata("Flat", 10, 4).estimated_index_size_in_bytes()
assert torch.version.cuda and (torch.ones(2, 2) @ torch.ones(2, 2)).sum() == 8
"""


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    """Each instruction of a Dockerfile, in order, with its continuation lines joined."""
    text = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(" ")
        yield name, rest


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1800)
def test_packages_of_the_image_are_imported_and_work(tmp_path: Path) -> None:
    context, venv = tmp_path / "context", tmp_path / "venv"
    context.mkdir()
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "UV_"))}
    environment |= {"VIRTUAL_ENV": str(venv), "PATH": f"{venv}/bin:{os.defpath}"}
    ran = 0
    for name, rest in _instructions((REPOSITORY / "infra/Dockerfile").read_text()):
        if name == "ARG":
            key, _, value = rest.partition("=")
            environment[key] = value
        elif name == "COPY" and not rest.startswith("--from"):
            *sources, target = rest.split()
            for source in sources:
                path = REPOSITORY / source
                if path.is_dir():
                    shutil.copytree(path, context / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(path, context)
        elif name == "RUN" and "pip " in rest:
            result = subprocess.run(["/bin/sh", "-c", rest], cwd=context, env=environment, text=True,
                                    capture_output=True)
            assert result.returncode == 0, rest + result.stdout[-2000:] + result.stderr[-4000:]
            ran += 1
    assert ran == 3
    for first, second in (("torch", "faiss"), ("faiss", "torch")):
        result = subprocess.run([venv / "bin/python", "-c", DOORS.format(first=first, second=second)], cwd="/",
                                env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
    check = subprocess.run([venv / "bin/uv", "pip", "check"], env=environment, capture_output=True, text=True)
    conflicts = re.findall(r"The package `([\w-]+)` requires `([\w-]+)", check.stderr)
    assert sorted(conflicts) == [
        ("autofaiss", "faiss-cpu"), ("autofaiss", "fire"), ("autofaiss", "numpy"), ("autofaiss", "pandas"),
        ("embedding-reader", "pandas"), ("retrieval-diffusion", "faiss-cpu")], check.stderr
