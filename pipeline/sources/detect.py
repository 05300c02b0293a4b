"""Choose the kind of a source by the names of its files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.media.types import SUFFIXES
from pipeline.sources.patterns import is_pattern, match_pattern
from pipeline.sources.source import LISTS, TARS, Source, list_source_files

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig


def open_source(config: ShardConfig) -> Source:
    """The source that the settings name; ValueError if there is none, or it cannot be told what it is."""
    from pipeline.sources.folder import FolderSource
    from pipeline.sources.lists import ListSource
    from pipeline.sources.tars import TarSource
    if not config.source:
        raise ValueError("shard needs a source\nhint: --source FOLDER, or a list of addresses, or tars")
    kind = config.kind if config.kind != "auto" else _guess(config.source)
    if kind != "tars" and (only := [name for name in ("image_key", "caption_key") if getattr(config, name)]):
        raise ValueError(f"shard.{only[0]}: a setting for tars, and {', '.join(config.source)} is no tar\n"
                         f"hint: --image-column and --caption-column for lists, --captions for folders")
    if kind == "pictures":
        return FolderSource(config)
    addresses = [address for source in config.source for address in list_source_files(source, kind)]
    if not addresses:
        wanted = {"list": ", ".join(LISTS[::4]), "tars": ", ".join(TARS)}[kind]
        raise ValueError(f"no files ending in {wanted} in {', '.join(config.source)}")
    return ListSource(config, addresses) if kind == "list" else TarSource(config, addresses)


def _guess(sources: tuple[str, ...]) -> str:
    kinds = set()
    for source in sources:
        names: Iterable[str] = [source]
        named = source.lower().endswith((*TARS, *LISTS, *SUFFIXES))
        if not named and is_pattern(source):
            names = match_pattern(source)
        elif not named and not storage.exists(source):
            try:
                names = [name for name, _ in storage.walk(source)]
            except FileNotFoundError:
                raise ValueError(f"there is no file or folder {source}") from None
        endings = [name.lower() for name in names]
        for kind, suffixes in (("pictures", SUFFIXES), ("tars", TARS), ("list", LISTS)):
            if any(name.endswith(suffixes) for name in endings):
                kinds.add(kind)
                break
        else:
            raise ValueError(f"no pictures in {source}\nhint: files ending in {', '.join(SUFFIXES)} are looked "
                             f"for, in folders below it too; or .tar; or lists, ending in {', '.join(LISTS[::4])}")
    if len(kinds) != 1:
        raise ValueError(f"the sources are of several kinds: {', '.join(sorted(kinds))}\n"
                         f"hint: make a dataset of each")
    return kinds.pop()
