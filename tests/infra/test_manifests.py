"""What is in infra/: rendered as it would be applied, checked against its schemas and against the command line."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jobs import cli
from pipeline.emoji import STYLES

REPOSITORY = Path(__file__).parents[2]
INFRA = REPOSITORY / "infra"
KUBERAY = json.loads((Path(__file__).parent / "kuberay.json").read_text())
KUBERNETES = "1.33"
OVERLAYS = ("aws", "on-prem")
SECRETS = {"rdm-token", "rdm-s3", "rdm-wandb"}  # those that infra/README.md has made by hand
Document = dict[str, Any]


def _kubectl() -> str:
    found = shutil.which("kubectl", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip("there is no kubectl to render overlays with")


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Document]:
    """The documents of an overlay, rendered."""
    done = subprocess.run([_kubectl(), "kustomize", INFRA / "kubernetes/overlays" / request.param],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def _jobs() -> list[Document]:
    return [document for file in sorted((INFRA / "kubernetes/jobs").glob("*.yaml"))
            for document in yaml.safe_load_all(file.read_text())]


def _of(documents: list[Document], kind: str) -> list[Document]:
    return [one for one in documents if one["kind"] == kind]


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, node
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _walk(value, f"{path}/{key}")


def _pods(document: Document) -> Iterator[Document]:
    """Every pod template of a document."""
    for _, node in _walk(document):
        if isinstance(node, dict) and "containers" in node.get("spec", {}):
            yield node


def _nodes(cluster: Document) -> list[Document]:
    """The pod templates of a cluster's spec, the head's first."""
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def _check(document: Document) -> None:
    """Against the schema of its kind, unknown fields included; pods by Kubernetes' own, wherever they are."""
    kind = document["kind"]
    if kind in {"RayJob", "RayCluster"}:
        assert document["apiVersion"] == "ray.io/v1" and document["metadata"]["name"]
        _check_ray(document["spec"], KUBERAY[kind], kind)
        for pod in _pods(document):
            kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", "metadata": pod.get("metadata", {}),
                                          "spec": pod["spec"]}, KUBERNETES, strict=True)
    elif kind != "PodMonitor":  # no schema of it is at hand: what it refers to is checked below
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def _check_ray(node: Any, schema: Document, path: str) -> None:
    if schema.get("x-ray-cluster"):
        schema = KUBERAY["RayCluster"]
    jsonschema.Draft202012Validator(schema).validate(node)
    if isinstance(node, dict) and "properties" in schema:
        for key, value in node.items():
            assert key in schema["properties"], f"{path} has no field {key}"
            _check_ray(value, schema["properties"][key], f"{path}.{key}")
    if isinstance(node, list):
        for value in node:
            _check_ray(value, schema.get("items", {}), path)


def test_every_document_of_an_overlay_is_as_its_schema_wants(overlay: list[Document]) -> None:
    assert {one["kind"] for one in overlay} >= {"RayCluster", "CronJob", "NetworkPolicy", "PodMonitor", "Role"}
    for document in overlay:
        _check(document)


