"""infra/render.sh prints manifests only when every word in capitals is replaced and every image has its digest."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

from tests.infra.kubernetes.manifests import INFRA, KUEUE_JOBS, OVERLAYS

DIGEST = "0123456789abcdef" * 4
WORDS = {"REGISTRY": "registry.internal", "ACCOUNT": "123456789012", "REGION": "eu-west-1", "BUCKET": "images"}


def _render(path: Path, check: bool = True) -> str:
    environment = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])}
    done = subprocess.run([INFRA / "render.sh", path], env=environment, text=True, capture_output=True)
    assert (done.returncode == 0) == check, done.stderr
    assert check or not done.stdout
    return done.stdout if check else done.stderr


@pytest.fixture
def kubernetes(tmp_path: Path) -> Path:
    """A copy of infra/kubernetes, filled in as its files say."""
    copy = tmp_path / "kubernetes"
    shutil.copytree(INFRA / "kubernetes", copy)
    for file in copy.rglob("*.yaml"):
        text = file.read_text().replace("sha256:DIGEST", f"sha256:{DIGEST}")
        for word, value in WORDS.items():
            text = text.replace(word, value)
        file.write_text(text)
    return copy


FOLDERS = [*(f"overlays/{each}" for each in OVERLAYS), *(f"kueue/{each}" for each in KUEUE_JOBS)]


@pytest.mark.parametrize("name", FOLDERS)
def test_complete_manifests_are_printed_and_incomplete_ones_refused(kubernetes: Path, name: str) -> None:
    documents = list(yaml.safe_load_all(_render(kubernetes / name)))
    assert DIGEST in str(documents)
    assert "DIGEST" in _render(INFRA / "kubernetes" / name, check=False)
    file = kubernetes / name / "kustomization.yaml"
    text = file.read_text()
    for wrong in (f"digest: sha256:{DIGEST[:-1]}", f"digest: sha256:{DIGEST}0", "newTag: '1'", "digest: sha256:DIGEST"):
        file.write_text(text.replace(f"digest: sha256:{DIGEST}", wrong))
        assert "hint: " in _render(kubernetes / name, check=False)


def test_a_single_file_is_rendered_too(kubernetes: Path) -> None:
    assert DIGEST in _render(kubernetes / "jobs/demo.yaml")
    assert "not replaced" in _render(INFRA / "kubernetes/jobs/demo.yaml", check=False)
    assert "RayJob" in _render(INFRA / "kubernetes/jobs/embed.yaml")  # it brings no image
