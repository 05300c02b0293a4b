"""Checks manifests and Dockerfile with checkov. infra/policy.toml has the exceptions with their reasons.

    "$(infra/tools.sh policy)"/bin/python infra/policy.py             # everything; `make policy` does this
    "$(infra/tools.sh policy)"/bin/python infra/policy.py FILE ...    # these manifests alone, with the same exceptions

checkov knows Kubernetes' own kinds, not those of Ray. So the pods of Ray clusters are given to it as plain pods.
Ends with 1 if a check fails without an exception, or, when it checks everything, if an exception is not needed.
"""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

INFRA = Path(__file__).resolve().parent
KUBERNETES = INFRA / "kubernetes"
FOLDERS = ("overlays/aws", "overlays/on-prem", "admission", "publish",
           "kueue/queues", "kueue/embed", "kueue/train", "kueue/train-aws")
RAY_KINDS = {"RayCluster", "RayJob"}


def render(folder: str) -> list[Any]:
    """The documents of a kustomization below infra/kubernetes."""
    places = [str(INFRA.parent / ".venv/bin"), sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    kubectl = shutil.which("kubectl", path=os.pathsep.join(places))
    if not kubectl:
        sys.exit("policy: there is no kubectl to render manifests with\nhint: make setup")
    done = subprocess.run([kubectl, "kustomize", str(KUBERNETES / folder)], text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"policy: {folder} cannot be rendered: {done.stderr}")
    return list(yaml.safe_load_all(done.stdout))


def pod_templates(node: Any) -> Iterator[Any]:
    """Every pod template of a document."""
    if isinstance(node, dict):
        if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
            yield node
        for value in node.values():
            yield from pod_templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_templates(value)


def expand(document: Any) -> Iterator[Any]:
    """The document, or the pods of a Ray cluster as plain pods: NAME-head, NAME-workers-0, and so on."""
    if document.get("kind") not in RAY_KINDS:
        yield document
        return
    for number, pod in enumerate(pod_templates(document)):
        role = "head" if number == 0 else f"workers-{number - 1}"
        metadata = {**pod.get("metadata", {}), "namespace": "rdm",
                    "name": f"{document['kind'].lower()}-{document['metadata']['name']}-{role}"}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}


def check(folder: Path) -> list[tuple[str, str, str, str]]:
    """Runs checkov on a folder. Returns the failed checks: identifier, name, resource, file."""
    command = [Path(sysconfig.get_path("scripts")) / "checkov", "--directory", folder, "--output", "json",
               "--framework", "kubernetes", "dockerfile", "--skip-download", "--quiet", "--compact"]
    environment = {**os.environ, "HOME": str(folder.parent), "LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, text=True, capture_output=True, env=environment)
    try:
        reports = json.loads(done.stdout)
    except json.JSONDecodeError:
        sys.exit(f"policy: checkov ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    reports = reports if isinstance(reports, list) else [reports]
    unread = [error for report in reports for error in report.get("results", {}).get("parsing_errors", ())]
    passed = sum(report.get("summary", report)["passed"] for report in reports)
    if unread or not passed:
        sys.exit(f"policy: checkov cannot read {', '.join(unread) or 'anything'}")
    print(f"policy: {passed} checks pass", file=sys.stderr)
    return [(each["check_id"], each["check_name"], each["resource"], Path(each["file_path"]).name)
            for report in reports for each in report.get("results", {}).get("failed_checks", ())]


def main(files: list[str]) -> int:
    """Run the checks and print the faults."""
    exceptions = tomllib.loads((INFRA / "policy.toml").read_text())["exception"]
    used = set()
    bad = []
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "manifests"
        target.mkdir()
        if files:
            sources = [(Path(file).name, list(yaml.safe_load_all(Path(file).read_text()))) for file in files]
        else:
            sources = [(folder.replace("/", "-") + ".yaml", render(folder)) for folder in FOLDERS]
            sources += [(file.name, list(yaml.safe_load_all(file.read_text())))
                        for file in sorted((KUBERNETES / "jobs").glob("*.yaml"))]
            shutil.copy(INFRA / "Dockerfile", target)
        for name, documents in sources:
            expanded = [each for document in documents for each in expand(document)]
            (target / name).write_text(yaml.safe_dump_all(expanded))
        for identifier, what, resource, file in check(target):
            excused = [number for number, each in enumerate(exceptions) if each["check"] == identifier
                       and any(fnmatch.fnmatchcase(resource, pattern) for pattern in each["resources"])]
            used.update(excused)
            if not excused:
                bad.append(f"{identifier} {what}: {resource} ({file})")
    for line in sorted(bad):
        print(line)
    idle = [] if files else [each for number, each in enumerate(exceptions) if number not in used]
    for each in idle:
        print(f"{each['check']} {each['resources']}: infra/policy.toml has an exception that nothing needs")
    if bad:
        print("hint: correct the manifest, or add an exception with its reason to infra/policy.toml", file=sys.stderr)
    return 1 if bad or idle else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
