"""The fork server and the template of roots, once for each session."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.laws.crashes.commands import Commands, serve_commands
from tests.laws.crashes.roots import Place, make_template


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """The server that forks a child for each command."""
    with tempfile.TemporaryDirectory(prefix="rdm-commands-") as folder, serve_commands(Path(folder)) as served:
        yield served


@pytest.fixture(scope="session")
def template(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A root to be copied, see `make_template`."""
    return make_template(commands, tmp_path_factory.mktemp("template"))
