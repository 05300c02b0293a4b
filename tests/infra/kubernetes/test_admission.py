"""infra/kubernetes/admission admits the pods and jobs of infra/ and refuses others. An interpreter of CEL evaluates it.

The pods of Ray clusters are completed as KubeRay 1.7 does it (ray-operator/controllers/ray/common/pod.go).
"""

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.infra import tools
from tests.infra.kubernetes import manifests
from tests.infra.kubernetes.manifests import Document

DIGEST = "REGISTRY/rdm@sha256:" + "0123456789abcdef" * 4
OPERATOR = {"userInfo": {"username": "jo", "groups": ["rdm-operators", "system:authenticated"]}}
ADMINISTRATOR = {"userInfo": {"username": "root", "groups": ["system:masters"]}}


@pytest.fixture(scope="module")
def policies() -> list[Document]:
    return manifests.render("admission")


def _decide(policies: list[Document], name: str, objects: list[Document], request: Document = OPERATOR) -> list[Any]:
    """For each object the messages of the failed validations, or None if the policy does not apply."""
    (policy,) = [each for each in policies if each["kind"] == "ValidatingAdmissionPolicy"
                 and each["metadata"]["name"] == name]
    task = {"policy": policy, "requests": [{"object": each, "request": request} for each in objects]}
    program = [tools.environment("policy") / "python", Path(__file__).with_name("cel.py")]
    done = subprocess.run(program, input=json.dumps(task), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _with_digest(node: Any) -> Any:
    """A document as it is after the digest was filled in."""
    return json.loads(json.dumps(node).replace("sha256:DIGEST", DIGEST.partition("@")[2]))


def _token(secret: str) -> list[Document]:
    return [{"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": secret, "key": "auth_token"}}}]


def _submitter(image: str, secret: str) -> Document:
    """KubeRay's pod that submits the entrypoint of a RayJob."""
    return {"metadata": {"labels": {"ray.io/originated-from-crd": "RayJob", "ray.io/originated-from-cr-name": "job"}},
            "spec": {"serviceAccountName": "default", "restartPolicy": "Never", "containers": [
                {"name": "ray-job-submitter", "image": image, "env": _token(secret)}]}}


def _pods(document: Document) -> list[Document]:
    """The pods that come of a document, with what KubeRay adds to them."""
    pods = [copy.deepcopy(pod) for pod in manifests.pod_templates(document)]
    for cluster in manifests.cluster_specs([document]):
        secret = cluster["authOptions"].get("secretName", "rdm-abcde")
        for number, pod in enumerate(pods):
            ray = pod["spec"]["containers"][0]
            ray["env"] = [*ray.get("env", ()), *_token(secret)]
            if number:
                wait = {key: copy.deepcopy(ray[key]) for key in ("image", "env", "securityContext", "volumeMounts")}
                pod["spec"].setdefault("initContainers", []).append({"name": "wait-gcs-ready", **wait})
            elif cluster.get("enableInTreeAutoscaling"):
                options = cluster["autoscalerOptions"]
                pod["spec"]["containers"].append({
                    "name": "autoscaler", "image": ray["image"], "env": _token(secret),
                    **{key: options[key] for key in ("securityContext", "volumeMounts", "resources")}})
        pods.append(_submitter(pods[0]["spec"]["containers"][0]["image"], secret))
    return pods


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """The documents of infra/kubernetes, with the digest filled in."""
    rendered = [each for overlay in manifests.OVERLAYS for each in manifests.render(f"overlays/{overlay}")]
    return _with_digest([*rendered, *manifests.read_jobs(), *manifests.render_kueue_jobs()])


def test_policies_follow_their_schemas_and_are_bound(policies: list[Document]) -> None:
    for document in policies:
        manifests.check_schema(document)
        assert "namespace" not in document["metadata"]
    bindings = manifests.of_kind(policies, "ValidatingAdmissionPolicyBinding")
    assert {each["spec"]["policyName"] for each in bindings} == {
        each["metadata"]["name"] for each in manifests.of_kind(policies, "ValidatingAdmissionPolicy")}
    for each in bindings:
        assert each["spec"]["validationActions"] == ["Deny"]
        assert each["spec"]["matchResources"] == {"namespaceSelector": {"matchLabels": {
            "kubernetes.io/metadata.name": "rdm"}}}
    assert all(each["spec"]["failurePolicy"] == "Fail" for each in manifests.of_kind(
        policies, "ValidatingAdmissionPolicy"))


