"""Keys, and a root with two signed versions."""

import shutil
from pathlib import Path

import pytest

from jobs.publishing.rebuild import run_rebuild
from pipeline.releases.signatures import RELEASE_KEY
from pipeline.stages.driver import run_stage
from tests.jobs.publishing.published_art import paint
from tests.jobs.publishing.signing.key_files import openssl_key
from tests.jobs.publishing.signing.signed_roots import signing_rebuild


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the publisher's key, and another one."""
    folder = tmp_path_factory.mktemp("keys")
    openssl_key(folder, "publisher")
    openssl_key(folder, "other")
    return folder


@pytest.fixture(scope="session")
def signed_once(first: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed v1 and a signed v2."""
    place = tmp_path_factory.mktemp("signed") / "place"
    shutil.copytree(first, place)
    shutil.rmtree(place / "root")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(RELEASE_KEY, raising=False)
        private = keys / "publisher.pem"
        assert run_rebuild(signing_rebuild(place, private), run_stage)["published"] == "v1"
        paint(place / "source" / "added.png", 1)
        assert run_rebuild(signing_rebuild(place, private), run_stage)["published"] == "v2"
    return place


@pytest.fixture
def signed(signed_once: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy for one test, whose readers have the publisher's public key."""
    shutil.copytree(signed_once, tmp_path / "place")
    monkeypatch.setenv(RELEASE_KEY, str(keys / "publisher.pub.pem"))
    monkeypatch.setenv("RDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "place"
