"""Weights are local, offered by a hub, absent there, or out of reach: four answers, without a download."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.embeddings.clip_weights import RANDOM, ClipConfig
from pipeline.embeddings.reachable import check_weights, vector_length

_TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"


class _Hub(BaseHTTPRequestHandler):
    """A hub with someone/small, and with someone/empty that has no weights."""

    def do_HEAD(self) -> None:
        _, owner, name, *_ = self.path.split("/")
        there = (owner, name) == ("someone", "small") and self.path.endswith(".bin")
        self.send_response(200 if there else 404)
        for key, value in ({"ETag": '"1"', "X-Repo-Commit": "0" * 40} if there else
                           {"X-Error-Code": "EntryNotFound" if name in {"empty", "small"} else "RepoNotFound"}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", "4")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"http://127.0.0.1:{server.server_port}{_TEMPLATE}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    yield
    server.shutdown()
    server.server_close()


def test_weights_are_offered_or_do_not_exist(hub: None) -> None:
    assert check_weights(ClipConfig("hf-hub:someone/small")) is False
    for repository in ("someone/empty", "someone/absent"):
        with pytest.raises(ValueError, match=f"do not exist: .*{repository}"):
            check_weights(ClipConfig(f"hf-hub:{repository}"))


def test_a_missing_network_is_a_different_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"http://127.0.0.1:9{_TEMPLATE}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for config in (ClipConfig("hf-hub:someone/small"), ClipConfig("ViT-B-32", "openai")):
        with pytest.raises(ValueError, match=r"(?s)the hub cannot be reached: .*hint: .*--embed.pretrained"):
            check_weights(config)


def test_weights_in_a_file_are_checked(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"weights")
    assert check_weights(ClipConfig("ViT-B-32", str(weights))) and check_weights(ClipConfig())
    assert check_weights(ClipConfig("ViT-B-32", RANDOM))
    weights.write_bytes(b"")
    for config, sentence in ((ClipConfig("ViT-B-32", str(weights)), "empty file"),
                             (ClipConfig("ViT-B-32", "no-such-tag"), "got neither"),
                             (ClipConfig("ViT-B-33", "openai"), "knows no model")):
        with pytest.raises(ValueError, match=sentence):
            check_weights(config)


def test_vector_lengths_need_no_weights() -> None:
    assert [vector_length(ClipConfig(model, "openai")) for model in ("ViT-B-32", "ViT-L-14")] == [512, 768]
    assert vector_length(ClipConfig()) == 256 and vector_length(ClipConfig("hf-hub:someone/small")) == 0
