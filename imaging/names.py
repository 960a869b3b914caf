"""Judge the names and modes of files, in folders and archives of any kind.

`is_hidden(name)` and `leaves_archive(name)` (the path would lead out of the target folder) return a
bool. `kind_of(mode)` takes the mode of a link or device (`st_mode`) and returns the reason for not
reading it. `utf8_name(name)` returns the name with escapes for bytes that are not UTF-8. `HIDDEN`
and `LINK` are reasons why a file is not read.
"""

import re
import stat
from pathlib import PurePosixPath

HIDDEN = "hidden"
LINK = "a symbolic link, which is not followed"


def is_hidden(name: str) -> bool:
    """Return whether file managers hide a file or folder of this path: `.x`, `._x`, `__MACOSX`."""
    return any(
        part == "__MACOSX" or (part.startswith(".") and part not in (".", ".."))
        for part in name.split("/")
    )


def utf8_name(name: str) -> str:
    """Replace bytes of a name that are not UTF-8 by escapes, so that the name can be printed and
    stored.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def kind_of(mode: int) -> str:
    """Return the reason why a file that is not regular is not read, by its mode."""
    return LINK if stat.S_ISLNK(mode) else "neither a file nor a folder"


def leaves_archive(name: str) -> bool:
    """Return whether unpacking a member of this name would write outside the target folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or bool(re.match(r"[A-Za-z]:", name))
