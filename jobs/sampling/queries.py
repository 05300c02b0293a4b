"""The queries of a sampling run: prompts, images, and rows sampled from p_D."""

import hashlib
import logging
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import storage
from pipeline.media.decode import decode
from pipeline.media.foreign_tars.samples import MOST_SAMPLE_BYTES
from pipeline.media.types import BadImage
from pipeline.rows.column_names import CAPTION_COLUMNS, find_caption_columns
from pipeline.sources.captions import read_caption_table
from pipeline.tables.cells import cell_text
from pipeline.tables.names import table_kind

_log = logging.getLogger(__name__)
_MOST_PIXELS = 100_000_000
FROM_P_D = "from p_D"
NAMED_PROMPTS = 5
"""More prompts are not spelled out in messages and commands."""


@dataclass(frozen=True)
class Query:
    """A row of the grid. All its images start from the noise of its position, which no other query has."""

    position: int
    kind: Literal["prompt", "image", "p_D"]
    title: str
    """The prompt, or the name of the image file."""
    sha256: str = ""
    """Hash of the bytes of the image."""

    @property
    def name(self) -> str:
        """The prefix of the names of its files."""
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


def prompt_flags(prompts: Sequence[str]) -> str:
    """The flags of a command with these prompts, or with a file if there are many."""
    if len(prompts) > NAMED_PROMPTS:
        return "--prompts FILE"
    return " ".join(f"--prompt {shlex.quote(prompt)}" for prompt in prompts)


def build_queries(prompts: Sequence[str], paths: Sequence[str], unconditional: int, count: int = 1
                  ) -> tuple[Query, ...]:
    """Prompts, then images, `count` queries for each, then rows of p_D.

    ValueError if a prompt or an image is empty, unreadable or given twice.
    """
    if wrong := [prompt for prompt, times in Counter(prompts).items() if times > 1 or not prompt.strip()]:
        raise ValueError(f"a prompt is empty or given twice: {', '.join(map(repr, wrong))}\n"
                         f"hint: --count 2 makes two images of each prompt")
    hashes = [hashlib.sha256(read_image(path)).hexdigest() for path in paths]
    if len(set(hashes)) < len(hashes):
        raise ValueError(f"an image is given twice: {', '.join(paths)}")
    kinds: list[tuple[Any, ...]] = [("prompt", prompt) for prompt in prompts for _ in range(count)]
    kinds += [("image", Path(path).name, sha256) for path, sha256 in zip(paths, hashes, strict=True)
              for _ in range(count)]
    kinds += [("p_D", FROM_P_D)] * unconditional
    return tuple(Query(position, *kind) for position, kind in enumerate(kinds))


def read_prompts(address: str) -> tuple[str, ...]:
    """The prompts of a file without duplicates: the captions of a table, or the lines of a text.

    Empty and repeated ones are counted in a warning. ValueError if the file or one of its rows cannot be read.
    """
    address = storage.normalize(address)
    is_table = table_kind(address) in {"parquet", "csv", "tsv", "jsonl", "ndjson", "json"}
    texts = _read_captions(address) if is_table else _read_lines(address)
    prompts = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not prompts:
        raise ValueError(f"{address} has no prompt\nhint: --prompts takes a text with a prompt in each line, or a "
                         f"table with a column caption")
    empty = sum(not text.strip() for text in texts)
    if len(prompts) < len(texts):
        _log.warning("%s: %d prompts; left out: %d empty, %d repeated", address, len(prompts), empty,
                     len(texts) - len(prompts) - empty)
    return prompts


def _read_captions(address: str) -> list[str]:
    rows, header = read_caption_table(address)
    if wrong := [row for row in rows if row.problem]:
        raise ValueError(f"{address}: {len(wrong)} of {len(rows)} rows cannot be read, the first is {wrong[0].place}: "
                         f"{wrong[0].problem}\nhint: correct these rows")
    names = find_caption_columns(header)
    if not names:
        raise ValueError(f"{address} has no column of prompts: expected one of {', '.join(CAPTION_COLUMNS)}, got "
                         f"{', '.join(header)}\nhint: name the column caption")
    return [cell_text(row.cells.get(names[0])) for row in rows]


def _read_lines(address: str) -> list[str]:
    """The lines of a text that are not blank."""
    try:
        text = storage.read_bytes(address).decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no file {address}\nhint: --prompts takes a text with a prompt in each line, or a "
                         f"table with a column caption") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{address} is no UTF-8 text: {error.reason} at byte {error.start}\n"
                         f"hint: iconv -t UTF-8 converts it; --prompts takes tables by their names: .csv, .parquet"
                         ) from None
    return [line for line in text.splitlines() if line.strip()]


def read_image(path: str) -> bytes:
    """The bytes of an image on this machine. ValueError if it cannot be read or decoded."""
    try:
        data = storage.read_at_most(str(Path(path).expanduser()), MOST_SAMPLE_BYTES)
        decode(data, _MOST_PIXELS)
    except (storage.DamagedFile, storage.FileTooLarge) as error:
        raise ValueError(f"cannot read the image {path}: {storage.first_line(error)}\n"
                         f"hint: --image takes the path of a file on this machine") from None
    except OSError as error:
        raise ValueError(f"cannot read the image {path}: {error.strerror}\n"
                         f"hint: --image takes the path of a file on this machine") from None
    except BadImage as error:
        raise ValueError(f"cannot decode the image {path}: {error}\n"
                         f"hint: --image takes the formats that `shard` takes, for example JPEG, PNG or WebP") from None
    return data