def test_every_pod_of_infra_is_admitted(policies: list[Document], documents: list[Document]) -> None:
    pods = [pod for document in documents for pod in _pods(document)]
    assert len(pods) > 20
    assert _decide(policies, "rdm-pods", pods) == [[]] * len(pods)


def test_a_missing_digest_is_refused(policies: list[Document]) -> None:
    pods = [pod for each in manifests.render("overlays/on-prem") for pod in _pods(each)]
    assert all(len(answer) == 1 and "by its digest" in answer[0] for answer in _decide(policies, "rdm-pods", pods))


def _change(document: Document, path: str, value: Any) -> Document:
    """A copy with another value at `path`. The value None takes the key out."""
    changed = copy.deepcopy(document)
    *parents, last = path.split("/")
    node: Any = changed
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    if value is None:
        del node[last]
    else:
        node[last] = value
    return changed


CONTAINER = "spec/containers/0"
OTHER_SECRET = [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "rdm-token", "key": "auth_token"}}}]
BAD_PODS = [
    (f"{CONTAINER}/image", "REGISTRY/rdm:1", "by its digest"),
    (f"{CONTAINER}/image", "REGISTRY/rdm", "by its digest"),
    (f"{CONTAINER}/image", "REGISTRY/rdm@sha256:DIGEST", "by its digest"),
    (f"{CONTAINER}/image", f"{DIGEST}0", "by its digest"),
    ("spec/initContainers", [{"name": "a", "image": "busybox", "securityContext": {}}], "by its digest"),
    ("spec/ephemeralContainers", [{"name": "a", "image": DIGEST}], "debugging"),
    ("spec/serviceAccountName", "default", "serviceAccountName must be"),
    ("spec/serviceAccountName", "rdm-admin", "serviceAccountName must be"),
    ("spec/securityContext", None, "runAsNonRoot"),
    ("spec/securityContext/runAsNonRoot", False, "runAsNonRoot"),
    ("spec/securityContext/seccompProfile/type", "Unconfined", "runAsNonRoot"),
    (f"{CONTAINER}/securityContext", None, "runAsNonRoot"),
    (f"{CONTAINER}/securityContext/runAsNonRoot", False, "runAsNonRoot"),
    (f"{CONTAINER}/securityContext/seccompProfile", {"type": "Unconfined"}, "runAsNonRoot"),
    (f"{CONTAINER}/securityContext/allowPrivilegeEscalation", True, "runAsNonRoot"),
    (f"{CONTAINER}/securityContext/readOnlyRootFilesystem", None, "runAsNonRoot"),
    (f"{CONTAINER}/securityContext/capabilities", {"drop": ["NET_RAW"]}, "runAsNonRoot"),
    (f"{CONTAINER}/securityContext/capabilities", {"drop": ["ALL"], "add": ["CHOWN"]}, "runAsNonRoot"),
    ("spec/volumes", [{"name": "a", "secret": {"secretName": "rdm-token"}}], "may hold no secret"),
    ("spec/volumes", [{"name": "a", "csi": {"driver": "secrets-store.csi.k8s.io"}}], "may hold no secret"),
    ("spec/volumes", [{"name": "a", "projected": {"sources": [{"secret": {"name": "rdm-token"}}]}}],
     "may hold no secret"),
    ("spec/volumes", [{"name": "a", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}],
     "may hold no secret"),
    (f"{CONTAINER}/envFrom", [{"secretRef": {"name": "rdm-token"}}], "envFrom may name"),
    (f"{CONTAINER}/env", OTHER_SECRET, "env may take"),
]


def test_a_pod_that_wants_more_is_refused(policies: list[Document], documents: list[Document]) -> None:
    (cluster, *_) = manifests.cluster_specs(manifests.of_kind(documents, "RayCluster"))
    worker = manifests.node_templates(cluster)[1]
    bad = [_change(worker, path, value) for path, value, _ in BAD_PODS]
    answers = _decide(policies, "rdm-pods", bad, ADMINISTRATOR)
    for (path, value, message), answer in zip(BAD_PODS, answers, strict=True):
        assert len([each for each in answer if message in each]) == 1, (path, value, answer)


def test_a_submitter_gets_the_token_and_nothing_else(policies: list[Document], documents: list[Document]) -> None:
    nightly = next(manifests.pod_templates(manifests.of_kind(documents, "CronJob")[0]))
    keys = [{"secretRef": {"name": "rdm-s3"}}]
    own = _submitter(DIGEST, "rdm-token")
    bad = [_change(own, f"{CONTAINER}/envFrom", keys), _change(nightly, f"{CONTAINER}/envFrom", keys),
           _change(own, f"{CONTAINER}/env", OTHER_SECRET)]
    answers = _decide(policies, "rdm-pods", [*bad, own, nightly])
    assert [len(each) for each in answers] == [1, 1, 1, 0, 0]


