"""`doctor` names what does not work, and the cure."""

import http.server
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.inspection import doctor

_CHECKS = ["packages", "devices", "Ray", "root", "disk", "memory", "clock", "ports", "cache", "network"]


@pytest.mark.ray
def test_doctor_finds_no_fault_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    code = main(["doctor", "--root", str(tmp_path / "new"), "--json"])
    assert time.monotonic() - began < 60  # even if Ray starts slowly on a busy machine, as the docs say
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert list(checks) == _CHECKS
    failed = [name for name, check in checks.items() if check["state"] == "failed"]
    assert code == bool(failed) and not failed, checks
    assert all(check["cure"] for check in checks.values() if check["state"] != "ok")
    assert checks["packages"]["state"] == checks["root"]["state"] == checks["cache"]["state"] == "ok"
    assert not (tmp_path / "new").exists() and not list(tmp_path.iterdir())
    shown = doctor.checks_text([doctor.Diagnosis("disk", "failed", "full", "make room")])
    assert shown.splitlines()[1:] == ["disk   failed  full", "disk: make room"]


def test_packages_out_of_range_are_named() -> None:
    check = doctor.check_packages(["numpy>=99", "no-such-package>=1", "packaging>=1"], ">=3.8")
    assert check.state == "failed" and "no-such-package is missing" in check.detail and "numpy " in check.detail
    assert check.cure == "pip install 'numpy>=99' 'no-such-package>=1'"
    assert doctor.check_packages([], ">=4").state == "failed"
    assert doctor.check_packages(["no-such-package>=1; python_version < '3'"], "").state == "ok"


@pytest.mark.ray
def test_a_silent_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    check = doctor.check_ray()
    assert check.state == "failed" and "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1" in check.detail
    assert "unset RAY_ADDRESS" in check.cure


def test_a_slow_check_is_ended_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROCESS_S", 1.0)
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); import time; time.sleep(60)"
    began = time.monotonic()
    assert doctor._run_python(code)[1].startswith("no answer within 1 s")
    assert time.monotonic() - began < 10
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert doctor._failure(-1) == "failed" == doctor._failure(1)
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    assert doctor._failure(-1) == "warning" and doctor._failure(1) == "failed"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(doctor, "_RAY", code)
    check = doctor.check_ray()
    assert check.state == "warning" and "load 99" in check.detail
    assert check.cure == "run it again when the machine is less busy; --local runs without Ray"


def test_ctrl_c_ends_the_checks_with_their_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROCESS_S", 120.0)
    monkeypatch.setattr(doctor, "_RAY", "import subprocess; subprocess.run(['sleep', '100'])")
    monkeypatch.setattr(doctor, "_TORCH", "import time; time.sleep(100)")
    came = []

    def interrupt() -> None:
        came.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(1.0, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        doctor.run_checks(str(tmp_path))
    assert time.monotonic() - came[0] < 8 and not doctor._processes


def test_unusable_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    check = doctor.check_root(str(tmp_path / "file/root"))
    assert check.state == "failed" and "--root" in check.cure
    (tmp_path / "cache").mkdir(mode=0o755)
    monkeypatch.setenv("RDM_CACHE", str(tmp_path / "cache"))
    check = doctor.check_cache()
    assert check.state == "failed" and "is open to other users" in check.detail and "chmod 700" in check.cure


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_free_bytes", lambda place: 5 << 20 if place == tmp_path else 1 << 40)
    check = doctor.check_disk(str(tmp_path))
    assert check.state == "failed" and check.cure == "--root FOLDER on a larger disk"


def test_a_store_is_checked(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = doctor.check_root(f"{s3}/root")
    assert check.state == "ok" and "conditional writes work" in check.detail, check
    assert doctor.check_clock(s3).state == "ok" and "the store" in doctor.check_clock(s3).detail
    check = doctor.check_root("s3://no-such-bucket/root")
    assert check.state == "failed" and "no such bucket" in check.detail
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    check = doctor.check_root(s3)
    assert check.state != "ok" and "AWS_ENDPOINT_URL" in check.cure
    assert doctor.check_clock(s3).state == "warning"


class _WrongClock(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response_only(403)
        self.send_header("Date", formatdate(time.time() + 7230, usegmt=True))
        self.end_headers()


@pytest.fixture
def wrong_clock() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _WrongClock)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_wrong_clock_is_named(wrong_clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", wrong_clock)
    check = doctor.check_clock("s3://bucket/root")
    assert check.state == "failed" and "2 h 00 min behind the store" in check.detail and "timedatectl" in check.cure
