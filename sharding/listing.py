"""List the images of a raw dataset with their labels, by the rules of a catalog source.

Main entry: `list_source(name, source, raw)`. It reads no image.

- `name`, `source`: a name and its `Source` in `read_catalog(files).sources` (sharding/catalog.py).
- `raw`: the folder of the raw datasets, a `Path`, or a `UPath` for an address.

It returns a `Listing`. If the source's folder is empty (or missing, at an address), `items` is
empty. Its fields:

- `items`: an `Item` for each image that a rule matches (unless its row in a CSV table contradicts
  the rule): `path` (below `raw`: the file, or the archive or table with the image), `member` (where
  in it, else ""), `label` (0 real, 1 fake), `generator`, `group`, `destination` (a JSON text of the
  dict set -> share), `excluded` ("", or why the caller must skip it) and more.
- `excluded`: the files and parquet rows without an `Item` (not hidden files, volumes of archives
  and the CSV tables), a dict: reason -> {"files": number, "first": the first `NAMED` names}.
- `read_as`: a dict of numbers of images. A key is a rule, or a note that a table or row is missing.
- `unmatched`: a list of texts, the rules that match no image, and the patterns of `group` if none
  of them matches one. An optional `ignore` rule is never listed, another optional rule only if no
  rule of its class (real or fake) matches an image.
- `ungrouped`: how many images match no pattern of `group`, a text; "" if all or none do.

A label comes from whole parts of the path, ignoring case, or from the columns of a table. An image
that an `ignore` rule matches has no `Item`. Of several other rules that match, the one with the
deepest folder is used; for parquet cells, the first. `CatalogError` is raised if an image matches a
real and a fake rule of equal depth, or a parquet cell matches both; if there are images but no rule
matches any; if a table is damaged, or lacks a column or a class that the catalog names. `RawError`
is raised for a broken archive, `OSError` for an unreadable file or missing source folder.

`links_in(listing)` returns the end of a sentence, which names a link among the excluded files.
`sharding/split.py` chooses which of these items are packed, and into which set.
"""

import fnmatch
import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from console import counted
from escape import as_utf8
from imaging.decode import IMAGE_SUFFIXES
from imaging.names import LINK, no_image
from sharding.catalog import CatalogError, Rule, Source, Table, shares
from sharding.format import CLASSES
from sharding.raw import VOLUME, RawError, RawFile, nfc, walk
from sharding.tables import (
    LabelRows,
    agrees,
    equal_to,
    naming_damage,
    read_rows,
    texts_of,
)
from storage import AnyPath

NAMED = 5
"""Number of excluded files to name per reason."""


class Item(NamedTuple):
    """One image that may become a sample."""

    source: str
    origin: str  # unique path below the raw folder, with '/', for people
    path: str  # file with the bytes, below the raw folder
    member: str  # location in that file; empty for the whole file
    size: int  # bytes; 0 if unknown before reading
    version: str  # changes when the bytes may have changed
    label: int
    generator: str
    group: str
    destination: str  # JSON: set -> share
    excluded: str  # why the image is not read, or ""


@dataclass
class Listing:
    """Content of a source: its items, excluded files by reason, and items by rule."""

    items: list[Item] = field(default_factory=list)
    excluded: dict[str, dict[str, Any]] = field(default_factory=dict)
    read_as: dict[str, int] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)  # rules and patterns that match no file
    ungrouped: str = ""

    def exclude(self, reason: str, name: str) -> None:
        """Count an excluded file, and keep the names of the first few."""
        entry = self.excluded.setdefault(reason, {"files": 0, "first": []})
        entry["files"] += 1
        if len(entry["first"]) < NAMED:
            entry["first"].append(name)


class _Compiled(NamedTuple):
    """Compiled catalog rule, and the values that it gives to every image that it matches."""

    label: int
    rule: Rule
    folder: re.Pattern
    name: re.Pattern
    read_as: str
    destination: str


@dataclass
class _Grouping:
    """Patterns that give a file its group. Counts the files that match one, and all others."""

    patterns: Sequence[re.Pattern]
    matched: int = 0
    unmatched: int = 0
    first: str = ""  # first path that no pattern matches

    def group_of(self, name: str, origin: str) -> str:
        """Return the group of a file: what the first pattern that matches captures, or its path."""
        if captured := next((m[1] for p in self.patterns if (m := p.search(origin))), None):
            self.matched += 1
            return f"{name}/{captured.lower()}"
        self.unmatched += 1
        self.first = self.first or origin
        return origin.rpartition(".")[0]

    def report(self, listing: Listing) -> None:
        """Note in `listing` that no file, or not every file, matches a pattern."""
        if self.patterns and not self.matched:
            paths = f" (paths are like {self.first})" if self.first else ""
            listing.unmatched += [f"group '{pattern.pattern}'{paths}" for pattern in self.patterns]
        elif self.patterns and self.unmatched:
            listing.ungrouped = (
                f"{self.unmatched:,} of {counted(self.matched + self.unmatched, 'image')} match no "
                f"`group` pattern (first: {self.first})"
            )


