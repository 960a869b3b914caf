"""The catalog: TOML files that say, for each source, what is real, what is fake, where it goes.

    [sets]                                  # set -> split; a set is a folder of shards
    phase1 = "train"

    [sources.my_photos]
    root = "my-photos"                      # below the raw folder; default: the source's name
    license = "mine"
    set = { phase1 = 0.9, val = 0.1 }       # or one name; shares go by hash of the group
    real = ["camera"]                       # folders, matched by whole part, `*` within a part
    fake = [{ folder = "sdxl", generator = "sdxl" }]
    group = '(\\d+)_\\d+\\.png$'              # optional: files with one capture stay in one set

Labels come from these names and from nothing else. Zip archives are read as the folders that they
hold. Parquet tables are read through rules with a `column`:

    fake = [{ column = "image", where = { label = "fake" }, generator = "sdxl" }]
    fake = [{ column = "image", where = { label = 1 }, generator = "<model>" }]     # by that column

A collection that was made to measure detectors says `test_only = true`: it goes to sets of the
split test and no others. `[suites]` names lists of sets that `evaluate.py --suite` measures on.

A set that may hold no real images has its false-positive rate from those of another:

    [reference]
    evalgen = "test"

Images that no set may hold are named by the first 16 or more hexadecimal digits of their SHA-256,
one a line, in files beside the catalog (above the first table of the TOML):

    exclude = ["kept-for-testing.txt"]

Later files add to earlier ones key by key: two lines change one setting of a built-in source.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import recipes
from imaging.zip import leaves_archive

BUILT_IN = Path(__file__).with_name("catalog.toml")
TESTS = Path(__file__).with_name("catalog-tests.toml")
"""The field's test sets; each is fetched by its name only."""

SHIPPED = (BUILT_IN, TESTS)
"""What every command knows."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
LONGEST_NAME = 78
"""Letters of a source's or a set's name. A sample's file in a tar is that of its source with 22
more (`sharding.plan.sample_key`, `.json`), and a tar has room for 100.
"""
_DATASET = re.compile(r"[A-Za-z0-9_-][\w.-]*(/[A-Za-z0-9_-][\w.-]*)*", re.ASCII)


class CatalogError(ValueError):
    """A catalog that cannot be used; the message says where and why."""


def _compile(what: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} is no regular expression: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One kind of image of a source: where it lies, and what made it.

    `folder` is a path below the source's root, matched part by part and without regard to case:
    `*` and `?` match within a part, `**` matches any number of parts, and `<generator>` matches one
    part and names the generator. `name` is a pattern for the file's own name. With `column` the
    files are parquet tables and the images lie in that column. `where` are columns and the values
    they must have: of the parquet row, or of the file's row in the source's `table`. A text value
    for a column of numbers is a class name, looked up in the table's own metadata. A `generator`
    in angle brackets is a column of the parquet table that names it. A rule that matches no file
    stops a build, unless it is `optional`.
    """

    folder: str = "**"
    name: str = "*"
    column: str = ""
    where: dict[str, str | int] = field(default_factory=dict)
    generator: str = ""
    set: str | dict[str, float] = ""
    optional: bool = False

    @property
    def generator_column(self) -> str:
        """The parquet column that names the generator; empty where the rule itself does."""
        bracketed = self.generator.startswith("<") and self.generator.endswith(">")
        return self.generator[1:-1] if bracketed else ""

    def __str__(self) -> str:
        """The rule as messages name it."""
        parts = [self.folder if self.name == "*" else f"{self.folder}/{self.name}"]
        parts += [f"column {self.column}"] if self.column else []
        parts += [f"{column}={value}" for column, value in self.where.items()]
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Table:
    """CSV files (by `name` pattern) with a row per image; `key` is the column of file names."""

    name: str
    key: str


