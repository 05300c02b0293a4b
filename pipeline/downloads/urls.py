"""Parse URLs as browsers do, tell their hosts, and refuse private addresses."""

import functools
import ipaddress
import math
import re
import socket
import unicodedata
from collections.abc import Iterable
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

from yarl import URL

from pipeline.media.types import BadImage

_SPACE = "".join(map(chr, range(0x21)))
_PATH = "%/:@!$&'()*+,;=~[]|"  # left as they are; % too, so that what is escaped already stays so
_HOST = re.compile(r"[a-z0-9_.-]+")
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
# Browsers read http:host and http:/host as http://host.
_AUTHORITY = re.compile(r"(?:https?:|[a-z][a-z0-9+.-]*:(?=//)|(?=//))/*([^/?#]+)", re.IGNORECASE)
_DELIMITER = re.compile(r"[/?#@\\]")
TOKEN = re.compile(r"[\w.*/-]+")
# A list, because `is_private` of ipaddress differs between versions of Python. IPv6 assigns only 2000::/3.
_CLOSED_4 = [ipaddress.IPv4Network(network) for network in (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/3", "168.63.129.16/32")]  # the last one is Azure's own door to its machines
_OPEN_6 = ipaddress.IPv6Network("2000::/3")
_CLOSED_6 = [ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "3fff::/20")]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def parse_allowed_host(text: str) -> tuple[str, int | None]:
    """(host, port) of an entry of allow_hosts."""
    try:
        host = text if text.startswith("[") or text.count(":") < 2 else f"[{text}]"
        url, credentials = parse_url(f"http://{host}")
        if credentials is not None or url.raw_path != "/" or url.query_string:
            raise ValueError
    except ValueError:
        raise ValueError(f"shard.download.allow_hosts = {text!r}: must be a host or host:port") from None
    # Not url.explicit_port: :80 in the entry means 80.
    port = re.search(r":(\d+)$", host.rpartition("]")[2])
    return url.raw_host or "", int(port[1]) if port else None


def parse_host_rates(entries: Iterable[str]) -> list[tuple[str, float]]:
    """(pattern of host names, requests a second) of the entries of host_rate; those of single hosts come first."""
    rates = []
    for entry in entries:
        pattern, _, number = entry.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not (0 < rate < math.inf and re.fullmatch(r"[a-z0-9_.*?:-]*", pattern.lower())):
            raise ValueError(f"shard.download.host_rate = {entry!r}: must be a number above 0, or HOST=NUMBER\n"
                             f"hint: --host-rate 10 images.example.org=2")
        if re.fullmatch(r"[^:]*:\d+", pattern):
            raise ValueError(f"shard.download.host_rate = {entry!r}: expected a host without a port, whose "
                             f"limit counts for all ports\nhint: --host-rate {pattern.partition(':')[0]}={number}")
        rates.append((pattern.lower() or "*", rate))
    return sorted(rates, key=lambda rate: rate[0].count("*") + rate[0].count("?"))


def clean_url(text: str) -> str:
    """Clean a URL as browsers do before they parse it."""
    text = text.strip(_SPACE).translate({ord(char): None for char in "\t\r\n"})
    if "\\" in text:
        head, mark, tail = text.partition("?")
        text = head.replace("\\", "/") + mark + tail
    return text


def parse_url(text: str) -> tuple[URL, bytes | None]:
    """A URL that can be sent, without its credentials, and these; ValueError if it is none.

    As browsers do: escapes stay as they are, and what cannot be sent is escaped.
    """
    parts = urlsplit(clean_url(text))
    if parts.scheme not in {"http", "https"}:
        raise ValueError("scheme")
    userinfo, at, place = parts.netloc.rpartition("@")
    origin = URL(f"{parts.scheme}://{place if '[' in place else unquote(place)}")
    host = origin.raw_host or ""
    if "[" in place:
        ipaddress.IPv6Address(host if "%" not in host else "")  # a zone is a matter of one machine
    elif not _HOST.fullmatch(host):
        raise ValueError("host")
    # An escaped character of the host may have become another part of the URL.
    if origin.port == 0 or origin.raw_user is not None or origin.raw_path != "/" or origin.query_string:
        raise ValueError("authority")
    path = parts.path
    if "/." in path and not path.startswith("//"):
        path = urlsplit(urljoin(f"{parts.scheme}://host/", path)).path
    url = URL.build(scheme=parts.scheme, authority=origin.raw_authority, encoded=True,
                    path=quote(path, _PATH, errors="surrogateescape") or "/",
                    query_string=quote(parts.query, _PATH + "?", errors="surrogateescape"))
    if not at:
        return url, None
    return url, unquote_to_bytes(userinfo if ":" in userinfo else userinfo + ":")


def literal_address(url: URL) -> str:
    """The address that the host is, in any spelling (2130706433, 0x7f.1); empty for a name, ValueError if none fits."""
    host = url.raw_host or ""
    if ":" in host:
        return host
    if not _NUMBER.fullmatch(host.removesuffix(".").rpartition(".")[2]):
        return ""
    try:
        return socket.inet_ntoa(socket.inet_aton(host.removesuffix(".")))
    except OSError:
        raise ValueError("address") from None


def find_host(text: str) -> str:
    """The host of a URL in one spelling: lower case, ASCII (IDNA), no final dot, addresses as numbers; "" for none.

    It is the host that `parse_url` would ask. URLs that it refuses are read too: //host/path, another scheme, a wrong
    port.
    """
    match = _AUTHORITY.match(clean_url(text))
    return _host_of_authority(match[1]) if match else ""


@functools.lru_cache(1 << 14)
def _host_of_authority(authority: str) -> str:
    place = authority.rpartition("@")[2]
    address, bracket, _ = place.partition("]")
    without_port = address + bracket if bracket else unquote(place).partition(":")[0]
    # Format characters, such as a soft hyphen, are no part of a host.
    mapped = "".join(char for char in unicodedata.normalize("NFKC", without_port) if unicodedata.category(char) != "Cf")
    for spelling in (place, mapped, mapped.rstrip(".")):
        if spelling is not place and _DELIMITER.search(spelling):
            break  # an escaped character of the host would become another part of the URL
        try:
            url, _ = parse_url(f"http://{spelling}/")
            host = (literal_address(url) or url.raw_host or "").rstrip(".")
        except ValueError:
            continue
        if ":" in host:
            embedded = ipaddress.IPv6Address(host).ipv4_mapped
            return str(embedded or host)
        return host
    return ""


def refuse_private(addresses: Iterable[str]) -> None:
    """BadImage if one of the addresses is not on the public internet."""
    for address in addresses:
        if not _is_public(address):
            raise BadImage("forbidden_address", f"{address} is not on the public internet")


@functools.lru_cache(1 << 14)
def _is_public(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 6:
        embedded = address.ipv4_mapped or address.sixtofour
        if embedded is None and address in _NAT64:
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if embedded is None:
            return address in _OPEN_6 and not any(address in network for network in _CLOSED_6)
        address = embedded
    return not any(address in network for network in _CLOSED_4)
