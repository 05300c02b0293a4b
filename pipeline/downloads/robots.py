"""Directives of the X-Robots-Tag header and of robots.txt."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from protego import Protego

from pipeline.downloads.urls import TOKEN

AGENT = "retrieval-diffusion"  # for robots.txt, if the settings name none
_MOST_BYTES = 500 * 1024  # of a robots.txt; RFC 9309 asks for at least as much
_LONGEST_DELAY_S = 60.0  # of Crawl-delay
_MOST_SITES = 10_000
_ROBOTS_WITH_VALUE = {"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"}


def robots_directives(tags: Iterable[str], agent: str) -> set[str]:
    """The directives of X-Robots-Tag headers that apply to everybody or to `agent`.

    A name before a colon addresses the rest of its header, up to the next name. `none` stands for noindex and nofollow.
    """
    directives = set()
    for tag in tags:
        ours = True
        for part in tag.lower().split(","):
            name, colon, rest = (piece.strip() for piece in part.partition(":"))
            if colon and name not in _ROBOTS_WITH_VALUE and TOKEN.fullmatch(name):
                ours, name = name in {"*", agent}, rest
            if ours:
                directives |= {"none", "noindex", "nofollow"} if name == "none" else {name}
    return directives


class RobotsTxt:
    """The robots.txt of each site, read once."""

    def __init__(self, agent: str, read: Callable[[str], Awaitable[bytes]]) -> None:
        """`read` gives the robots.txt of a site, and an empty one if the site has none."""
        self._agent, self._read = agent or AGENT, read
        self._rules: dict[str, asyncio.Task[Protego]] = {}

    async def rules(self, site: str, url: str) -> tuple[bool, float]:
        """Whether a URL may be read, and the seconds between two requests that its site asks for, at most a minute.

        BadImage if the site does not answer, so it is not known what it allows.
        """
        task = self._rules.get(site)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            self._rules[site] = task = asyncio.create_task(self._parse(site))
            if len(self._rules) > _MOST_SITES:
                self._rules.pop(next(iter(self._rules))).cancel()
        rules = await asyncio.shield(task)  # others wait for the same answer
        delay = float(rules.crawl_delay(self._agent) or 0)
        return bool(rules.can_fetch(url, self._agent)), min(delay, _LONGEST_DELAY_S)

    async def _parse(self, site: str) -> Protego:
        return Protego.parse((await self._read(f"{site}/robots.txt"))[:_MOST_BYTES].decode("utf-8", "replace"))

    def close(self) -> None:
        """Cancel what is still being read."""
        for task in self._rules.values():
            task.cancel()
        self._rules.clear()
