"""The messages of `submit` if the job server refuses a job, and if the user stops waiting."""

import http.server
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest

from jobs.cli.main import main
from jobs.cluster.job_server import raise_refusal

_NO_AGENT = "No available agent to submit job, please try again later."
_STATUS = ["status", "--root", "/nowhere"]


class _Server(http.server.BaseHTTPRequestHandler):
    """The part of Ray's job server that `submit --installed` uses. Its jobs never end. Logs bring Ctrl-C."""

    refusal: ClassVar[str] = ""
    jobs: ClassVar[list[dict[str, str]]] = []

    def do_GET(self) -> None:
        if self.path.endswith("/logs/tail"):  # the command waits
            os.kill(os.getpid(), signal.SIGINT)
        self._answer(200, json.dumps(self.jobs if self.path == "/api/jobs/" else {
            "version": "4", "ray_version": "2", "ray_commit": "0", "session_name": "s"}))

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refusal:
            self._answer(500, self.refusal)
            return
        self.jobs.append({"type": "SUBMISSION", "submission_id": job["submission_id"], "status": "RUNNING",
                          "entrypoint": job["entrypoint"]})
        self._answer(200, json.dumps({"submission_id": job["submission_id"], "job_id": ""}))

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a job server. `submit` writes it into the environment."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(_Server, "refusal", "")
    monkeypatch.setattr(_Server, "jobs", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_head_without_an_agent_is_named_with_its_cure(address: str, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_Server, "refusal", _NO_AGENT)
    assert main(["submit", "--installed", "--address", address, *_STATUS]) == 1
    said = capsys.readouterr().err
    assert "agent on its head does not answer" in said and "52365" in said and "hint: end the other Ray" in said
    assert "the same command continues" not in said
    with pytest.raises(OSError, match="status code 400: bad\nhint: compare the versions of Ray") as refused:
        raise_refusal(RuntimeError("Request failed with status code 400: bad\nTraceback"))
    assert "Traceback" not in str(refused.value)


def test_ctrl_c_while_waiting_says_that_the_job_continues(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = ["submit", "--installed", "--wait", "--retries", "2", "--address", address, *_STATUS]
    for _ in range(2):  # the second command joins the job
        assert main(waiting) == 130
        [job] = _Server.jobs
        said = capsys.readouterr().err
        assert f"stopped waiting; the job {job['submission_id']} continues on the cluster" in said
        assert "hint: the same command shows its log again" in said
        assert f"`ray job stop --address {address} {job['submission_id']}`" in said
