"""Download images over HTTP with retries. The only file that opens HTTP connections."""

import asyncio
import base64
import contextlib
import random
import socket
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import ContentEncodingError, ContentLengthError, TransferEncodingError

from pipeline.downloads.config import DownloadConfig
from pipeline.downloads.host_gate import HostGate
from pipeline.downloads.host_limits import HostLimits, ProcessLimits
from pipeline.downloads.hosts import Refusals, Refused, Visit
from pipeline.downloads.http_text import certificate_fault, phrase, retry_after, system_fault
from pipeline.downloads.resolver import HostLookup, Retryable
from pipeline.downloads.robots import RobotsTxt, robots_directives
from pipeline.downloads.urls import URL, clean_url, literal_address, parse_allowed_host, parse_url, refuse_private
from pipeline.media.types import BadImage

REDIRECTS = 5
_FIRST_WAIT, _LONGEST_BACKOFF = 0.5, 30.0
_PIECE = 1 << 20  # a body of twice that is taken in without a pause
_HEADER = 1 << 15  # bytes of one header; policies of 20 kB are met with


class _Target(NamedTuple):
    url: URL  # without credentials
    headers: dict[str, str]


class _Trip:
    """The way of one download: attempts, redirects and refusals."""

    def __init__(self, target: _Target, seconds: float) -> None:
        self.start, self.attempts, self.refusals = target, 0, Refusals()
        self.begin(seconds)

    def begin(self, seconds: float) -> None:
        """Begin an attempt, with so many seconds for it."""
        self.target, self.seconds, self.hops = self.start, seconds, 0


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
    """Downloads over HTTP; an asynchronous context manager, for any number of concurrent `get`."""

    def __init__(self, config: DownloadConfig, limits: HostLimits | None = None) -> None:
        """`limits` are shared with other downloaders, by default with none."""
        self.config = config
        self.gate = HostGate(config, limits or ProcessLimits())
        self._allowed = {parse_allowed_host(host) for host in config.allow_hosts}
        self._robots = {directive.strip().lower() for directive in config.robots}
        self._robots_txt = RobotsTxt(config.robots_agent, self._read_robots_txt) if config.robots_txt else None

    async def __aenter__(self) -> "Downloader":
        config = self.config
        self._slots = asyncio.Semaphore(config.connections)
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lookup = HostLookup(self._allowed, config.retries + 1)
        self._session = aiohttp.ClientSession(
            # No limit there: waiting in that queue would count as time spent on the attempt.
            connector=aiohttp.TCPConnector(limit=0, resolver=_Resolver(self._lookup), use_dns_cache=False,
                                           socket_factory=self._open_socket),
            timeout=aiohttp.ClientTimeout(sock_connect=config.connect_timeout, sock_read=config.read_timeout),
            headers={"User-Agent": config.full_user_agent, "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(), trust_env=False, read_bufsize=_PIECE, max_line_size=_HEADER,
            max_field_size=_HEADER)
        await self.gate.__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        if self._robots_txt:
            self._robots_txt.close()
        await self.gate.__aexit__(kind, error, trace)
        await self._session.close()
        self._lookup.close()
        # Aborted TLS connections still wait for the server's close message. The end of the loop would interrupt that.
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
        too_many_redirects, robots, protocol, host_banned, or http_ and the status.
        """
        async with self.hold(url) as body:
            return body

    @contextlib.asynccontextmanager
    async def hold(self, url: str) -> AsyncIterator[bytes]:
        """`get`, for as long as one of the `connections` is kept: so the bodies in memory are no more than these."""
        # No retry library: the time limit of an attempt starts when a connection is free, each redirect is checked
        # again, and Retry-After counts. A library would not replace this code.
        trip = _Trip(self._parse_target(url, None), self.config.timeout)
        body = None
        while body is None:
            if self._robots_txt:
                await self._obey_robots_txt(self._robots_txt, trip.target.url)
            body = await self._request_next(trip)
        try:
            yield body
        finally:
            self._slots.release()

    async def _obey_robots_txt(self, robots: RobotsTxt, url: URL) -> None:
        with self.gate.parked():
            allowed, delay = await robots.rules(str(url.origin()), str(url))
        if not allowed:
            raise BadImage("robots", "robots.txt excludes it")
        if delay:
            self.gate.limit_rate(url.raw_host or "", 1 / delay)

    async def _read_robots_txt(self, url: str) -> bytes:
        trip = _Trip(self._parse_target(url, None), self.config.timeout)
        try:
            while (body := await self._request_next(trip)) is None:
                pass
        except BadImage as bad:
            if bad.reason.startswith("http_4") and bad.reason != "http_429":
                return b""  # RFC 9309: the site has no rules
            raise BadImage(bad.reason, f"robots.txt: {bad.detail}") from None
        self._slots.release()
        return body

    async def _request_next(self, trip: _Trip) -> bytes | None:
        """Send the next request of a download: the body, for which a connection is kept, or None to continue."""
        visit = await self._enter(trip)
        try:
            answer = await self._visit(trip, visit)
        except BaseException as error:
            self._slots.release()
            if isinstance(error, Refused):
                await self.gate.refused(visit, trip.refusals, error)
                return None
            if not isinstance(error, Retryable):
                raise
            trip.attempts += 1
            if trip.attempts > self.config.retries:
                raise BadImage(error.reason, error.detail) from None
            wait = min(_FIRST_WAIT * 2 ** (trip.attempts - 1), _LONGEST_BACKOFF) * random.uniform(0.75, 1.25)
        else:
            if isinstance(answer, bytes):
                return answer
            self._slots.release()
            trip.target, trip.hops = self._parse_target(answer, trip.target), trip.hops + 1
            if trip.hops > REDIRECTS:
                raise BadImage("too_many_redirects", f"more than {REDIRECTS}")
            return None
        trip.begin(self.config.timeout)
        with self.gate.parked():
            await asyncio.sleep(wait)
        return None

    async def _enter(self, trip: _Trip) -> Visit:
        """Wait for the host, and then for a connection: requests to a paused host keep no others waiting."""
        while True:
            visit = await self.gate.enter(trip.target.url.raw_host or "", trip.refusals.count > 0)
            try:
                await self._slots.acquire()
            except BaseException:
                self.gate.turn_back(visit)
                raise
            if self.gate.depart(visit):
                return visit
            self._slots.release()

    async def _visit(self, trip: _Trip, visit: Visit) -> bytes | str:
        """One request: the body, or where it leads."""
        try:
            answer = await self._request_translated(trip.target, trip.seconds)
        except Refused:
            raise
        except BadImage as error:
            if error.reason.startswith("http_") or error.reason in {"robots", "too_large"}:
                self.gate.answered(visit, trip.refusals)
            else:
                self.gate.leave(visit)
            raise
        except BaseException:
            self.gate.leave(visit)
            raise
        trip.seconds -= time.monotonic() - visit.sent
        self.gate.answered(visit, trip.refusals)
        return answer

    def _parse_target(self, text: str, base: _Target | None) -> _Target:
        """The checked target of a URL, parsed as browsers do, relative to `base`."""
        try:
            url, credentials = parse_url(text if base is None else urljoin(str(base.url), clean_url(text)))
            address = literal_address(url)
        except ValueError:
            # Not the error's own text: it may quote the URL.
            raise BadImage("bad_url", "not an http or https URL" if base is None else "led to no http or https URL"
                             ) from None
        # aiohttp calls the resolver for names only, so IP addresses are checked here.
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
            raise BadImage("tls", certificate_fault(error)) from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise BadImage("tls", certificate_fault(error)) from None
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
            raise BadImage("bad_url", "not a URL that can be requested") from None
        except aiohttp.ServerDisconnectedError:
            raise Retryable("connect", "closed without an answer") from None
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise Retryable("connect", system_fault(error)) from None

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
            # There is none if the whole body has arrived. The rest of it and the close message of TLS are not read.
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
        if status in {403, 429} or (status == 503 and "Retry-After" in headers):
            raise Refused(status, phrase(status), retry_after(headers.get("Retry-After", "")))
        if status in {408, 425} or 500 <= status <= 599:
            raise Retryable(f"http_{status}", phrase(status))
        if status != 200:
            raise BadImage(f"http_{status}", phrase(status))
        tags = headers.getall("X-Robots-Tag", ()) if response.url.path != "/robots.txt" else ()
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
    # Once for a connection: asyncio warns about an error that was never retrieved.
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
