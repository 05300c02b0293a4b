"""infra/kubernetes/base/check-driver.sh, with an nvidia-smi, a PCI bus and EFA devices that these tests make."""

import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.infra.kubernetes.manifests import INFRA

SCRIPT = INFRA / "kubernetes/base/check-driver.sh"
HINT = re.compile(r"\Aerror: [^\n]+\nexpected: [^\n]+; got: [^\n]+\nhint: [^\n]+\n\Z")
MIG = "\n  MIG 1g.10gb     Device  {}: (UUID: MIG-{})"


class Node:
    """A node in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for tool in ("bash", "grep", "head", "sed", "timeout"):  # an nvidia-smi of this machine is not one
            (folder / "bin" / tool).symlink_to(str(shutil.which(tool)))

    def write_command(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def install_driver(self, version: str, gpus: int = 1, slices: int = 0) -> None:
        """An nvidia-smi that prints what NVIDIA's prints."""
        devices = [f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: GPU-{number})" for number in range(gpus)]
        devices[0] += "".join(MIG.format(number, number) for number in range(slices))
        lines = "\n".join(devices)
        versions = "\n".join([version] * gpus)
        self.write_command("nvidia-smi", f"case $1 in\n-L) echo '{lines}' ;;\n"
                                         f"--query-gpu=driver_version) echo '{versions}' ;;\n*) exit 9 ;;\nesac")

    def add_device(self, number: int, vendor: str, kind: str) -> None:
        device = self.folder / f"sys/bus/pci/devices/0000:{number:02}:00.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")

    def install_efa(self, devices: int) -> None:
        (self.folder / "dev/infiniband").mkdir(parents=True)
        for number in range(devices):
            (self.folder / f"dev/infiniband/uverbs{number}").touch()
        line = "libnccl-net-ofi.so (libc6,x86-64) => /opt/amazon/ofi-nccl/lib/libnccl-net-ofi.so"
        self.write_command("ldconfig", f"echo '{line}'\nfor number in {{1..5000}}; do echo a library; done")

    def check(self, *words: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        done = subprocess.run(
            [self.folder / "bin/bash", SCRIPT, *words], capture_output=True, text=True, timeout=60,
            env={"PATH": f"{self.folder}/bin", "CHECK_ROOT": str(self.folder)} | environment,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10)))
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.mark.parametrize("version", ["580.65.06", "580", "595.91.07", "1000.1"])
def test_a_new_driver_passes(node: Node, version: str) -> None:
    node.install_driver(version, gpus=8)
    for words in ((), ("1",), ("8",)):
        code, said, log = node.check(*words, RAY_OVERRIDE_RESOURCES='{"CPU":8,"GPU":1}')
        assert (code, log) == (0, "") and f"driver {version}, 8 GPUs" in said


@pytest.mark.parametrize("version", ["579.99", "570.172.08", "450.80.02", "58"])
def test_an_old_driver_fails(node: Node, version: str) -> None:
    node.install_driver(version)
    code, _, log = node.check("1")
    assert code == 1 and HINT.match(log) and "too old" in log and f"got: {version}\n" in log


def test_no_driver_fails_where_a_gpu_is_announced_or_on_the_bus(node: Node) -> None:
    node.add_device(0, "0x8086", "0x060000")
    node.add_device(1, "0x10de", "0x040300")  # the audio function of a card
    assert node.check() == (0, "", "")
    assert node.check(RAY_OVERRIDE_RESOURCES='{"CPU":8}') == (0, "", "")
    for announced in ('{"CPU":8,"GPU":1}', '{"GPU": 1.0}', '"{\\"CPU\\":8,\\"GPU\\":1}"'):
        code, _, log = node.check(RAY_OVERRIDE_RESOURCES=announced)
        assert code == 1 and HINT.match(log) and "expected: 1 GPUs" in log
    for number, kind in ((2, "0x030200"), (3, "0x030000")):
        node.add_device(number, "0x10de", kind)
    code, _, log = node.check()
    assert code == 1 and HINT.match(log) and "expected: 2 GPUs" in log and "no driver" in log


@pytest.mark.parametrize("text", [
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\nMake sure it is installed.",
    "Failed to initialize NVML: Driver/library version mismatch"])
def test_a_driver_that_does_not_answer_fails(node: Node, text: str) -> None:
    node.write_command("nvidia-smi", f'echo "{text}"; exit 9')
    code, _, log = node.check("1")
    assert code == 1 and HINT.match(log) and text.splitlines()[0] in log


def test_a_driver_that_answers_nonsense_fails(node: Node) -> None:
    for text in ("", "[N/A]", "No devices were found"):
        node.write_command("nvidia-smi", f"echo '{text}'")
        code, _, log = node.check("1")
        assert code == 1 and HINT.match(log) and "did not print a driver version" in log


def test_missing_gpus_fail(node: Node) -> None:
    node.install_driver("580.65.06", gpus=7)
    code, _, log = node.check("8")
    assert code == 1 and HINT.match(log) and "expected: 8; got: 7" in log


def test_mig_fails_unless_accepted_for_one_gpu(node: Node) -> None:
    node.install_driver("580.65.06", slices=2)
    code, _, log = node.check("1")
    assert code == 1 and HINT.match(log) and "ALLOW_MIG=1" in log
    code, said, log = node.check("1", ALLOW_MIG="1")
    assert code == 0 and "2 MIG slices" in said and log.startswith("warning: ")
    code, _, log = node.check("8", ALLOW_MIG="1")
    assert code == 1 and HINT.match(log) and "NCCL" in log


def test_efa_needs_devices_memory_and_the_plugin(node: Node) -> None:
    node.install_driver("580.65.06", gpus=8)
    node.install_efa(32)
    code, said, log = node.check("8", "32", MIN_MEMLOCK_KIB="64")
    assert (code, log) == (0, "") and "32 EFA devices, locked memory 64" in said
    code, _, log = node.check("8", "32")
    assert code == 1 and HINT.match(log) and "LimitMEMLOCK" in log and "got: 64 KiB" in log
    (node.folder / "dev/infiniband/uverbs31").unlink()
    code, _, log = node.check("8", "32", MIN_MEMLOCK_KIB="64")
    assert code == 1 and HINT.match(log) and "got: 31" in log
    node.write_command("ldconfig", "echo libc.so.6")
    code, _, log = node.check("8", "31", MIN_MEMLOCK_KIB="64")
    assert code == 1 and HINT.match(log) and "libnccl-net-ofi.so" in log
    assert node.check("8")[0] == 0


@pytest.mark.parametrize("words", [["abc"], ["-1"], ["--help"], ["1", "x"]])
def test_invalid_numbers_are_refused(node: Node, words: list[str]) -> None:
    node.install_driver("580.82.07")
    code, _, said = node.check(*words)
    assert code == 1 and HINT.match(said) and "is not a number of devices" in said
