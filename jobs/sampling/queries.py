"""The queries of a sampling run: prompts, images, and rows sampled from p_D."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.media.decode import decode
from pipeline.media.types import BadImage

_MOST_PIXELS = 100_000_000
FROM_P_D = "from p_D"


@dataclass(frozen=True)
class Query:
    """A row of the grid. All its images start from the noise of its position."""

    position: int
    kind: Literal["prompt", "image", "p_D"]
    title: str
    """The prompt, or the name of the image file."""
    sha256: str = ""
    """Hash of the bytes of the image."""

    @property
    def name(self) -> str:
        """The beginning of the names of its files."""
        text = Path(self.title).stem if self.kind == "image" else self.title
        return f"{self.position:02d}-{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')[:40] or self.kind}"

    @property
    def carried(self) -> str:
        """Path in the folder of the original bytes of the image, for workers on other machines."""
        return f"asked/{self.sha256[:16]}"

    @property
    def shown(self) -> str:
        """Path in the folder of a small copy of the image, for viewing."""
        return f"asked/{self.name}.png"

    def about(self) -> dict[str, Any]:
        """The fields of samples.json that are the same in each database."""
        if self.kind == "prompt":
            return {"kind": self.kind, "prompt": self.title}
        if self.kind == "image":
            return {"kind": self.kind, "image": {"name": self.title, "sha256": self.sha256, "file": self.shown}}
        return {"kind": self.kind}


def query_title(picture: dict[str, Any]) -> str:
    """The title of the query of an entry in samples.json. Older files have prompts only."""
    kind = picture.get("kind", "prompt")
    return picture["prompt"] if kind == "prompt" else picture["image"]["name"] if kind == "image" else FROM_P_D


def build_queries(prompts: Sequence[str], paths: Sequence[str], unconditional: int) -> tuple[Query, ...]:
    """Prompts, then images, then rows of p_D. ValueError if one is empty, unreadable or given twice."""
    if len(set(prompts)) < len(prompts) or not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"a prompt is empty or given twice: {', '.join(map(repr, prompts))}")
    hashes = [hashlib.sha256(read_image(path)).hexdigest() for path in paths]
    if len(set(hashes)) < len(hashes):
        raise ValueError(f"a picture is given twice: {', '.join(paths)}")
    kinds: list[tuple[Any, ...]] = [("prompt", prompt) for prompt in prompts]
    kinds += [("image", Path(path).name, sha256) for path, sha256 in zip(paths, hashes, strict=True)]
    kinds += [("p_D", FROM_P_D)] * unconditional
    return tuple(Query(position, *kind) for position, kind in enumerate(kinds))


def read_image(path: str) -> bytes:
    """The bytes of an image on this machine. ValueError if it cannot be read or decoded."""
    try:
        data = Path(path).expanduser().read_bytes()
        decode(data, _MOST_PIXELS)
    except OSError as error:
        raise ValueError(f"cannot read the picture {path}: {error.strerror}\n"
                         f"hint: --image takes the path of a file on this machine") from None
    except BadImage as error:
        raise ValueError(f"the picture {path} cannot be taken: {error}\n"
                         f"hint: --image takes what `shard` takes, JPEG, PNG or WebP for example") from None
    return data
