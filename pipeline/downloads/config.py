"""Settings of downloads: the section shard.download."""

from dataclasses import dataclass
from math import inf
from typing import Annotated

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds
from pipeline.downloads.urls import TOKEN, parse_allowed_host


@dataclass(frozen=True)
class DownloadConfig:
    """How images are downloaded."""

    connections: Annotated[int, Ge(1)] = 256
    """Largest number of connections in use per worker; as many again may be kept open for the next request."""
    connections_per_host: Annotated[int, Ge(0)] = 0
    """Largest number of connections to one host; 0: no limit."""
    connect_timeout: Annotated[float, Interval(gt=0, lt=inf)] = 10.0
    """Seconds until a connection is open, TLS included."""
    read_timeout: Annotated[float, Interval(gt=0, lt=inf)] = 10.0
    """Seconds between two pieces of an answer."""
    timeout: Annotated[float, Interval(gt=0, lt=inf)] = 60.0
    """Seconds for one whole attempt, redirects and body included; waiting for a free connection is not counted."""
    retries: Annotated[int, Ge(0)] = 2
    """Attempts after the first one, for failures that may pass."""
    max_bytes: Annotated[int, Ge(1)] = 50_000_000
    """Largest body in bytes, after decompression; larger ones are refused."""
    user_agent: str = "Mozilla/5.0 (compatible; retrieval-diffusion/0.1)"
    """The User-Agent header of every request."""
    robots: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Directives of an X-Robots-Tag header that exclude an image; none: the header is ignored."""
    robots_agent: str = ""
    """Name by which an X-Robots-Tag may address this program alone ("mybot: noai")."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts that may have private IP addresses, such as your own servers: a name or an IP address, also with :port."""

    def __post_init__(self) -> None:
        check_bounds("shard.download", self)
        if not self.user_agent.isascii() or not self.user_agent.isprintable():
            raise ValueError(f"shard.download.user_agent = {self.user_agent!r}: must be printable ASCII")
        if self.robots_agent and not TOKEN.fullmatch(self.robots_agent):
            raise ValueError(f"shard.download.robots_agent = {self.robots_agent!r}: must be one word")
        for host in self.allow_hosts:
            parse_allowed_host(host)
