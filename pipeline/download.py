"""Bytes of pictures from webs that are hostile, slow and large; what goes wrong gets a name.

Nothing here knows what a picture is: `Downloader.get` gives the bytes that a URL leads to, or raises
`images.BadPicture` with a word for the ledger. No request reaches an address inside one's own network:
the addresses that are checked are those that are connected to.
"""

import asyncio
import base64
import contextlib
import email.utils
import functools
import http
import ipaddress
import os
import random
import re
import socket
import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import ContentEncodingError, ContentLengthError, TransferEncodingError
from yarl import URL

from pipeline.media.types import BadPicture

REDIRECTS = 5
LONGEST_WAIT = 60.0  # seconds that a server may ask for by Retry-After
_FIRST_WAIT, _LONGEST_BACKOFF = 0.5, 30.0
_PIECE = 1 << 20  # a body of twice that is taken in without a pause
_HEADER = 1 << 15  # bytes of one header; policies of 20 kB are met with
_DNS_THREADS, _DNS_SECONDS, _DNS_NAMES = 64, 300.0, 100_000
_SPACE = "".join(map(chr, range(0x21)))
_PATH = "%/:@!$&'()*+,;=~[]|"  # left as they are; % too, so that what is escaped already stays so
_HOST = re.compile(r"[a-z0-9_.-]+")
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
_TOKEN = re.compile(r"[\w.*/-]+")
_ROBOTS_WITH_VALUE = {"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"}
# Written out, for what ipaddress calls private differs between versions of Python. Of IPv6 only 2000::/3 is given out.
_CLOSED_4 = [ipaddress.IPv4Network(network) for network in (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/3", "168.63.129.16/32")]  # the last one is Azure's own door to its machines
_OPEN_6 = ipaddress.IPv6Network("2000::/3")
_CLOSED_6 = [ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "3fff::/20")]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class DownloadConfig:
    """How pictures are downloaded."""

    connections: int = 256
    """Connections in use at once, per worker; as many again may be kept open for the next request."""
    connections_per_host: int = 0
    """Of these to one host; 0: no limit."""
    connect_timeout: float = 10.0
    """Seconds to a connection, TLS included."""
    read_timeout: float = 10.0
    """Seconds between two pieces of an answer."""
    timeout: float = 60.0
    """Seconds for one whole attempt, redirects and body included; waiting for a free connection is not counted."""
    retries: int = 2
    """Attempts after the first one, where another may help."""
    max_bytes: int = 50_000_000
    """Larger bodies are refused; unpacked ones count."""
    user_agent: str = "Mozilla/5.0 (compatible; retrieval-diffusion/0.1)"
    """What servers are told about who asks."""
    robots: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Directives of an X-Robots-Tag header that keep a picture out; none: the header is not looked at."""
    robots_agent: str = ""
    """Name by which an X-Robots-Tag may address this program alone ("mybot: noai")."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts (name, address, or either with :port) that may lie at private addresses: one's own servers."""

    def __post_init__(self) -> None:
        for name, least in (("connections", 1), ("connections_per_host", 0), ("retries", 0), ("max_bytes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"download.{name} = {getattr(self, name)}: must be at least {least}")
        for name in ("connect_timeout", "read_timeout", "timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"download.{name} = {getattr(self, name)}: must be above 0")
        if not self.user_agent.isascii() or not self.user_agent.isprintable():
            raise ValueError(f"download.user_agent = {self.user_agent!r}: must be printable ASCII")
        if self.robots_agent and not _TOKEN.fullmatch(self.robots_agent):
            raise ValueError(f"download.robots_agent = {self.robots_agent!r}: must be one word")
        for host in self.allow_hosts:
            _allowed_host(host)


class _Again(BadPicture):
    """A failure that another attempt may mend; `wait` is what the server asks for in seconds."""

    def __init__(self, reason: str, detail: str, wait: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.wait = wait


class _Target(NamedTuple):
    url: URL  # without credentials
    headers: dict[str, str]


class Downloader:
    """A session with the web; an asynchronous context manager, for any number of `get` at once."""

    def __init__(self, config: DownloadConfig) -> None:
        self.config = config
        self._allowed = {_allowed_host(host) for host in config.allow_hosts}
        self._robots = {directive.strip().lower() for directive in config.robots}

    async def __aenter__(self) -> "Downloader":
        config = self.config
        self._slots = asyncio.Semaphore(config.connections)
        self._slots_of_host: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._resolver = _Resolver(self._allowed, config.retries + 1)
        self._session = aiohttp.ClientSession(
            # No limit there: waiting in that queue would count as time spent on the attempt.
            connector=aiohttp.TCPConnector(limit=0, resolver=self._resolver, use_dns_cache=False,
                                           socket_factory=self._socket),
            timeout=aiohttp.ClientTimeout(sock_connect=config.connect_timeout, sock_read=config.read_timeout),
            headers={"User-Agent": config.user_agent, "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(), trust_env=False, read_bufsize=_PIECE, max_line_size=_HEADER,
            max_field_size=_HEADER)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self._session.close()
        await self._resolver.close()
        # What was given up over TLS still waits for the server's farewell, which the end of the loop would cut off.
        for left in list(self._sockets):
            with contextlib.suppress(OSError):
                left.shutdown(socket.SHUT_RDWR)
        for _ in range(100):
            if all(left.fileno() < 0 for left in self._sockets):
                break
            await asyncio.sleep(0.001)

    async def get(self, url: str) -> bytes:
        """The body at `url`, empty if the server has none.

        BadPicture with the reason bad_url, forbidden_address, dns, connect, tls, timeout, cut, too_large,
        too_many_redirects, robots, protocol, or http_ and the status.
        """
        for attempt in range(self.config.retries + 1):
            try:
                return await self._attempt(url)
            except _Again as error:
                if error.wait > LONGEST_WAIT:
                    raise BadPicture(error.reason, f"{error.detail}; to be asked again in {error.wait:.0f} s") from None
                if attempt == self.config.retries:
                    raise BadPicture(error.reason, error.detail) from None
                backoff = min(_FIRST_WAIT * 2 ** attempt, _LONGEST_BACKOFF) * random.uniform(0.75, 1.25)
                wait = max(backoff, error.wait)
            await asyncio.sleep(wait)
        raise AssertionError("not reached")

    async def _attempt(self, url: str) -> bytes:
        target, left = self._target(url, None), self.config.timeout
        for _ in range(REDIRECTS + 1):
            # First the host's slot: whoever waits for a busy host keeps nobody else waiting.
            async with self._slot_of_host(target.url.raw_host or ""), self._slots:
                began = time.monotonic()
                answer = await self._translated(target, left)
                left -= time.monotonic() - began
            if isinstance(answer, bytes):
                return answer
            target = self._target(answer, target)
        raise BadPicture("too_many_redirects", f"more than {REDIRECTS}")

    def _slot_of_host(self, host: str) -> contextlib.AbstractAsyncContextManager[None]:
        if not self.config.connections_per_host:
            return contextlib.nullcontext()
        slot = self._slots_of_host.get(host)
        if slot is None:
            self._slots_of_host[host] = slot = asyncio.Semaphore(self.config.connections_per_host)
        return slot

    def _target(self, text: str, base: _Target | None) -> _Target:
        """What to ask for, checked: `text` as a browser would read it, relative to `base`."""
        try:
            url, credentials = _parsed(text if base is None else urljoin(str(base.url), _cleaned(text)))
            address = _address(url)
        except ValueError:
            # Not the error's own text: it may quote the URL.
            raise BadPicture("bad_url", "not an http or https URL" if base is None else "led to no http or https URL"
                             ) from None
        # For addresses aiohttp asks no resolver; those behind names are checked there.
        if address:
            if not self._resolver.permits(url.raw_host or "", url.port or 0):
                _refuse_private([address])
            if address != url.raw_host:
                url = url.with_host(address)
        headers = {}
        if credentials is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(credentials).decode()
        elif base is not None and base.url.origin() == url.origin() and "Authorization" in base.headers:
            headers["Authorization"] = base.headers["Authorization"]
        return _Target(url, headers)

    async def _translated(self, target: _Target, seconds: float) -> bytes | str:
        """`_hop` within `seconds`, with aiohttp's errors as ours.

        Their texts may hold the URL, or what the server wrote (which may be the URL too), so none is used.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self._hop(target)
        except BadPicture:
            raise
        except aiohttp.ClientSSLError as error:
            raise BadPicture("tls", _certificate_fault(error)) from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise BadPicture("tls", _certificate_fault(error)) from None
        except aiohttp.ConnectionTimeoutError:
            raise _Again("timeout", f"no connection within {self.config.connect_timeout:g} s") from None
        except aiohttp.SocketTimeoutError:
            raise _Again("timeout", f"nothing came for {self.config.read_timeout:g} s") from None
        except TimeoutError:
            raise _Again("timeout", f"not done within {self.config.timeout:g} s") from None
        except aiohttp.ClientPayloadError as error:
            raise _payload_fault(error) from None
        except aiohttp.ClientResponseError as error:
            cause = error.__cause__ and error.__cause__.__cause__
            raise BadPicture("protocol", f"malformed answer ({type(cause or error).__name__})") from None
        except aiohttp.InvalidURL:
            raise BadPicture("bad_url", "not a URL that can be asked for") from None
        except aiohttp.ServerDisconnectedError:
            raise _Again("connect", "closed without an answer") from None
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise _Again("connect", _system_fault(error)) from None

    async def _hop(self, target: _Target) -> bytes | str:
        """One request: the body, or where it leads."""
        headers = target.headers
        # aiohttp keeps any number of idle connections, and a million hosts are more than there are descriptors.
        crowded = len(self._sockets) >= 2 * self.config.connections
        if crowded:
            headers = headers | {"Connection": "close"}
        response = await self._session.get(target.url, headers=headers, allow_redirects=False)
        try:
            if crowded and (protocol := _protocol(response)) is not None:
                protocol.force_close()
            return await self._answer(response)
        finally:
            # There is none if all of the body has come. What is left of it is not waited for, nor a farewell by TLS.
            if response.connection is not None:
                if response.connection.transport is not None:
                    response.connection.transport.abort()
                response.close()

    async def _answer(self, response: aiohttp.ClientResponse) -> bytes | str:
        status, headers = response.status, response.headers
        if status in {301, 302, 303, 307, 308} and (location := headers.get("Location")):
            return location
        if status == 204:
            return b""
        if status in {408, 425, 429} or 500 <= status <= 599:
            raise _Again(f"http_{status}", _phrase(status), _retry_after(headers.get("Retry-After", "")))
        if status != 200:
            raise BadPicture(f"http_{status}", _phrase(status))
        tags = headers.getall("X-Robots-Tag", ())
        if tags and (forbidden := self._robots & _directives(tags, self.config.robots_agent.lower())):
            raise BadPicture("robots", f"X-Robots-Tag: {', '.join(sorted(forbidden))}")
        content, limit, length = response.content, self.config.max_bytes, response.content_length
        if length is not None and length > limit:
            raise BadPicture("too_large", f"{length} bytes announced, allowed are {limit}")
        if length is not None and length <= _PIECE and "Content-Encoding" not in headers:
            # One waking for the whole body instead of one for each piece.
            if content.exception() is None:
                await content.wait_eof()
            return content.read_nowait()
        pieces, size = [], 0
        with _woken(response):
            while piece := await content.readany():
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    raise BadPicture("too_large", f"more than {limit} bytes")
                # Unpacking gives piece after piece without a look at the network, or at anybody else.
                await asyncio.sleep(0)
        return b"".join(pieces)

    def _socket(self, info: tuple[Any, ...]) -> socket.socket:
        made = socket.socket(*info[:3])
        self._sockets.add(made)
        return made


class _Known(NamedTuple):
    until: float
    addresses: list[str]
    failure: tuple[str, str, bool]  # reason, detail, whether another attempt may help; empty if there are addresses
    failures: int = 0


class _Resolver(AbstractResolver):
    """Names to addresses: in threads of its own, remembered with failures, and no private ones."""

    def __init__(self, allowed: set[tuple[str, int | None]], attempts: int) -> None:
        self._allowed, self._attempts = allowed, attempts
        self._known: dict[str, _Known] = {}
        self._asked: dict[str, asyncio.Future[_Known]] = {}
        self._threads = ThreadPoolExecutor(_DNS_THREADS, "dns")

    def permits(self, host: str, port: int) -> bool:
        """Whether the host may lie anywhere."""
        return (host, None) in self._allowed or (host, port) in self._allowed

    async def resolve(self, host: str, port: int = 0,
                      family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        known = self._known.get(host)
        if known is None or known.until < time.monotonic():
            asked = self._asked.get(host)
            if asked is None:
                failures = known.failures if known else 0
                self._asked[host] = asked = asyncio.get_running_loop().run_in_executor(
                    self._threads, _look_up, host, failures, self._attempts)
                asked.add_done_callback(functools.partial(self._remember, host))
            # Shielded: others wait for the same answer.
            known = await asyncio.shield(asked)
        if not known.addresses:
            reason, detail, again = known.failure
            raise (_Again if again else BadPicture)(reason, detail)
        if not self.permits(host, port):
            _refuse_private(known.addresses)
        return [ResolveResult(hostname=host, host=address, port=port, proto=0, flags=socket.AI_NUMERICHOST,
                              family=socket.AF_INET6 if ":" in address else socket.AF_INET)
                for address in known.addresses]

    def _remember(self, host: str, asked: asyncio.Future[_Known]) -> None:
        del self._asked[host]
        if not asked.cancelled() and asked.exception() is None:
            self._known.pop(host, None)
            self._known[host] = asked.result()
            if len(self._known) > _DNS_NAMES:
                del self._known[next(iter(self._known))]

    async def close(self) -> None:
        for asked in list(self._asked.values()):
            asked.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str, failures: int, attempts: int) -> _Known:
    later = time.monotonic() + _DNS_SECONDS
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except socket.gaierror as error:
        if error.errno in {socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_FAIL}:
            return _Known(later, [], ("dns", "no such name", False))
        # A name whose servers are dead takes a thread for long: after as many attempts as one URL has, it is given up.
        failures += 1
        return _Known(later if failures >= attempts else 0.0, [],
                      ("dns", "no answer from the name's servers", failures < attempts), failures)
    except OSError:
        return _Known(0.0, [], ("dns", "the lookup failed", True))
    except ValueError:  # labels that are empty or too long
        return _Known(later, [], ("bad_url", "no name that a host can have", False))
    addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    return _Known(later, addresses, ("dns", "a name without addresses", False))


def _allowed_host(text: str) -> tuple[str, int | None]:
    """(host, port) of an entry of allow_hosts."""
    try:
        host = text if text.startswith("[") or text.count(":") < 2 else f"[{text}]"
        url, credentials = _parsed(f"http://{host}")
        if credentials is not None or url.raw_path != "/" or url.query_string:
            raise ValueError
    except ValueError:
        raise ValueError(f"download.allow_hosts has {text!r}: must be a host or host:port") from None
    # Not url.explicit_port: :80 in the entry means 80.
    port = re.search(r":(\d+)$", host.rpartition("]")[2])
    return url.raw_host or "", int(port[1]) if port else None


def _cleaned(text: str) -> str:
    """What browsers do before they read a URL."""
    text = text.strip(_SPACE).translate({ord(char): None for char in "\t\r\n"})
    if "\\" in text:
        head, mark, tail = text.partition("?")
        text = head.replace("\\", "/") + mark + tail
    return text


def _parsed(text: str) -> tuple[URL, bytes | None]:
    """A URL that can be sent, without its credentials, and these; ValueError if it is none.

    As browsers do: escapes stay as they are, and what cannot be sent is escaped.
    """
    parts = urlsplit(_cleaned(text))
    if parts.scheme not in {"http", "https"}:
        raise ValueError("scheme")
    userinfo, at, place = parts.netloc.rpartition("@")
    origin = URL(f"{parts.scheme}://{place if '[' in place else unquote(place)}")
    host = origin.raw_host or ""
    if "[" in place:
        ipaddress.IPv6Address(host if "%" not in host else "")  # a zone is a matter of one machine
    elif not _HOST.fullmatch(host):
        raise ValueError("host")
    # What was escaped in the host may have become another part.
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


def _address(url: URL) -> str:
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


def _refuse_private(addresses: Iterable[str]) -> None:
    for address in addresses:
        if not _is_public(address):
            raise BadPicture("forbidden_address", f"{address} is not on the public internet")


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


def _directives(tags: Iterable[str], agent: str) -> set[str]:
    """The directives of X-Robots-Tag headers that apply to everybody or to `agent`.

    A name before a colon addresses the rest of its header, up to the next name.
    """
    found = set()
    for tag in tags:
        ours = True
        for part in tag.lower().split(","):
            name, colon, rest = (piece.strip() for piece in part.partition(":"))
            if colon and name not in _ROBOTS_WITH_VALUE and _TOKEN.fullmatch(name):
                ours, name = name in {"*", agent}, rest
            if ours:
                found.add(name)
    return found


def _retry_after(text: str) -> float:
    """Seconds that the header Retry-After asks for; 0 if it says nothing that can be read."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError, IndexError):
        return 0.0


def _phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "a status that no standard knows"


def _system_fault(error: Exception) -> str:
    cause = getattr(error, "os_error", error)
    number = getattr(cause, "errno", None)
    # Numbers below 0 are those of getaddrinfo.
    return os.strerror(number) if number and number > 0 else type(cause).__name__


def _certificate_fault(error: Exception) -> str:
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", error)
    return getattr(cause, "verify_message", None) or getattr(cause, "reason", None) or "no TLS connection"


def _protocol(response: aiohttp.ClientResponse) -> ResponseHandler | None:
    """None if all of the body has come."""
    return response.connection.protocol if response.connection else None


@contextlib.contextmanager
def _woken(response: aiohttp.ClientResponse) -> Iterator[None]:
    """Let the reader of a body know when its connection is lost.

    aiohttp does not if chunks go wrong halfway: the reader would wait until the attempt is over.
    """
    closed = protocol.closed if (protocol := _protocol(response)) is not None else None
    if closed is None:
        yield
        return
    content = response.content

    def wake(_: asyncio.Future[None]) -> None:
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError())
    # Once for a connection: the future complains about an error that nobody has looked at.
    closed.remove_done_callback(_look_at)
    closed.add_done_callback(_look_at)
    closed.add_done_callback(wake)
    try:
        yield
    finally:
        closed.remove_done_callback(wake)


def _look_at(closed: asyncio.Future[None]) -> None:
    if not closed.cancelled():
        closed.exception()


def _payload_fault(error: aiohttp.ClientPayloadError) -> BadPicture:
    cause = error.__cause__
    if isinstance(cause, ContentEncodingError):
        return BadPicture("protocol", "the body does not unpack")
    if isinstance(cause, ContentLengthError):
        return _Again("cut", "fewer bytes than announced")
    if isinstance(cause, TransferEncodingError) and "Not enough data" in str(cause):
        return _Again("cut", "closed before the last chunk")
    return BadPicture("protocol", f"malformed body ({type(cause).__name__})" if cause else "malformed body")