@dataclass(frozen=True, kw_only=True)
class Git:
    """The files of one commit of a Git repository: those below `below` whose path in the repository
    has a match of the regular expression `pattern`.

    `repository` is an https or file address, or an absolute folder. `count` is how many files that
    are, and `manifest_sha256` the hash of their object names and paths (`sharding.git`); both are
    checked where they are given.
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
                f"git.commit {self.commit!r}: expected 40 hexadecimal digits; a branch or a tag "
                "moves"
            )
        if not re.fullmatch("([0-9a-f]{64})?", self.manifest_sha256):
            raise ValueError("git.manifest_sha256: expected 64 hexadecimal digits")
        _compile(f"git.pattern {self.pattern!r}", self.pattern)


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Where a source is downloaded from: one of the Hugging Face hub (`files`: patterns of what is
    needed there), Kaggle, a Git repository, or plain addresses; or `by_hand`, what a person has to
    do. `sha256` holds the hashes of files that must arrive with these bytes, by their path in the
    download.
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
            if not _DATASET.fullmatch(name):  # the libraries make paths of it
                raise ValueError(f"fetch {name!r} is no name of a dataset, such as owner/dataset")
        for name, digest in self.sha256.items():
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"fetch.sha256 of {name}: expected 64 hexadecimal digits")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset. `policy` names the augmentation its training images keep; see `recipes/`.

    `cap` is the most images to take per class, whole groups at a time; `expected` is how many a
    complete download has per class, checked before anything is packed (an empty table checks
    nothing). `group_column` is the parquet column whose equal values make a group. `synthetic`
    marks images that a program drew to try out the commands: no photographs, and of no published
    generator. What is trained on them says so. A `test_only` source goes to sets of the split test
    alone. `size` is that of the download, and `facts` are what is known of it, each with its source
    in brackets, for people.
    """

    license: str
    set: str | dict[str, float]
    real: list[str | Rule] = field(default_factory=list)
    fake: list[str | Rule] = field(default_factory=list)
    ignore: list[str | Rule] = field(default_factory=list)
    root: str = ""
    homepage: str = ""
    fetch: Fetch | None = None
    table: Table | None = None
    group: str | list[str] = ""
    group_column: str = ""
    cap: dict[Literal["real", "fake"], int] = field(default_factory=dict)
    expected: dict[Literal["real", "fake"], int] = field(default_factory=dict)
    policy: str = ""
    replay: bool = True
    synthetic: bool = False
    test_only: bool = False
    size: str = ""
    facts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.real and not self.fake:
            raise ValueError("names neither real nor fake images")
        for rule in (*self.rules(0), *self.rules(1)):
            if rule.generator_column and not rule.column:
                raise ValueError(
                    f"rule '{rule}' has generator {rule.generator}, a column of a parquet table, "
                    "and reads none; give its column of images, or leave out < and >"
                )
        for pattern in self.groups():
            if re.compile(pattern).groups != 1:
                raise ValueError(f"group {pattern!r} must have exactly one capture group")

        if any(count < 0 for counts in (self.cap, self.expected) for count in counts.values()):
            raise ValueError("cap and expected are numbers of images, 0 or more")

    def rules(self, label: int) -> list[Rule]:
        """The rules of one label, 0 real or 1 fake."""
        return [_as_rule(rule) for rule in (self.fake if label else self.real)]

    def ignored(self) -> list[Rule]:
        """What belongs to no class."""
        return [_as_rule(rule) for rule in self.ignore]

    def groups(self) -> list[str]:
        """The patterns that find a file's group; the first that fits counts."""
        return [self.group] if isinstance(self.group, str) and self.group else list(self.group)

    def destinations(self) -> list[dict[str, float]]:
        """Every set, or mixture of sets, that images of this source may go to."""
        of_rules = [r.set for label in (0, 1) for r in self.rules(label) if r.set]
        return [shares(destination) for destination in (self.set, *of_rules)]


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Sets with their split, sources by name, and for a set that may have no real images the one
    whose real images its false-positive rate is then measured on. `suites` are lists of sets that
    are measured on together. `exclude` are the beginnings of
    the SHA-256 of images that no set may hold; a TOML file names the files that list them.
    """

    sets: dict[str, Literal["train", "val", "test"]] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    reference: dict[str, str] = field(default_factory=dict)
    suites: dict[str, list[str]] = field(default_factory=dict)
    exclude: frozenset[str] = frozenset()


def _as_rule(rule: str | Rule) -> Rule:
    return Rule(folder=rule) if isinstance(rule, str) else rule


def shares(destination: str | Mapping[str, float]) -> dict[str, float]:
    """Where samples go: `{set: share}`, shares summing to 1."""
    return {destination: 1.0} if isinstance(destination, str) else dict(destination)


def read_catalog(files: Sequence[Path]) -> Catalog:
    """The files as one catalog; a later file adds to, and overrides, an earlier one.

    Raises:
        CatalogError: unknown keys, bad names, shares that do not sum to 1, sets without a split.
    """
    sets: dict[str, Any] = {}
    sources: dict[str, dict[str, Any]] = {}
    reference: dict[str, Any] = {}
    suites: dict[str, Any] = {}
    exclude: set[str] = set()
    catalog = Catalog()
    for file in files:
        values = _read(file)
        exclude |= _read_excluded(file, values.pop("exclude", []))
        sets |= values.pop("sets", {})
        reference |= values.pop("reference", {})
        suites |= values.pop("suites", {})
        for name, entry in values.pop("sources", {}).items():
            sources[name] = {**sources.get(name, {}), **entry}
        try:
            catalog = recipes.build(
                Catalog,
                {
                    "sets": sets,
                    "sources": sources,
                    "reference": reference,
                    "suites": suites,
                    **values,
                },
                str(file),
            )
        except recipes.RecipeError as error:
            raise CatalogError(str(error)) from error
        for name in catalog.sets:
            _check_name("set", name, file)
        for name, source in catalog.sources.items():
            _check(name, source, sets, file)
        named = [("reference", name) for pair in reference.items() for name in pair]
        named += [("suites", name) for listed in catalog.suites.values() for name in listed]
        for table, name in named:
            if name not in sets:
                raise CatalogError(
                    f"{file}: [{table}] names set {name!r}, which [sets] does not have"
                )
    return replace(catalog, exclude=frozenset(exclude))


def _read_excluded(file: Path, lists: Any) -> set[str]:
    """Read the beginnings of hashes from the files that `exclude` names; `#` begins a comment."""
    if not isinstance(lists, list) or not all(isinstance(name, str) for name in lists):
        raise CatalogError(f"{file}: exclude is {lists!r}, expected a list of names of files")
    hashes: set[str] = set()
    for name in lists:
        path = file.parent / name
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CatalogError(f"{file}: exclude {name!r} cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            digits = line.partition("#")[0].strip().lower()
            if digits and not re.fullmatch("[0-9a-f]{16,64}", digits):
                raise CatalogError(
                    f"{path}, line {number}: {digits[:70]!r}, expected the first 16 to 64 "
                    "hexadecimal digits of a SHA-256"
                )
            hashes |= {digits} - {""}
    return hashes


def _read(file: Path) -> dict[str, Any]:
    try:
        return recipes.read_toml(file)
    except FileNotFoundError:
        raise CatalogError(f"no catalog at {file}") from None
    except recipes.RecipeError as error:
        raise CatalogError(str(error)) from error


def _check_name(kind: str, name: str, file: Path) -> None:
    """Check that a name can be one of files and folders, and is safe there: catalogs are passed
    on.
    """
    if not _NAME.fullmatch(name):
        raise CatalogError(
            f"{file}: {kind} {name!r}: use lower-case letters, digits, '-' and '_', and begin with "
            "a letter or digit"
        )
    if len(name) > LONGEST_NAME:
        raise CatalogError(
            f"{file}: {kind} {name[:40]}... has {len(name)} letters; use {LONGEST_NAME} at most"
        )


def _leaves_raw(root: str) -> bool:
    """Whether a source's root is no path below the raw folder."""
    strange = any(ord(character) < 32 for character in root) or "://" in root
    return strange or leaves_archive(root) or not PurePosixPath(root).parts


