"""`make setup`: the Pythons that it accepts and refuses, and the cases in which it makes .venv again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LINE = "setup: Python 3.11 to 3.14 with venv and pip is needed, but "

# An interpreter as the script uses one. It records installations, and fails where a file in $BREAK says so.
FAKE = r"""#!/bin/sh
case "$1 $2" in
  "-c "*) echo "{facts}" ;;
  "-m venv")
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "version = {version}.1" >"$3/pyvenv.cfg"
    printf '#!/bin/sh\necho uv "$@" >>"$LOG"\ntest ! -e "$BREAK/uv"\n' >"$3/bin/uv" && chmod +x "$3/bin/uv"
    test ! -e "$BREAK/venv" ;;
  "-m pip") echo pip "$@" >>"$LOG" && test ! -e "$BREAK/pip" ;;
esac
"""


class Machine:
    """A copy of the repository's build files, and a PATH with the interpreters of the test and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.repository, self.bin, self.log, self.broken = (folder / name for name in ("code", "bin", "log", "broken"))
        for path in (self.repository / "infra", self.bin, self.broken):
            path.mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", "requirements.lock", "infra/setup.sh"):
            shutil.copy(REPOSITORY / name, self.repository / name)
        for name in ("sh", "make", "sed", "cat", "cksum", "cp", "rm", "mkdir", "dirname", "chmod"):
            (self.bin / name).symlink_to(shutil.which(name))

    def add(self, name: str, version: str, lacks: str = "") -> None:
        path = self.bin / name
        path.write_text(FAKE.replace("{facts}", f"{version} {lacks}".strip()).replace("{version}", version))
        path.chmod(0o755)

    def setup(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        environment = {"PATH": str(self.bin), "LOG": str(self.log), "BREAK": str(self.broken)}
        return subprocess.run(["make", "setup", *arguments], cwd=self.repository, env=environment, text=True,
                              capture_output=True)

    @property
    def venv(self) -> Path:
        return self.repository / ".venv"

    def version(self) -> str:
        return re.search(r"version = (3\.\d+)", (self.venv / "pyvenv.cfg").read_text())[1]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(("installed", "expected"), [
    ({"python3": "3.11"}, "3.11"),
    ({"python3": "3.14", "python3.11": "3.11"}, "3.14"),
    ({"python3": "3.12", "python3.14": "3.14"}, "3.12"),
    ({"python3": "3.10", "python3.11": "3.11", "python3.13": "3.13"}, "3.13"),
    ({"python3": "3.15", "python3.12": "3.12"}, "3.12"),
    ({"python3.14": "3.14"}, "3.14"),
])
def test_setup_uses_python3_if_supported_else_the_newest(machine: Machine, installed: dict[str, str],
                                                         expected: str) -> None:
    for name, version in installed.items():
        machine.add(name, version)
    result = machine.setup()
    assert result.returncode == 0 and machine.version() == expected
    assert f"setup: .venv with Python {expected} (" in result.stderr


@pytest.mark.parametrize(("installed", "problem"), [
    ({}, "there is no python3"),
    ({"python3": "3.10"}, "python3 is Python 3.10"),
    ({"python3": "3.15"}, "python3 is Python 3.15"),
    ({"python3": "2.7"}, "python3 is Python 2.7"),
    ({"python3": "4.11"}, "python3 is Python 4.11"),
    ({"python3": "-bash: not found"}, "python3 does not run"),
    ({"python3": "3.10", "python3.16": "3.16"}, "python3 is Python 3.10"),
])
def test_without_a_supported_python_setup_makes_nothing(machine: Machine, installed: dict[str, str],
                                                        problem: str) -> None:
    for name, version in installed.items():
        machine.add(name, version)
    result = machine.setup()
    assert result.returncode != 0 and not machine.venv.exists() and machine.log.read_text() == ""
    assert result.stderr.startswith(f"{LINE}{problem}. hint: install Python 3.11 to 3.14 with venv and pip")


def test_an_interpreter_without_venv_is_skipped_or_named(machine: Machine) -> None:
    machine.add("python3", "3.13", "ensurepip")
    assert machine.setup().stderr.startswith(f"{LINE}python3 (Python 3.13) lacks ensurepip. hint: install Python")
    (machine.bin / "apt-get").symlink_to(shutil.which("true"))
    assert "lacks ensurepip. hint: apt-get install python3.13-venv\n" in machine.setup().stderr
    machine.add("python3", "3.10")
    assert "python3 is Python 3.10. hint: apt-get install python3 python3-venv" in machine.setup().stderr
    machine.add("python3.12", "3.12", "venv, ensurepip")
    assert "python3.12 (Python 3.12) lacks venv, ensurepip. hint: apt-get install python3.12-" in machine.setup().stderr
    assert not machine.venv.exists()
    machine.add("python3.11", "3.11")
    assert machine.setup().returncode == 0 and machine.version() == "3.11"


def test_an_explicit_python_wins_and_is_checked(machine: Machine) -> None:
    machine.add("python3", "3.12")
    for version in ("3.10", "3.14"):
        machine.add("my own python", version)
        result = machine.setup(f"PYTHON={machine.bin}/my own python")
        assert (result.returncode == 0) == (version == "3.14") == machine.venv.exists()
        assert ("is Python 3.10. hint: leave PYTHON out" in result.stderr) == (version == "3.10")
    assert machine.version() == "3.14"
    assert machine.setup("PYTHON=python3.99").stderr.startswith(f"{LINE}there is no python3.99. hint: leave PYTHON out")
    assert machine.setup().returncode == 0 and machine.version() == "3.14"  # a usable .venv stays


def test_setup_repeats_nothing_and_installs_a_changed_lock(machine: Machine) -> None:
    machine.add("python3", "3.13")
    machine.setup()
    installed = machine.log.read_text()
    assert re.fullmatch(r"pip .*--no-deps uv==[\d.]+\nuv pip install .*--no-deps .*-r requirements.lock\n"
                        r"pip .*--no-deps .*--editable \.\n", installed)
    second = machine.setup()
    assert (second.returncode, second.stderr, machine.log.read_text()) == (0, "", "")
    with (machine.repository / "requirements.lock").open("a") as lock:
        lock.write("six==1.17.0\n")
    said = machine.setup().stderr
    assert re.fullmatch(r"setup: installing the packages of .*\nsetup: done\. .*: \. .venv/bin/activate\n", said)
    assert machine.log.read_text() == installed
    assert machine.setup().stderr == "" and machine.log.read_text() == ""
    (machine.venv / "lib/python3.13/site-packages/jobs").mkdir(parents=True)  # `pip install .` copies the code
    machine.setup()
    assert machine.log.read_text() == installed


def test_pip_replaces_a_failing_uv_and_a_failed_install_is_resumed(machine: Machine) -> None:
    machine.add("python3", "3.13")
    (machine.broken / "uv").touch()
    result = machine.setup()
    assert result.returncode == 0 and "setup: uv could not install the packages, so pip does\n" in result.stderr
    assert re.search(r"^pip .*--no-deps -r requirements.lock$", machine.log.read_text(), re.M)
    (machine.broken / "pip").touch()
    (machine.repository / "pyproject.toml").open("a").write("\n")
    assert machine.setup().returncode != 0
    result = machine.setup()
    assert "the packages could not be installed. hint: " in result.stderr
    assert result.returncode != 0  # does not count as complete
    (machine.broken / "pip").unlink()
    assert machine.setup().stderr.endswith("setup: done. To call rdm in this shell: . .venv/bin/activate\n")
    assert machine.setup().stderr == ""


def test_a_failed_venv_leaves_nothing(machine: Machine) -> None:
    machine.add("python3", "3.13")
    (machine.broken / "venv").touch()
    result = machine.setup()
    assert result.returncode != 0 and "setup: python3 -m venv failed. hint: " in result.stderr
    assert not machine.venv.exists()


def test_an_unusable_venv_is_made_again_with_a_reason(machine: Machine) -> None:
    machine.add("python3", "3.13")

    def made_again(reason: str, *arguments: str) -> None:
        result = machine.setup(*arguments)
        assert result.returncode == 0 and result.stderr.startswith(f"setup: .venv {reason}: it is made again\n")
        assert "--editable" in machine.log.read_text() and machine.setup(*arguments).stderr == ""

    machine.setup()
    (machine.venv / "bin/python").unlink()
    made_again("is incomplete")
    (machine.venv / "pyvenv.cfg").unlink()
    made_again("is incomplete")
    shutil.rmtree(machine.venv)
    machine.venv.mkdir()
    made_again("is incomplete")
    (machine.venv / "pyvenv.cfg").write_text("version = 3.12.4\n")
    made_again("was made for Python 3.12, and its python is 3.13 now")
    machine.add("python3.14", "3.14")
    made_again("has Python 3.13, and PYTHON=python3.14 is 3.14", "PYTHON=python3.14")
    machine.add("old", "3.10")
    shutil.copy(machine.bin / "old", machine.venv / "bin/python")
    (machine.venv / "pyvenv.cfg").write_text("version_info = 3.10.1\n")
    made_again("has Python 3.10")
    machine.repository = machine.repository.rename(machine.repository.with_name("moved"))
    made_again("was made in another folder")
    (machine.venv / ".ready").unlink()  # its install was interrupted, and then it was moved
    with (machine.venv / "pyvenv.cfg").open("a") as stream:
        stream.write("command = /usr/bin/python3 -m venv /elsewhere/.venv\n")
    made_again("was made in another folder")


def test_a_venv_that_cannot_be_replaced_stays(machine: Machine) -> None:
    machine.add("python3", "3.13")
    machine.setup()
    (machine.venv / "pyvenv.cfg").write_text("version = 3.12.4\n")
    machine.add("python3", "3.10")
    assert machine.setup().returncode != 0 and (machine.venv / "bin/python").exists()


def test_the_faults_of_a_real_interpreter_are_named(machine: Machine, tmp_path: Path) -> None:
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "ensurepip.py").write_text("raise ImportError")
    wrapper = machine.bin / "python3"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={shadow} exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    version = "{}.{}".format(*sys.version_info)
    assert machine.setup().stderr.startswith(f"{LINE}python3 (Python {version}) lacks ensurepip. hint: ")


@pytest.mark.slow
@pytest.mark.network
def test_setup_works_with_a_small_lock(machine: Machine) -> None:
    lock = (machine.repository / "requirements.lock").read_text()
    (machine.repository / "requirements.lock").write_text(
        "".join(re.findall(r"^(?:uv|setuptools|six)==\S+\n", lock, re.M)))
    for package in ("pipeline", "model", "jobs"):
        (machine.repository / package).mkdir()
        (machine.repository / package / "__init__.py").touch()
    for name in ("README.md", "LICENSE"):
        (machine.repository / name).touch()
    result = subprocess.run(["make", "setup", f"PYTHON={sys.executable}"], cwd=machine.repository, text=True,
                            capture_output=True, env={**os.environ, "PATH": os.defpath})
    assert result.returncode == 0, result.stderr
    done = subprocess.run([machine.venv / "bin/python", "-c", "import six, model"], cwd="/", text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
