"""The network policies, evaluated as a network plugin does: the IPs and pods that each kind of pod reaches."""

import ipaddress
from typing import Any

import pytest

from tests.infra.kubernetes import manifests
from tests.infra.kubernetes.manifests import Document

NODE = {"app.kubernetes.io/part-of": "rdm", "ray.io/cluster": "rdm"}
SUBMITTERS = ({"app.kubernetes.io/component": "rdm-submit"}, {"ray.io/originated-from-crd": "RayJob"})
OTHERS: tuple[dict[str, str], ...] = ({}, {"app": "something-else"})
# Metadata services, from the documentation of the clouds, and link-local IPs.
METADATA = (
    "169.254.169.254",  # AWS, Google, Azure, Oracle, IBM, DigitalOcean, Hetzner, OpenStack
    "169.254.170.2", "169.254.170.23",  # credentials of ECS, of EKS Pod Identity
    "169.254.0.23", "169.254.42.42", "169.254.0.1", "169.254.255.254",  # Tencent, Scaleway, the ends of the range
    "100.100.100.200",  # Alibaba
    "168.63.129.16",  # Azure's host
    "192.0.0.192",  # Oracle's first cloud
    "fe80::1", "fe80::a9fe:a9fe", "febf:ffff::1",
    "fd00:ec2::254", "fd00:ec2::23", "fd00:ec2::253",  # AWS: metadata, EKS Pod Identity, resolver
    "fd20:ce::254", "fd00:c1::a9fe:a9fe", "fd00:42::42",  # Google, Oracle, Scaleway
    "64:ff9b::a9fe:a9fe", "64:ff9b::6464:64c8",  # the first and Alibaba's through NAT64
    "64:ff9b::a83f:8110", "64:ff9b::c000:c0", "2002:a9fe:a9fe::1",  # Azure's and Oracle's, and the first through 6to4
)
REACHABLE = ("93.184.215.14", "8.8.8.8", "10.3.4.5", "192.168.7.7", "100.64.0.1", "169.253.255.255", "169.255.0.1",
             "2606:2800:21f:cb07::1", "fd12:3456::1", "64:ff9b::808:808")


@pytest.fixture(params=manifests.OVERLAYS)
def policies(request: pytest.FixtureRequest) -> list[Document]:
    return manifests.of_kind(manifests.render(f"overlays/{request.param}"), "NetworkPolicy")


def _selects(selector: Document, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def _rules(policies: list[Document], labels: dict[str, str], direction: str) -> list[Document] | None:
    """The rules for a pod, or None if no policy selects it: then everything is allowed."""
    mine = [each["spec"] for each in policies if _selects(each["spec"]["podSelector"], labels)
            and direction.capitalize() in each["spec"]["policyTypes"]]
    return [rule for each in mine for rule in each.get(direction, ())] if mine else None


def _port(rule: Document, port: int) -> bool:
    return "ports" not in rule or any(each["port"] == port and each["protocol"] == "TCP" for each in rule["ports"])


def _in_block(peer: Document, address: str) -> bool:
    block, where = peer.get("ipBlock"), ipaddress.ip_address(address)
    return bool(block) and where in ipaddress.ip_network(block["cidr"]) and not any(
        where in ipaddress.ip_network(each) for each in block.get("except", ()))


def reaches(policies: list[Document], labels: dict[str, str], address: str, port: int = 80) -> bool:
    """Whether a pod may open a connection to an address outside the cluster."""
    rules = _rules(policies, labels, "egress")
    return rules is None or any(
        _port(rule, port) and any(_in_block(peer, address) for peer in rule["to"]) for rule in rules)


def _is_peer(peer: Document, labels: dict[str, str], namespace: str | None) -> bool:
    if "namespaceSelector" in peer:
        assert "podSelector" not in peer
        return namespace is not None and _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
    return namespace is None and "podSelector" in peer and _selects(peer["podSelector"], labels)


def talks(policies: list[Document], source: dict[str, str], target: dict[str, str], port: int,
          namespace: str | None = None) -> bool:
    """Whether a pod (of another namespace, if it is given) may open a connection to a pod of ours."""
    def peers(rules: list[Document] | None, side: str, labels: dict[str, str], place: str | None) -> bool:
        if rules is None:
            return True
        return any(_port(rule, port) and any(_is_peer(peer, labels, place) for peer in rule[side]) for rule in rules)
    out = namespace is not None or peers(_rules(policies, source, "egress"), "to", target, None)
    return out and peers(_rules(policies, target, "ingress"), "from", source, namespace)


@pytest.mark.parametrize("address", METADATA)
def test_no_pod_reaches_metadata_or_link_local_ips(policies: list[Document], address: str) -> None:
    for labels in (NODE, *SUBMITTERS, *OTHERS):
        for port in (80, 443, 53):
            assert not reaches(policies, labels, address, port)


def test_nodes_reach_hosts_of_images(policies: list[Document]) -> None:
    for address in REACHABLE:
        assert all(reaches(policies, NODE, address, port) for port in (80, 443, 9000))


def test_others_reach_nothing_outside(policies: list[Document]) -> None:
    for address in REACHABLE:
        assert not any(reaches(policies, labels, address, 443) for labels in (*SUBMITTERS, *OTHERS))


def test_submitters_reach_only_the_dashboard_and_nodes_reach_each_other(policies: list[Document]) -> None:
    for submitter in SUBMITTERS:
        assert talks(policies, submitter, NODE, 8265)
        assert not talks(policies, submitter, NODE, 6379) and not talks(policies, submitter, NODE, 8080)
        assert not any(talks(policies, source, submitter, 80) for source in (NODE, *SUBMITTERS, *OTHERS))
    assert talks(policies, NODE, NODE, 6379) and talks(policies, NODE, NODE, 40000)
    for other in OTHERS:
        assert not any(talks(policies, other, target, port)
                       for target in (NODE, *SUBMITTERS) for port in (8265, 6379, 53))
        assert not talks(policies, NODE, other, 80)


def test_only_kuberay_and_prometheus_reach_pods_from_other_namespaces(policies: list[Document]) -> None:
    assert talks(policies, {}, NODE, 8265, "kuberay-system") and not talks(policies, {}, NODE, 6379, "kuberay-system")
    assert all(talks(policies, {}, NODE, port, "monitoring") for port in (8080, 44217, 44227))
    assert not talks(policies, {}, NODE, 8265, "monitoring")
    for namespace in ("default", "kube-system", "other"):
        assert not any(talks(policies, {}, NODE, port, namespace) for port in (8265, 8080, 6379))


def test_dns_requests_go_to_kube_system(policies: list[Document]) -> None:
    for labels in (NODE, *SUBMITTERS):
        dns: list[Any] = [rule for rule in _rules(policies, labels, "egress") or () if any(
            _selects(peer.get("namespaceSelector", {"matchLabels": {"x": "x"}}),
                     {"kubernetes.io/metadata.name": "kube-system"}) for peer in rule["to"])]
        assert [rule["ports"] for rule in dns] == [[{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]]