def test_a_role_of_aws_is_admitted(policies: list[Document], documents: list[Document]) -> None:
    # Amazon's webhook adds this to pods of an account with a role.
    token = {"path": "token", "expirationSeconds": 86400, "audience": "sts.amazonaws.com"}
    volume = {"name": "aws-iam-token", "projected": {"sources": [{"serviceAccountToken": token}]}}
    nodes = _pods(manifests.of_kind(documents, "RayCluster")[0])[:3]
    pods = [_change(pod, "spec/volumes", [*pod["spec"]["volumes"], volume]) for pod in nodes]
    assert _decide(policies, "rdm-pods", pods) == [[]] * 3


def test_people_who_run_jobs_may_create_every_job_of_infra(policies: list[Document], documents: list[Document]) -> None:
    jobs = manifests.of_kind(documents, "RayJob")
    assert len(jobs) > 10
    assert _decide(policies, "rdm-operators", jobs) == [[]] * len(jobs)


CLUSTER = "spec/rayClusterSpec"
HEAD = f"{CLUSTER}/headGroupSpec/template/spec"
WORKER = f"{CLUSTER}/workerGroupSpecs/0/template/spec"
BAD_JOBS = [
    ("spec/submitterPodTemplate", {"spec": {"containers": []}}, "submitterPodTemplate"),
    (f"{CLUSTER}/authOptions/secretName", "rdm-token", "authOptions"),
    (f"{CLUSTER}/authOptions/mode", "disabled", "authOptions"),
    (f"{CLUSTER}/authOptions", None, "authOptions"),
    (f"{CLUSTER}/enableInTreeAutoscaling", True, "fixed size"),
    (f"{CLUSTER}/autoscalerOptions", {"envFrom": [{"secretRef": {"name": "rdm-token"}}]}, "fixed size"),
    (f"{CLUSTER}/gcsFaultToleranceOptions", {"redisPassword": OTHER_SECRET[0]}, "fixed size"),
    (f"{CLUSTER}/historyServerOptions", {}, "fixed size"),
    *[change for pod in (HEAD, WORKER) for change in (
        (f"{pod}/serviceAccountName", "rdm-head", "serviceAccountName"),
        (f"{pod}/serviceAccountName", None, "serviceAccountName"),
        (f"{pod}/automountServiceAccountToken", True, "serviceAccountName"),
        (f"{pod}/automountServiceAccountToken", None, "serviceAccountName"),
        (f"{pod}/volumes", [{"name": "a", "secret": {"secretName": "rdm-token"}}], "volumes may be"),
        (f"{pod}/volumes", [{"name": "a", "projected": {"sources": []}}], "volumes may be"),
        (f"{pod}/volumes", [{"name": "a", "hostPath": {"path": "/"}}], "volumes may be"),
        (f"{pod}/containers/0/env", _token("rdm-token"), "containers may take"),
        (f"{pod}/containers/0/envFrom", [{"secretRef": {"name": "rdm-token"}}], "containers may take"),
        (f"{pod}/initContainers", [{"name": "a", "image": DIGEST, "env": OTHER_SECRET}], "containers may take"))]]


def test_a_job_that_wants_more_is_refused(policies: list[Document], documents: list[Document]) -> None:
    (job,) = [each for each in documents if each["metadata"]["name"] == "demo"]
    bad = [_change(job, path, value) for path, value, _ in BAD_JOBS]
    for (path, value, message), answer in zip(BAD_JOBS, _decide(policies, "rdm-operators", bad), strict=True):
        assert len(answer) == 1 and message in answer[0], (path, value, answer)
    assert _decide(policies, "rdm-operators", bad, ADMINISTRATOR) == [None] * len(bad)


@pytest.fixture
def allowed() -> Callable[[str, str, str], bool]:
    """Whether the roles of people who run jobs allow a verb."""
    documents = [*manifests.render("overlays/on-prem"), *manifests.render("kueue/queues")]
    names = {each["roleRef"]["name"] for each in manifests.of_kind(documents, "RoleBinding")
             if {"kind": "Group", "name": "rdm-operators", "apiGroup": "rbac.authorization.k8s.io"} in each["subjects"]}
    rules = [rule for role in manifests.of_kind(documents, "Role") if role["metadata"]["name"] in names
             for rule in role["rules"]]
    assert not manifests.of_kind(documents, "ClusterRole") + manifests.of_kind(documents, "ClusterRoleBinding")

    def ask(verb: str, group: str, resource: str) -> bool:
        return any({verb, "*"} & set(rule["verbs"]) and {group, "*"} & set(rule["apiGroups"])
                   and {resource, "*"} & set(rule["resources"]) for rule in rules)
    return ask


