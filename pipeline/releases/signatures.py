"""Signatures of publications: write access to a root is not enough to publish there.

    current.json    {..., "signature": {"key": "SHA256:...", "ed25519": "..."}}

The signature covers the name of the dataset and the pointer: version, sequence number, hash of the release and more.
The hash leads to everything that the release stands for. `checked`, `takedowns` and `takedown_list` change without a
publication, so the signature does not cover them.

Readers that have a public key (RDM_RELEASE_KEY) refuse what was not signed by it. The private key stays in the process
that publishes. Neither it nor its path is written anywhere.
"""

import base64
import binascii
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline import storage

if TYPE_CHECKING:  # loaded only where keys are used
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

RELEASE_KEY = "RDM_RELEASE_KEY"
_CHANGING = {"checked", "takedowns", "takedown_list", "signature"}
_MOST_KEY_BYTES = 1 << 20
_PURPOSE = b"rdm publication 1\n"  # so that a signature for another purpose is none for this one
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True)
class ReleaseKeys:
    """The public keys whose signatures a command accepts, and the private key that it signs with."""

    accepted: tuple["Ed25519PublicKey", ...] = ()
    """Empty: signatures are not checked."""
    private: "Ed25519PrivateKey | None" = field(default=None, repr=False)
    accept_unsigned: bool = False
    """Accept a publication without a signature. One with a wrong signature is refused."""
    publish_unsigned: bool = False
    """Publish without a signature although the dataset is signed."""

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """The accepted keys, as `ssh-keygen -l` prints them."""
        return tuple(map(_fingerprint, self.accepted))

    def find_fault(self, name: str, document: Mapping[str, Any]) -> str:
        """A fault of the signature of a publication of the dataset `name`; "" if it is accepted."""
        if not self.accepted or not document:
            return ""
        expected = " or ".join(self.fingerprints)
        if "signature" not in document:
            return "" if self.accept_unsigned else f"has no signature: expected one by {expected}"
        signature = document["signature"]
        label = signature.get("key") if isinstance(signature, dict) else None
        for key in self.accepted:
            if _fingerprint(key) == label:
                valid = _verifies(key, signature.get("ed25519"), _statement(name, document))
                return "" if valid else f"has a signature by {label} that is not valid for what it says"
        return f"is signed by another key: expected {expected}, got {str(label)[:60]!r}"

    def sign(self, name: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """A publication with the signature of this command in the place of any other; without one if it has no key."""
        plain = {key: value for key, value in document.items() if key != "signature"}
        if self.private is None:
            return plain
        signature = base64.b64encode(self.private.sign(_statement(name, plain))).decode()
        return plain | {"signature": {"key": _fingerprint(self.private.public_key()), "ed25519": signature}}

    def has_signed(self, document: Mapping[str, Any]) -> bool:
        """Whether a publication names the key of this command as its signer."""
        signature = document.get("signature")
        return (self.private is not None and isinstance(signature, dict)
                and signature.get("key") == _fingerprint(self.private.public_key()))

    def refuse_unsigned(self, name: str, *before: Mapping[str, Any]) -> None:
        """ValueError if this command would publish without a signature after publications that have one."""
        if self.private is None and not self.publish_unsigned and (
                self.accepted or any("signature" in document for document in before)):
            reason = f"{RELEASE_KEY} is set here" if self.accepted else f"{name} is signed"
            raise ValueError(f"{reason}: readers that have the key would refuse a version without a signature\n"
                             f"hint: --sign KEYFILE; or --unsigned, where {RELEASE_KEY} is not set")


NO_KEYS = ReleaseKeys()


def read_release_keys() -> ReleaseKeys:
    """The keys that RDM_RELEASE_KEY names; none if it is not set. ValueError if it is set and names no key."""
    text = os.environ.get(RELEASE_KEY)
    return NO_KEYS if text is None else parse_release_keys(text, RELEASE_KEY)


def parse_release_keys(text: str, label: str) -> ReleaseKeys:
    """The public keys in `text`, or in the file that it names. `label` says in errors where the text is from."""
    if "-----BEGIN" not in text and "ssh-ed25519 " not in text:
        if not text.strip():
            raise ValueError(f"{label} is empty, so every signature would be accepted\n"
                             f"hint: a public key, the path of one; or do not set it")
        try:
            text = storage.read_small_file(text).decode()
        except (OSError, UnicodeDecodeError, ValueError) as error:
            # Other users can read the arguments of a command, but not its environment.
            shown = f" {text!r}" if label == "--key" and len(text) < 500 else ""
            raise ValueError(f"{label}{shown} is neither a public key nor a file with one: "
                             f"{getattr(error, 'strerror', None) or type(error).__name__}\n"
                             f"hint: openssl pkey -in KEYFILE -pubout -out release.pub.pem") from None
    return ReleaseKeys(tuple(_parse_public_keys(text, label)))


def publishing_keys(sign: str, *, accept_unsigned: bool = False, unsigned: bool = False) -> ReleaseKeys:
    """The keys of a command that publishes: `sign` is the path of the private key, "" for none.

    Without RDM_RELEASE_KEY it accepts the publications that its own key has signed.
    """
    known = read_release_keys()
    if unsigned and (sign or known.accepted):
        raise ValueError("--unsigned publishes without a signature: it takes no --sign, and no " + RELEASE_KEY)
    if accept_unsigned and not sign:
        raise ValueError("--accept-unsigned needs --sign: it signs what had no signature")
    if not sign:
        return ReleaseKeys(known.accepted, publish_unsigned=unsigned)
    private = _read_private_key(sign)
    own = private.public_key()
    if known.accepted and _fingerprint(own) not in known.fingerprints:
        raise ValueError(f"the key of --sign is {_fingerprint(own)}, which {RELEASE_KEY} does not name: readers here "
                         f"would refuse it\nhint: {RELEASE_KEY} may name a file with several keys")
    return ReleaseKeys(known.accepted or (own,), private, accept_unsigned)


def public_text(keys: ReleaseKeys) -> str:
    """The accepted keys as text that RDM_RELEASE_KEY may hold, one on each line."""
    from cryptography.hazmat.primitives import serialization
    return "\n".join(key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
                     for key in keys.accepted)


def refuse_key_text(path: str) -> None:
    """ValueError if the value of --sign is a key. It must be the path of one, because others can read arguments."""
    if "-----BEGIN" in path or "\n" in path:
        raise ValueError("--sign takes the path of a private key, not the key itself\n"
                         "hint: other users can read the arguments of a command: make another key")


def _statement(name: str, document: Mapping[str, Any]) -> bytes:
    """The bytes that are signed. Equal publications have equal bytes."""
    covered = {key: value for key, value in document.items() if key not in _CHANGING}
    return _PURPOSE + json.dumps([name, covered], sort_keys=True, separators=(",", ":")).encode()


def _verifies(key: "Ed25519PublicKey", signature: Any, statement: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    try:
        key.verify(base64.b64decode(signature, validate=True), statement)
    except (InvalidSignature, binascii.Error, TypeError, ValueError):
        return False
    return True


def _fingerprint(key: "Ed25519PublicKey") -> str:
    from cryptography.hazmat.primitives import serialization
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return f"SHA256:{_base64_sha256(base64.b64decode(line.split()[1]))}"


def _base64_sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _parse_public_keys(text: str, label: str) -> list["Ed25519PublicKey"]:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    if "PRIVATE KEY-----" in text:
        raise ValueError(f"{label} names a private key: readers need the public one\n"
                         f"hint: openssl pkey -in KEY -pubout -out KEY.pub; or ssh-keygen -y -f KEY > KEY.pub")
    lines = [line.strip() for line in _PEM.sub("", text).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    keys = []
    try:
        keys += [serialization.load_pem_public_key(block.encode()) for block in _PEM.findall(text)]
        keys += [serialization.load_ssh_public_key(line.encode()) for line in lines]
    except (ValueError, UnsupportedAlgorithm):
        keys = []
    if not keys or not all(isinstance(key, Ed25519PublicKey) for key in keys):
        raise ValueError(f"{label} has something else than ed25519 public keys\n"
                         f"hint: PEM blocks, or lines that begin with ssh-ed25519")
    return [key for key in keys if isinstance(key, Ed25519PublicKey)]


def _read_private_key(path: str) -> "Ed25519PrivateKey":
    """The private key in a file. ValueError if it is no such key, or if others may read it."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    refuse_key_text(path)
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            # Kubernetes mounts a secret for the group of a pod, and root owns it. PostgreSQL has the same rule.
            too_open = 0o027 if status.st_uid == 0 and os.getuid() != 0 else 0o077
            if status.st_mode & too_open or (os.getuid() != 0 and status.st_uid not in {0, os.getuid()}):
                raise ValueError("others can read the private key of --sign\nhint: own the file, and chmod 600")
            data = file.read(_MOST_KEY_BYTES)
    except FileNotFoundError:  # no key is there, so the path tells nothing about one
        raise ValueError(f"the private key of --sign {path!r} cannot be read: No such file\n"
                         f"hint: openssl genpkey -algorithm ed25519 -out KEYFILE && chmod 600 KEYFILE") from None
    except OSError as error:
        raise ValueError(f"the private key of --sign cannot be read: {error.strerror}\n"
                         f"hint: the path of a file that this user may read") from None
    try:
        load = (serialization.load_ssh_private_key if b"OPENSSH PRIVATE KEY" in data
                else serialization.load_pem_private_key)
        key = load(data, password=None)
    except TypeError:
        raise ValueError("the private key of --sign has a passphrase\nhint: a file without one, which only the "
                         "publisher may read") from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("the file of --sign is no ed25519 private key\nhint: openssl genpkey -algorithm ed25519 "
                         "-out KEY; or ssh-keygen -t ed25519 -N '' -f KEY")
    return key
