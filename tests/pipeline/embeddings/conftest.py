"""Fixtures of the tests of embeddings."""

import shutil

import pytest

from pipeline.embeddings import clip
from pipeline.embeddings.clip_weights import BUNDLED, describe_encoder


@pytest.fixture
def fresh_encoder():
    """Weights are read again, as by the next command."""
    yield
    clip.load_encoder_on.cache_clear()
    describe_encoder.cache_clear()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A copy of the bundled weights in a file."""
    return shutil.copy(BUNDLED / "tiny_clip.safetensors", tmp_path_factory.mktemp("weights") / "w.safetensors")
