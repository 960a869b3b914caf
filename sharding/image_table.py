"""Find the CSV table in a folder of images that has a row per image, and the columns in it with the
class and with the published split.

Main entry: `find_table(raw, root, files)`. It guesses nothing that it does not name: what it does
not use is in the notes.

- `raw`, `root`: the folder of the raw datasets (`Path` or `UPath`) and the name of a folder in it.
- `files`: the list of the files in that folder, from `walk()` of sharding/raw.py.

Tables that divide the images by their file names, such as `test.csv`, are a `CatalogError`.
It returns a pair: an `ImageTable`, or None if no table names the images and their class or split;
and a list of lines, the notes on tables and columns that are not used. The fields of the table:

- `name`: the name of the CSV files. `key`: the column with the names of the images.
- `split`: the column with the published splits, "" if there is none. `splits`: dict from each of
  its values to "train", "val" or "test", or to "" if it is empty.
- `label`: the column with the classes, "" if there is none. `labels`: dict from each of its values
  to the label, or to None if the words of the value do not tell it, as for 0 and 1.
- `unused`: the names of the other columns.

`row_of(inside, columns)` returns the row of an image (its path below `root`), or the reason why it
has none, such as several rows that differ in one of the columns.
`where(inside, row, columns)` returns the conditions of a rule for an image with this row, and
`split_if(where)` the split that they name. `decisive(has_classes)` returns the columns that may
decide, and `notes_on(columns, rules, images)` lines on those that do and those that are not used.
`as_toml()` returns the table as the value of `table` in a catalog. `rule(...)` and
`destination(...)` return a rule and `set` of a source as TOML; they decide what becomes of a
published split.
"""

import glob
import posixpath
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from console import counted
from imaging.decode import IMAGE_SUFFIXES
from sharding.catalog import CatalogError, Source, Table, toml_string
from sharding.csv_rows import csv_rows
from sharding.folder_names import class_of, looks_published, split_of, strictest
from sharding.raw import RawFile, nfc
from sharding.tables import LabelRows, read_rows
from storage import AnyPath

Where = tuple[tuple[str, str], ...]
"""Conditions of a rule: columns, and the values that they must have."""

MOST_VALUES = 50
"""Maximum number of different values in a column of classes or splits; others are free texts."""

OTHER_TABLES = frozenset({".tsv", ".jsonl", ".xlsx", ".ods"})
"""Suffixes of tables that are not read, such as `metadata.jsonl` of Hugging Face."""

SPLIT_NAMES = frozenset("split splits subset partition fold usage".split())
"""Names of columns that are expected to have a split, in lower case."""

LABEL_NAMES = frozenset("label labels class target category kind type is_fake is_ai fake".split())
"""Names of columns that are expected to have a class, in lower case."""


