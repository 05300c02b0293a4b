"""`make policy`: infra/ passes checkov with the named exceptions, and unsafe manifests do not."""

import copy
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra import tools
from tests.infra.kubernetes import manifests
from tests.infra.kubernetes.manifests import INFRA


def _check(*files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tools.environment("policy") / "python", INFRA / "policy.py", *files], text=True,
                          capture_output=True)


@pytest.mark.slow  # `make lint` runs the same check
def test_infra_passes_and_every_exception_is_needed() -> None:
    done = _check()
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_every_exception_has_a_reason() -> None:
    exceptions = tomllib.loads((INFRA / "policy.toml").read_text())["exception"]
    assert exceptions and all(len(each["reason"]) > 40 and each.keys() == {"check", "resources", "reason"}
                              for each in exceptions)
    assert not [pattern for each in exceptions for pattern in each["resources"] if pattern.startswith("*")]


@pytest.mark.slow
def test_unsafe_manifests_are_found(tmp_path: Path) -> None:
    cluster = yaml.safe_load((INFRA / "kubernetes/base/cluster.yaml").read_text())

    def worker(name: str, **changes: Any) -> None:
        document = copy.deepcopy(cluster)
        document["metadata"]["name"] = name
        spec = manifests.node_templates(document["spec"])[1]["spec"]
        spec["containers"][0]["image"] = "registry.internal/rdm@sha256:" + "0" * 64
        for key, value in changes.items():
            (spec if key.startswith(("host", "volumes", "automount")) else spec["containers"][0])[key] = value
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(document))

    good = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    worker("good")
    worker("tag", image="registry.internal/rdm:1")
    worker("privileged", securityContext=good | {"privileged": True})
    worker("writable", securityContext={key: good[key] for key in ("allowPrivilegeEscalation", "capabilities")})
    worker("capable", securityContext=good | {"capabilities": {"drop": ["NET_RAW"]}})
    worker("network", hostNetwork=True)
    worker("token", automountServiceAccountToken=True)
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
            "metadata": {"name": "all", "namespace": "rdm"},
            "rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]}
    (tmp_path / "role.yaml").write_text(yaml.safe_dump(role))
    done = _check(*sorted(tmp_path.glob("*.yaml")))
    assert done.returncode == 1 and "hint: " in done.stderr
    lines = done.stdout.splitlines()
    for check, name in (("CKV_K8S_43", "tag"), ("CKV_K8S_16", "privileged"), ("CKV_K8S_22", "writable"),
                        ("CKV_K8S_37", "capable"), ("CKV_K8S_19", "network"), ("CKV_K8S_38", "token")):
        resource = f"Pod.rdm.raycluster-{name}-workers-0 "
        assert [line for line in lines if line.startswith(f"{check} ") and resource in line], check
    assert [line for line in lines if line.startswith("CKV_K8S_49 ") and "Role.rdm.all" in line]
