"""What all tests share: a home of their own, no trackers, small corpora drawn by the program."""

import os
import tempfile
from pathlib import Path

import pytest

# Before anything imports Ray or wandb: both write into the home folder.
_HOME = tempfile.mkdtemp(prefix="rdm-tests-home-")
os.environ.update(HOME=_HOME, WANDB_MODE="disabled", RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0",
                  RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5", RDM_CACHE=f"{_HOME}/cache",
                  RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def drawn_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 144 drawn pictures of 24 subjects in six styles, with captions; read only."""
    from pipeline import stage
    from pipeline.pictures import Pictures, PicturesConfig
    root = tmp_path_factory.mktemp("drawn")
    config = PicturesConfig(corpus="drawn", subjects=24, size=32, pictures_per_item=50)
    stage_ = Pictures(str(root), config, root / "cache")
    stage.run(stage_)
    return Path(stage_.folder)