@dataclass(frozen=True)
class ImageTable:
    """CSV table of the images of a folder; see the module docstring."""

    name: str
    key: str
    split: str
    splits: Mapping[str, str]
    label: str
    labels: Mapping[str, int | None]
    unused: Sequence[str]
    root: str
    rows: LabelRows

    def row_of(self, inside: str, columns: Sequence[str]) -> Mapping[str, str] | str:
        """Return the row of an image, or why it has none; several must be equal in `columns`."""
        return self.rows.row_of(f"{self.root}/{inside}", columns)

    def decisive(self, has_classes: bool) -> tuple[str, ...]:
        """Return the columns for class and split. With `has_classes`, folders give the class."""
        label = "" if has_classes else self.label
        return tuple(column for column in (label, self.split) if column)

    def where(self, folder: str, row: Mapping[str, str], columns: Sequence[str]) -> Where:
        """Return the conditions of a rule for the images in a folder that have such a row. The
        split of the row is a condition, unless the folder names a stricter split.
        """
        published = split_of(folder)[0]
        cells = ((column, row.get(column, "").strip()) for column in columns if row)
        return tuple(
            (column, value)
            for column, value in cells
            if column != self.split
            or not published
            or strictest(published, self.splits[value]) != published
        )

    def split_if(self, where: Where) -> str:
        """Return the published split of rows that fulfill `where`, "" if it names none."""
        return next((self.splits[value] for column, value in where if column == self.split), "")

    def notes_on(
        self, columns: Sequence[str], rules: Collection[Where], images: Iterable[str]
    ) -> list[str]:
        """Return lines on the columns that the conditions `rules` use, on the other columns, and on
        the `images` (paths) whose folder and row name different splits.
        """
        used = {column for where in rules for column, _ in where}
        decide = [column for column in columns if column in used]
        rest = [c for c in (self.label, *self.unused) if c and c not in columns]
        notes = []
        if decide:
            verb = "decide" if len(decide) > 1 else "decides"
            notes.append(f"table {self.name}: {' and '.join(map(repr, decide))} {verb}")
        if idle := [column for column in columns if column not in used]:
            shown = " and ".join(map(repr, idle))
            notes.append(f"table {self.name}: not used: {shown}: folders give the splits")
        if rest:
            why = ": folders give the classes" if self.label in rest else ""
            notes.append(f"table {self.name}: not used: {', '.join(map(repr, rest))}{why}")
        if fitted := self.rows.fitted:
            key, path = next(iter(fitted.items()))
            notes.append(
                f"table {self.name}: {counted(len(fitted), 'path')} of another folder taken for "
                f"the file that it ends with, such as {key} for {path}"
            )
        if self.split in columns and (count := sum(map(self._disagrees, images))):
            notes.append(
                f"table {self.name}: {self.split!r} and the folder name different splits of "
                f"{counted(count, 'image')}: test counts before val, and val before train"
            )
        return notes

    def _disagrees(self, inside: str) -> bool:
        """Return whether folder and row name different splits of an image."""
        named = split_of(inside.rpartition("/")[0])[0]
        row = self.row_of(inside, [self.split]) if named else ""
        split = "" if isinstance(row, str) else self.splits[row.get(self.split, "").strip()]
        return bool(split) and split != named

    def as_toml(self) -> str:
        """Return the value of the key `table` of a source."""
        return f"{{ name = {toml_string(glob.escape(self.name))}, key = {toml_string(self.key)} }}"


def _where_as_toml(where: Where) -> str:
    """Return the value of the key `where` of a rule, "" without a condition."""
    if not where:
        return ""
    pairs = (f"{toml_string(column)} = {toml_string(value)}" for column, value in where)
    return f"{{ {', '.join(pairs)} }}"


def rule(
    name: str, folder: str, split: str, generator: str, where: Where, *, optional: bool = False
) -> str:
    """Return a rule of the source `name` as TOML. Images of a published val or test set go to this
    set, images of a published train set where unassigned images go.
    """
    parts = {"folder": toml_string(folder) if folder else "", "where": _where_as_toml(where)}
    parts |= {"generator": toml_string(generator) if generator else ""}
    parts |= {"set": toml_string(f"{name}-{split}") if split in ("val", "test") else ""}
    parts |= {"optional": "true" if optional else ""}
    return f"{{ {', '.join(f'{key} = {value}' for key, value in parts.items() if value)} }}"


def destination(name: str, published: Collection[str], held_out: Mapping[str, float]) -> str:
    """Return `set` of the source `name` as TOML: shares of the training set and of those sets of
    `held_out` (split -> share) that are not published. Published images go only to their own set.
    """
    shares = {f"{name}-{s}": share for s, share in held_out.items() if s not in published}
    shares = {name: 1 - sum(shares.values()), **shares}
    divided = ", ".join(f"{key} = {share:g}" for key, share in shares.items())
    return f"{{ {divided} }}" if len(shares) > 1 else toml_string(name)


