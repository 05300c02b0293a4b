"""A hub that does not answer and a model that does not exist are different errors."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

_ASK = """
import sys
from pipeline.embeddings.hub import is_offered
try:
    print(is_offered("the model", sys.argv[1], ("weights.bin",)))
except ValueError as error:
    sys.exit(str(error))
"""


class _Hub(BaseHTTPRequestHandler):
    """A hub with one repository, someone/there, that has weights.bin."""

    def do_HEAD(self) -> None:
        there = self.path.startswith("/someone/there/")
        self.send_response(200 if there else 404)
        if there:
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"1"')
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def _ask(repository: str, endpoint: str, home: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", _ASK, repository], capture_output=True, text=True, timeout=60, env={
        **os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(Path(__file__).parents[3])})


def test_a_hub_offers_a_file_lacks_it_or_is_unreachable(hub: str, tmp_path: Path) -> None:
    assert _ask("someone/there", hub, tmp_path).stdout == "False\n"
    absent = _ask("someone/absent", hub, tmp_path).stderr
    assert "do not exist: the hub has no someone/absent" in absent and "\nhint: " in absent
    unreachable = _ask("someone/there", "http://127.0.0.1:9", tmp_path).stderr
    assert "the hub cannot be reached" in unreachable and "\nhint: on a machine without network" in unreachable
    assert "Traceback" not in absent + unreachable