def test_people_who_run_jobs_cannot_create_pods(allowed: Callable[[str, str, str], bool]) -> None:
    makers = [("", "pods"), ("", "pods/exec"), ("", "pods/attach"), ("", "pods/ephemeralcontainers"),
              ("apps", "deployments"), ("", "replicationcontrollers"), ("apps", "statefulsets"),
              ("apps", "daemonsets"), ("apps", "replicasets"), ("batch", "jobs"), ("batch", "cronjobs"),
              ("ray.io", "rayclusters"), ("ray.io", "rayservices"), ("ray.io", "raycronjobs"),
              ("", "serviceaccounts"), ("", "serviceaccounts/token"), ("rbac.authorization.k8s.io", "roles"),
              ("rbac.authorization.k8s.io", "rolebindings"), ("networking.k8s.io", "networkpolicies"),
              ("", "configmaps")]
    assert not [(verb, *each) for each in makers for verb in ("create", "update", "patch") if allowed(verb, *each)]
    assert not [verb for verb in ("get", "list", "watch", "create", "update", "patch") if allowed(verb, "", "secrets")]
    assert all(allowed(verb, "ray.io", "rayjobs") for verb in ("get", "list", "watch", "create", "patch", "delete"))
    assert allowed("get", "", "pods/log") and allowed("create", "", "pods/portforward")


@pytest.mark.parametrize("name", manifests.OVERLAYS)
def test_only_the_autoscaler_has_a_token_of_kubernetes(name: str) -> None:
    documents = manifests.render(f"overlays/{name}")
    accounts = manifests.of_kind(documents, "ServiceAccount")
    assert {each["metadata"]["name"] for each in accounts} == {"default", "rdm-head", "rdm-worker", "rdm-submit"}
    assert all(each["automountServiceAccountToken"] is False for each in accounts)
    everything = [*documents, *manifests.read_jobs(), *manifests.render_kueue_jobs()]
    pods = [pod for each in everything for pod in manifests.pod_templates(each)]
    assert all(pod["spec"]["automountServiceAccountToken"] is False for pod in pods)
    holders = [(pod["spec"]["serviceAccountName"], volume["name"]) for pod in pods
               for volume in pod["spec"].get("volumes", ()) if "projected" in volume]
    assert holders == [("rdm-head", "kubernetes-access")]
    mounted = [mount for pod in pods for container in manifests.containers(pod)
               for mount in container.get("volumeMounts", ()) if mount["name"] == "kubernetes-access"]
    (cluster,) = manifests.cluster_specs(documents)
    from ray.autoscaler._private.kuberay import node_provider
    (access,) = [each for each in cluster["autoscalerOptions"]["volumeMounts"] if each["name"] == "kubernetes-access"]
    assert not mounted and access["readOnly"]
    assert f"{access['mountPath']}/token" == node_provider.IN_CLUSTER_TOKEN_PATH
    assert f"{access['mountPath']}/ca.crt" == node_provider.IN_CLUSTER_CA_CERT_PATH


@pytest.mark.parametrize("name", manifests.OVERLAYS)
def test_every_path_that_a_pod_writes_has_a_volume(name: str) -> None:
    documents = [*manifests.render(f"overlays/{name}"), *manifests.read_jobs(), *manifests.render_kueue_jobs()]
    for pod in (pod for each in documents for pod in manifests.pod_templates(each)):
        empty = {volume["name"] for volume in pod["spec"]["volumes"] if "emptyDir" in volume}
        assert all("sizeLimit" in volume["emptyDir"] for volume in pod["spec"]["volumes"] if "emptyDir" in volume)
        assert all(each["securityContext"]["readOnlyRootFilesystem"] is True for each in manifests.containers(pod))
        for container in pod["spec"]["containers"]:
            places = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in empty}
            assert {"/tmp", "/home/rdm"} <= places
    for cluster in manifests.cluster_specs(documents):
        if "autoscalerOptions" in cluster:
            assert "/tmp" in {mount["mountPath"] for mount in cluster["autoscalerOptions"]["volumeMounts"]}
            assert cluster["autoscalerOptions"]["securityContext"]["readOnlyRootFilesystem"] is True
