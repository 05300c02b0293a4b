"""A real Prometheus watches a real run on a real cluster, and answers the queries of the dashboard and the rules."""

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli.model import train
from jobs.cluster.config import ClusterConfig
from jobs.config.recipes import tiny
from jobs.inspection import prometheus as inspection_prometheus
from jobs.runs.run import Run
from jobs.telemetry.observe import run_observed
from jobs.training.train_stage import Job
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.indices.config import IndexConfig
from pipeline.indices.index import Index
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.neighbors import Neighbors
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages import progress
from pipeline.stages.driver import run_in_process
from tests.jobs.inspection import prometheus_server

needs_prometheus = pytest.mark.skipif(not prometheus_server.binary(), reason="prometheus is not installed")
STEPS = 40
NAME = "watched"  # other tests on the same cluster have counted under theirs
_NEEDS_GPU = ("ray_node_gpus_utilization", "ray_rdm_train_mfu")


@needs_prometheus
def test_rules_and_their_tests_pass() -> None:
    """rules_test.yaml has cases in which each alert fires, and cases in which it does not."""
    promtool = prometheus_server.binary("promtool")
    assert promtool
    for arguments in (["check", "rules", "rules.yaml"], ["check", "config", "prometheus.yaml"],
                      ["test", "rules", "rules_test.yaml"]):
        process = subprocess.run([promtool, *arguments], cwd=prometheus_server.INFRA / "prometheus",
                                 capture_output=True, text=True)
        assert process.returncode == 0 and "FAILED" not in process.stdout, process.stdout + process.stderr


def test_each_alert_is_tested() -> None:
    folder = prometheus_server.INFRA / "prometheus"
    rules = yaml.safe_load((folder / "rules.yaml").read_text())
    tested = {alert_test["alertname"] for test in yaml.safe_load((folder / "rules_test.yaml").read_text())["tests"]
              for alert_test in test["alert_rule_test"] if alert_test.get("exp_alerts")}
    assert tested == {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}


def _corpus(folder: Path, pictures: Path) -> Path:
    """The synthetic images, and one file that is no image."""
    shutil.copytree(pictures, folder)
    (folder / "broken.png").write_text("no picture")
    return folder


def _train(root: str, run: str, *, local: bool) -> None:
    dataset = Dataset.parse(root, NAME)
    small = replace(tiny().train.unet, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                    attention_downsampling=(2,), head_dim=16, patch=4)
    config = replace(tiny().train, steps=STEPS, global_batch=8, log_every=2, warmup=5, image_size=32, unet=small,
                     precision="fp32")
    assert train(Job(Run.parse(root, run), dataset, dataset, config), ClusterConfig(workers=1), local=local)


def _run_until_interrupted(stage: Any, items: Any) -> Iterator[Any]:
    for number, outcome in enumerate(run_in_process(stage, items)):
        if number == 3:
            raise KeyboardInterrupt
        time.sleep(0.3)
        yield outcome


@pytest.fixture(scope="module")
def watched_run(cluster: Any, tmp_path_factory: pytest.TempPathFactory, drawn_pictures: Path) -> Iterator[Any]:
    """Prometheus, when the run began, and its root; after shard, embed, index, neighbors on a cluster, and train."""
    from jobs.cluster.actor_pool import Pool
    from jobs.cluster.connect import write_prometheus_targets
    folder = tmp_path_factory.mktemp("watched")
    root = str(folder / "root")
    dataset = Dataset.parse(root, NAME)
    storage.put_json({"version": "v1", "content": "", "published": time.time() - 3600, "number": 1,
                      "recall@10": 0.9}, storage.join(root, f"datasets/{NAME}/current.json"))
    port = prometheus_server.free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "period", lambda folder: 0.5)
        patch.setattr(inspection_prometheus, "period", lambda root: 0.5)
        patch.setenv("OMP_NUM_THREADS", "1")
        threading.Thread(target=inspection_prometheus.serve_metrics, args=(root, f"127.0.0.1:{port}"),
                         daemon=True).start()
        with prometheus_server.running(folder / "prometheus", str(folder / "prom_metrics_service_discovery.json"),
                                       port) as server:
            start = time.time()
            pool = Pool(ClusterConfig(workers=1))
            for number, stage in enumerate((
                    Shard(dataset, ShardConfig(source=str(_corpus(folder / "in", drawn_pictures)), image_size=32,
                                               format="png", samples_per_shard=10)),
                    Embed(dataset, EmbedConfig()), Index(dataset, IndexConfig(bytes_per_vector=288)),
                    Neighbors(dataset, dataset, NeighborsConfig()))):
                run_observed(stage, pool)
                if not number:
                    write_prometheus_targets(folder)
            pool.close()
            # This stage stays unfinished. The others are so quick that Prometheus may not have scraped them before.
            config = ShardConfig(source=str(drawn_pictures), image_size=32, format="png", samples_per_shard=10)
            with pytest.raises(KeyboardInterrupt):
                run_observed(Shard(Dataset.parse(root, "unfinished"), config), _run_until_interrupted)
            _train(root, "small", local=True)  # in this process, which Ray knows as it knows one of Ray Train's
            yield server, start, root


