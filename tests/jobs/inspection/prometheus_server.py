"""A real Prometheus with the files of infra/: its own port and folder, what it scrapes and evaluates as there."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INFRA = Path(__file__).parents[3] / "infra"
_COMPARED = re.compile(r"(?:\s(?:==|<|>|and|or|unless)\s(?:on\s*\([^)]*\)\s)?)")


def binary(name: str = "prometheus") -> str | None:
    """The path of a program of the package; None if it is not installed."""
    return shutil.which(name)


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass(frozen=True)
class Prometheus:
    """A server that runs."""

    address: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now."""
        return self._get("query", query=expression)

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The series of an expression over time."""
        return self._get("query_range", query=expression, start=start, end=end, step=step)

    def _get(self, endpoint: str, **parameters: Any) -> list[dict[str, Any]]:
        url = f"{self.address}/api/v1/{endpoint}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters['query']}: {error.read().decode()}") from None


@contextlib.contextmanager
def running(folder: Path, discovery: str, exporter: int, *, every: str = "1s") -> Iterator[Prometheus]:
    """The server with the configuration and rules of infra/, where only places and intervals are others."""
    config = (INFRA / "prometheus/prometheus.yaml").read_text()
    for setting, replacement in (("/tmp/ray/prom_metrics_service_discovery*.json", discovery),
                                 ("scrape_interval: 10s", f"scrape_interval: {every}"),
                                 ("evaluation_interval: 30s", f"evaluation_interval: {every}"),
                                 ("refresh_interval: 10s", "refresh_interval: 1s"),
                                 ("127.0.0.1:9108", f"127.0.0.1:{exporter}")):
        assert setting in config, setting
        config = config.replace(setting, replacement)
    folder.mkdir(parents=True)
    (folder / "prometheus.yaml").write_text(config)
    shutil.copy(INFRA / "prometheus/rules.yaml", folder)
    port = free_port()
    program = binary()
    assert program
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen([program, f"--config.file={folder}/prometheus.yaml",
                                    f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"],
                                   stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{address}/-/ready"), f"Prometheus does not answer: {folder}/log.txt", process)
        yield Prometheus(address)
    finally:
        process.terminate()
        process.wait(20)


def answers(address: str) -> bool:
    """Whether a server answers at an address."""
    try:
        urllib.request.urlopen(address, timeout=5).read()
        return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def wait_until(condition: Any, message: str, process: "subprocess.Popen[Any] | None" = None,
               seconds: float = 60.0) -> Any:
    """Wait until `condition` returns something true, and return that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process is None or process.poll() is None, message
        if outcome := condition():
            return outcome
        time.sleep(0.2)
    raise AssertionError(message)


def panels(interval: str, dataset: str = ".*") -> list[tuple[dict[str, Any], list[tuple[str, str]]]]:
    """The panels of the dashboard, each with its queries as (expression, legend), variables replaced."""
    board = json.loads((INFRA / "grafana/rdm.json").read_text())
    return [(panel, [(_plain(target["expr"], interval, dataset), target["legendFormat"])
                     for target in panel["targets"]])
            for panel in board["panels"] if panel["type"] != "row"]


def annotations(interval: str, dataset: str = ".*") -> list[str]:
    """The queries of the dashboard's marks."""
    board = json.loads((INFRA / "grafana/rdm.json").read_text())
    return [_plain(annotation["expr"], interval, dataset) for annotation in board["annotations"]["list"]]


def _plain(expression: str, interval: str, dataset: str) -> str:
    plain = expression.replace("$__rate_interval", interval).replace("$dataset", dataset)
    assert "$" not in plain, plain
    return plain


def operands(expression: str) -> list[str]:
    """The operands of an alert's comparisons without numbers. Comparisons inside brackets do not count."""
    flat, depth = "", 0
    for letter in expression:
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(letter, 0)
        flat += letter if depth == 0 or letter.isspace() is False else "\0"
    parts = [part.replace("\0", " ").strip() for part in _COMPARED.split(flat)]
    if parts != [expression.strip()]:
        inner = [operands(part[1:-1]) if part[:1] == "(" and _COMPARED.search(part) else [part] for part in parts]
        parts = [part for group in inner for part in group]
    return [re.sub(r"\s-\s[0-9.]+$", "", part) for part in parts if re.search("[a-z]", part)]
