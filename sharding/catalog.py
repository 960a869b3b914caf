"""Read the catalog: TOML files that list each source with its real images, fake images and sets.

Main entry: `read_catalog(files)` takes a list of the `pathlib.Path`s of all files to read, such as
`[*SHIPPED, Path("my.toml")]`, and returns one `Catalog`. It raises `CatalogError` (a `ValueError`)
if a file is missing, cannot be read, or has a wrong key, name, value, set or share. `SHIPPED` are
this program's own catalogs: `BUILT_IN`, and `TESTS` (published test sets). The commands that take a
catalog put `SHIPPED` before it. A later file overrides an earlier one key by key: to change one
setting of a source, write only `[sources.NAME]` and that key. But two files, neither of `SHIPPED`,
may not give one set two splits or references, one suite two lists of sets, or describe one source
as a whole (with a license, sets and images) in two ways: one would replace the other. A file may
name only sets of its own or of earlier files. The fields of a `Catalog` are `sources` (name ->
`Source`), `exclude` (a frozenset of the hashes in all `exclude` files), and the dicts `sets` (set
-> split), `suites` (name -> list of sets) and `reference` (set -> set). A file:

    exclude = ["kept-for-testing.txt"]      # files of hashes, in the folder of this catalog

    [sets]                                  # name of a set = its split: train, val or test
    phase1 = "train"                        # each set becomes a folder of shards
    val = "val"
    test = "test"
    fakes = "test"

    [suites]
    all = ["test", "fakes"]                 # sets for `evaluate.py --suite all`

    [reference]                             # `fakes` has no real images: its false-positive rate
    fakes = "test"                          # is measured on the real images of `test`

    [sources.my_photos]
    license = "mine"
    set = { phase1 = 0.9, val = 0.1 }       # name of one set, or the shares of the groups (sum 1)
    real = ["camera"]                       # folders; `*` matches within one part of a path
    fake = [
        { folder = "sdxl", generator = "sdxl" },
        { column = "image", where = { label = 1 }, generator = "<model>" },  # parquet tables
    ]

The text below each field of `Catalog`, `Source`, `Rule` and `Table` in this file, and of `Fetch`
and `Git` in sharding/fetch_spec.py, is about the key in a file; docs/catalog-keys.md has all keys.
Names of sets and sources have lower-case letters, digits, `-` and `_`. They begin with a letter or
digit, and have at most `LONGEST_NAME` characters.

`shares(destination)` converts the `set` of a source or `Rule` to a dict, set -> share. The methods
of `Source` return its rules, group patterns and sets in one form. `toml_string(text)` returns a
TOML string, in quotes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import recipes
from escape import printable
from imaging.names import leaves_archive
from sharding.fetch_spec import Fetch
from storage import read_text

BUILT_IN = Path(__file__).with_name("catalog.toml")
TESTS = Path(__file__).with_name("catalog-tests.toml")
"""Catalog of published test sets; `fetch` downloads them only if they are named."""

SHIPPED = (BUILT_IN, TESTS)
"""Catalogs that every command reads."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
LONGEST_NAME = 78
"""Maximum characters of the name of a source or set. A file name in a tar may have 100 bytes, and
`sharding.plan.sample_key` and `.json` add 22 to the name of the source.
"""
LONGEST_TITLE = 80
"""Maximum characters of the title of a source."""