def _check(name: str, source: Source, sets: Mapping[str, str], file: Path) -> None:
    """Check that names and root are safe in paths, and that every set that is used has a split."""
    _check_name("source", name, file)
    if source.root and _leaves_raw(source.root):
        raise CatalogError(
            f"{file}: source {name}: root {source.root!r} is no folder below the raw folder; "
            "give a relative path without '..'"
        )
    for destination in source.destinations():
        if bad := [share for share in destination.values() if not 0 < share <= 1]:
            raise CatalogError(
                f"{file}: source {name}: a share of {destination} is {bad[0]}, expected more than "
                "0 and at most 1"
            )
        total = sum(destination.values())
        if abs(total - 1) > 1e-6:
            raise CatalogError(
                f"{file}: source {name}: the shares of {destination} sum to {total:g}"
            )
        for set_name in destination:
            if set_name not in sets:
                raise CatalogError(
                    f"{file}: source {name} goes to set {set_name!r}, but [sets] has only "
                    f'{", ".join(sets) or "nothing"}; add {set_name} = "train", "val" or "test"'
                )
            if source.test_only and sets[set_name] != "test":
                raise CatalogError(
                    f"{file}: source {name} is a test collection and may not go to set {set_name} "
                    f"of the split {sets[set_name]}: what is measured on it would be memory. Give "
                    "it a set of the split test; if it is meant, say test_only = false"
                )
