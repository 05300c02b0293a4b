"""Files on local disks and S3, behind one set of functions.

Input: paths and URLs. Output: bytes, JSON documents, verified local copies.
Functions that other packages use are imported here: `from pipeline import storage`.
Start with files.py.
"""

from pipeline.storage.addresses import (
    is_local,
    join,
    local_path,
    normalize,
    quote,
    short_hash,
)
from pipeline.storage.cache import cache_folder, fetch, fetch_and_open, local_copy
from pipeline.storage.conditional import can_swap, create_bytes, put_checked, swap_bytes
from pipeline.storage.credentials import redact_credentials, redact_known_credentials, redact_url
from pipeline.storage.errors import (
    DamagedFile,
    NoAnswer,
    StorageError,
    denial_message,
    disk_full_message,
    is_about_machine,
    refuse_special_file,
    verify_replaced,
)
from pipeline.storage.file_names import file_below, is_file_name, is_path_below, is_whole_address, manifest_file_url
from pipeline.storage.files import (
    check_store,
    download,
    exists,
    is_file,
    json_bytes,
    map_urls,
    modified_time,
    open_reader,
    parse_json,
    put_bytes,
    put_file,
    put_json,
    read_bytes,
    read_json,
    read_range,
    remove,
    remove_tree,
    sha256,
    sha256_file,
    size,
    stamp,
    summarize_file,
)
from pipeline.storage.hashing import describe_file, digest, name_by_content
from pipeline.storage.lease import Holder, Lease, LeaseConflict, find_holders, hold_lease, remove_ended_leases
from pipeline.storage.leftovers import remove_unfinished
from pipeline.storage.listings import (
    glob,
    list_files,
    list_folders,
    list_names,
    list_sizes_and_times,
    list_stamps,
    walk,
)
from pipeline.storage.printable import escape_controls
from pipeline.storage.private_folder import make_private_folder
from pipeline.storage.remembered import forget_reads, remember_reads

__all__ = [
    "DamagedFile",
    "Holder",
    "Lease",
    "LeaseConflict",
    "NoAnswer",
    "StorageError",
    "cache_folder",
    "can_swap",
    "check_store",
    "create_bytes",
    "denial_message",
    "describe_file",
    "digest",
    "disk_full_message",
    "download",
    "escape_controls",
    "exists",
    "fetch",
    "fetch_and_open",
    "file_below",
    "find_holders",
    "forget_reads",
    "glob",
    "hold_lease",
    "is_about_machine",
    "is_file",
    "is_file_name",
    "is_local",
    "is_path_below",
    "is_whole_address",
    "join",
    "json_bytes",
    "list_files",
    "list_folders",
    "list_names",
    "list_sizes_and_times",
    "list_stamps",
    "local_copy",
    "local_path",
    "make_private_folder",
    "manifest_file_url",
    "map_urls",
    "modified_time",
    "name_by_content",
    "normalize",
    "open_reader",
    "parse_json",
    "put_bytes",
    "put_checked",
    "put_file",
    "put_json",
    "quote",
    "read_bytes",
    "read_json",
    "read_range",
    "redact_credentials",
    "redact_known_credentials",
    "redact_url",
    "refuse_special_file",
    "remember_reads",
    "remove",
    "remove_ended_leases",
    "remove_tree",
    "remove_unfinished",
    "sha256",
    "sha256_file",
    "short_hash",
    "size",
    "stamp",
    "summarize_file",
    "swap_bytes",
    "verify_replaced",
    "walk",
]
