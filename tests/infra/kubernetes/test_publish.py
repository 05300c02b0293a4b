"""The private key of releases: one pod in its own namespace has it, and no pod of the cluster can get it."""

import pytest

from jobs.cli.publish import RebuildOptions
from tests.infra.kubernetes import manifests
from tests.infra.kubernetes.manifests import Document

KEY = "rdm-release-key"


@pytest.fixture(scope="module")
def publish() -> list[Document]:
    return manifests.render("publish")


def test_the_publisher_follows_its_schemas(publish: list[Document]) -> None:
    for document in publish:
        manifests.check_schema(document)
    assert {document["metadata"].get("namespace", "rdm-publish") for document in publish} == {"rdm-publish"}
    (namespace,) = manifests.of_kind(publish, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    accounts = manifests.of_kind(publish, "ServiceAccount")
    assert len(accounts) == 2 and not any(account["automountServiceAccountToken"] for account in accounts)
    assert not manifests.of_kind(publish, "Role") + manifests.of_kind(publish, "RoleBinding")


def test_its_pod_signs_with_the_mounted_key_and_runs_nothing_on_the_cluster(publish: list[Document]) -> None:
    (job,) = manifests.of_kind(publish, "CronJob")
    (pod,) = manifests.pod_templates(job)
    (container,) = pod["spec"]["containers"]
    settings = {"RDM_ROOT": "s3://bucket/rdm", "RDM_PICTURES": "s3://bucket/pictures"}
    (command,) = manifests.read_commands(manifests.of_kind(publish, "CronJob"), settings)
    options = manifests.parse_command(command)
    assert isinstance(options, RebuildOptions) and options.common.local
    assert options.signing.sign == "/keys/release.pem"
    (mount,) = [each for each in container["volumeMounts"] if options.signing.sign.startswith(each["mountPath"])]
    (volume,) = [each for each in pod["spec"]["volumes"] if each["name"] == mount["name"]]
    # Root owns the file, and the command accepts it because others cannot read it.
    assert mount["readOnly"] and volume["secret"] == {"secretName": KEY, "defaultMode": 0o440}
    assert pod["spec"]["securityContext"]["fsGroup"] == 1000 and not pod["spec"]["automountServiceAccountToken"]


def test_no_other_pod_has_the_key(publish: list[Document]) -> None:
    others = [*manifests.read_jobs(), *manifests.render_kueue_jobs(),
              *(document for overlay in manifests.OVERLAYS for document in manifests.render(f"overlays/{overlay}"))]
    assert KEY in str(publish) and KEY not in str(others)


def test_the_publisher_reaches_what_nodes_reach_and_no_pod_reaches_it(publish: list[Document]) -> None:
    (policy,) = manifests.of_kind(publish, "NetworkPolicy")
    nodes = next(each for each in manifests.of_kind(manifests.render("overlays/on-prem"), "NetworkPolicy")
                 if each["metadata"]["name"] == "rdm-nodes")
    blocks = [[peer["ipBlock"] for rule in each["spec"]["egress"] for peer in rule["to"] if "ipBlock" in peer]
              for each in (policy, nodes)]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 2
    assert policy["spec"]["podSelector"] == {} and not policy["spec"].get("ingress")
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
