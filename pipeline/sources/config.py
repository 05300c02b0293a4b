"""Settings of `shard`: the source, the filters and the images."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds
from pipeline.downloads.config import DownloadConfig
from pipeline.formats.sizes import parse_size
from pipeline.media.types import NARROWEST, Format, Resize

Kind = Literal["auto", "pictures", "list", "tars"]


# Bytes a pixel that images take: img2dataset's table of a million of 256 x 256, and some for the metadata.
_BYTES_A_PIXEL = {"jpg": 0.46, "webp": 0.36, "png": 1.5}

LATER_SETTINGS = {"columns": "", "fetch_failed": False, "image_key": "", "caption_key": "", "licenses": ""}
"""Later additions, with their defaults. A default does not change the fingerprint of a folder made before."""


@dataclass(frozen=True)
class ShardConfig:
    """Settings of the source and of the shards."""

    source: tuple[str, ...] = ()
    """The corpus, local or s3://: a folder of images, lists of URLs, parquet with images, or tars. Several folders,
    files and patterns (*, **, ?, [0-9], {000..012}) may be named."""
    kind: Kind = "auto"
    """Kind of the source. auto: by the names of its files, if they are of one kind."""
    captions: str = ""
    """Captions of a folder: a parquet, CSV or JSONL file with a column file (relative to the source) and a
    column caption; others are stored. Default: captions.* in the source, metadata.* in any of its folders, or .txt,
    .caption and .json beside each image."""
    only_captioned: bool = False
    """Take only the images that the captions name, in the order of the captions. Default: all images, sorted by
    name."""
    sources: str = ""
    """JSON file on origin and license of the images; its content is kept in the manifest."""
    url_column: str = ""
    """Column of a list with the URLs; default: url, URL, image_url. It may be a path or a template, as in
    https://host/{image_id}.jpg (docs/guides/ingest/corpora.md)."""
    image_column: str = ""
    """Column with images as bytes, or as struct with a field bytes; default: image and the like."""
    caption_column: str = ""
    """Column with the captions; default: caption, TEXT, text, captions, alt_text, txt, prompt or title in any case.
    It may be a path or a template for lists, as in "{style} by {artist}"."""
    image_key: str = ""
    """Suffix of the images in tars: image.jpg for 0001.image.jpg. a;b: a, or b where there is no a. Default: any image.
    The ledger names samples with several."""
    caption_key: str = ""
    """Suffix of the captions in tars: caption.txt for 0001.caption.txt. a;b: a, or b where there is no a. Default: txt,
    or a column of the JSON."""
    hash_column: str = ""
    """Column with the hash (md5, sha1, sha256, sha512) that the bytes must have. Default: a column sha256 or md5. none:
    do not check."""
    fetch_failed: bool = False
    """For a list that img2dataset wrote: also download the rows that it could not. Default: leave them out as
    failed_before."""
    columns: str = ""
    """Names of the columns of a CSV, TSV or .txt list without a header, in their order, as in "caption,url"."""
    where: str = ""
    """Take only rows for which this filter is true, such as "punsafe < 0.1 and AESTHETIC_SCORE > 5"."""
    licenses: str = ""
    """Take only rows with one of these licenses (SPDX), as in "CC0-1.0,CC-BY-*". CC-BY-* is any version of CC BY. Rows
    whose license is unknown are left out too."""
    samples_per_shard: Annotated[int, Ge(1)] = 1000
    """Rows of the source in one tar."""
    shard_size: str = ""
    """Approximate size of a tar, such as 500M, instead of samples_per_shard."""
    image_size: Annotated[int, Ge(1)] = 256
    """Side in pixels after resizing. `resize` says which side."""
    resize: Resize = "center_crop"
    """center_crop: cut to a square. keep_ratio: image_size is the short side. keep_ratio_largest: the long side.
    border: a square with a white border. no: do not resize."""
    only_if_bigger: bool = False
    """Never enlarge."""
    format: Format = "jpg"
    """Encoding in the tar. Images that need no change keep their bytes."""
    quality: Annotated[int, Interval(ge=1, le=100)] = 95
    """Quality of jpg and webp."""
    max_pixels: Annotated[int, Ge(1)] = 100_000_000
    """Leave out images with more pixels, before they are decoded."""
    min_size: Annotated[int, Ge(0)] = 0
    """Leave out images whose short side has fewer pixels."""
    max_aspect: Annotated[float, Ge(1)] = NARROWEST
    """Leave out images whose long side is more than this many times the short side."""
    patches: Annotated[int, Ge(0)] = 0
    """Number of squares of image_size to cut at random from each image. 0: resize the image instead."""
    patch_side: Annotated[int, Ge(1)] = 1200
    """With patches: resize the short side to this many pixels first."""
    seed: int = 0
    """Seed of the random places of patches."""
    exif: bool = False
    """Keep the EXIF data of each image in its metadata."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """exact: leave out images with the pixels of an earlier image. near: leave out similar images too."""
    duplicate_bits: Annotated[int, Interval(ge=0, le=8)] = 3
    """Bits of 64 in which the perceptual hashes of near duplicates may differ."""
    download: DownloadConfig = field(default_factory=DownloadConfig)

    def __post_init__(self) -> None:
        if isinstance(self.source, str):  # a single source may be given without a tuple
            object.__setattr__(self, "source", (self.source,) if self.source else ())
        check_bounds("shard", self)
        if self.licenses:
            from pipeline.rows.licenses import Licenses  # the list of SPDX, needed only with this filter
            Licenses(self.licenses)
        if self.patches and self.patch_side < self.image_size:
            raise ValueError(f"shard.patch_side = {self.patch_side}: must be at least "
                             f"shard.image_size = {self.image_size} with shard.patches = {self.patches}\n"
                             f"hint: --patch-side {self.image_size}")
        if len(set(names := self.column_names)) < len(names) or "" in names:
            raise ValueError(f"shard.columns = {self.columns!r}: expected another name for each column\n"
                             f"hint: --columns url,caption")
        assert self.rows_per_shard

    @property
    def column_names(self) -> tuple[str, ...]:
        """The names of `columns`."""
        return tuple(name.strip() for name in self.columns.split(",")) if self.columns else ()

    @property
    def rows_per_shard(self) -> int:
        """Rows of the source for one tar, by number or by the size wanted."""
        if not self.shard_size:
            return self.samples_per_shard
        if self.resize == "no":
            raise ValueError(f"shard.shard_size = {self.shard_size!r}: must be empty with shard.resize = 'no', because "
                             f"the size of such images is unknown\nhint: --samples-per-shard 1000")
        wanted = parse_size(self.shard_size, "shard.shard_size")
        if not wanted:
            raise ValueError(f"shard.shard_size = {self.shard_size!r}: must be at least 1 byte\n"
                             f"hint: --shard-size 500M")
        each = self.image_size ** 2 * _BYTES_A_PIXEL[self.format] + 3000
        return max(1, round(wanted / each / max(self.patches, 1)))
