"""Files on local disks and S3, behind one set of functions.

Input: paths and URLs. Output: bytes, JSON documents, verified local copies.
Functions that other packages use are imported here: `from pipeline import storage`.
Start with files.py.
"""

from pipeline.storage.addresses import is_local, join, local_path, normal, place, short_hash, without_credentials
from pipeline.storage.cache import cache_folder, fetch, opened
from pipeline.storage.conditional import can_swap, create_bytes, swap_bytes
from pipeline.storage.files import (
    StorageError,
    download,
    each,
    exists,
    folders,
    full,
    glance,
    glob,
    json_bytes,
    json_of,
    modified,
    names,
    put_bytes,
    put_file,
    put_json,
    read_bytes,
    read_json,
    reader,
    remove,
    remove_tree,
    sha256,
    sha256_file,
    size,
    stamps,
    walk,
)
from pipeline.storage.hashing import describe_file, digest, name_by_content

__all__ = [
    "StorageError", "cache_folder", "can_swap", "create_bytes", "describe_file", "digest", "download", "each",
    "exists", "fetch", "folders", "full", "glance", "glob", "is_local", "join", "json_bytes", "json_of",
    "local_path", "modified", "name_by_content", "names", "normal", "opened", "place", "put_bytes", "put_file",
    "put_json", "read_bytes", "read_json", "reader", "remove", "remove_tree", "sha256", "sha256_file", "short_hash",
    "size", "stamps", "swap_bytes", "walk", "without_credentials",
]
