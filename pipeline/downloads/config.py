"""Settings of downloads: the section shard.download."""

from dataclasses import dataclass
from math import inf
from typing import Annotated

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds
from pipeline.downloads.urls import TOKEN, parse_allowed_host, parse_host_rates


@dataclass(frozen=True)
class DownloadConfig:
    """How images are downloaded."""

    connections: Annotated[int, Ge(1)] = 256
    """Largest number of connections in use in a worker. It may keep as many idle ones open for the next request."""
    connections_per_host: Annotated[int, Ge(0)] = 0
    """Largest number of connections of one worker to one host; 0: no limit."""
    host_connections: Annotated[int, Ge(0)] = 256
    """Largest number of connections of all workers together to one host; 0: no limit. Each worker has an equal share,
    at least one connection."""
    host_rate: tuple[str, ...] = ()
    """Largest number of requests a second of all workers together to one host. NUMBER limits every host, HOST=NUMBER
    the hosts of that name (with * and ?). By default there is no limit until a host refuses."""
    host_patience: Annotated[float, Interval(ge=0, lt=inf)] = 120.0
    """Seconds that rows wait for a host that refuses all requests (403, 429, 503 with Retry-After)."""
    connect_timeout: Annotated[float, Interval(gt=0, lt=inf)] = 10.0
    """Seconds until a connection is open, TLS included."""
    read_timeout: Annotated[float, Interval(gt=0, lt=inf)] = 10.0
    """Seconds between two pieces of an answer."""
    timeout: Annotated[float, Interval(gt=0, lt=inf)] = 60.0
    """Seconds for an attempt with redirects and body, but without the wait for a free connection."""
    retries: Annotated[int, Ge(0)] = 2
    """Attempts after the first one, for failures that may pass."""
    max_bytes: Annotated[int, Ge(1)] = 50_000_000
    """Largest download in bytes, after decompression."""
    user_agent: str = "Mozilla/5.0 (compatible; retrieval-diffusion/0.1)"
    """The User-Agent header of every request."""
    contact: str = ""
    """URL or mail address of a contact for hosts. It is added to the User-Agent header."""
    robots: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Directives of an X-Robots-Tag header that exclude an image; none: the header is ignored."""
    robots_agent: str = ""
    """Name of your program in rules of X-Robots-Tag and robots.txt, such as mybot in "mybot: noai"."""
    robots_txt: bool = False
    """Read robots.txt of each host first. The download leaves out URLs that it excludes and
    keeps its Crawl-delay."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts that may have private IP addresses, such as your own servers: a name or an IP address, also with :port."""

    def __post_init__(self) -> None:
        check_bounds("shard.download", self)
        parse_host_rates(self.host_rate)
        if not self.user_agent.isascii() or not self.user_agent.isprintable():
            raise ValueError(f"shard.download.user_agent = {self.user_agent!r}: must be printable ASCII")
        if not self.contact.isascii() or not self.contact.isprintable() or set("();") & set(self.contact):
            raise ValueError(f"shard.download.contact = {self.contact!r}: must be printable ASCII without brackets "
                             f"and semicolons\nhint: --contact me@example.org")
        if self.robots_agent and not TOKEN.fullmatch(self.robots_agent):
            raise ValueError(f"shard.download.robots_agent = {self.robots_agent!r}: must be one word")
        for host in self.allow_hosts:
            parse_allowed_host(host)

    @property
    def full_user_agent(self) -> str:
        """The User-Agent header, with the contact in its comment."""
        if not self.contact:
            return self.user_agent
        contact = f"+{self.contact}" if "://" in self.contact else self.contact
        return (f"{self.user_agent[:-1]}; {contact})" if self.user_agent.endswith(")") else
                f"{self.user_agent} ({contact})")
