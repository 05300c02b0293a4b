"""Names of files in documents, and where they lead. The only place that decides which names are accepted."""

from pipeline.storage.addresses import join
from pipeline.storage.errors import DamagedFile

_BESIDE = "../../"  # before VERSION/STAGE/FILE: a file of another version, which is not copied


def is_whole_address(name: str) -> bool:
    """Whether a name is an absolute path or a URL. Only tars that were adopted where they lie have such names."""
    return "://" in name or name.startswith("/")


def is_path_below(name: str) -> bool:
    """Whether a name leads to a place below its folder."""
    return bool(name) and not is_whole_address(name) and "\0" not in name and ".." not in name.split("/")


def is_file_name(name: str) -> bool:
    """Whether a name leads to a file below its stage folder, or to one of a stage of another version."""
    rest = name.removeprefix(_BESIDE)
    return is_path_below(rest) and (rest == name or rest.count("/") >= 2)


def file_below(folder: str, name: str) -> str:
    """The URL of the file `name` of a document, below `folder`; DamagedFile if the name leads elsewhere."""
    if not is_path_below(name):
        raise DamagedFile(f"a document names the file {name!r}, which does not lie below {folder}\n"
                          f"hint: python -m jobs verify")
    return join(folder, name)


def manifest_file_url(folder: str, name: str) -> str:
    """The URL of a manifest's file: below `folder`, in another version, or the whole address of an adopted file.

    DamagedFile if the name leads elsewhere.
    """
    if is_whole_address(name):
        return name
    rest = name.removeprefix(_BESIDE)
    if rest == name or not is_file_name(name):
        return file_below(folder, name)
    return join(folder.rstrip("/").rsplit("/", 2)[0], rest)
