"""Judge the names and modes of files, in folders and archives of any kind.

`is_hidden(name)` and `leaves_archive(name)` (the path would lead out of the target folder) return a
bool. `kind_of(mode)` takes the mode of a link or device (`st_mode`) and returns the reason for not
reading it. `no_image(name)` returns the reason for not reading a file whose name is not that of an
image. `HIDDEN`, `LINK` and `NESTED` are reasons why a file is not read.
"""

import posixpath
import re
import stat
from pathlib import PurePosixPath

HIDDEN = "hidden"
LINK = "a symbolic link, which is not followed"
NESTED = "an archive in an archive, which is not read; unpack it"

# An extension by which files are counted: not a number after a dot, which differs per file.
_EXTENSION = re.compile(r"\.[a-z][a-z0-9_-]{0,9}")


def is_hidden(name: str) -> bool:
    """Return whether file managers hide a file or folder of this path: `.x`, `._x`, `__MACOSX`."""
    return any(
        part == "__MACOSX" or (part.startswith(".") and part not in (".", ".."))
        for part in name.split("/")
    )


def no_image(name: str) -> str:
    """Return the reason for not reading a file that is no image by its name, with its extension."""
    suffix = posixpath.splitext(name)[1].lower()
    kind = suffix if _EXTENSION.fullmatch(suffix) else "no extension"
    return f"not an image by its name ({kind})"


def kind_of(mode: int) -> str:
    """Return the reason why a file that is not regular is not read, by its mode."""
    return LINK if stat.S_ISLNK(mode) else "neither a file nor a folder"


def leaves_archive(name: str) -> bool:
    """Return whether unpacking a member of this name would write outside the target folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or bool(re.match(r"[A-Za-z]:", name))