class CatalogError(ValueError):
    """Error in a catalog; the message gives the file, the entry and the reason."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Rule that selects images of one class of a source, and gives their generator. Of several
    rules that match a file, the one with the deepest folder decides; a real and a fake rule of
    equal depth stop the build.
    """

    folder: str = "**"
    """Folder below the source's root, with all folders inside it. Case is ignored. `*` and `?`
    match within one part of a path, `**` stands for any number of parts, and `<generator>` for one
    part, which becomes the generator."""
    name: str = "*"
    """Pattern of the file name, such as `*__sdxl*`. Case is ignored."""
    column: str = ""
    """Column with the images. The files are then parquet tables."""
    where: dict[str, str | bool | int] = field(default_factory=dict)
    """Columns and the values that they must have: in the parquet row, or in the row of the file in
    the source's `table`. A text for an integer column of a parquet table is a class name, looked up
    in the table's metadata. Not in `ignore`."""
    generator: str = ""
    """Name of the generator of the images. With `column`, a name in angle brackets, such as
    `<model>`, is that of a parquet column with the generators. Empty: `real` or `fake`. Not in
    `ignore`."""
    set: str | dict[str, float] = ""
    """Where the images go, as `set` of the source, which is the default. Not in `ignore`."""
    optional: bool = False
    """Accept that no file matches. Otherwise a rule without a file stops a build."""

    @property
    def generator_column(self) -> str:
        """Return the parquet column with the generator, or "" if the rule gives the generator."""
        bracketed = self.generator.startswith("<") and self.generator.endswith(">")
        return self.generator[1:-1] if bracketed else ""

    def __str__(self) -> str:
        """Format the rule for messages."""
        parts = [self.folder if self.name == "*" else f"{self.folder}/{self.name}"]
        parts += [f"column {self.column}"] if self.column else []
        parts += [f"{column}={value}" for column, value in self.where.items()]
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Table:
    """CSV files with one row per image, separated by commas. A rule with `where` takes no file
    without a row.
    """

    name: str
    """Pattern of the names of the CSV files, in any folder of the source. Case is ignored."""
    key: str
    """Column with the file names of the images. A name is for the file that has it below the folder
    of its CSV file. If there is none, a name with a folder is for the files whose path ends so, in
    whole parts. One without a folder that several files have is for none of them; with `optional`,
    it is for all of them."""
    optional: bool = False
    """Label files without a row by their folders alone. The CSV files may then be missing."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset: its rules, sets, download and license. It has `real` or `fake`, or both. A rule
    is a folder, or a table with keys of `Rule`.
    """

    license: str
    """License of the images, a text for people."""
    set: str | dict[str, float]
    """Name of one set, or the shares of several sets, which sum to 1. A group goes to one set."""
    real: list[str | Rule] = field(default_factory=list)
    """Rules for the real images."""
    fake: list[str | Rule] = field(default_factory=list)
    """Rules for the fake images."""
    ignore: list[str | Rule] = field(default_factory=list)
    """Rules for files of no class, by their path alone: `folder`, `name` and `optional`."""
    root: str = ""
    """Folder of the source below the raw folder. Empty: the name of the source. A zip archive in it
    is read like a folder."""
    title: str = ""
    """What the images are, in a few words that follow "37 % of", such as `faces of Flickr users`.
    Notices on a detector and its model card name the source so. At most 80 characters."""
    homepage: str = ""
    """Address of the dataset, without `https://`."""
    fetch: Fetch | None = None
    """Download of the source, for `python -m sharding fetch`."""
    table: Table | None = None
    """CSV files with the labels."""
    group: str | list[str] = ""
    """Regular expression with one capture, such as `'(\\d+)_\\d+\\.png$'`, or a list of them, for
    the path of a file, which begins with the name of the source's folder (`mine/cats/1.png`). Case
    is ignored. The first that matches gives the capture; images with equal captures are a group.
    One of them must match a file. By default, files that differ only in their suffix are a group.
    """
    group_column: str = ""
    """Parquet column in which images of one group have equal values. By default, the images of one
    row are a group."""
    cap: dict[Literal["real", "fake"], int] = field(default_factory=dict)
    """The most images of a class that are taken, in whole groups, such as `{ real = 500 }`. Range:
    at least 0"""
    expected: dict[Literal["real", "fake"], int] = field(default_factory=dict)
    """Number of images of a class in a complete download, checked before packing. An empty table
    checks nothing. Range: at least 0"""
    policy: str = ""
    """Augmentation policy of the training images, a table of `[augment]` in the recipe. Empty:
    `data.policy` of the recipe."""
    replay: bool = True
    """Whether phase 2 may replay the images."""
    synthetic: bool = False
    """Whether a program drew the images to try out the commands: neither photographs nor output of
    a published generator. A detector trained on such images is marked too."""
    test_only: bool = False
    """Whether the images may only go to sets of the split test."""
    size: str = ""
    """Size of the download, a text for people."""
    facts: list[str] = field(default_factory=list)
    """Notes for people, each with its reference in brackets."""

    def __post_init__(self) -> None:
        if not self.real and not self.fake:
            raise ValueError("names neither real nor fake images")
        if len(self.title) > LONGEST_TITLE or printable(self.title).split("\n") != [self.title]:
            raise ValueError(
                f"title is {self.title[:100]!r}; expected one line of at most {LONGEST_TITLE} "
                "characters"
            )
        for rule in (*self.rules(0), *self.rules(1)):
            if rule.generator_column and not rule.column:
                raise ValueError(
                    f"rule '{rule}' has generator {rule.generator}, a column of a parquet table, "
                    "but reads no parquet table; add `column`, or remove < and >"
                )
            if rule.where and not rule.column and not self.table:
                raise ValueError(
                    f"rule '{rule}' has `where`, a condition on a table, but reads none; add "
                    "`column`, or a `table` to the source"
                )
        for rule in self.ignored():
            if rule.column or rule.where or rule.generator or rule.set:
                raise ValueError(
                    f"rule '{rule}' of `ignore` has more than `folder`, `name` and `optional`; "
                    "files are ignored by their path alone"
                )
        for pattern in self.groups():
            try:
                captured = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"group {pattern!r} is no regular expression: {error}") from error
            if captured != 1:
                raise ValueError(f"group {pattern!r} must have exactly one capture group")
        of_tables = [bool(rule.column) for rule in (*self.rules(0), *self.rules(1))]
        if self.groups() and all(of_tables):
            raise ValueError(
                "has `group`, patterns for the paths of files, but all of its rules read parquet "
                "tables; name a `group_column` instead, or remove `group`"
            )
        if self.group_column and not any(of_tables):
            raise ValueError(
                f"has group_column {self.group_column!r}, but no rule reads a parquet table; give "
                "a `group` for the paths of files instead, or remove `group_column`"
            )

        if any(count < 0 for counts in (self.cap, self.expected) for count in counts.values()):
            raise ValueError("cap and expected must be numbers of images, 0 or more")

    def rules(self, label: int) -> list[Rule]:
        """Return the rules of one label, 0 real or 1 fake."""
        return [_as_rule(rule) for rule in (self.fake if label else self.real)]

    def ignored(self) -> list[Rule]:
        """Return the rules of files that belong to no class."""
        return [_as_rule(rule) for rule in self.ignore]

    def groups(self) -> list[str]:
        """Return the patterns that extract a file's group; the first that matches is used."""
        return [self.group] if isinstance(self.group, str) and self.group else list(self.group)

    def destinations(self) -> list[dict[str, float]]:
        """List every set, or mixture of sets, that images of this source may go to."""
        of_rules = [r.set for label in (0, 1) for r in self.rules(label) if r.set]
        return [shares(destination) for destination in (self.set, *of_rules)]


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Content of one or more catalog files."""

    sets: dict[str, Literal["train", "val", "test"]] = field(default_factory=dict)
    """Split of each set, by the name of the set. Each set becomes a folder of shards."""
    sources: dict[str, Source] = field(default_factory=dict)
    """Sources, by name."""
    reference: dict[str, str] = field(default_factory=dict)
    """Set by whose real images the false-positive rate of a set without real images is measured, by
    the name of the latter. `evaluate.py` reads it with `--catalog FILE`."""
    suites: dict[str, list[str]] = field(default_factory=dict)
    """Sets that `evaluate.py --catalog FILE --suite NAME` evaluates together, by the name of the
    suite."""
    exclude: frozenset[str] = frozenset()
    """Files, in the folder of the catalog, with hashes of images that no set may contain: on each
    line the first 16 to 64 hexadecimal digits of a SHA-256. `#` starts a comment."""


def _as_rule(rule: str | Rule) -> Rule:
    return Rule(folder=rule) if isinstance(rule, str) else rule


def shares(destination: str | Mapping[str, float]) -> dict[str, float]:
    """Return a destination as `{set: share}`; the shares sum to 1."""
    return {destination: 1.0} if isinstance(destination, str) else dict(destination)


def read_catalog(files: Sequence[Path]) -> Catalog:
    """Read catalog files as one catalog; later files override earlier ones key by key.

    Raises:
        CatalogError: an unknown key, a bad name, shares that do not sum to 1, a set without a
            split, a file that cannot be read, or two files of the user that describe a source or
            set in two ways.
    """
    shipped = {path.resolve() for path in SHIPPED}
    described: dict[tuple[str, str], tuple[Path, Any]] = {}
    sets: dict[str, Any] = {}
    sources: dict[str, dict[str, Any]] = {}
    reference: dict[str, Any] = {}
    suites: dict[str, Any] = {}
    exclude: set[str] = set()
    catalog = Catalog()
    for file in files:
        values = _read(file)
        _check_tables(values, file)
        exclude |= _read_excluded(file, values.pop("exclude", []))
        if file.resolve() not in shipped:
            _refuse_second(values, file, described)
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
        _check_downloads(catalog, file)
        named = [("reference", name) for pair in reference.items() for name in pair]
        named += [("suites", name) for listed in catalog.suites.values() for name in listed]
        for table, name in named:
            if name not in sets:
                raise CatalogError(
                    f"{file}: [{table}] names set {name!r:.100}, which is not in [sets]"
                )
    return replace(catalog, exclude=frozenset(exclude))


def _check_tables(values: Mapping[str, Any], file: Path) -> None:
    """Check that the tables that are merged are tables; `recipes.build` checks their content."""
    sources = values.get("sources")
    inner = sources.items() if isinstance(sources, dict) else ()
    tables = {
        key: values[key] for key in ("sets", "sources", "reference", "suites") if key in values
    }
    tables |= {f"sources.{name}": entry for name, entry in inner}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise CatalogError(f"{file}: {name} is {table!r:.100}, expected a table: [{name}]")


def _refuse_second(
    values: Mapping[str, Any], file: Path, described: dict[tuple[str, str], tuple[Path, Any]]
) -> None:
    """Refuse entries that an earlier file of the user describes otherwise, and add those of this
    file to `described`. A source without its required keys only overrides an earlier one.
    """
    whole = {
        (kind, name): entry
        for kind, table in _KINDS.items()
        for name, entry in values.get(table, {}).items()
        if kind != "source"
        or ({"license", "set"} <= entry.keys() and not entry.keys().isdisjoint({"real", "fake"}))
    }
    both = whole.keys() & described.keys()
    other = [key for key in whole if key in both and described[key][1] != whole[key]]
    for kind, name in other:
        earlier, more = described[kind, name][0], sum(of == kind for of, _ in other) - 1
        rest = f" (and {more} more)" if more else ""
        raise CatalogError(
            f"{earlier} and {file} describe {kind} {name}{rest} in two ways; {_ADVICE[kind]}"
        )
    described.update({key: (file, entry) for key, entry in whole.items() if key not in described})


_KINDS = {"set": "sets", "source": "sources", "suite": "suites", "reference of set": "reference"}
"""Kind of an entry that two files of the user may not describe differently -> its table."""

_ADVICE = {
    "source": "give one of them another name, or, to override some of its keys, write only these "
    "in the second file",
    "set": "give one of them another name, or both the same split",
    "suite": "give one of them another name, or both the same sets",
    "reference of set": "name the same set in both",
}


def _read_excluded(file: Path, lists: Any) -> set[str]:
    """Read hash prefixes from the files that `exclude` names; `#` starts a comment."""
    if not isinstance(lists, list) or not all(isinstance(name, str) for name in lists):
        raise CatalogError(f"{file}: exclude is {lists!r:.100}, expected a list of file names")
    hashes: set[str] = set()
    for name in lists:
        path = file.parent / name
        try:
            lines = read_text(path).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CatalogError(f"{file}: exclude {name!r:.100} cannot be read: {error}") from error
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
    except (recipes.RecipeError, OSError) as error:
        raise CatalogError(str(error)) from error


def toml_string(text: str) -> str:
    """Return a TOML string in quotes. JSON has the same syntax, except that it does not escape DEL,
    and escapes characters beyond 16 bits in a form that TOML forbids.
    """
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _check_name(kind: str, name: str, file: Path) -> None:
    """Check that a name is safe as a file or folder name: catalogs may come from other people."""
    if not _NAME.fullmatch(name):
        raise CatalogError(
            f"{file}: {kind} {name!r:.100}: use lower-case letters, digits, '-' and '_', and begin "
            "with a letter or digit"
        )
    if len(name) > LONGEST_NAME:
        raise CatalogError(
            f"{file}: {kind} {name[:40]}... has {len(name)} characters; use at most {LONGEST_NAME}"
        )


def leaves_raw(root: str) -> bool:
    """Return whether a source's root is not a relative path below the raw folder."""
    strange = any(ord(character) < 32 for character in root) or "://" in root
    return strange or leaves_archive(root) or not PurePosixPath(root).parts


