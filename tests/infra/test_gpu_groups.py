"""The worker groups of one and of eight GPUs: what their pods get, and which of them Ray's autoscaler starts."""

from typing import Any

import pytest

from tests.infra.kubernetes import manifests
from tests.infra.kubernetes.manifests import Document

GPU, EFA, HUGE_PAGES = "nvidia.com/gpu", "vpc.amazonaws.com/efa", "hugepages-2Mi"
# Capabilities that containers may add under the policy `baseline`, which the namespace enforces.
BASELINE = {"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "SETFCAP",
            "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"}


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[quantity[-2:]]


def _standing(name: str) -> Document:
    (cluster,) = manifests.cluster_specs(manifests.render(f"overlays/{name}"))
    return cluster


def _groups(cluster: Document) -> dict[str, Document]:
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def _limits(group: Document) -> dict[str, str]:
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]


def _gpu_groups() -> list[tuple[str, Document]]:
    """Every group with GPUs, of the standing clusters and of the RayJobs for Kueue, with the place it is from."""
    clusters = [(name, cluster) for name in manifests.OVERLAYS for cluster in [_standing(name)]]
    clusters += [(name, cluster) for name in manifests.KUEUE_JOBS
                 for cluster in manifests.cluster_specs(manifests.render(f"kueue/{name}"))]
    groups = [(name, group) for name, cluster in clusters for group in cluster["workerGroupSpecs"]]
    return [(name, group) for name, group in groups if GPU in _limits(group)]


def test_every_gpu_pod_is_checked_before_ray_starts() -> None:
    groups = _gpu_groups()
    assert len(groups) == 2 * len(manifests.OVERLAYS) + len(manifests.KUEUE_JOBS)
    for _, group in groups:
        pod = group["template"]["spec"]
        (check,), limits = pod["initContainers"], _limits(group)
        wanted = [limits[GPU], *([limits[EFA]] if EFA in limits else [])]
        assert check["command"] == ["bash", "/checks/check-driver.sh", *wanted]
        # It sees the devices that the worker gets, from the same image.
        assert {key: check["resources"]["limits"].get(key) for key in (GPU, EFA)} == {
            key: limits.get(key) for key in (GPU, EFA)}
        assert check["image"] == pod["containers"][0]["image"]
        mounts = {mount["name"]: mount["mountPath"] for mount in check["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts == {"checks": "/checks"} and volumes["checks"]["configMap"] == {"name": "rdm-checks"}
        assert {"key": GPU, "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    for name in manifests.OVERLAYS:
        files = [document["data"] for document in manifests.of_kind(manifests.render(f"overlays/{name}"), "ConfigMap")
                 if document["metadata"]["name"] == "rdm-checks"]
        assert files == [{"check-driver.sh": (manifests.INFRA / "kubernetes/base/check-driver.sh").read_text()}]


def test_pods_of_eight_have_their_own_shared_memory() -> None:
    eights = [group for _, group in _gpu_groups() if group["groupName"] == "gpu8"]
    assert len(eights) == len(manifests.OVERLAYS) + 2
    for group in eights:
        pod, limits = group["template"]["spec"], _limits(group)
        assert limits[GPU] == "8" and int(limits["cpu"]) >= 8 * 8
        (shared,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
        assert shared["medium"] == "Memory"
        # Shared memory counts towards the limit, and Ray's object store must leave NCCL and torch most of it.
        assert 4 * _bytes(shared["sizeLimit"]) <= _bytes(limits["memory"])
        assert 4 * int(group["rayStartParams"]["object-store-memory"]) <= _bytes(shared["sizeLimit"])


def test_efa_is_requested_only_on_aws() -> None:
    for name, group in _gpu_groups():
        (container,), limits = group["template"]["spec"]["containers"], _limits(group)
        variables = {variable["name"]: variable["value"] for variable in container.get("env", ())}
        if "aws" in name and group["groupName"] == "gpu8":
            assert limits[EFA] == "32" and _bytes(limits[HUGE_PAGES]) % (2 << 20) == 0
            assert int(limits["cpu"]) <= 192 - 8 and _bytes(limits["memory"]) <= 0.9 * 2 * 2**40  # p5.48xlarge
            assert variables == {"FI_PROVIDER": "efa", "NCCL_NET_PLUGIN": "ofi", "NCCL_NET": "Libfabric",
                                 "NCCL_DEBUG": "WARN"}
        else:
            assert not {EFA, HUGE_PAGES} & limits.keys() and not variables
    aws, train = _groups(_standing("aws"))["gpu8"], manifests.cluster_specs(manifests.render("kueue/train-aws"))[0]
    (own,) = train["workerGroupSpecs"]
    for part in ("containers", "initContainers", "volumes"):
        assert own["template"]["spec"][part] == aws["template"]["spec"][part]


@pytest.mark.parametrize("name", manifests.OVERLAYS)
def test_the_namespace_admits_every_pod(name: str) -> None:
    documents = [*manifests.render(f"overlays/{name}"), *manifests.read_jobs(), *manifests.render_kueue_jobs()]
    (namespace,) = manifests.of_kind(documents, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "baseline"
    for pod in (pod for document in documents for pod in manifests.pod_templates(document)):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()
        assert all("hostPath" not in volume for volume in pod["spec"].get("volumes", ()))
        for container in manifests.containers(pod):
            context = container["securityContext"]
            assert not context.get("privileged") and set(context["capabilities"].get("add", ())) <= BASELINE


def _launches(cluster: Document, count: int, cpus: int, together: bool) -> dict[str, int]:
    """The pods by group that Ray's own autoscaler starts for `count` workers of one GPU each, from nothing.

    Ray Train asks for all of its workers together, the pool of actors for one after another.
    """
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest
    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "rdm", "namespace": "rdm"}, "spec": cluster}), skip_content_hash=True)
    requests = [ResourceRequestUtil.make({"GPU": 1, "CPU": cpus}) for _ in range(count)]
    reply = ResourceDemandScheduler(_Events()).schedule(SchedulingRequest(
        disable_launch_config_check=True, node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(requests) if not together else [],
        gang_resource_requests=[GangResourceRequest(requests=requests)] if together else []))
    assert not reply.infeasible_resource_requests and not reply.infeasible_gang_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch if launch.instance_type != "headgroup"}


class _Events:
    def __getattr__(self, name: str) -> Any:
        return lambda *words, **named: None


@pytest.mark.parametrize("name", manifests.OVERLAYS)
def test_embed_gets_pods_of_one_gpu_and_train_pods_of_eight(name: str) -> None:
    cluster = _standing(name)
    settings = manifests.read_settings(manifests.render(f"overlays/{name}"))
    for verb, group, gpus in (("embed", "gpu", 1), ("train", "gpu8", 8)):
        (job,) = [job for job in manifests.read_jobs() if f"jobs {verb} " in job["spec"]["entrypoint"]]
        words = manifests.split_command(job["spec"]["entrypoint"], settings)
        flags = {flag: int(words[words.index(flag) + 1]) for flag in ("--workers", "--gpus", "--cpus")}
        assert flags["--gpus"] == 1
        room = _groups(cluster)[group]["maxReplicas"] * gpus
        for count in {gpus, min(room, flags["--workers"])}:
            assert _launches(cluster, count, flags["--cpus"], together=verb == "train") == {group: count // gpus}