def test_every_job_is_as_its_schema_wants() -> None:
    for document in _jobs():
        _check(document)
        spec = document["spec"]
        # What KubeRay refuses though the schema allows it.
        assert ("clusterSelector" in spec) != ("rayClusterSpec" in spec)
        of_its_own = spec.keys() & {"backoffLimit", "suspend", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
        assert "clusterSelector" not in spec or not of_its_own


@pytest.mark.parametrize("path, value", [
    ("spec.workerGroupSpec", []), ("spec.authOptions.mode", "tokens"), ("spec.autoscalerOptions.version", "v3"),
    ("spec.headGroupSpec.rayStartParams.num-cpus", 0), ("spec.headGroupSpec.template.spec.container", []),
    ("spec.headGroupSpec.template.spec.securityContext.runAsUser", "ubuntu")])
def test_what_is_wrong_is_found(path: str, value: Any) -> None:
    cluster = yaml.safe_load((INFRA / "kubernetes/base/cluster.yaml").read_text())
    _check(cluster)
    node = cluster
    *parents, last = path.split(".")
    for key in parents:
        node = node[key]
    node[last] = value
    with pytest.raises((AssertionError, jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        _check(cluster)


def _commands(documents: list[Document], environment: dict[str, str]) -> Iterator[list[str]]:
    """What jobs and containers run, with their variables in place, after `python -m jobs`."""
    for document in documents:
        if document["kind"] == "RayJob":
            yield _words(document["spec"]["entrypoint"], environment)
        if document["kind"] == "CronJob":
            for pod in _pods(document):
                for container in pod["spec"]["containers"]:
                    own = environment | {one["name"]: one.get("value", "") for one in container["env"]}
                    words = [re.sub(r"\$\((\w+)\)", lambda found, own=own: own[found[1]], word)
                             for word in (*container["command"], *container["args"])]
                    assert words[:3] == ["python", "-m", "jobs"]
                    yield words[3:]


def _words(line: str, environment: dict[str, str]) -> list[str]:
    words = shlex.split(re.sub(r"\$\{?(\w+)\}?", lambda found: environment[found[1]], line), comments=True)
    assert words[:3] == ["python", "-m", "jobs"], line
    return words[3:]


def _parse(words: list[str]) -> Any:
    """Through the command line's own parser; a verb that submit sends too."""
    try:
        _, command, _ = cli.parsed(words)
    except (SystemExit, ValueError) as error:
        raise AssertionError(f"{shlex.join(words)}: {error}") from None
    return _parse(list(command.words)) if words[0] == "submit" else command


def _settings(overlay: list[Document]) -> dict[str, str]:
    return next(one["data"] for one in _of(overlay, "ConfigMap") if one["metadata"]["name"] == "rdm")


def test_no_manifest_names_a_verb_or_flag_that_is_not_there(overlay: list[Document]) -> None:
    commands = [_parse(words) for words in _commands([*overlay, *_jobs()], _settings(overlay))]
    assert len(commands) == len(STYLES) + len(list((INFRA / "kubernetes/jobs").glob("*.yaml")))
    assert all(command.common.root.startswith("s3://BUCKET/rdm") for command in commands)


def test_no_other_text_names_a_verb_or_flag_that_is_not_there() -> None:
    line = re.compile(r"^(?:#? {4,}|\$ )?(?:\S*/)?(python -m jobs [^`|<>]*?)(?:\s+\\)?$", re.M)
    found = []
    for file in sorted(INFRA.rglob("*")):
        if file.suffix in {".md", ".sh"} or file.parent.name == "ray-up":
            text = re.sub(r"\\\n\s*", "", file.read_text())
            found += [_parse(_words(match[1], {"PWD": "/here"})) for match in line.finditer(text)]
    assert len(found) >= 5


def test_a_verb_or_flag_that_is_not_there_is_found() -> None:
    for words in (["fly"], ["embed", "noto", "--no-such-flag"], ["submit", "--wait", "embed", "noto", "--wait"]):
        with pytest.raises(AssertionError):
            _parse(words)


def test_all_that_is_referred_to_is_there(overlay: list[Document]) -> None:
    names = {kind: {one["metadata"]["name"] for one in _of(overlay, kind)} for kind in (
        "ServiceAccount", "ConfigMap", "RayCluster", "Role")}
    (cluster,) = _of(overlay, "RayCluster")
    assert all(one["metadata"]["namespace"] == "rdm" for one in overlay if one["kind"] != "Namespace")
    pods = [pod for document in [*overlay, *_jobs()] for pod in _pods(document)]
    assert len(pods) == 3 + len(STYLES) + 2
    for pod in pods:
        assert pod["spec"]["serviceAccountName"] in names["ServiceAccount"]
        for _, node in _walk(pod):
            if isinstance(node, dict):
                assert node.get("configMapRef", {"name": "rdm"})["name"] in names["ConfigMap"]
                assert {node.get(key, {"name": "rdm-s3"})["name"] for key in ("secretRef", "secretKeyRef")} <= SECRETS
    for binding in _of(overlay, "RoleBinding"):
        assert binding["roleRef"]["name"] in names["Role"]
    for policy in [*_of(overlay, "NetworkPolicy"), *_of(overlay, "PodMonitor")]:
        labels = policy["spec"].get("podSelector", policy["spec"].get("selector"))["matchLabels"].items()
        chosen = [pod for pod in pods if labels <= pod["metadata"]["labels"].items()]
        ports = {port["name"]: port["containerPort"] for pod in chosen for container in pod["spec"]["containers"]
                 for port in container.get("ports", ())}
        assert chosen and all(one["port"] in ports for one in policy["spec"].get("podMetricsEndpoints", ()))
        if policy["metadata"]["name"] == "rdm-nodes":
            opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", ())}
            assert opened == {8265, 8080, 44217, 44227} == opened & set(ports.values())
    for job in _jobs():
        assert job["spec"].get("clusterSelector", {"ray.io/cluster": "rdm"})["ray.io/cluster"] in names["RayCluster"]
    for pod in (pod for one in _of(overlay, "CronJob") for pod in _pods(one)):
        told = {one["name"]: one.get("value") for one in pod["spec"]["containers"][0]["env"]}
        assert told["RAY_API_SERVER_ADDRESS"] == f"http://{cluster['metadata']['name']}-head-svc:8265"


def test_no_secret_is_written_down_and_none_is_missing_from_the_readme(overlay: list[Document]) -> None:
    assert not _of([*overlay, *_jobs()], "Secret")
    for document in [*overlay, *_jobs()]:
        for path, node in _walk(document):
            if isinstance(node, dict) and isinstance(node.get("value"), str) and "name" in node:
                assert not re.search("KEY|SECRET|TOKEN|PASSWORD", node["name"]), path
    assert not [name for name in _settings(overlay) if re.search("KEY|SECRET|TOKEN|PASSWORD", name)]
    readme = (INFRA / "README.md").read_text()
    assert all(f"create secret generic {name} " in readme for name in SECRETS)


def _clusters(documents: list[Document]) -> list[Document]:
    return [one["spec"] for one in _of(documents, "RayCluster")] + [
        one["spec"]["rayClusterSpec"] for one in _of(documents, "RayJob") if "rayClusterSpec" in one["spec"]]


def test_clusters_want_a_token_and_heads_are_safe(overlay: list[Document]) -> None:
    for cluster in _clusters([*overlay, *_jobs()]):
        assert cluster["authOptions"] == {"mode": "token", "secretName": "rdm-token"}
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        head, *workers = _nodes(cluster)
        assert "tolerations" not in head["spec"] and workers
        for pod in (head, *workers):
            assert pod["spec"]["securityContext"]["runAsNonRoot"] and pod["spec"]["restartPolicy"] == "Never"
            assert all(container["securityContext"]["allowPrivilegeEscalation"] is False
                       and not container["image"].endswith(":latest") for container in pod["spec"]["containers"])
    (standing,) = _clusters(overlay)
    head, *workers = _nodes(standing)
    assert [group["groupName"] for group in standing["workerGroupSpecs"]] == ["cpu", "gpu"]
    assert standing["enableInTreeAutoscaling"] and standing["autoscalerOptions"]["version"] == "v2"
    for worker in workers:
        assert {"key": "rdm/spot", "operator": "Exists", "effect": "NoSchedule"} in worker["spec"]["tolerations"]
        assert worker["spec"]["automountServiceAccountToken"] is False
    if "affinity" in head["spec"]:  # on AWS
        text = json.dumps(head["spec"]["affinity"])
        assert "requiredDuring" in text and text.count("NotIn") == 2 and '"In"' not in text
        assert all("preferredDuring" in json.dumps(worker["spec"]["affinity"]) for worker in workers)


def test_each_style_is_rebuilt_at_night_by_one_pod_that_waits(overlay: list[Document]) -> None:
    jobs = _of(overlay, "CronJob")
    assert all(one["spec"]["concurrencyPolicy"] == "Forbid" for one in jobs)
    words = list(_commands(jobs, _settings(overlay)))
    assert sorted(_parse(one).dataset for one in words) == sorted(STYLES)
    assert all(cli.parsed(one)[1].wait and one[one.index("--source") + 1].endswith(f"/{_parse(one).dataset}")
               for one in words)
    for what in ({one["spec"]["schedule"] for one in jobs}, {one["metadata"]["name"] for one in jobs}):
        assert len(what) == len(STYLES)


def test_versions_are_those_that_were_tested(overlay: list[Document]) -> None:
    lock = dict(re.findall(r"^([\w.-]+)==(\S+)", (REPOSITORY / "requirements.lock").read_text(), re.M))
    assert {one["rayVersion"] for one in _clusters([*overlay, *_jobs()])} == {lock["ray"]}


def test_the_image_is_made_of_what_is_there_and_runs_as_nobody_special() -> None:
    dockerfile = (INFRA / "Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (?!--from)(.*)", dockerfile, re.M) for word in line.split()[:-1]]
    kept = set(re.findall("^!(.*)", (INFRA / "Dockerfile.dockerignore").read_text(), re.M))
    assert set(sources) == kept and all((REPOSITORY / name).exists() for name in sources)
    assert re.findall("^USER (.*)", dockerfile, re.M)[-1] == "1000:1000"
    assert not re.search(":latest|^FROM [^:]+$", dockerfile, re.M)


@pytest.mark.parametrize("name", ["aws", "on-prem"])
def test_ray_itself_takes_the_cluster_files(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config
    written = yaml.safe_load((INFRA / f"ray-up/{name}.yaml").read_text())
    config = prepare_config(copy.deepcopy(written))
    validate_config(config)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "ray stop" in commands[0]
        assert all(words in commands[1] for words in ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=", "ray start"))
    for words in ("--num-cpus=0", "--dashboard-host=127.0.0.1"):
        assert words in config["head_start_ray_commands"][1]
    kinds = written.get("available_node_types", {})
    spot = {kind for kind, one in kinds.items() if "InstanceMarketOptions" in one["node_config"]}
    assert spot == (set(kinds) - {written["head_node_type"]} if kinds else set())
    config["head_start_commands"] = []
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config)
