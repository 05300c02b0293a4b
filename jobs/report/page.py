"""The page of a report: markup that escapes by construction, pictures inlined, numbers as people read them."""

import base64
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from html import escape
from typing import Any

from PIL import Image, UnidentifiedImageError

from jobs.report.style import STYLE

MOST_PICTURE_BYTES = 6_000_000
_LOSSLESS_SIDE = 96
_EMPTY_TAGS = {"img", "meta"}
_log = logging.getLogger(__name__)


class Html(str):
    """Text that is markup already; every other text is escaped when it becomes part of a tag."""


Child = str | Iterable["Child"] | None


def tag(name: str, /, *children: Child, **attributes: Any) -> Html:
    """An element; `class_` is the attribute class, `data_label` data-label; None leaves an attribute out."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
                      for key, value in attributes.items() if value is not None)
    if name in _EMPTY_TAGS:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{together(children)}</{name}>")


def together(children: Iterable[Child]) -> Html:
    """Children one after another."""
    return Html("".join(_flat(children)))


def _flat(children: Iterable[Child]) -> Iterator[str]:
    for child in children:
        if isinstance(child, Html):
            yield child
        elif isinstance(child, str):
            yield escape(child)
        elif child is not None:
            yield from _flat(child)


def note(*children: Child) -> Html:
    """A quiet line, as for what is not there."""
    return tag("p", *children, class_="note")


def link(text: str, address: Any) -> Child:
    """A link where the address is one of the web; elsewhere the text alone."""
    web = isinstance(address, str) and address.startswith(("https://", "http://"))
    return tag("a", text, href=address, rel="noopener noreferrer") if web else text


def scrolling(*children: Child) -> Html:
    """Something wide that scrolls by itself on a narrow screen."""
    return tag("div", *children, class_="scroll", tabindex="0")


def details(summary: str, *children: Child) -> Html:
    """Something folded away."""
    return tag("details", tag("summary", summary), *children)


def settings(values: dict[str, Any]) -> Html:
    """Nested settings as a table of dotted names."""
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", text)) for name, text in _dotted(values, "")]
    return scrolling(tag("table", tag("tbody", rows), class_="settings"))


def _dotted(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _dotted(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(map(str, value)) or "none"
    else:
        yield prefix, "–" if value in (None, "") else str(value)


def guarded(what: str, make: Callable[..., Child], *arguments: Any) -> Child:
    """What `make` makes, or a line that says why it could not."""
    try:
        return make(*arguments)
    except Exception as error:
        # A damaged root needs its report most: one part that cannot be read must not cost the others.
        _log.warning("report: %s could not be read: %s", what, error,
                     exc_info=not isinstance(error, ValueError | OSError))
        return note(f"{what} could not be read: ", str(error).split("\nhint:")[0] or type(error).__name__)


def page(title: str, body: Iterable[Child]) -> bytes:
    """The whole document."""
    head = tag("head", tag("meta", charset="utf-8"), tag("title", title),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("meta", name="color-scheme", content="light dark"), tag("style", Html(STYLE)))
    document = tag("html", head, tag("body", tag("main", body)), lang="en")
    # A file name of old may hold bytes that no UTF-8 can spell.
    return f"<!doctype html>\n{document}\n".encode("utf-8", "backslashreplace")


class Album:
    """The pictures of a page: inlined until they have `budget` bytes together, then empty places."""

    def __init__(self, budget: int = MOST_PICTURE_BYTES) -> None:
        self.left = budget
        self.left_out = 0

    def picture(self, data: bytes | None, alt: str, title: str | None = None, side: int = 256) -> Html:
        """An encoded picture of at most `side` pixels; an empty place if it is None or broken."""
        inlined = self._inlined(data, side) if data else None
        if inlined is None:
            return tag("span", class_="empty", role="img", aria_label=f"{alt} (no picture)", title=title)
        source, (width, height) = inlined
        return tag("img", src=source, alt=alt, title=title, width=width, height=height)

    def _inlined(self, data: bytes, side: int) -> tuple[str, tuple[int, int]] | None:
        if self.left <= 0:
            self.left_out += 1
            return None
        try:
            picture = Image.open(io.BytesIO(data)).convert("RGB")
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
            return None
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        packed = io.BytesIO()
        # Small drawings have hard edges, which lossy coding frays.
        picture.save(packed, "WEBP", lossless=max(picture.size) <= _LOSSLESS_SIDE, quality=85)
        text = base64.b64encode(packed.getvalue()).decode()
        self.left -= len(text)
        return f"data:image/webp;base64,{text}", picture.size


def number(value: float | None, digits: int = 0) -> str:
    """A number with thousands apart; a dash for none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def amount(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun, in the plural where it is not one."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def brief(value: float | None) -> str:
    """A number in three digits or all of its whole ones, for rates and losses."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(count) < 999.5 or unit == "PB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds in the two units that matter."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def today() -> str:
    """The time of writing."""
    now = datetime.now(UTC)
    return f"{now.day} {now:%B %Y}, {now:%H:%M} UTC"
