"""`make audit`, `make sbom` and `make licenses`, with the real tools. The vulnerability service is one of the test."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from packaging.requirements import Requirement

from tests.infra import tools
from tests.infra.test_lock import GPU, LOCK

REPOSITORY = Path(__file__).parents[2]
# As make runs it: see the Makefile.
AUDIT = re.search(r'pip-audit" (.*?) \$\(AUDIT_OPTIONS\)', (REPOSITORY / "Makefile").read_text())[1].split()


class _Service(BaseHTTPRequestHandler):
    """Answers as osv.dev does. It knows one vulnerability, of pillow 9.0.0."""

    queries: ClassVar[list[tuple[str, str]]] = []
    broken = False

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pair = (query["package"]["name"], query["version"])
        self.queries.append(pair)
        answer: Any = {}
        if pair == ("pillow", "9.0.0"):
            answer = {"vulns": [{"id": "PYSEC-2022-9", "aliases": ["CVE-2022-22817"], "summary": "code in an image",
                                 "modified": "2022-01-10T14:12:00Z", "affected": [{
                                     "package": {"name": "pillow", "ecosystem": "PyPI"},
                                     "ranges": [{"type": "ECOSYSTEM",
                                                 "events": [{"introduced": "0"}, {"fixed": "9.0.1"}]}],
                                     "versions": ["9.0.0"]}]}]}
        body = json.dumps(answer).encode()
        self.send_response(500 if self.broken else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        """Nothing."""


@pytest.fixture
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    _Service.queries, _Service.broken = [], False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()
    thread.join()
    server.server_close()


def _audit(service: str, lock: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    command = [tools.environment("supply") / "pip-audit", *AUDIT, "--vulnerability-service", "osv",
               "--osv-url", service, "--cache-dir", tmp_path / "cache", "-r", lock]
    return subprocess.run(command, text=True, capture_output=True)


def test_a_known_vulnerability_fails_the_audit(service: str, tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("# a comment\npillow==9.0.0\nsix==1.17.0\n")
    done = _audit(service, lock, tmp_path)
    assert done.returncode == 1 and "PYSEC-2022-9" in done.stdout and "9.0.1" in done.stdout
    lock.write_text("pillow==9.0.1\nsix==1.17.0\n")
    assert _audit(service, lock, tmp_path).returncode == 0


@pytest.mark.slow
def test_every_locked_package_is_looked_up(service: str, tmp_path: Path) -> None:
    for name, pins in (("requirements.lock", LOCK), ("infra/requirements-gpu.lock", GPU)):
        _Service.queries = []
        done = _audit(service, REPOSITORY / name, tmp_path)
        assert done.returncode == 0, done.stderr
        wanted = {(re.sub(r"[-_.]+", "-", pin.name).lower(), str(pin.specifier).removeprefix("=="))
                  for pin in pins if not pin.marker or pin.marker.evaluate()}
        assert {(re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in _Service.queries} == wanted


@pytest.mark.slow
def test_a_service_that_does_not_answer_fails_the_audit(service: str, tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("six==1.17.0\n")
    _Service.broken = True
    assert _audit(service, lock, tmp_path).returncode != 0


@pytest.mark.slow
def test_the_lists_have_every_pin_and_are_reproducible(tmp_path: Path) -> None:
    program = tools.environment("supply") / "cyclonedx-py"
    for folder in ("first", "second"):
        command = [REPOSITORY / "infra/sbom.sh", program, tmp_path / folder]
        done = subprocess.run(command, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    for name, pins in (("sbom.json", LOCK), ("sbom-gpu.json", GPU)):
        text = (tmp_path / "first" / name).read_text()
        assert text == (tmp_path / "second" / name).read_text()
        bom = json.loads(text)
        assert bom["bomFormat"] == "CycloneDX" and bom["metadata"]["component"]["name"] == "retrieval-diffusion"
        assert sorted((each["name"], each["version"]) for each in bom["components"]) == sorted(
            (pin.name, str(pin.specifier).removeprefix("==")) for pin in pins)
        assert all(each["purl"].startswith("pkg:pypi/") for each in bom["components"])


def test_the_table_of_licenses_is_not_stale_and_has_every_pin(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, REPOSITORY / "infra/licenses.py", "--check"], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    text = (REPOSITORY / "docs/reference/licenses.md").read_text()
    rows = re.findall(r"^\| (\S+) \| (\S+) \| ([^|]+) \| (?:everywhere|GPU)", text, re.M)
    assert [row[:2] for row in rows] == [(pin.name, str(pin.specifier).removeprefix("==")) for pin in (*LOCK, *GPU)]
    # Licenses that require more than a notice, or are not open: each new one is a decision.
    special = {row[0] for row in rows if not re.search(r"MIT|Apache|BSD|PSF", row[2])}
    special = {name for name in special if not name.startswith(("nvidia-", "cuda-"))}
    assert special == {"certifi", "hypothesis", "pathspec"}
    assert not [row for row in rows if "GPL" in row[2]]


def test_a_stale_table_is_found(tmp_path: Path) -> None:
    for name in ("infra/licenses.py", "docs/reference/licenses.md", "requirements.lock", "infra/requirements-gpu.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((REPOSITORY / name).read_text())

    def check() -> tuple[int, str]:
        command = [sys.executable, tmp_path / "infra/licenses.py", "--check"]
        done = subprocess.run(command, text=True, capture_output=True)
        return done.returncode, done.stderr

    assert check() == (0, "")
    document, lock = tmp_path / "docs/reference/licenses.md", tmp_path / "requirements.lock"
    document.write_text(document.read_text().replace("| numpy | ", "| numpy-old | "))
    assert check() == (1, "licenses: docs/reference/licenses.md is stale\nhint: make licenses\n")
    lock.write_text(lock.read_text() + "a-package-that-is-not-there==1.0\n")
    status, message = check()
    assert status == 1 and "the license of a-package-that-is-not-there 1.0 is not known\nhint: " in message


@pytest.mark.parametrize("name", ["docs", "policy", "supply"])
def test_the_tools_have_exact_versions(name: str) -> None:
    lines = (REPOSITORY / f"infra/tools/{name}.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.+]+", str(pin.specifier)) for pin in pins)
    wanted = (REPOSITORY / f"infra/tools/{name}.in").read_text().split()
    assert set(wanted) <= {pin.name for pin in pins}
    assert not set(wanted) - {"pyyaml"} & {pin.name for pin in LOCK}