_PACKED_TABLE = "a table in an archive, which is not read; unpack it"


def list_source(name: str, source: Source, raw: AnyPath) -> Listing:
    """List all images of a source, sorted by path.

    Raises:
        CatalogError: a file is both real and fake by the rules, a table is damaged or lacks a
            column that the rules name, or there are images but no rule matches any.
        RawError, OSError: a file or folder cannot be read.
    """
    root = source.root or name
    files = list(walk(raw, root))
    rules = [
        _compile(source, label, rule)
        for label in range(len(CLASSES))
        for rule in source.rules(label)
    ]
    ignored = [_compile(source, -1, rule) for rule in source.ignored()]
    groups = _Grouping([re.compile(pattern, re.IGNORECASE) for pattern in source.groups()])
    listing = Listing()
    used: set[str] = set()
    table = read_rows(source, root, raw, files)
    if table and table.fitted:
        note = "rows whose path ends with that of a file"
        listing.read_as[note] = len(table.fitted)
    if table and table.table.optional and not table.rows:
        listing.read_as[f"no table {table.table.name}: labels by folder"] = 0
    on_files = [rule for rule in rules if not rule.rule.column]
    on_cells = [rule for rule in rules if rule.rule.column]
    if table and not table.table.optional:
        table.shared = _shared_keys(table, root, files, on_files, ignored)
    images = 0
    for file in files:
        inside, base, suffix = _split(file)
        if source.table and fnmatch.fnmatch(base.lower(), source.table.name.lower()):
            if file.member:
                listing.exclude(_PACKED_TABLE, file.inside)
            continue
        claims = _fitting(on_files, inside, base)
        ignoring = _fitting(ignored, inside, base)
        if suffix in IMAGE_SUFFIXES:
            always = [claim for claim in claims if not claim.compiled.rule.where]
            used.update(claim.compiled.read_as for claim in (*ignoring, *always))
        if ignoring:
            listing.exclude("the catalog ignores it", file.inside)
        elif file.excluded == VOLUME:
            raise RawError(
                f"{raw / file.path} is a volume of a split archive, and the last volume, the .zip, "
                "is not beside it; fetch it, or remove or `ignore` the volumes"
            )
        elif file.excluded and not (claims and suffix in IMAGE_SUFFIXES):
            listing.exclude(file.excluded, file.inside)
        elif on_cells and suffix == ".parquet":
            images += 1
            _list_cells(name, source, raw, file, _fitting(on_cells, inside, base), listing)
        elif suffix not in IMAGE_SUFFIXES:
            listing.exclude(no_image(base), file.inside)
        else:
            images += 1
            _list_file(name, source, file, claims, table, groups, listing, used)
    listing.unmatched = _unmatched([*rules, *ignored], used | listing.read_as.keys())
    groups.report(listing)
    if images and table and not (table.csv_files or table.table.optional):
        _refuse_missing_table(name, raw / root, table.table, files)
    if images and not listing.items:
        _refuse_all(name, source, raw / root, listing)
    return listing


def links_in(listing: Listing) -> str:
    """Return the end of a sentence on missing images that names a link, or "" if there is none."""
    if LINK not in listing.excluded:
        return ""
    return f"; {listing.excluded[LINK]['first'][0]} is {LINK}: put the folder or file itself there"


def _unmatched(rules: Sequence[_Compiled], used: set[str]) -> list[str]:
    """List the rules that match no file; optional rules only if no rule of their class matches."""
    classes = {rule.label for rule in rules if rule.read_as in used}
    return [
        rule.read_as
        for rule in rules
        if rule.read_as not in used
        and (not rule.rule.optional or (rule.label >= 0 and rule.label not in classes))
    ]


def _refuse_all(name: str, source: Source, root: AnyPath, listing: Listing) -> None:
    """Raise an error if a source has images but no rule matches any: its layout is unknown."""
    wanted = "; ".join(str(rule) for label in (0, 1) for rule in source.rules(label)[:4])
    reason, entry = max(listing.excluded.items(), key=lambda item: item[1]["files"])
    raise CatalogError(
        f"source {name}: {root} contains images, but none matches the catalog ({wanted}, ...). "
        f"{entry['files']:,} files: {reason}; the first is {entry['first'][0]}. Was the source "
        "unpacked one folder too deep, or has its layout changed? Add rules in your own catalog"
    )