def _query_over_run(watched_run: Any, expression: str) -> list[dict[str, Any]]:
    """Its series at any time of the run."""
    server, start, _ = watched_run
    return server.query_range(expression, start, time.time(), 1.0)


@needs_prometheus
@pytest.mark.slow
@pytest.mark.ray
def test_every_query_of_the_dashboard_has_an_answer(watched_run: Any) -> None:
    gpu = bool(_query_over_run(watched_run, "ray_node_gpus_available > 0"))
    expressions = [expression for _, queries in prometheus_server.panels("10s") for expression, _ in queries]
    for expression in expressions:
        if gpu or not any(name in expression for name in _NEEDS_GPU):
            # The last samples come a second late.
            prometheus_server.wait_until(lambda expression=expression: _query_over_run(watched_run, expression),
                                         expression)
    for expression in prometheus_server.annotations("10s"):
        assert _query_over_run(watched_run, expression.split(" > ")[0])


@needs_prometheus
@pytest.mark.slow
@pytest.mark.ray
def test_every_operand_of_an_alert_has_values(watched_run: Any) -> None:
    rules = yaml.safe_load((prometheus_server.INFRA / "prometheus/rules.yaml").read_text())
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    assert len(expressions) > 8
    for operand in [operand for expression in expressions for operand in prometheus_server.operands(expression)]:
        # The recorded series appear with a delay.
        prometheus_server.wait_until(lambda operand=operand: _query_over_run(watched_run, operand), operand)
    firing = {series["metric"]["alertname"] for series in _query_over_run(watched_run, 'ALERTS{alertstate="firing"}')}
    assert firing == set()


@needs_prometheus
@pytest.mark.slow
@pytest.mark.ray
def test_prometheus_has_the_counts_of_the_run(watched_run: Any) -> None:
    server, _, root = watched_run
    def counted_now() -> dict[str, float]:
        return {series["metric"]["stage"]: float(series["value"][1]) for series in server.query(
            f'sum by (stage) (ray_rdm_samples_total{{dataset="{NAME}", version="v1"}})')}

    # Ray exports its metrics every second, and Prometheus scrapes them every second.
    prometheus_server.wait_until(lambda: counted_now().get("train") == STEPS * 8, "the last step was never seen")
    counted = counted_now()
    assert counted == {"shard": 144, "embed": 144, "index": 144, f"neighbors/{NAME}": 144, "train": STEPS * 8}
    failed = server.query(f'ray_rdm_failures_total{{dataset="{NAME}"}}')
    assert [(series["metric"]["reason"], series["value"][1]) for series in failed] == [("not_a_picture", "1")]
    items = {series["metric"]["stage"]: float(series["value"][1]) for series in server.query(
        f'ray_rdm_item_seconds_count{{dataset="{NAME}"}}')}
    manifest = Dataset.parse(root, NAME).manifest("shards")
    assert items["shard"] == len(manifest["items"]) == 15
    items_left = f'max by (stage) (ray_rdm_items_left{{dataset="{NAME}", version="v1"}})'
    prometheus_server.wait_until(
        lambda: {series["metric"]["stage"]: series["values"][-1][1] for series in _query_over_run(
            watched_run, items_left)} == dict.fromkeys(counted, "0"), "items are left")
    # The files say the same.
    prometheus_server.wait_until(lambda: server.query('rdm_stage_sealed{stage="train"} == 1'), "never seen as sealed")
    assert {series["metric"]["stage"]: float(series["value"][1])
            for series in server.query("rdm_stage_samples")} == counted
    line = json.loads(Path(root, "runs/small/metrics.jsonl").read_text().splitlines()[-1])
    assert float(server.query("rdm_train_loss")[0]["value"][1]) == line["loss"]
    assert 3600 <= float(server.query("rdm_database_age_seconds")[0]["value"][1]) < 4000


@needs_prometheus
@pytest.mark.slow
@pytest.mark.ray
def test_prometheus_has_a_run_on_ray_train(watched_run: Any) -> None:
    server, _, root = watched_run
    _train(root, "far", local=False)
    worker = server.query_range('ray_rdm_train_step{run="far"}', time.time() - 120, time.time(), 1.0)
    assert len({series["metric"]["WorkerId"] for series in worker}) == 1, "one series: the first process speaks for all"
    assert 0 < float(worker[0]["values"][-1][1]) <= STEPS
    driver_worker_id = server.query('ray_rdm_samples_total{stage="embed"}')[0]["metric"]["WorkerId"]
    assert worker[0]["metric"]["WorkerId"] != driver_worker_id
    for name in ("loss", "grad_norm", "data_wait", "tflops_per_s"):
        assert server.query_range(f'ray_rdm_train_{name}{{run="far"}}', time.time() - 120, time.time(), 1.0), name


def test_the_guide_lists_every_alert() -> None:
    rules = yaml.safe_load((prometheus_server.INFRA / "prometheus/rules.yaml").read_text())
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    guide = (prometheus_server.INFRA.parent / "docs/guides/operate/monitor.md").read_text()
    assert re.findall(r"^\| `([A-Z][A-Za-z]+)` \|", guide, re.MULTILINE) == alerts
