"""What pictures are drawn from: prompts, pictures, and rows of the database as likely as they are in training."""

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
    """A row of the grid: its pictures have the noise of its position in common."""

    position: int
    kind: Literal["prompt", "image", "p_D"]
    title: str
    """The prompt, or the name of the picture's file."""
    sha256: str = ""
    """Of the bytes of the picture."""

    @property
    def name(self) -> str:
        """The beginning of the names of its files."""
        text = Path(self.title).stem if self.kind == "image" else self.title
        return f"{self.position:02d}-{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')[:40] or self.kind}"

    @property
    def carried(self) -> str:
        """Where the bytes of the picture stand in the folder, for workers on other machines."""
        return f"asked/{self.sha256[:16]}"

    @property
    def shown(self) -> str:
        """Where the picture stands, small, for people to look at."""
        return f"asked/{self.name}.png"

    def about(self) -> dict[str, Any]:
        """What samples.json says of it in each database; of rows drawn from p_D that differs."""
        if self.kind == "prompt":
            return {"kind": self.kind, "prompt": self.title}
        if self.kind == "image":
            return {"kind": self.kind, "image": {"name": self.title, "sha256": self.sha256, "file": self.shown}}
        return {"kind": self.kind}


def title(picture: dict[str, Any]) -> str:
    """The title of the query that a picture in samples.json was drawn for; older files know prompts alone."""
    kind = picture.get("kind", "prompt")
    return picture["prompt"] if kind == "prompt" else picture["image"]["name"] if kind == "image" else FROM_P_D


def queries(prompts: Sequence[str], paths: Sequence[str], unconditional: int) -> tuple[Query, ...]:
    """Prompts, then pictures, then rows of p_D; ValueError where one is empty, unreadable or given twice."""
    if len(set(prompts)) < len(prompts) or not all(one.strip() for one in prompts):
        raise ValueError(f"a prompt is empty or given twice: {', '.join(map(repr, prompts))}")
    hashes = [hashlib.sha256(read(path)).hexdigest() for path in paths]
    if len(set(hashes)) < len(hashes):
        raise ValueError(f"a picture is given twice: {', '.join(paths)}")
    asked: list[tuple[Any, ...]] = [("prompt", one) for one in prompts]
    asked += [("image", Path(path).name, sha256) for path, sha256 in zip(paths, hashes, strict=True)]
    asked += [("p_D", FROM_P_D)] * unconditional
    return tuple(Query(position, *one) for position, one in enumerate(asked))


def read(path: str) -> bytes:
    """The bytes of a picture on this machine; ValueError if there is none that can be decoded."""
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
