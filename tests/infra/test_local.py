"""infra/local.sh on this machine: real servers, a cluster, killed processes."""

import os
import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_the_local_scenario_ends_without_a_fault(tmp_path: Path) -> None:
    done = subprocess.run([Path(__file__).parents[2] / "infra/local.sh", tmp_path / "local"], capture_output=True,
                          text=True, env={**os.environ, "HOME": str(tmp_path)})
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
