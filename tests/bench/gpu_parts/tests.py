"""The tests marked `gpu`, file by file: those whose packages are missing here are skipped."""

import re
import subprocess
import sys
from pathlib import Path

from gpu_parts.report import Report

_ROOT = Path(__file__).parents[3]


def run(report: Report) -> None:
    """Run each file that has such tests."""
    if report.small:
        report.skip("tests marked gpu", "they need a GPU")
        return
    files = sorted(path for path in (_ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    for path in files:
        name = str(path.relative_to(_ROOT))
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", name],
                              cwd=_ROOT, capture_output=True, text=True, check=False)
        said = done.stdout.strip().splitlines()
        missing = re.search(r"No module named '?(\w+)", done.stdout + done.stderr)
        if done.returncode and missing:
            report.skip(name, f"{missing[1]} is not installed")
        else:
            report.expect(name, done.returncode == 0, "passed", said[-1] if said else done.stderr[-200:])
