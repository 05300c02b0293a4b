"""The manifests of infra/, rendered as for a cluster, are checked against schemas and the command line."""

import json
import re
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jobs.cli import parse
from pipeline.corpora.emoji import STYLES
from tests.infra.kubernetes import manifests
from tests.infra.kubernetes.manifests import INFRA, REPOSITORY, Document

SECRETS = {"rdm-token", "rdm-s3", "rdm-wandb"}  # an administrator makes them with the commands of the guide



@pytest.fixture(scope="module", params=manifests.OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Document]:
    """The documents of an overlay, rendered."""
    return manifests.render(f"overlays/{request.param}")









@pytest.fixture(scope="module")
def rayjobs() -> list[Document]:
    """Every RayJob, those for Kueue included."""
    return [*manifests.read_jobs(), *manifests.render_kueue_jobs()]


def test_every_document_of_an_overlay_follows_its_schema(overlay: list[Document]) -> None:
    kinds = {document["kind"] for document in overlay}
    assert kinds >= {"RayCluster", "CronJob", "NetworkPolicy", "PodMonitor", "Role"}
    for document in overlay:
        manifests.check_schema(document)


def test_every_job_follows_its_schema(rayjobs: list[Document]) -> None:
    for document in rayjobs:
        manifests.check_schema(document)
        spec = document["spec"]
        # The schema allows both or neither of these, and KubeRay refuses that.
        assert ("clusterSelector" in spec) != ("rayClusterSpec" in spec)
        of_its_own = spec.keys() & {"backoffLimit", "suspend", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
        assert "clusterSelector" not in spec or not of_its_own


@pytest.mark.parametrize("path, value", [
    ("spec.workerGroupSpec", []), ("spec.authOptions.mode", "tokens"), ("spec.autoscalerOptions.version", "v3"),
    ("spec.headGroupSpec.rayStartParams.num-cpus", 0), ("spec.headGroupSpec.template.spec.container", []),
    ("spec.headGroupSpec.template.spec.securityContext.runAsUser", "ubuntu")])
def test_faults_of_a_manifest_are_found(path: str, value: Any) -> None:
    cluster = yaml.safe_load((INFRA / "kubernetes/base/cluster.yaml").read_text())
    manifests.check_schema(cluster)
    node = cluster
    *parents, last = path.split(".")
    for key in parents:
        node = node[key]
    node[last] = value
    with pytest.raises((AssertionError, jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        manifests.check_schema(cluster)


def test_no_manifest_names_a_missing_verb_or_flag(overlay: list[Document], rayjobs: list[Document]) -> None:
    command_lines = manifests.read_commands([*overlay, *rayjobs], manifests.read_settings(overlay))
    commands = [manifests.parse_command(command_words) for command_words in command_lines]
    assert len(commands) == len(STYLES) + len(rayjobs)
    assert len(rayjobs) == len(list((INFRA / "kubernetes/jobs").glob("*.yaml"))) + len(manifests.KUEUE_JOBS)
    assert all(command.common.root.startswith("s3://BUCKET/rdm") for command in commands)


def test_no_other_text_names_a_missing_verb_or_flag() -> None:
    line = re.compile(r"^(?:#? {4,}|\$ )?(?:\S*/)?(python -m jobs [^`|<>]*?)(?:\s+\\)?$", re.M)
    commands = []
    for file in (*sorted(INFRA.rglob("*")), *sorted((REPOSITORY / "docs/guides/operate").glob("*.md"))):
        if file.suffix in {".md", ".sh"} or file.parent.name == "ray-up":
            text = re.sub(r"\\\n\s*", "", file.read_text())
            commands += [manifests.parse_command(manifests.split_command(match[1], {"PWD": "/here"}))
                         for match in line.finditer(text)]
    assert len(commands) >= 5


def test_a_missing_verb_or_flag_is_found() -> None:
    for words in (["fly"], ["embed", "noto", "--no-such-flag"], ["submit", "--wait", "embed", "noto", "--wait"]):
        with pytest.raises(AssertionError):
            manifests.parse_command(words)


def test_every_reference_has_a_target(overlay: list[Document], rayjobs: list[Document]) -> None:
    names = {kind: {document["metadata"]["name"] for document in manifests.of_kind(overlay, kind)} for kind in (
        "ServiceAccount", "ConfigMap", "RayCluster", "Role")}
    (cluster,) = manifests.of_kind(overlay, "RayCluster")
    assert all(document["metadata"]["namespace"] == "rdm" for document in overlay if document["kind"] != "Namespace")
    pods = [pod for document in [*overlay, *rayjobs] for pod in manifests.pod_templates(document)]
    assert len(pods) == 4 + len(STYLES) + 2 + 2 * len(manifests.KUEUE_JOBS)
    for pod in pods:
        assert pod["spec"]["serviceAccountName"] in names["ServiceAccount"]
        for _, node in manifests.walk(pod):
            if isinstance(node, dict):
                assert node.get("configMapRef", {"name": "rdm"})["name"] in names["ConfigMap"]
                # Kubernetes keeps kube-root-ca.crt in every namespace.
                assert node.get("configMap", {"name": "rdm"})["name"] in names["ConfigMap"] | {"kube-root-ca.crt"}
                assert {node.get(key, {"name": "rdm-s3"})["name"] for key in ("secretRef", "secretKeyRef")} <= SECRETS
    # KubeRay makes this pod for each RayJob.
    submitter = {"metadata": {"labels": {"ray.io/originated-from-crd": "RayJob"}}, "spec": {"containers": []}}
    for binding in manifests.of_kind(overlay, "RoleBinding"):
        assert binding["roleRef"]["name"] in names["Role"]
    for policy in [*manifests.of_kind(overlay, "NetworkPolicy"), *manifests.of_kind(overlay, "PodMonitor")]:
        selector = policy["spec"].get("podSelector", policy["spec"].get("selector"))
        labels = selector.get("matchLabels", {}).items()
        selected_pods = [pod for pod in [*pods, submitter] if labels <= pod["metadata"]["labels"].items()]
        ports = {port["name"]: port["containerPort"] for pod in selected_pods for container in pod["spec"]["containers"]
                 for port in container.get("ports", ())}
        endpoints = policy["spec"].get("podMetricsEndpoints", ())
        assert selected_pods and all(endpoint["port"] in ports for endpoint in endpoints)
        if policy["metadata"]["name"] == "rdm-nodes":
            open_ports = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", ())}
            assert open_ports == {8265, 8080, 44217, 44227} == open_ports & set(ports.values())
    for job in rayjobs:
        assert job["spec"].get("clusterSelector", {"ray.io/cluster": "rdm"})["ray.io/cluster"] in names["RayCluster"]
    for pod in (pod for document in manifests.of_kind(overlay, "CronJob") for pod in manifests.pod_templates(document)):
        environment = {variable["name"]: variable.get("value") for variable in pod["spec"]["containers"][0]["env"]}
        assert environment["RAY_API_SERVER_ADDRESS"] == f"http://{cluster['metadata']['name']}-head-svc:8265"


def test_manifests_contain_no_secret_and_the_guide_names_each_one(overlay: list[Document],
                                                                  rayjobs: list[Document]) -> None:
    assert not manifests.of_kind([*overlay, *rayjobs], "Secret")
    for document in [*overlay, *rayjobs]:
        for path, node in manifests.walk(document):
            if isinstance(node, dict) and isinstance(node.get("value"), str) and "name" in node:
                assert not re.search("KEY|SECRET|TOKEN|PASSWORD", node["name"]), path
    assert not [name for name in manifests.read_settings(overlay) if re.search("KEY|SECRET|TOKEN|PASSWORD", name)]
    guide = (REPOSITORY / "docs/guides/operate/kubernetes.md").read_text()
    assert all(f"create secret generic {name} " in guide for name in SECRETS)



def test_clusters_require_a_token_and_heads_take_no_work(overlay: list[Document], rayjobs: list[Document]) -> None:
    (own,) = manifests.cluster_specs(overlay)
    for cluster in manifests.cluster_specs([*overlay, *rayjobs]):
        # KubeRay makes a token for the cluster of a RayJob, which is not that of the standing one.
        assert cluster["authOptions"] == {"mode": "token", **({"secretName": "rdm-token"} if cluster is own else {})}
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        head, *workers = manifests.node_templates(cluster)
        assert "tolerations" not in head["spec"] and workers
        for pod in (head, *workers):
            assert pod["spec"]["securityContext"]["runAsNonRoot"] and pod["spec"]["restartPolicy"] == "Never"
            assert all(container["securityContext"]["allowPrivilegeEscalation"] is False
                       and container["image"].endswith("/rdm@sha256:DIGEST") for container in manifests.containers(pod))
    (standing,) = manifests.cluster_specs(overlay)
    head, *workers = manifests.node_templates(standing)
    assert [group["groupName"] for group in standing["workerGroupSpecs"]] == ["cpu", "gpu", "gpu8"]
    assert standing["enableInTreeAutoscaling"] and standing["autoscalerOptions"]["version"] == "v2"
    on_spot = [{"key": "rdm/spot", "operator": "Exists", "effect": "NoSchedule"} in worker["spec"]["tolerations"]
               for worker in workers]
    assert on_spot == [True, True, False]
    assert all(worker["spec"]["automountServiceAccountToken"] is False for worker in workers)
    if "affinity" in head["spec"]:  # on AWS
        text = json.dumps(head["spec"]["affinity"])
        assert "requiredDuring" in text and text.count("NotIn") == 2 and '"In"' not in text
        assert ["preferredDuring" in json.dumps(worker["spec"].get("affinity")) for worker in workers] == on_spot


def test_each_style_is_rebuilt_at_night_by_one_pod_that_waits(overlay: list[Document]) -> None:
    jobs = manifests.of_kind(overlay, "CronJob")
    assert all(job["spec"]["concurrencyPolicy"] == "Forbid" for job in jobs)
    command_lines = list(manifests.read_commands(jobs, manifests.read_settings(overlay)))
    datasets = [manifests.parse_command(words).dataset for words in command_lines]
    assert sorted(datasets) == sorted(STYLES)
    assert all(parse.parse_command(words)[1].wait and words[words.index("--source") + 1].endswith(f"/{dataset}")
               for words, dataset in zip(command_lines, datasets, strict=True))
    for names in ({job["spec"]["schedule"] for job in jobs}, {job["metadata"]["name"] for job in jobs}):
        assert len(names) == len(STYLES)


def test_manifests_have_the_tested_versions(overlay: list[Document], rayjobs: list[Document]) -> None:
    lock = dict(re.findall(r"^([\w.-]+)==(\S+)", (REPOSITORY / "requirements.lock").read_text(), re.M))
    assert {cluster["rayVersion"] for cluster in manifests.cluster_specs([*overlay, *rayjobs])} == {lock["ray"]}


def test_the_image_copies_existing_files_and_runs_without_privileges() -> None:
    dockerfile = (INFRA / "Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (?!--from)(.*)", dockerfile, re.M) for word in line.split()[:-1]]
    kept = set(re.findall("^!(.*)", (INFRA / "Dockerfile.dockerignore").read_text(), re.M))
    assert set(sources) == kept and all((REPOSITORY / name).exists() for name in sources)
    assert re.findall("^USER (.*)", dockerfile, re.M)[-1] == "1000:1000"
    assert not re.search(":latest|^FROM [^:]+$", dockerfile, re.M)
