"""Kubernetes manifests of infra/: how tests render, check and search them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jobs.cli import parse

REPOSITORY = Path(__file__).parents[3]
INFRA = REPOSITORY / "infra"
OVERLAYS = ("aws", "on-prem")
KUEUE_JOBS = ("embed", "train", "train-aws")
KUBERAY = json.loads((Path(__file__).parent / "kuberay.json").read_text())
KUEUE = json.loads((Path(__file__).parent / "kueue.json").read_text())
KUBERNETES = "1.33"
Document = dict[str, Any]


def render(folder: str) -> list[Document]:
    """The documents of a kustomization below infra/kubernetes."""
    return json.loads(_render_json(folder))


@cache
def _render_json(folder: str) -> str:
    """The documents as JSON: many tests render the same folder, and some change what they get."""
    kubectl = shutil.which("kubectl", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
    if not kubectl:
        pytest.skip("there is no kubectl to render overlays with")
    done = subprocess.run([kubectl, "kustomize", INFRA / "kubernetes" / folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.dumps(list(yaml.safe_load_all(done.stdout)))


def read_jobs() -> list[Document]:
    """The RayJobs of infra/kubernetes/jobs."""
    return [document for file in sorted((INFRA / "kubernetes/jobs").glob("*.yaml"))
            for document in yaml.safe_load_all(file.read_text())]


def render_kueue_jobs() -> list[Document]:
    """The RayJobs of infra/kubernetes/kueue, which bring a cluster of their own."""
    return [document for folder in KUEUE_JOBS for document in render(f"kueue/{folder}")]


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every node of a document, with its path."""
    yield path, node
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from walk(value, f"{path}/{key}")


def pod_templates(document: Document) -> Iterator[Document]:
    """Every pod template of a document."""
    for _, node in walk(document):
        if isinstance(node, dict) and "containers" in node.get("spec", {}):
            yield node


def containers(pod: Document) -> list[Document]:
    """The containers of a pod template, those that run first included."""
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def cluster_specs(documents: list[Document]) -> list[Document]:
    """The specs of clusters, those that RayJobs bring included."""
    specs = [document["spec"] for document in of_kind(documents, "RayJob")]
    return [document["spec"] for document in of_kind(documents, "RayCluster")] + [
        spec["rayClusterSpec"] for spec in specs if "rayClusterSpec" in spec]


def node_templates(cluster: Document) -> list[Document]:
    """The pod templates of a cluster's spec, the head's first."""
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def check_schema(document: Document) -> None:
    """Against the schema of its kind, unknown fields included; pods by Kubernetes' own, wherever they are."""
    kind = document["kind"]
    if kind in {"RayJob", "RayCluster"}:
        assert document["apiVersion"] == "ray.io/v1" and document["metadata"]["name"]
        _check_node(document["spec"], KUBERAY[kind], kind)
        for pod in pod_templates(document):
            kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", "metadata": pod.get("metadata", {}),
                                          "spec": pod["spec"]}, KUBERNETES, strict=True)
    elif kind in KUEUE:
        assert document["apiVersion"] == "kueue.x-k8s.io/v1beta2" and document["metadata"]["name"]
        assert ("namespace" in document["metadata"]) == (KUEUE[kind]["scope"] == "Namespaced")
        _check_node({key: value for key, value in document.items() if key != "metadata"}, KUEUE[kind], kind)
    elif kind != "PodMonitor":  # no schema of it is at hand: what it refers to is checked in test_manifests.py
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def _check_node(node: Any, schema: Document, path: str) -> None:
    if schema.get("x-ray-cluster"):
        schema = KUBERAY["RayCluster"]
    jsonschema.Draft202012Validator(schema).validate(node)
    if isinstance(node, dict) and "properties" in schema:
        for key, value in node.items():
            assert key in schema["properties"], f"{path} has no field {key}"
            _check_node(value, schema["properties"][key], f"{path}.{key}")
    if isinstance(node, list):
        for value in node:
            _check_node(value, schema.get("items", {}), path)


def read_settings(overlay: list[Document]) -> dict[str, str]:
    return next(document["data"] for document in of_kind(overlay, "ConfigMap") if document["metadata"]["name"] == "rdm")


def read_commands(documents: list[Document], environment: dict[str, str]) -> Iterator[list[str]]:
    """The words after `python -m jobs` that jobs and containers run, with their variables in place."""
    for document in documents:
        if document["kind"] == "RayJob":
            yield split_command(document["spec"]["entrypoint"], environment)
        if document["kind"] == "CronJob":
            for pod in pod_templates(document):
                for container in pod["spec"]["containers"]:
                    own = environment | {pair["name"]: pair.get("value", "") for pair in container.get("env", ())}
                    words = [re.sub(r"\$\((\w+)\)", lambda match, own=own: own[match[1]], word)
                             for word in (*container["command"], *container["args"])]
                    assert words[:3] == ["python", "-m", "jobs"]
                    yield words[3:]


def split_command(line: str, environment: dict[str, str]) -> list[str]:
    words = shlex.split(re.sub(r"\$\{?(\w+)\}?", lambda match: environment[match[1]], line), comments=True)
    assert words[:3] == ["python", "-m", "jobs"], line
    return words[3:]


def parse_command(words: list[str]) -> Any:
    """Through the command line's own parser; a verb that submit sends too."""
    try:
        _, command = parse.parse_command(words)
    except (SystemExit, ValueError) as error:
        raise AssertionError(f"{shlex.join(words)}: {error}") from None
    return parse_command(list(command.words)) if words[0] == "submit" else command