def find_table(
    raw: AnyPath, root: str, files: Sequence[RawFile]
) -> tuple[ImageTable | None, list[str]]:
    """Return the table with the class or the split of the images below `raw/root`, and notes."""
    images = {_base(file) for file in files if posixpath.splitext(_base(file))[1] in IMAGE_SUFFIXES}
    keys: dict[str, set[str]] = {}
    shared: dict[str, set[str]] = {}  # name of tables -> the columns that all of them have
    unused: dict[str, str] = {}  # name of tables that cannot be used -> the reason
    notes: list[str] = []
    others: dict[str, list[str]] = {}
    for file in files:
        suffix = posixpath.splitext(_base(file))[1]
        if suffix in OTHER_TABLES:
            others.setdefault(suffix, []).append(file.inside)
        if suffix != ".csv":
            continue
        if reason := file.excluded or ("in an archive" if file.member else ""):
            notes.append(f"table {file.inside} is not read: {reason}")
            continue
        try:
            columns, key = _key_of(raw / file.path, images)
        except (CatalogError, OSError) as error:
            unused[_base(file)] = f"not read: {error}"
            notes.append(unused[_base(file)])
            continue
        shared[_base(file)] = shared.get(_base(file), {*columns}) & {*columns}
        if key:
            keys.setdefault(_base(file), set()).add(key)
        else:
            shown = ", ".join(columns[:8]) or "none"
            notes.append(f"table {file.inside}: no column has the names of images ({shown})")
    for of_suffix in others.values():
        notes.append(
            f"{counted(len(of_suffix), 'table')} not read, such as {of_suffix[0]}: write a CSV "
            "table with commas if it has classes or splits of the images"
        )
    tables = []
    dividing: dict[str, bool] = {}
    for name, columns_of in keys.items():
        if len(columns_of) > 1:
            shown = " and ".join(sorted(columns_of))
            notes.append(
                f"tables {name} are not used: they name images in different columns ({shown})"
            )
            continue
        (key,) = columns_of
        try:
            table = _table(raw, root, files, name, key, shared[name], notes)
        except CatalogError as error:  # tables of this name in several folders
            unused[name] = f"not read: {error}"
            notes.append(unused[name])
            continue
        if fault := _fault(table, files):
            unused[name] = f"table {table.name} is not used: {fault}"
            notes.append(unused[name])
            continue
        if table.split and table.split not in shared[name]:
            raise CatalogError(
                f"some tables {table.name} in {raw / root} lack the column {table.split!r}, which "
                "others have; add it to them, or rename them"
            )
        tables += [table] if table.split or table.label else []
        if not table.split and _names_split(table.name):
            dividing[table.name] = _divides(table, files)
    _refuse_published(raw / root, files, unused)
    if any(dividing.values()):
        raise CatalogError(
            f"{' and '.join(dividing)} in {raw / root}: their names divide the images, and only a "
            "column can; join them into one table with a column 'split' (train, val or test), or "
            "move them out of the folder to divide its images anew"
        )
    if len(tables) > 1:
        names = " and ".join(table.name for table in tables)
        notes.append(
            f"{names} each have a row per image: none is used; join them into one, or leave "
            "one of them there"
        )
        return None, notes
    return (tables[0] if tables else None), notes


def _refuse_published(folder: AnyPath, files: Sequence[RawFile], unused: Mapping[str, str]) -> None:
    """Refuse unusable tables that are named like a published split, if no folder is: their images
    would be trained on.
    """
    folders = {file.inside.rpartition("/")[0] for file in files}
    if not any(split_of(path)[0] in ("val", "test") for path in folders):
        for name, reason in unused.items():
            if looks_published(posixpath.splitext(name)[0]):
                raise CatalogError(
                    f"{name} in {folder} may name the images of a published set: {reason}; or "
                    "move it out of the folder to divide its images anew"
                )


def _base(file: RawFile) -> str:
    return nfc(file.inside).rpartition("/")[2].lower()


def _key_of(path: AnyPath, images: set[str]) -> tuple[list[str], str]:
    """Return the columns of a CSV file, and the column with the most names of images, "" if fewer
    than half of the rows have one there.
    """
    hits, count = Counter[str](), 0
    with csv_rows(path, CatalogError) as (columns, rows):
        for _, row in rows:
            count += 1
            for column, value in row.items():
                named = nfc(value.replace("\\", "/")).lower().rpartition("/")[2]
                hits[column] += named in images
    ((key, most),) = hits.most_common(1) or [("", 0)]
    return columns, key if most and 2 * most >= count else ""