def _check_downloads(catalog: Catalog, file: Path) -> None:
    """Check that no two sources download to one folder: each deletes the files of the other."""
    first: dict[str, str] = {}
    for name, source in catalog.sources.items():
        if source.fetch and not source.fetch.by_hand:
            root = str(PurePosixPath(source.root or name))  # normalized: no `./`, `//` or last `/`
            other = first.setdefault(root.casefold(), name)  # some disks ignore case
            if catalog.sources[other].fetch != source.fetch:
                where = f"{file}: sources {other} and {name} have the root {root!r:.100}"
                raise CatalogError(f"{where} and different downloads; give each its own root")


def _check(name: str, source: Source, sets: Mapping[str, str], file: Path) -> None:
    """Check that the name and the root are safe as paths, and that every set has a split."""
    _check_name("source", name, file)
    if source.root and leaves_raw(source.root):
        raise CatalogError(
            f"{file}: source {name}: root {source.root!r:.100} is not a folder below the raw "
            "folder; give a relative path without '..'"
        )
    for destination in source.destinations():
        if bad := [share for share in destination.values() if not 0 < share <= 1]:
            raise CatalogError(
                f"{file}: source {name}: a share of {destination!s:.100} is {bad[0]}, expected "
                "more than 0 and at most 1"
            )
        total = sum(destination.values())
        if abs(total - 1) > 1e-6:
            raise CatalogError(
                f"{file}: source {name}: the shares of {destination!s:.100} sum to {total:g}, "
                "expected 1"
            )
        for set_name in destination:
            if set_name not in sets:
                raise CatalogError(
                    f"{file}: source {name} goes to set {set_name!r:.100}, but [sets] has only "
                    f"{', '.join(sets) or 'nothing'}; add {set_name:.100} = "
                    '"train", "val" or "test"'
                )
            if source.test_only and sets[set_name] != "test":
                raise CatalogError(
                    f"{file}: source {name} is test_only and may not go to set {set_name} of the "
                    f"split {sets[set_name]}: a detector must not be measured on images that it "
                    "was trained on. Give it a set of the split test, or set test_only = false"
                )
