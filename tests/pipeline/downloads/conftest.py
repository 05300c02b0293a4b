"""Fixtures of the tests of downloads: a web server, host names, a certificate."""

import datetime
import ipaddress
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.downloads import downloader, host_limits
from tests.pipeline import web_server
from tests.pipeline.downloads.download_requests import FILES, Names


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with web_server.serving(FILES) as address:
        yield address


@pytest.fixture
def no_warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Short pauses between attempts. asyncio and aiohttp log no warning."""
    monkeypatch.setattr(downloader, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(host_limits, "_PAUSES_S", (0.05, 0.1, 0.2))
    caplog.set_level(logging.WARNING)
    yield
    assert not caplog.records


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The IPs that were connected to. Other machines refuse the connection."""
    seen: list[str] = []
    real = socket.socket.connect

    def connect(self: socket.socket, address: tuple) -> None:
        seen.append(address[0])
        if not ipaddress.ip_address(address[0]).is_loopback:
            raise ConnectionRefusedError(111, "Connection refused")
        real(self, address)
    monkeypatch.setattr(socket.socket, "connect", connect)
    return seen


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
              .serial_number(1).not_valid_before(now - datetime.timedelta(1))
              .not_valid_after(now + datetime.timedelta(1))
              .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
              .add_extension(x509.BasicConstraints(True, None), True).sign(key, hashes.SHA256()))
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return path