def _table(
    raw: AnyPath,
    root: str,
    files: Sequence[RawFile],
    name: str,
    key: str,
    shared: Set[str],
    notes: list[str],
) -> ImageTable:
    """Read the CSV files of one name, and choose the columns with the class and the split. Only a
    column that all these files have (`shared`) can give the class.
    """
    actual = next(base for f in files for base in [f.inside.rpartition("/")[2]] if _base(f) == name)
    table = Table(name=glob.escape(actual), key=key)
    read = [file for file in files if not (_base(file) == name and file.excluded)]
    rows = read_rows(Source(license="", set="any", real=["**"], table=table), root, raw, read)
    assert rows is not None
    values: dict[str, Counter[str]] = {}
    for row in rows.rows.values():
        for column, value in row.items():
            values.setdefault(column, Counter())[value] += 1
    for differing in rows.differing.values():
        for column, others in differing.items():
            values.setdefault(column, Counter()).update(others)
    few = {column: counts for column, counts in values.items() if len(counts) <= MOST_VALUES}
    split = _split_column(actual, few, notes)
    label, labels = _label_column({c: few[c] for c in few if c != split and c in shared})
    unused = [column for column in values if column not in (split, label)]
    if not (split or label):
        shown = ", ".join(values) or "no other column"
        notes.append(f"table {actual}: neither classes nor splits of images ({shown})")
    splits = {value: split_of(value)[0] for value in sorted(few.get(split, ()))}
    return ImageTable(actual, key, split, splits, label, labels, unused, root, rows)


def _fault(table: ImageTable, files: Sequence[RawFile]) -> str:
    """Return why no row of a table is for a single image, or "". Stores the names that several
    images have in `rows.shared`.
    """
    rows = table.rows
    images = [file.inside for file in files if posixpath.splitext(_base(file))[1] in IMAGE_SUFFIXES]
    counts = Counter(rows.key_of(f"{table.root}/{inside}") for inside in images)
    rows.shared = {key for key, count in counts.items() if count > 1 and "/" not in key} - {""}
    if counts.keys() - rows.shared - {""}:
        return ""
    what = f"write paths below {table.root} into its column {table.key!r}"
    if rows.shared:
        return f"several images have each of its names, such as {min(rows.shared)!r}; {what}"
    return f"no image has such a path as {rows.example!r}; {what}"


def _names_split(name: str) -> bool:
    """Return whether a table is named like a split, or with a word of a val or test split."""
    stem = posixpath.splitext(name)[0]
    return looks_published(stem) or bool(split_of(stem)[0])


def _divides(table: ImageTable, files: Sequence[RawFile]) -> bool:
    """Return whether a table is named like a published val or test split and has a row of an image
    that is in no folder of such a split.
    """
    if not looks_published(posixpath.splitext(table.name)[0]):
        return False  # such as train.csv
    images = [file.inside for file in files if posixpath.splitext(_base(file))[1] in IMAGE_SUFFIXES]
    return any(
        split_of(inside.rpartition("/")[0])[0] not in ("val", "test")
        and not isinstance(table.row_of(inside, ()), str)
        for inside in images
    )


def _split_column(name: str, values: Mapping[str, Counter[str]], notes: list[str]) -> str:
    """Return the column whose values name splits, with a validation or test set among them."""
    good = []
    for column, counts in values.items():
        strange = [value for value in counts if value and not split_of(value)[0]]
        held = [value for value in counts if split_of(value)[0] in ("val", "test")]
        if held and not strange:
            good.append(column)
        elif column.lower() in SPLIT_NAMES and strange:
            notes.append(
                f"table {name}: column {column!r} is not used: {strange[0]!r} is not the name of a "
                "split (train, val, test)"
            )
    return min(good, key=lambda column: column.lower() not in SPLIT_NAMES, default="")


def _label_column(values: Mapping[str, Counter[str]]) -> tuple[str, dict[str, int | None]]:
    """Return the column whose values name the class of most images, and the label of each value. If
    no values do, return a column named like a label.
    """
    decided: dict[str, dict[str, int | None]] = {}
    shares: dict[str, float] = {}
    for column, counts in values.items():
        labels = {value: class_of(value, {value.lower()})[0] for value in sorted(counts)}
        known = sum(count for value, count in counts.items() if labels[value] is not None)
        is_named = column.lower() in LABEL_NAMES and len(counts) > 1
        if {0, 1} <= {*labels.values()} or is_named:
            decided[column], shares[column] = labels, known / counts.total() + 0.001 * is_named
    best = max(shares, key=lambda column: shares[column], default="")
    return best, decided.get(best, {})
