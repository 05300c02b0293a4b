"""infra/one-machine.sh without a cluster; tests/jobs/cli/test_submit.py starts one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["PORT", "DASHBOARD_PORT"])
def test_a_port_in_use_is_refused_with_free_ones(name: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        used = str(other.getsockname()[1])
        ports = {"PORT": str(free.getsockname()[1]), "DASHBOARD_PORT": str(free.getsockname()[1])} | {name: used}
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        done = subprocess.run([Path(__file__).parents[2] / "infra/one-machine.sh", "up"], text=True,
                              capture_output=True, env=os.environ | ports | {"RDM_STATE": str(tmp_path), "PATH": path})
    assert done.returncode == 1 and not done.stdout and not list(tmp_path.iterdir())
    assert f"error: port {used} of this machine is in use" in done.stderr
    assert "hint: PORT=" in done.stderr and "infra/one-machine.sh up" in done.stderr
