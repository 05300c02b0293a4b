"""The script behind `make gpu`, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("gpu.py")


def _run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment)


def test_a_missing_gpu_or_an_unknown_part_has_a_hint(tmp_path: Path) -> None:
    for words in ([], ["--only", "train,magic"]):
        done = _run("--out", str(tmp_path), *words)
        assert done.returncode == 2 and "hint: " in done.stderr and "Traceback" not in done.stderr


def test_the_default_parts_take_ten_minutes_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu
    assert sum(gpu.PARTS[part].limit_s for part in gpu.DEFAULT) <= 600
    for part in gpu.PARTS.values():
        assert (SCRIPT.parent / "gpu_parts" / f"{part.module.replace('.', '/')}.py").is_file()


@pytest.mark.slow
def test_a_part_leaves_its_rows_and_a_table_without_ray_and_faiss(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("ray", "faiss", "autofaiss"):
        (hidden / f"{name}.py").write_text("raise ImportError('hidden')\n")
    done = _run("--device", "cpu", "--only", "device,index", "--out", str(tmp_path), PYTHONPATH=str(hidden))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "gpu.json").read_text())
    results = {row["name"]: row["status"] for row in document["rows"]}
    assert results["hidden card"] == results["absent card"] == "PASS"
    assert results["the index stage"] == "SKIP" and results["rows in the same list as on the CPU"] == "PASS"
    assert "| device | hidden card | yes" in (tmp_path / "gpu.md").read_text()
