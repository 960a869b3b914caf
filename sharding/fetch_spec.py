"""Describe the download of a source: the tables `fetch` and `fetch.git` of a catalog.

Main entries: the dataclasses `Fetch` and `Git`. `read_catalog()` of sharding/catalog.py makes them,
and sharding/fetch.py downloads what they name. A wrong value raises `ValueError`. Nothing is read.
"""

import re
from dataclasses import dataclass, field

_DATASET = re.compile(r"[A-Za-z0-9_-][\w.-]*(/[A-Za-z0-9_-][\w.-]*)*", re.ASCII)


def _compile(what: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} is not a regular expression: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Git:
    """Selection of files of one commit of a Git repository.

    `repository` is an https or file address, or an absolute folder. A file is selected if its path
    starts with `below` and the regular expression `pattern` matches anywhere in the path. `count`
    is the expected number of files, and `manifest_sha256` the hash of their object names and paths
    (`sharding.git.manifest_sha256`). Each of the two is checked only if given.
    """

    repository: str
    commit: str
    below: str = ""
    pattern: str = ""
    count: int = 0
    manifest_sha256: str = ""

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
    """Download of a source; exactly one of `hub`, `kaggle`, `urls`, `git` and `by_hand` is given.

    `hub` and `kaggle` are dataset names on the Hugging Face hub and on Kaggle; `files` are patterns
    of the files needed from there. `by_hand` describes what a person has to do. `sha256` gives the
    expected hash of some files, by their path in the download.
    """

    hub: str = ""
    files: list[str] = field(default_factory=list)
    kaggle: str = ""
    urls: list[str] = field(default_factory=list)
    git: Git | None = None
    by_hand: str = ""
    sha256: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = (self.hub, self.kaggle, self.urls, self.git, self.by_hand)
        if sum(map(bool, kinds)) != 1:
            raise ValueError("fetch takes exactly one of hub, kaggle, urls, git and by_hand")
        for name in filter(None, (self.hub, self.kaggle)):
            if not _DATASET.fullmatch(name):  # the libraries use it in local paths
                raise ValueError(
                    f"fetch {name!r}: expected the name of a dataset, such as owner/dataset"
                )
        for name, digest in self.sha256.items():
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"fetch.sha256 of {name}: expected 64 hexadecimal digits")
