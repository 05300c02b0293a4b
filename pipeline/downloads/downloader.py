"""Download images over HTTP with retries. The only file that opens HTTP connections."""

import asyncio
import base64
import contextlib
import email.utils
import http
import os
import random
import socket
import time
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import ContentEncodingError, ContentLengthError, TransferEncodingError

from pipeline.downloads.config import DownloadConfig
from pipeline.downloads.resolver import HostLookup, Retryable
from pipeline.downloads.robots import robots_directives
from pipeline.downloads.urls import URL, clean_url, literal_address, parse_allowed_host, parse_url, refuse_private
from pipeline.media.types import BadImage

REDIRECTS = 5
LONGEST_WAIT = 60.0  # seconds that a server may ask for by Retry-After
_FIRST_WAIT, _LONGEST_BACKOFF = 0.5, 30.0
_PIECE = 1 << 20  # a body of twice that is taken in without a pause
_HEADER = 1 << 15  # bytes of one header; policies of 20 kB are met with


class _Target(NamedTuple):
    url: URL  # without credentials
    headers: dict[str, str]


class _Resolver(AbstractResolver):
    """A `HostLookup` as aiohttp wants it."""

    def __init__(self, lookup: HostLookup) -> None:
        self._lookup = lookup

    async def resolve(self, host: str, port: int = 0,
                      family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        return [ResolveResult(hostname=host, host=address, port=port, proto=0, flags=socket.AI_NUMERICHOST,
                              family=socket.AF_INET6 if ":" in address else socket.AF_INET)
                for address in await self._lookup.addresses(host, port)]

    async def close(self) -> None:
        self._lookup.close()


class Downloader:
    """Downloads over HTTP; an asynchronous context manager, for any number of `get` at once."""

    def __init__(self, config: DownloadConfig) -> None:
        self.config = config
        self._allowed = {parse_allowed_host(host) for host in config.allow_hosts}
        self._robots = {directive.strip().lower() for directive in config.robots}

    async def __aenter__(self) -> "Downloader":
        config = self.config
        self._slots = asyncio.Semaphore(config.connections)
        self._slots_of_host: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lookup = HostLookup(self._allowed, config.retries + 1)
        self._session = aiohttp.ClientSession(
            # No limit there: waiting in that queue would count as time spent on the attempt.
            connector=aiohttp.TCPConnector(limit=0, resolver=_Resolver(self._lookup), use_dns_cache=False,
                                           socket_factory=self._open_socket),
            timeout=aiohttp.ClientTimeout(sock_connect=config.connect_timeout, sock_read=config.read_timeout),
            headers={"User-Agent": config.user_agent, "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(), trust_env=False, read_bufsize=_PIECE, max_line_size=_HEADER,
            max_field_size=_HEADER)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self._session.close()
        self._lookup.close()
        # What was given up over TLS still waits for the server's farewell, which the end of the loop would cut off.
        for open_socket in list(self._sockets):
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
        for _ in range(100):
            if all(open_socket.fileno() < 0 for open_socket in self._sockets):
                break
            await asyncio.sleep(0.001)

    async def get(self, url: str) -> bytes:
        """The body at `url`, empty if the server has none.

        BadImage with the reason bad_url, forbidden_address, dns, connect, tls, timeout, cut, too_large,
        too_many_redirects, robots, protocol, or http_ and the status.
        """
        # No retry library: each attempt has a time limit of its own, which starts when a connection is free, each
        # redirect is checked again, and the server's Retry-After counts. With one, all of that would still be here.
        for attempt in range(self.config.retries + 1):
            try:
                return await self._attempt(url)
            except Retryable as error:
                if error.wait > LONGEST_WAIT:
                    raise BadImage(error.reason, f"{error.detail}; to be asked again in {error.wait:.0f} s") from None
                if attempt == self.config.retries:
                    raise BadImage(error.reason, error.detail) from None
                backoff = min(_FIRST_WAIT * 2 ** attempt, _LONGEST_BACKOFF) * random.uniform(0.75, 1.25)
                wait = max(backoff, error.wait)
            await asyncio.sleep(wait)
        raise AssertionError("not reached")

    async def _attempt(self, url: str) -> bytes:
        target, seconds = self._parse_target(url, None), self.config.timeout
        for _ in range(REDIRECTS + 1):
            # First the host's slot: whoever waits for a busy host keeps nobody else waiting.
            async with self._slot_of_host(target.url.raw_host or ""), self._slots:
                began = time.monotonic()
                answer = await self._request_translated(target, seconds)
                seconds -= time.monotonic() - began
            if isinstance(answer, bytes):
                return answer
            target = self._parse_target(answer, target)
        raise BadImage("too_many_redirects", f"more than {REDIRECTS}")

    def _slot_of_host(self, host: str) -> contextlib.AbstractAsyncContextManager[None]:
        if not self.config.connections_per_host:
            return contextlib.nullcontext()
        slot = self._slots_of_host.get(host)
        if slot is None:
            self._slots_of_host[host] = slot = asyncio.Semaphore(self.config.connections_per_host)
        return slot

    def _parse_target(self, text: str, base: _Target | None) -> _Target:
        """What to ask for, checked: `text` as a browser would read it, relative to `base`."""
        try:
            url, credentials = parse_url(text if base is None else urljoin(str(base.url), clean_url(text)))
            address = literal_address(url)
        except ValueError:
            # Not the error's own text: it may quote the URL.
            raise BadImage("bad_url", "not an http or https URL" if base is None else "led to no http or https URL"
                             ) from None
        # For addresses aiohttp asks no resolver; those behind names are checked there.
        if address:
            if not self._lookup.permits(url.raw_host or "", url.port or 0):
                refuse_private([address])
            if address != url.raw_host:
                url = url.with_host(address)
        headers = {}
        if credentials is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(credentials).decode()
        elif base is not None and base.url.origin() == url.origin() and "Authorization" in base.headers:
            headers["Authorization"] = base.headers["Authorization"]
        return _Target(url, headers)

    async def _request_translated(self, target: _Target, seconds: float) -> bytes | str:
        """`_request` within `seconds`, with aiohttp's errors as ours.

        Their texts may hold the URL, or what the server wrote (which may be the URL too), so none is used.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self._request(target)
        except BadImage:
            raise
        except aiohttp.ClientSSLError as error:
            raise BadImage("tls", _certificate_fault(error)) from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise BadImage("tls", _certificate_fault(error)) from None
        except aiohttp.ConnectionTimeoutError:
            raise Retryable("timeout", f"no connection within {self.config.connect_timeout:g} s") from None
        except aiohttp.SocketTimeoutError:
            raise Retryable("timeout", f"nothing came for {self.config.read_timeout:g} s") from None
        except TimeoutError:
            raise Retryable("timeout", f"not done within {self.config.timeout:g} s") from None
        except aiohttp.ClientPayloadError as error:
            raise _payload_fault(error) from None
        except aiohttp.ClientResponseError as error:
            cause = error.__cause__ and error.__cause__.__cause__
            raise BadImage("protocol", f"malformed answer ({type(cause or error).__name__})") from None
        except aiohttp.InvalidURL:
            raise BadImage("bad_url", "not a URL that can be asked for") from None
        except aiohttp.ServerDisconnectedError:
            raise Retryable("connect", "closed without an answer") from None
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise Retryable("connect", _system_fault(error)) from None

    async def _request(self, target: _Target) -> bytes | str:
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
            return await self._read_answer(response)
        finally:
            # There is none if all of the body has come. What is left of it is not waited for, nor a farewell by TLS.
            if response.connection is not None:
                if response.connection.transport is not None:
                    response.connection.transport.abort()
                response.close()

    async def _read_answer(self, response: aiohttp.ClientResponse) -> bytes | str:
        status, headers = response.status, response.headers
        if status in {301, 302, 303, 307, 308} and (location := headers.get("Location")):
            return location
        if status == 204:
            return b""
        if status in {408, 425, 429} or 500 <= status <= 599:
            raise Retryable(f"http_{status}", _phrase(status), _retry_after(headers.get("Retry-After", "")))
        if status != 200:
            raise BadImage(f"http_{status}", _phrase(status))
        tags = headers.getall("X-Robots-Tag", ())
        if tags and (forbidden := self._robots & robots_directives(tags, self.config.robots_agent.lower())):
            raise BadImage("robots", f"X-Robots-Tag: {', '.join(sorted(forbidden))}")
        content, limit, length = response.content, self.config.max_bytes, response.content_length
        if length is not None and length > limit:
            raise BadImage("too_large", f"{length} bytes announced, allowed are {limit}")
        if length is not None and length <= _PIECE and "Content-Encoding" not in headers:
            # One waking for the whole body instead of one for each piece.
            if content.exception() is None:
                await content.wait_eof()
            return content.read_nowait()
        pieces, size = [], 0
        with _wake_on_close(response):
            while piece := await content.readany():
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    raise BadImage("too_large", f"more than {limit} bytes")
                # Unpacking gives piece after piece without a look at the network, or at anybody else.
                await asyncio.sleep(0)
        return b"".join(pieces)

    def _open_socket(self, info: tuple[Any, ...]) -> socket.socket:
        new_socket = socket.socket(*info[:3])
        self._sockets.add(new_socket)
        return new_socket


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
def _wake_on_close(response: aiohttp.ClientResponse) -> Iterator[None]:
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
    closed.remove_done_callback(_retrieve_exception)
    closed.add_done_callback(_retrieve_exception)
    closed.add_done_callback(wake)
    try:
        yield
    finally:
        closed.remove_done_callback(wake)


def _retrieve_exception(closed: asyncio.Future[None]) -> None:
    if not closed.cancelled():
        closed.exception()


def _payload_fault(error: aiohttp.ClientPayloadError) -> BadImage:
    cause = error.__cause__
    if isinstance(cause, ContentEncodingError):
        return BadImage("protocol", "the body does not unpack")
    if isinstance(cause, ContentLengthError):
        return Retryable("cut", "fewer bytes than announced")
    if isinstance(cause, TransferEncodingError) and "Not enough data" in str(cause):
        return Retryable("cut", "closed before the last chunk")
    return BadImage("protocol", f"malformed body ({type(cause).__name__})" if cause else "malformed body")