def _refuse_missing_table(name: str, root: AnyPath, table: Table, files: Sequence[RawFile]) -> None:
    """Raise an error that names the CSV files which are there instead of the source's table."""
    there = [as_utf8(file.inside) for file in files if file.inside.lower().endswith(".csv")]
    instead = f", which has {', '.join(there[:4])}" if there else ", and no other CSV file"
    raise CatalogError(
        f"source {name} has no {table.name} below {root}{instead}; correct `table`, or set "
        "optional = true in it to label files without a row by their folders"
    )


# --- matching -------------------------------------------------------------------------------------


def _compile(source: Source, label: int, rule: Rule) -> _Compiled:
    name = re.compile(fnmatch.translate(nfc(rule.name)), re.IGNORECASE)
    read_as = f"{CLASSES[label] if label >= 0 else 'ignored'}: {rule}"
    destination = json.dumps(shares(rule.set or source.set))
    return _Compiled(label, rule, folder_pattern(rule.folder), name, read_as, destination)


def folder_pattern(folder: str) -> re.Pattern:
    """Compile a catalog path to a regular expression for 'a/b/c/' in lower case; see `Rule`."""
    parts = [part for part in nfc(folder).lower().strip("/").split("/") if part not in (".", "")]
    translated = [r"(?:[^/]+/)*" if part == "**" else _part_pattern(part) + "/" for part in parts]
    return re.compile("".join(translated))


def _part_pattern(part: str) -> str:
    """Translate one path part to a regular expression; `*` and `?` do not match a slash."""
    if part == "<generator>":
        return r"(?P<generator>[^/]+)"
    return "".join(
        {"*": "[^/]*", "?": "[^/]"}.get(character, re.escape(character)) for character in part
    )


def _split(file: RawFile) -> tuple[str, str, str]:
    """Return the folder of a file as `folder_pattern` expects it, its name, and its suffix."""
    folder, _, base = nfc(file.inside).rpartition("/")
    return f"{folder}/".lower() if folder else "", base, posixpath.splitext(base)[1].lower()


class _Claim(NamedTuple):
    """Rule that matches a file, with the depth of the match and the generator."""

    depth: int
    compiled: _Compiled
    generator: str


def _fitting(rules: Sequence[_Compiled], inside: str, base: str) -> list[_Claim]:
    claims = []
    for compiled in rules:
        match = compiled.folder.match(inside)
        if match and compiled.name.match(base):
            # A zip archive counts as a folder, with a name without .zip.
            named = (match.groupdict().get("generator") or "").removesuffix(".zip")
            named = named or compiled.rule.generator
            # "**" alone has depth 0, so that every rule with a named folder wins.
            depth = 0 if compiled.rule.folder == "**" else match.end()
            claims.append(_Claim(depth, compiled, named))
    return claims


def _decide(claims: list[_Claim], name: str) -> _Claim:
    """Return the deepest claim, the first of equals; two labels at equal depth are an error."""
    deepest = max(claim.depth for claim in claims)
    best = [claim for claim in claims if claim.depth == deepest]
    real = [claim.compiled.rule for claim in best if claim.compiled.label == 0]
    fake = [claim.compiled.rule for claim in best if claim.compiled.label == 1]
    if real and fake:
        raise CatalogError(
            f"{name} matches the real rule '{real[0]}' and the fake rule '{fake[0]}'; make one of "
            "the two more precise in the catalog"
        )
    return best[0]


# --- files ----------------------------------------------------------------------------------------


def _list_file(
    name: str,
    source: Source,
    file: RawFile,
    claims: list[_Claim],
    table: LabelRows | None,
    groups: _Grouping,
    listing: Listing,
    used: set[str],
) -> None:
    if not claims:
        listing.exclude("in no folder the catalog names", file.inside)
        return
    if table:
        claims, reason = _by_row(claims, f"{source.root or name}/{file.inside}", table)
        if not claims:
            listing.exclude(reason, file.inside)
            return
        if reason == table.no_row and table.rows:
            note = "no row in the table: labeled by folder"
            listing.read_as[note] = listing.read_as.get(note, 0) + 1
    used.update(claim.compiled.read_as for claim in claims)  # not only the deepest rule
    claim = _decide(claims, file.inside)
    root = source.root or name
    origin = nfc(f"{root}/{file.inside}")  # equal on all machines
    group = groups.group_of(name, origin)
    _add(listing, claim, name, file, origin, file.member, group)


def _shared_keys(
    table: LabelRows,
    root: str,
    files: Sequence[RawFile],
    rules: Sequence[_Compiled],
    ignored: Sequence[_Compiled],
) -> set[str]:
    """Return the keys without a folder that several images have: their rows are ambiguous."""
    keys = Counter[str]()
    for file in files:
        inside, base, suffix = _split(file)
        if suffix in IMAGE_SUFFIXES and _fitting(rules, inside, base):
            if not _fitting(ignored, inside, base):
                keys[table.key_of(f"{root}/{file.inside}")] += 1
    return {key for key, count in keys.items() if count > 1 and "/" not in key} - {""}


