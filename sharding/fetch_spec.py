"""Describe the download of a source: the tables `fetch` and `fetch.git` of a catalog.

Main entries: the dataclasses `Fetch` and `Git`. `read_catalog()` of sharding/catalog.py makes them,
and sharding/fetch.py downloads what they name. A wrong value raises `ValueError`. Nothing is read.
`BEGUN` is the name of the file that marks an unfinished download.
"""

import re
from dataclasses import dataclass, field

BEGUN = ".fetching.json"
"""File in the folder of a source while its download runs, or after it was interrupted."""

_DATASET = re.compile(r"[A-Za-z0-9_-][\w.-]*(/[A-Za-z0-9_-][\w.-]*)*", re.ASCII)


def _compile(what: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} is not a regular expression: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Git:
    """Selection of files of one commit of a Git repository."""

    repository: str
    """Address `https://...` (without a login) or `file:///...`, or an absolute folder."""
    commit: str
    """The commit, 40 hexadecimal digits."""
    below: str = ""
    """Beginning of the paths of the selected files."""
    pattern: str = ""
    """Regular expression that matches anywhere in the paths of the selected files."""
    count: int = 0
    """Expected number of files. 0: not checked."""
    manifest_sha256: str = ""
    """Expected SHA-256 of the sorted lines `<object name> <path>` of the files, as
    `sharding.git.manifest_sha256` computes it. Empty: not checked."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(https://[^/\s@]+/|file:///|/)[^\s?#]+", self.repository):
            raise ValueError(
                f"git.repository {self.repository!r}: expected https://host/owner/name without a "
                "login, file:///folder, or an absolute folder"
            )
        if not re.fullmatch("[0-9a-f]{40}", self.commit):
            raise ValueError(
                f"git.commit {self.commit!r}: expected 40 hexadecimal digits, not a branch or a "
                "tag, which can move"
            )
        if not re.fullmatch("([0-9a-f]{64})?", self.manifest_sha256):
            raise ValueError("git.manifest_sha256: expected 64 hexadecimal digits")
        _compile(f"git.pattern {self.pattern!r}", self.pattern)


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Download of a source: exactly one of `hub`, `kaggle`, `urls`, `git` and `by_hand`."""

    hub: str = ""
    """Name of a dataset on the Hugging Face hub, such as `owner/dataset`."""
    files: list[str] = field(default_factory=list)
    """Patterns of the files that are needed from `hub` or `kaggle`. Empty: all."""
    kaggle: str = ""
    """Name of a dataset on Kaggle."""
    urls: list[str] = field(default_factory=list)
    """Addresses of files."""
    git: Git | None = None
    """Files of one commit of a Git repository."""
    by_hand: str = ""
    """What a person has to do to get the files."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Expected SHA-256 of files, by their path in the download."""

    def __post_init__(self) -> None:
        kinds = (self.hub, self.kaggle, self.urls, self.git, self.by_hand)
        if sum(map(bool, kinds)) != 1:
            raise ValueError("fetch takes exactly one of hub, kaggle, urls, git and by_hand")
        for name in filter(None, (self.hub, self.kaggle)):
            if not _DATASET.fullmatch(name):  # the libraries put the name into local paths
                raise ValueError(
                    f"fetch {name!r}: expected the name of a dataset, such as owner/dataset"
                )
        for name, digest in self.sha256.items():
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"fetch.sha256 of {name}: expected 64 hexadecimal digits")
