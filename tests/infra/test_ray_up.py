"""The files of `ray up`: Ray's own check, its requests to EC2, and the commands before `ray start`."""

import copy
from typing import Any

import jsonschema
import pytest
import yaml

from tests.infra.kubernetes.manifests import INFRA

IMAGE = "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"


@pytest.mark.parametrize("name", ["aws", "on-prem"])
def test_ray_itself_takes_the_cluster_files(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config
    cluster_file = yaml.safe_load((INFRA / f"ray-up/{name}.yaml").read_text())
    config = prepare_config(copy.deepcopy(cluster_file))
    validate_config(config)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "ray stop" in commands[0]
        assert all(words in commands[1] for words in ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=", "ray start"))
    for words in ("--num-cpus=0", "--dashboard-host=127.0.0.1"):
        assert words in config["head_start_ray_commands"][1]
    for remote, local in cluster_file["file_mounts"].items():
        assert remote.endswith("token") or (INFRA.parent / local).is_file()
    check_command, start_command = config["worker_start_ray_commands"][1].split(" && ")
    assert check_command.endswith("/check-driver.sh") and check_command.rsplit(" ", 1)[1] in cluster_file["file_mounts"]
    assert "ray start" in start_command
    kinds = cluster_file.get("available_node_types", {})
    spot = {kind for kind, node_type in kinds.items() if "InstanceMarketOptions" in node_type["node_config"]}
    assert spot == (set(kinds) - {cluster_file["head_node_type"]} if kinds else set())
    config["head_start_commands"] = []
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config)


def test_every_machine_gets_a_current_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Ray's bootstrap to its call of EC2, which looks the parameter up; moto answers in EC2's place."""
    import boto3
    import botocore.client
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config
    for name, value in {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none",
                        "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    calls: list[tuple[str, dict[str, Any]]] = []
    call = botocore.client.BaseClient._make_api_call

    def record(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        calls.append((operation, copy.deepcopy(arguments)))
        return call(client, operation, arguments)

    with mock_aws():
        ec2 = boto3.client("ec2")
        boto3.client("iam").create_instance_profile(InstanceProfileName="rdm-nodes")
        places = {"REGION": "us-east-1", "ACCOUNT": "123456789012",
                  "SUBNET": ec2.describe_subnets()["Subnets"][0]["SubnetId"],
                  "[GROUP]": f"[{ec2.describe_security_groups()['SecurityGroups'][0]['GroupId']}]"}
        text = (INFRA / "ray-up/aws.yaml").read_text()
        for word, value in places.items():
            text = text.replace(word, value)
        monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", record)
        config = bootstrap_aws(prepare_config(yaml.safe_load(text)))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for kind, node_type in config["available_node_types"].items():
            provider.create_node(node_type["node_config"], {"ray-user-node-type": kind}, 1)
    assert "DescribeImages" not in dict(calls)  # which takes no parameters
    launched = [(arguments["InstanceType"], arguments["ImageId"]) for operation, arguments in calls
                if operation == "RunInstances"]
    assert launched == [("m7i.2xlarge", IMAGE), ("m7i.2xlarge", IMAGE), ("g6e.2xlarge", IMAGE)]
