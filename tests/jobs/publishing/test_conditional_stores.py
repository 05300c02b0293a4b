"""Publishing on S3, on a store without conditional writes, and on one that refuses them in fewer words."""

import http.client
import io
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from jobs.cli.main import main
from jobs.publishing.config import GcConfig
from jobs.publishing.garbage_collect import collect_garbage
from jobs.publishing.rebuild import run_rebuild
from pipeline import storage
from pipeline.releases.published import Published
from pipeline.stages.driver import run_stage
from pipeline.storage import files
from tests.jobs.publishing.published_art import NAME, make_rebuild, published_dataset, rebuild, vectors_by_content

_CONDITION = re.compile(b"<Condition>.*?</Condition>")


class OtherStore(ThreadingHTTPServer):
    """A proxy that makes the test server behave like another store.

    With `conditional` it refuses writes as MinIO and R2 do, which do not name the condition that failed. Otherwise it
    ignores the conditions of writes. `loses` is a header: the answer to the first write with it is lost.
    """

    def __init__(self, store: str, conditional: bool, loses: str = "") -> None:
        to_lose = [True]

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                connection = http.client.HTTPConnection(store.removeprefix("http://"))
                headers = {name: value for name, value in self.headers.items()
                           if conditional or not name.lower().startswith("if-")}
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                whole = response.read()
                if loses in self.headers and to_lose:
                    self.close_connection = to_lose.pop()
                    return
                data = _CONDITION.sub(b"", whole)
                self.send_response(response.status)
                for name, value in response.getheaders():
                    if name.lower() == "content-length":
                        value = str(int(value) - len(whole) + len(data))
                    if name.lower() not in {"transfer-encoding", "connection", "server", "date"}:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

            def log_message(self, *arguments: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def other_store(s3_server: str, s3: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
                ) -> Iterator[str]:
    proxy = OtherStore(s3_server, *request.param)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    for clear in (files._filesystem.cache_clear, fsspec.get_filesystem_class("s3").clear_instance_cache):
        clear()
    yield s3
    for clear in (files._filesystem.cache_clear, fsspec.get_filesystem_class("s3").clear_instance_cache):
        clear()
    proxy.shutdown()


@pytest.mark.parametrize("other_store", [(False,)], indirect=True)
def test_a_store_without_conditions_is_refused(other_store: str, place: Path) -> None:
    with pytest.raises(ValueError, match="ignores If-Match and If-None-Match"):
        make_rebuild(f"{other_store}/root", place / "source")


@pytest.mark.parametrize("other_store", [(True,)], indirect=True)
def test_a_store_may_omit_the_failed_condition(other_store: str, tmp_path: Path) -> None:
    url = f"{other_store}/datasets/x/a"
    assert storage.can_swap(f"{other_store}/datasets/x")
    assert storage.create_bytes(b"1", url) and not storage.create_bytes(b"2", url)
    checks: list[bytes] = []
    (tmp_path / "b").write_bytes(b"3")
    storage.put_checked(tmp_path / "b", url, lambda: checks.append(storage.read_bytes(url)))
    assert checks == [b"1", b"1"] and storage.read_bytes(url) == b"3"


@pytest.mark.parametrize("other_store", [(True, "If-Match")], indirect=True)
def test_a_swap_with_a_lost_answer_has_succeeded(other_store: str) -> None:
    document = {"version": "v1", "takedowns": 0}
    storage.put_json(document, f"{other_store}/datasets/x/current.json")
    current = Published(other_store, "x", storage.json_bytes(document), document)
    listed = {"requests": 1, "sha256": "0" * 64}
    assert current.require_takedowns(listed)
    assert storage.read_json(f"{other_store}/datasets/x/current.json") == document | {
        "takedowns": 1, "takedown_list": listed}
    assert not current.require_takedowns(listed | {"requests": 2})


@pytest.mark.parametrize("other_store", [(True, "If-Match"), (True, "If-None-Match")], indirect=True)
def test_a_store_that_loses_an_answer_can_swap(other_store: str) -> None:
    assert storage.can_swap(f"{other_store}/datasets/x")


def test_publishing_rollback_and_gc_work_on_s3(s3: str, place: Path) -> None:
    root = f"{s3}/root"
    fsspec.filesystem("s3").put(str(place / "source"), f"{s3}/source", recursive=True)
    source = f"{s3}/source"
    assert rebuild(root, source)["published"] == "v1"
    image = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(image, "PNG")
    fsspec.filesystem("s3").pipe_file(f"{s3}/source/added.png", image.getvalue())
    first, second = make_rebuild(root, source), make_rebuild(root, source)
    assert run_rebuild(first, run_stage)["embedded"] == 1
    assert run_rebuild(second, run_stage)["by"] == "another"
    assert Published.load(root, NAME).version == "v2" and len(vectors_by_content(published_dataset(root))) == 73
    nothing = Published(root, NAME, None, {})
    assert not nothing.publish(published_dataset(root), b'{"content": "", "samples": 0, "recall@10": 1}', 3)
    assert main(["rollback", NAME, "--root", root]) == 0 and published_dataset(root).version == "v1"
    versions = collect_garbage(root, NAME, GcConfig(keep=0, lease=0))
    assert {version["version"]: version["kept"] for version in versions} == {"v1": "published", "v2": ""}
    assert main(["verify", "--against", "current", "--root", root]) == 0
