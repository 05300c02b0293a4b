"""Key files that are accepted and refused."""

import os
import subprocess
from pathlib import Path

import pytest

from jobs.cli.main import main
from pipeline.releases import signatures
from pipeline.releases.signatures import RELEASE_KEY, ReleaseKeys
from tests.jobs.publishing.published_art import NAME
from tests.jobs.publishing.signing.key_files import openssl_key, ssh_key


def test_keys_of_openssl_and_openssh_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RELEASE_KEY, raising=False)
    document = {"version": "v1", "sequence": 1}
    for number, (private, public) in enumerate((openssl_key(tmp_path, "pem"), ssh_key(tmp_path, "ssh"))):
        publisher = signatures.publishing_keys(str(private))
        statement = publisher.sign(NAME, document)
        for text in (str(public), public.read_text(), f"# a comment\n{public.read_text()}\n"):
            reader = signatures.parse_release_keys(text, "key")
            assert reader.find_fault(NAME, statement) == "" and reader.fingerprints == publisher.fingerprints
        assert reader.find_fault("other", statement) and reader.find_fault(NAME, statement | {"sequence": 2})
        assert not reader.find_fault(NAME, statement | {"checked": 5, "takedowns": 2})
        if number:
            printed = subprocess.run(["ssh-keygen", "-l", "-f", public], capture_output=True, text=True, check=True)
            assert publisher.fingerprints[0] in printed.stdout
    texts = [(tmp_path / name).read_text() for name in ("pem.pub.pem", "ssh.pub")]
    both = signatures.parse_release_keys("".join(texts), "key")
    assert len(both.accepted) == 2
    assert signatures.parse_release_keys(signatures.public_text(both), "key").fingerprints == both.fingerprints


def test_unsafe_private_keys_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(RELEASE_KEY, raising=False)
    private, public = openssl_key(tmp_path, "key")
    private.chmod(0o640)
    with pytest.raises(ValueError, match="others can read the private key of --sign"):
        signatures.publishing_keys(str(private))
    private.chmod(0o600)
    (tmp_path / "empty").touch(0o600)
    public.chmod(0o600)
    for path, reason in ((openssl_key(tmp_path, "rsa", "rsa")[0], "is no ed25519 private key"),
                         (tmp_path / "empty", "is no ed25519 private key"), (public, "is no ed25519 private key"),
                         (ssh_key(tmp_path, "locked", "a passphrase")[0], "has a passphrase"),
                         (tmp_path, "cannot be read: Is a directory")):
        with pytest.raises(ValueError, match=reason) as refused:
            signatures.publishing_keys(str(path))
        assert str(tmp_path) not in str(refused.value)
    for name in ("art", NAME):
        (tmp_path / "datasets" / name).mkdir(parents=True)
    missing, root = str(tmp_path / "missing"), ["--root", str(tmp_path)]
    for verb, flag in ((["rollback", "art"], "--sign"), (["verify"], "--key")):
        assert main([*verb, flag, missing, *root]) == 2
        shown = capsys.readouterr().err
        assert f"{flag} '{missing}'" in shown and "\nhint: openssl " in shown
    text = private.read_text()
    assert main(["rollback", NAME, f"--sign={text}", "--root", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "takes the path of a private key" in shown and text.splitlines()[1] not in shown
    for wrong in ({"sign": str(private), "unsigned": True}, {"sign": "", "accept_unsigned": True}):
        with pytest.raises(ValueError, match=r"^--(unsigned|accept-unsigned) "):
            signatures.publishing_keys(**wrong)
    monkeypatch.setenv(RELEASE_KEY, str(public))
    with pytest.raises(ValueError, match="--unsigned publishes without a signature"):
        signatures.publishing_keys("", unsigned=True)


def test_invalid_public_keys_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = openssl_key(tmp_path, "key")
    for text, reason in (("", "is empty"), (" \n", "is empty"), (str(tmp_path / "missing"), "No such file"),
                         (str(private), "names a private key"), (private.read_text(), "names a private key"),
                         (str(openssl_key(tmp_path, "rsa", "rsa")[1]), "something else than ed25519"),
                         ("ssh-ed25519 AAAA", "something else than ed25519"),
                         (public.read_text() + "nonsense", "something else than ed25519"), ("\0", "ValueError")):
        monkeypatch.setattr(os, "environ", os.environ | {RELEASE_KEY: text})
        with pytest.raises(ValueError, match=reason) as refused:
            signatures.read_release_keys()
        assert private.read_text().splitlines()[1] not in str(refused.value)
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != RELEASE_KEY})
    assert signatures.read_release_keys() == ReleaseKeys()
