"""Tools in separate environments, which infra/tools.sh makes."""

import functools
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


@functools.cache
def environment(name: str) -> Path:
    """The folder of the programs of infra/tools/NAME.lock."""
    done = subprocess.run([REPOSITORY / "infra/tools.sh", name], env={**os.environ, "PYTHON": sys.executable},
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return REPOSITORY / done.stdout.strip() / "bin"
