"""Rendering: Jinja templates that escape all text, and images that are inlined until the page is large enough.

The only file that imports Jinja.
"""

import base64
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from pipeline import storage

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_IMAGE_BYTES = 6_000_000
_LOSSLESS_SIDE = 96
_THUMBNAIL_HEIGHT = 96
_THUMBNAIL_SHAPES = (0.5, 2.0)
"""The least and the greatest width of a thumbnail over its height. A longer image is cropped at both ends."""
_FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> Markup:
    """The HTML of a file in templates/. Every value is escaped unless it is `Markup`."""
    return Markup(_environment().get_template(template).render(**values))


def render_page(**values: Any) -> bytes:
    """The HTML document, with the style sheet inside."""
    page = render("page.html", style=Markup((_FOLDER / "report.css").read_text()), **values)
    # Here and not in the templates, so that no value is left out. The page itself has none of these characters.
    return storage.escape_controls(page, "\n\t\r").encode()


def web_url(value: Any) -> str | None:
    """The value if it is an http or https URL. A link to anything else could run a script."""
    return value if isinstance(value, str) and value.startswith(("https://", "http://")) else None


@functools.cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from jobs.telemetry import units
    environment = Environment(loader=FileSystemLoader(_FOLDER / "templates"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": units.format_count, "number": units.format_number, "bytes": units.format_bytes,
                            "duration": units.format_duration, "web_url": web_url}
    return environment


@dataclass(frozen=True)
class InlineImage:
    """An image of the page. `source` is a data URL, or None for an empty place."""

    alt: str
    title: str | None = None
    source: str | None = None
    width: int = 0
    height: int = 0


class Album:
    """The images of a page and their captions.

    It inlines images until they have `budget` bytes together, then returns empty places.
    """

    def __init__(self, budget: int = MOST_IMAGE_BYTES) -> None:
        self.left = budget
        self.left_out = 0
        self._captions: set[str] = set()

    def once(self, caption: str) -> str:
        """An explanation below an image or a table; empty if the page has the same one already."""
        caption = type(caption)(" ".join(caption.split()))
        if caption in self._captions:
            return ""
        self._captions.add(caption)
        return caption

    def thumbnail(self, data: bytes | None, alt: str, title: str | None = None) -> InlineImage:
        """An encoded image for a row of images of one height. An image of an extreme shape shows its middle."""
        return self._inline(data, alt, title, _fit_height)

    def image(self, data: bytes | None, alt: str, title: str | None = None, side: int = 256) -> InlineImage:
        """An encoded image, scaled to at most `side` pixels. An empty place if `data` is None or cannot be decoded."""
        def fit(image: Image.Image) -> Image.Image:
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            return image

        return self._inline(data, alt, title, fit)

    def _inline(self, data: bytes | None, alt: str, title: str | None,
                fit: Callable[[Image.Image], Image.Image]) -> InlineImage:
        if not data:
            return InlineImage(alt, title)
        if self.left <= 0:
            self.left_out += 1
            return InlineImage(alt, title)
        try:
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
            return InlineImage(alt, title)
        image = fit(image)
        packed = io.BytesIO()
        # Lossy coding blurs the hard edges of small images.
        image.save(packed, "WEBP", lossless=max(image.size) <= _LOSSLESS_SIDE, quality=85)
        text = base64.b64encode(packed.getvalue()).decode()
        self.left -= len(text)
        return InlineImage(alt, title, f"data:image/webp;base64,{text}", *image.size)


def _fit_height(image: Image.Image) -> Image.Image:
    """The image at the height of thumbnails, or smaller if it is smaller, cropped to the shapes of thumbnails."""
    least, most = _THUMBNAIL_SHAPES
    width = min(image.width, max(1, round(most * image.height)))
    height = min(image.height, max(1, round(image.width / least)))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    scale = min(1.0, _THUMBNAIL_HEIGHT / height)
    return image.resize((max(1, round(scale * width)), max(1, round(scale * height))), Image.Resampling.LANCZOS)