def _by_row(claims: list[_Claim], path: str, table: LabelRows) -> tuple[list[_Claim], str]:
    """Return the claims that agree with the row of a file, and why there are not more."""
    row = table.row_of(path)
    if not isinstance(row, str):
        agreeing = [claim for claim in claims if agrees(claim.compiled.rule, row)]
        return agreeing, "its folder and its row in the table disagree"
    if table.table.optional and row == table.no_row:
        return claims, row
    if row != table.no_row and any(claim.compiled.rule.where for claim in claims):
        return [], row  # contradicting rows: one may be of a test set
    return [claim for claim in claims if not claim.compiled.rule.where], row


def _add(
    listing: Listing, claim: _Claim, name: str, file: RawFile, origin: str, member: str, group: str
) -> None:
    label, read_as = claim.compiled.label, claim.compiled.read_as
    listing.read_as[read_as] = listing.read_as.get(read_as, 0) + 1
    size = 0 if member and member != file.member else file.size
    listing.items.append(
        Item(
            source=name, origin=origin, path=file.path, member=member, size=size,
            version=file.version, label=label, generator=claim.generator or CLASSES[label],
            group=group, destination=claim.compiled.destination, excluded=file.excluded,
        )
    )  # fmt: skip


# --- parquet tables -------------------------------------------------------------------------------


def _list_cells(
    name: str, source: Source, raw: AnyPath, file: RawFile, claims: list[_Claim], listing: Listing
) -> None:
    """List the image cells of one parquet table that a rule matches."""
    if not claims:
        listing.exclude("in no table the catalog names", file.inside)
        return
    if file.member:
        listing.exclude(_PACKED_TABLE, file.inside)
        return
    with naming_damage(raw / file.path), (raw / file.path).open("rb") as stream:
        table = pq.ParquetFile(stream, pre_buffer=False)  # no threads: see `raw.rows_of`
        conditions = {column for claim in claims for column in claim.compiled.rule.where}
        naming = {claim.compiled.rule.generator_column for claim in claims} - {""}
        names = conditions | naming | ({source.group_column} - {""})
        images = {claim.compiled.rule.column for claim in claims}
        if missing := (names | images) - set(table.schema_arrow.names):
            raise CatalogError(
                f"{raw / file.path} has columns {', '.join(table.schema_arrow.names)}, but the "
                f"catalog also expects {', '.join(sorted(missing))}"
            )
        values = table.read(columns=sorted(names), use_threads=False)
        sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    total = sum(sizes)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    row_of = np.arange(total) - np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    chosen = _choose_rows(claims, values, total, raw / file.path)
    captions = values.column(source.group_column).to_pylist() if source.group_column else None
    generators = {column: texts_of(values, column, raw / file.path) for column in naming}
    taken = np.zeros(total, bool)
    root = source.root or name
    cells = [(int(row), i) for i, mask in enumerate(chosen) for row in np.flatnonzero(mask)]
    for row, claim_index in sorted(cells):
        claim = claims[claim_index]
        column = claim.compiled.rule.column
        if named_by := claim.compiled.rule.generator_column:
            claim = claim._replace(generator=generators[named_by][row])
        taken[row] = True
        origin = nfc(f"{root}/{file.inside}:{row}:{column}")
        group = nfc(f"{root}/{file.inside}:{row}")
        if captions and captions[row] not in (None, ""):
            group = f"{name}/{hashlib.sha256(str(captions[row]).encode()).hexdigest()[:16]}"
        member = f"{group_of[row]}:{row_of[row]}:{column}"
        _add(listing, claim, name, file, origin, member, group)
    for row in np.flatnonzero(~taken).tolist():
        shown = ", ".join(f"{c}={values.column(c)[int(row)]}" for c in sorted(conditions))
        listing.exclude(f"no rule for such a row ({shown[:80]})", f"{file.inside}:{row}")


def _choose_rows(
    claims: Sequence[_Claim], values: pa.Table, total: int, path: AnyPath
) -> list[np.ndarray]:
    """Return a row mask per claim; a cell that is real by one and fake by another is an error."""
    chosen: list[np.ndarray] = []
    for claim in claims:
        mask = np.ones(total, bool)
        for column, value in claim.compiled.rule.where.items():
            mask &= equal_to(values, column, value, path)
        for other, earlier in zip(claims, chosen, strict=False):
            if other.compiled.rule.column == claim.compiled.rule.column:
                both = mask & earlier
                if both.any() and other.compiled.label != claim.compiled.label:
                    _decide([other._replace(depth=0), claim._replace(depth=0)],
                            f"{path}:{int(np.flatnonzero(both)[0])}")  # fmt: skip
                mask &= ~earlier
        chosen.append(mask)
    return chosen
