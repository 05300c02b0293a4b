"""Folders in places that several users share, such as /tmp: only their owner may put files into them."""

import contextlib
import os
import stat
from pathlib import Path


def make_private_folder(folder: Path, variable: str) -> Path:
    """`folder`, made if it is absent; the environment variable `variable` is named as the way to use another one.

    Raises:
        PermissionError: it is a link, no folder, another user's, or open to others.
    """
    with contextlib.suppress(FileExistsError):  # also a link that leads nowhere
        folder.mkdir(parents=True, mode=0o700)
    found = os.lstat(folder)  # after mkdir: another user may have made it just before
    if stat.S_ISLNK(found.st_mode):
        fault = "is a symbolic link"
    elif not stat.S_ISDIR(found.st_mode):
        fault = "is no folder"
    elif found.st_uid != os.geteuid():
        fault = f"belongs to the user {found.st_uid}, and this is the user {os.geteuid()}"
    elif found.st_mode & 0o077:
        fault = f"is open to other users (mode {stat.S_IMODE(found.st_mode):04o})"
    else:
        return folder
    cure = f"chmod 700 {folder}, if only you put files into it, or " if fault.startswith("is open") else ""
    raise PermissionError(f"{folder} {fault}: files in it could be anybody's\n"
                          f"hint: {cure}{variable}=FOLDER with a folder of your own")
