"""Known corpora in folders: the names of folders and files tell classes and authors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

_ARTBENCH_STYLES = {"art_nouveau", "baroque", "expressionism", "impressionism", "post_impressionism", "realism",
                    "renaissance", "romanticism", "surrealism", "ukiyo_e"}
_WIKIART_STYLES = {
    "Abstract_Expressionism", "Action_painting", "Analytical_Cubism", "Art_Nouveau_Modern", "Baroque",
    "Color_Field_Painting", "Contemporary_Realism", "Cubism", "Early_Renaissance", "Expressionism", "Fauvism",
    "High_Renaissance", "Impressionism", "Mannerism_Late_Renaissance", "Minimalism", "Naive_Art_Primitivism",
    "New_Realism", "Northern_Renaissance", "Pointillism", "Pop_Art", "Post_Impressionism", "Realism", "Rococo",
    "Romanticism", "Symbolism", "Synthetic_Cubism", "Ukiyo_e"}
_SPLITS = {"train", "test", "val", "valid", "validation"}
_FEWEST_CLASSES = 2


@dataclass(frozen=True)
class FolderLayout:
    """A corpus of images in folders of classes."""

    name: str
    path: str
    """How the names of its images are built, for the log and the documents."""
    columns: tuple[str, ...]
    fits: Callable[[list[str]], bool]
    """Whether the parts of a relative name, at least two, are as in this corpus."""
    cells: Callable[[list[str]], tuple[str, ...]]
    """The cells of the columns, by the parts of a name."""


def _artist_and_title(file: str) -> tuple[str, str]:
    artist, _, title = file.rpartition(".")[0].partition("_")
    return artist, title


FOLDERS = (
    FolderLayout("ArtBench-10", "{train,test}/<style>/<file>", ("style",), lambda parts: parts[-2] in _ARTBENCH_STYLES,
                 lambda parts: (parts[-2],)),
    FolderLayout("WikiArt", "<style>/<artist>_<title>.jpg", ("style", "artist", "title"),
                 lambda parts: parts[-2] in _WIKIART_STYLES, lambda parts: (parts[-2], *_artist_and_title(parts[-1]))),
    FolderLayout("ImageFolder", "{train,test,validation}/<label>/<file>", ("label",),
                 lambda parts: len(parts) == 3 and parts[0] in _SPLITS, lambda parts: (parts[-2],)),
)


def find_folder_layout(names: Iterable[str]) -> FolderLayout | None:
    """The known layout that most of the relative names fit, if these are of two classes or more."""
    names = list(names)
    for layout in FOLDERS:
        fitting = [name for name in names if fits_layout(layout, name)]
        if 2 * len(fitting) > len(names) and len({name.split("/")[-2] for name in fitting}) >= _FEWEST_CLASSES:
            return layout
    return None


def fits_layout(layout: FolderLayout, name: str) -> bool:
    """Whether the relative name of an image is as in a layout."""
    return "/" in name and layout.fits(name.split("/"))


def folder_cells(layout: FolderLayout, name: str) -> dict[str, str]:
    """The columns that the name of an image tells. A name without a title has no column for it."""
    return {column: cell for column, cell in zip(layout.columns, layout.cells(name.split("/")), strict=True) if cell}
