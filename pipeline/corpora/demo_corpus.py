"""A first corpus: emoji in eight styles, or synthetic images if npm is missing.

<style>/<subject>.png          one image
<style>.csv train.csv          captions: of each style, of the mix of all that training may see
heldout.csv sources.json       captions of what training may not see; origins and licenses
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.corpora import drawn, emoji
from pipeline.corpora.config import DemoCorpusConfig
from pipeline.corpora.vocabulary import Catalog, CatalogImage, name_hash
from pipeline.stages.stage import Stage
from pipeline.stages.types import Entry, Item, Output
from pipeline.storage import name_by_content

_COLUMNS = ("file", "caption", "tags", "style", "subject", "held_out")


class DemoCorpus(Stage):
    """The stage from a catalog to a folder of images with captions."""

    name = "pictures"

    def __init__(self, root: str, config: DemoCorpusConfig, cache: Path) -> None:
        super().__init__(root, f"pictures/{config.corpus}", config)
        self.cache = cache

    @property
    def command(self) -> str:
        return f"python -m jobs demo --root {storage.quote(self.root)}"

    @property
    def replacement(self) -> str:
        return f"python -m jobs rm {self.path} --root {storage.quote(self.root)}; then {self.command}"

    @property
    def alternative(self) -> str:
        return "choose another --root"

    def inputs(self) -> dict[str, dict[str, Any]]:
        sources = emoji.sources(self.cache) if self.config.corpus == "emoji" else drawn.sources()
        return {source["package"]: {"path": "", "digest": source["version"]} for source in sources}

    def plan(self) -> list[Item]:
        corpus = self._catalog()
        step = self.config.pictures_per_item
        parts = [corpus.pictures[start:start + step] for start in range(0, len(corpus.pictures), step)]
        # Workers have no cache of the packages: each part brings its drawings along.
        drawings = [(f"{number:06d}", storage.json_bytes([asdict(picture) | (
            {"drawing": corpus.drawings[picture.key]} if self.config.corpus == "emoji" else {}) for picture in part]))
            for number, part in enumerate(parts)]
        named = [(name_by_content(f"drawings/{number}.json", data), data) for number, data in drawings]
        return [Item(number, {"drawings": name, "count": len(part)}, ((name, data),))
                for (number, _), (name, data), part in zip(drawings, named, parts, strict=True)]

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        output = Output()
        for name, data in self._lists(self._catalog()):
            (scratch / name).write_bytes(data)
            output.files[name] = scratch / name
        return output

    def _lists(self, corpus: Catalog) -> Iterator[tuple[str, bytes]]:
        for style in corpus.styles:
            yield f"{style}.csv", _captions(picture for picture in corpus.pictures if picture.style == style)
        mixed = sorted(corpus.pictures, key=lambda picture: name_hash(picture.key))
        yield "train.csv", _captions(picture for picture in mixed if not picture.held_out)
        yield "heldout.csv", _captions(picture for picture in mixed if picture.held_out)
        sources = emoji.sources(self.cache) if self.config.corpus == "emoji" else drawn.sources()
        yield "sources.json", storage.json_bytes(sources)

    def process(self, item: Item, scratch: Path) -> Output:
        rows = json.loads(storage.read_bytes(storage.file_below(self.folder, item.inputs["drawings"])))
        output = Output()
        drawings = {}
        pictures = []
        for row in rows:
            drawing = row.pop("drawing", None)
            pictures.append(CatalogImage(**row | {"tags": tuple(row["tags"])}))
            drawings[pictures[-1].key] = drawing
        corpus: Catalog[Any]
        render: Callable[[Catalog[Any], CatalogImage, int], bytes]
        if self.config.corpus == "emoji":
            corpus, render = Catalog(tuple(pictures), drawings), emoji.render
        else:
            corpus, render = self._catalog(), drawn.render
        for picture in pictures:
            try:
                data = render(corpus, picture, self.config.size)
            except ValueError as error:
                output.ledger.append(Entry(picture.key, "unrenderable", str(error)))
                continue
            name = f"{picture.key}.png"
            path = scratch / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            output.files[name] = path
            output.samples += 1
        return output

    def _catalog(self) -> Catalog:
        if self.config.corpus == "emoji":
            return emoji.catalog(self.cache)
        return drawn.catalog(self.config.subjects, self.config.seed)


def _captions(pictures: Iterable[CatalogImage]) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for picture in pictures:
        writer.writerow({"file": f"{picture.key}.png", "caption": picture.caption, "tags": ", ".join(picture.tags),
                         "style": picture.style, "subject": picture.subject, "held_out": int(picture.held_out)})
    return buffer.getvalue().encode()
