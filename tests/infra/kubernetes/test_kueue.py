"""infra/kubernetes/kueue: queues, and RayJobs that Kueue admits. Its rules are those of its webhook (Kueue 0.19)."""

import copy
from typing import Any

import jsonschema
import pytest

from tests.infra.kubernetes import manifests
from tests.infra.kubernetes.manifests import Document

UNITS = {"m": 1e-3, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
SUBMITTER = {"cpu": "500m", "memory": "200Mi"}  # KubeRay's own pod, which Kueue counts


def _number(quantity: str) -> float:
    unit = quantity.lstrip("0123456789.")
    return float(quantity.removesuffix(unit)) * UNITS.get(unit, 1.0)


@pytest.fixture(scope="module")
def queues() -> list[Document]:
    return manifests.render("kueue/queues")


@pytest.fixture(scope="module", params=manifests.KUEUE_JOBS)
def job(request: pytest.FixtureRequest) -> Document:
    (document,) = manifests.render(f"kueue/{request.param}")
    return document


def test_queues_follow_their_schemas(queues: list[Document]) -> None:
    assert [each["kind"] for each in queues if each["kind"] in manifests.KUEUE] == [
        "ClusterQueue", "LocalQueue", "ResourceFlavor", "WorkloadPriorityClass"]
    for document in queues:
        manifests.check_schema(document)


@pytest.mark.parametrize("path, value", [
    ("spec.resourceGroup", []), ("spec.queueingStrategy", "Fifo"), ("spec.preemption.withinClusterQueue", "Always"),
    ("spec.resourceGroups.0.flavors.0.resources.0.nominalQuota", "many"), ("metadata.namespace", "rdm")])
def test_faults_of_a_queue_are_found(queues: list[Document], path: str, value: Any) -> None:
    document = copy.deepcopy(next(each for each in queues if each["kind"] == "ClusterQueue"))
    manifests.check_schema(document)
    node: Any = document
    *parents, last = path.split(".")
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    node[last] = value
    with pytest.raises((AssertionError, jsonschema.ValidationError)):
        manifests.check_schema(document)


def test_queues_refer_to_each_other_and_to_the_jobs(queues: list[Document], job: Document) -> None:
    names = {kind: {each["metadata"]["name"] for each in manifests.of_kind(queues, kind)} for kind in manifests.KUEUE}
    (local,), (cluster,) = (manifests.of_kind(queues, kind) for kind in ("LocalQueue", "ClusterQueue"))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert job["metadata"]["namespace"] == local["metadata"]["namespace"] == "rdm"
    assert local["spec"]["clusterQueue"] in names["ClusterQueue"]
    assert cluster["spec"]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "rdm"}
    for group in cluster["spec"]["resourceGroups"]:
        for flavor in group["flavors"]:
            assert flavor["name"] in names["ResourceFlavor"]
            assert [each["name"] for each in flavor["resources"]] == group["coveredResources"]


def test_kueue_admits_each_job(job: Document) -> None:
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["suspend"] and spec["shutdownAfterJobFinishes"] and spec["backoffLimit"] == 0
    assert "clusterSelector" not in spec and not cluster.get("enableInTreeAutoscaling")
    groups = cluster["workerGroupSpecs"]
    assert len(groups) <= 16 and "head" not in {group["groupName"] for group in groups}
    assert all(group["replicas"] == group["minReplicas"] == group["maxReplicas"] for group in groups)


def test_each_job_fits_the_queue(queues: list[Document], job: Document) -> None:
    (queue,) = manifests.of_kind(queues, "ClusterQueue")
    quota = {each["name"]: _number(each["nominalQuota"]) for group in queue["spec"]["resourceGroups"]
             for flavor in group["flavors"] for each in flavor["resources"]}
    needs = {name: _number(value) for name, value in SUBMITTER.items()}
    cluster = job["spec"]["rayClusterSpec"]
    for pod, count in zip(manifests.node_templates(cluster),
                          [1, *(group["replicas"] for group in cluster["workerGroupSpecs"])], strict=True):
        (container,) = pod["spec"]["containers"]
        for name, value in (container["resources"]["limits"] | container["resources"]["requests"]).items():
            needs[name] = needs.get(name, 0.0) + count * _number(value)
    assert needs.keys() <= quota.keys()
    assert not {name: (value, quota[name]) for name, value in needs.items() if value > quota[name]}
    words = manifests.split_command(job["spec"]["entrypoint"], {"RDM_ROOT": "s3://BUCKET/rdm"})
    flags = {flag: int(words[words.index(flag) + 1]) for flag in ("--workers", "--gpus", "--cpus")}
    assert flags["--workers"] * flags["--gpus"] == needs["nvidia.com/gpu"]
    head = manifests.node_templates(cluster)[0]["spec"]["containers"][0]["resources"]["requests"]
    own = needs["cpu"] - _number(SUBMITTER["cpu"]) - _number(head["cpu"])
    assert flags["--workers"] * flags["--cpus"] <= own
