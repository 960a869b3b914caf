"""Tests of `read_catalog()`, and of the labels, groups and sets that a catalog gives."""

import json
import tomllib
from pathlib import Path

import pytest

from sharding.catalog import BUILT_IN, CatalogError, read_catalog
from sharding.listing import folder_pattern, list_source
from sharding.plan import sample_key
from sharding.split import choose_set, hash_point
from tests.builders import ROOT, build_all, encode, photo


def catalog_of(tmp_path: Path, text: str):
    path = tmp_path / "catalog.toml"
    path.write_text('[sets]\ntrain = "train"\nheld = "test"\n' + text)
    return read_catalog([path])


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(len(path.parts)), "PNG"))


def labels_of(tmp_path: Path, source: str) -> dict[str, tuple[int, str]]:
    catalog = catalog_of(tmp_path, source)
    items = list_source("s", catalog.sources["s"], tmp_path).items
    return {item.origin.removeprefix("s/"): (item.label, item.generator) for item in items}


def test_the_built_in_catalog_is_valid() -> None:
    catalog = read_catalog([BUILT_IN])
    assert catalog.sources["dda"].policy == "dda"
    assert {"phase1", "phase2", "val", "val-phase2", "evalgen"} <= catalog.sets.keys()


def test_the_example_catalog_holds_whole_sources_out() -> None:
    example = ROOT / "docs" / "example-catalog.toml"
    catalog = read_catalog([BUILT_IN, example])
    assert catalog.sources["bsds500"].set == "unseen"
    assert catalog.sets["unseen"] == "test"


def test_labels_come_from_whole_path_parts_and_never_from_their_order(tmp_path: Path) -> None:
    root = tmp_path / "s"
    touch(
        root / "real-vs-ai" / "AI" / "a.png",
        root / "real-vs-ai" / "Nature" / "b.png",
        root / "real-vs-ai" / "nature_ai" / "c.png",
    )
    source = '[sources.s]\nlicense = "x"\nset = "train"\nreal = ["**/nature"]\nfake = ["**/ai"]\n'
    assert labels_of(tmp_path, source) == {
        "real-vs-ai/AI/a.png": (1, "fake"),
        "real-vs-ai/Nature/b.png": (0, "real"),
    }


def test_the_deepest_folder_decides(tmp_path: Path) -> None:
    touch(tmp_path / "s/real/x/fake/a.png", tmp_path / "s/real/b.png")
    source = '[sources.s]\nlicense = "x"\nset = "train"\nreal = ["real"]\nfake = ["**/fake"]\n'
    assert labels_of(tmp_path, source) == {
        "real/x/fake/a.png": (1, "fake"),
        "real/b.png": (0, "real"),
    }


def test_a_file_that_is_real_and_fake_by_the_rules_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "s/mixed/a.png")
    source = '[sources.s]\nlicense = "x"\nset = "train"\nreal = ["mixed"]\nfake = ["*"]\n'
    with pytest.raises(CatalogError, match=r"a\.png matches the real rule 'mixed' and the fake"):
        labels_of(tmp_path, source)


def test_a_file_name_may_give_the_generator(tmp_path: Path) -> None:
    touch(tmp_path / "s/fake/1__sdxl.png", tmp_path / "s/fake/1__Flux.png")
    source = (
        '[sources.s]\nlicense = "x"\nset = "train"\nfake = [\n'
        '{ folder = "fake", name = "*__sdxl*", generator = "sdxl" },\n'
        '{ folder = "fake", name = "*__flux*", generator = "flux" } ]\n'
    )
    assert {generator for _, generator in labels_of(tmp_path, source).values()} == {"sdxl", "flux"}


def test_a_condition_on_a_table_needs_a_table(tmp_path: Path) -> None:
    text = (
        '[sources.s]\nlicense = "x"\nset = "train"\n'
        'fake = [{ folder = "fake", where = { model = "sd" } }]\n'
    )
    with pytest.raises(CatalogError, match=r"`where`, a condition on a table, but reads none"):
        catalog_of(tmp_path, text)


def test_excluded_files_are_counted_by_reason(tmp_path: Path) -> None:
    touch(tmp_path / "s/real/a.png", tmp_path / "s/other/b.png", tmp_path / "s/skip/c.png")
    (tmp_path / "s/real/labels.csv").write_text("x")
    catalog = catalog_of(
        tmp_path, '[sources.s]\nlicense = "x"\nset = "train"\nreal = ["real"]\nignore = ["skip"]\n'
    )
    listing = list_source("s", catalog.sources["s"], tmp_path)
    assert len(listing.items) == 1
    assert listing.excluded == {
        "not an image by its name (.csv)": {"files": 1, "first": ["real/labels.csv"]},
        "in no folder the catalog names": {"files": 1, "first": ["other/b.png"]},
        "the catalog ignores it": {"files": 1, "first": ["skip/c.png"]},
    }


def test_a_group_is_never_divided_between_sets(tmp_path: Path) -> None:
    touch(*(tmp_path / f"s/fake/prompt{n}_{i}.png" for n in range(40) for i in range(3)))
    catalog = catalog_of(
        tmp_path,
        '[sources.s]\nlicense = "x"\nset = { train = 0.5, held = 0.5 }\nfake = ["fake"]\n'
        "group = '([^/]+)_[0-9]+\\.png$'\n",
    )
    items = list_source("s", catalog.sources["s"], tmp_path).items
    sets = {}
    for item in items:
        chosen = choose_set(item.group, json.loads(item.destination))
        sets.setdefault(item.group, set()).add(chosen)
    assert len(sets) == 40
    assert all(len(names) == 1 for names in sets.values())
    assert {"train", "held"} == set().union(*sets.values())


def test_groups_are_divided_by_the_shares_of_the_sets() -> None:
    chosen = [choose_set(f"group {i}", {"a": 0.7, "b": 0.2, "c": 0.1}) for i in range(5000)]
    assert abs(chosen.count("a") / 5000 - 0.7) < 0.03
    assert abs(chosen.count("c") / 5000 - 0.1) < 0.02


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("real", "real/x/", True),
        ("real", "x/real/", False),
        ("**/real", "x/y/real/z/", True),
        ("**/real", "x/unreal/", False),
        ("a/*/c", "a/b/c/", True),
        ("a/*/c", "a/b/b/c/", False),
        ("imagenet_*/train", "ImageNet_ai/train/".lower(), True),
        (".", "", True),
    ],
)
def test_folder_patterns(pattern: str, path: str, matches: bool) -> None:
    assert bool(folder_pattern(pattern).match(path)) is matches


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[sources.s]\nlicense = "x"\nset = "train"\nreal = ["a"]\nlicens = "y"\n',
         "unknown key 'sources.s.licens'; did you mean license?"),
        ('[sources.s]\nlicense = "x"\nset = "train"\nreal = [{ folder = "a", generatr = "g" }]\n',
         "unknown key 'sources.s.real.0.generatr'"),
        ('[sources.s]\nlicense = "x"\nset = "train"\n', "names neither real nor fake images"),
        ('[sources.s]\nlicense = "x"\nset = "train"\nreal = ["a"]\ntitle = "a\\nb"\n',
         "title is 'a\\nb'; expected one line of at most 80"),
        ('[sources.s]\nlicense = "x"\nset = "none"\nreal = ["a"]\n', "goes to set 'none'"),
        ('[sources.s]\nlicense = "x"\nset = { train = 0.5 }\nreal = ["a"]\n', "sum to 0.5"),
        ('[sources."S 1"]\nlicense = "x"\nset = "train"\nreal = ["a"]\n', "use lower-case letters"),
        ('[sources.s]\nset = "train"\nreal = ["a"]\n', "sources.s.license is missing; add it"),
        ('[sources.s]\nlicense = "x"\nset = "train"\nreal = ["a"]\ngroup = "(["\n',
         "group '([' is no regular expression: unterminated"),
        ("[sources]\nx = 1\n", "sources.x is 1, expected a table: [sources.x]"),
        ("[suites]\nx = 1\n", "suites.x"),
        ("[reference]\nx = 1\n", "reference.x"),
    ],
)  # fmt: skip
def test_a_bad_catalog_is_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(CatalogError) as caught:
        catalog_of(tmp_path, text)
    assert said in str(caught.value)


def test_a_title_may_have_any_spaces_and_joiners(tmp_path: Path) -> None:
    title = "写真\u3000まとめ, क्\u200dष"
    text = f'[sources.s]\nlicense = "x"\nset = "train"\nreal = ["a"]\ntitle = "{title}"\n'
    assert catalog_of(tmp_path, text).sources["s"].title == title


@pytest.mark.parametrize("name", ["../x", "/srv/x", "..", ".build", "a/b", "A", "", "x\\n"])
def test_a_set_name_must_be_safe_as_a_folder_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(
        f'[sets]\n"{name}" = "train"\n[sources.s]\nlicense = "x"\nset = "{name}"\nreal = ["a"]\n'
    )
    with pytest.raises(CatalogError, match=r"set '.*': use lower-case letters"):
        read_catalog([path])


@pytest.mark.parametrize("kind", ["source", "set"])
def test_a_name_must_fit_into_a_tar(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "catalog.toml"
    for letters in (78, 79):
        source, set_name = ("s" * letters, "t") if kind == "source" else ("s", "t" * letters)
        path.write_text(
            f'[sets]\n{set_name} = "test"\n'
            f'[sources.{source}]\nlicense = "x"\nset = "{set_name}"\nreal = ["real"]\n'
        )
        if letters == 78:
            catalog = read_catalog([path])
    with pytest.raises(CatalogError, match=rf"{kind} \w+\.\.\. has 79 characters; use at most 78"):
        read_catalog([path])
    if kind == "source":  # the longest name can be packed
        touch(tmp_path / "raw" / ("s" * 78) / "real" / "a.png")
        build_all(tmp_path / "raw", tmp_path / "shards", catalog=catalog)


@pytest.mark.parametrize(
    "root",
    ["../../.ssh", "/etc", "..", ".", "a/../../b", "C:/x", "..\\\\x", "s3://bucket/x", "a\\u0000"],
)
def test_a_root_must_be_below_the_raw_folder(tmp_path: Path, root: str) -> None:
    with pytest.raises(CatalogError, match="is not a folder below the raw folder"):
        catalog_of(
            tmp_path, f'[sources.s]\nlicense = "x"\nset = "train"\nreal = ["a"]\nroot = "{root}"\n'
        )


@pytest.mark.parametrize("root", ["my-photos", "a/b c/é", "x.y"])
def test_a_relative_root_is_accepted(tmp_path: Path, root: str) -> None:
    text = f'[sources.s]\nlicense = "x"\nset = "train"\nreal = ["a"]\nroot = "{root}"\n'
    assert catalog_of(tmp_path, text).sources["s"].root == root


@pytest.mark.parametrize("entry", ['hub = "../../x"', 'kaggle = "../.."', 'kaggle = "/etc/x"'])
def test_a_download_must_have_the_name_of_a_dataset(tmp_path: Path, entry: str) -> None:
    with pytest.raises(CatalogError, match="expected the name of a dataset"):
        catalog_of(
            tmp_path,
            f'[sources.s]\nlicense = "x"\nset = "train"\nreal = ["a"]\nfetch = {{ {entry} }}\n',
        )


TWO = """[sources.a]
license = "x"
set = "train"
real = ["a"]
root = "{0}"
fetch = {{ {1} }}
[sources.b]
license = "x"
set = "train"
real = ["b"]
root = "{2}"
fetch = {{ {3} }}
"""


@pytest.mark.parametrize("root", ["photos", "photos/", "./photos", "photos//", "photos/."])
def test_two_downloads_to_one_folder_are_refused(tmp_path: Path, root: str) -> None:
    text = TWO.format("photos", 'hub = "x/y"', root, 'hub = "x/z"')
    with pytest.raises(CatalogError, match="sources a and b have the root 'photos' and different"):
        catalog_of(tmp_path, text)
    catalog_of(tmp_path, TWO.format("photos/b", 'hub = "x/y"', root, 'hub = "x/z"'))


@pytest.mark.parametrize("other", ['by_hand = "ask her"', 'hub = "x/y"'])
def test_files_put_in_a_folder_by_hand_are_no_download(tmp_path: Path, other: str) -> None:
    catalog_of(tmp_path, TWO.format("photos", 'by_hand = "ask him"', "photos", other))


def test_a_byte_order_mark_is_accepted_and_another_encoding_refused(tmp_path: Path) -> None:
    text = '# Müller\n[sets]\nt = "train"\n[sources.s]\nlicense = "x"\nset = "t"\nreal = ["a"]\n'
    path = tmp_path / "catalog.toml"
    path.write_bytes(text.encode("utf-8-sig"))
    assert list(read_catalog([path]).sources) == ["s"]
    path.write_bytes(text.encode("cp1252"))
    with pytest.raises(CatalogError, match=r"catalog\.toml is not UTF-8 \(byte 3 is 0xfc\); save"):
        read_catalog([path])


@pytest.mark.parametrize("line", ["sets = 3", 'sources = "a"', "suites = [1]", "reference = 1"])
def test_what_must_be_a_table_is_one(tmp_path: Path, line: str) -> None:
    name = line.partition(" ")[0]
    (tmp_path / "catalog.toml").write_text(line + "\n")
    with pytest.raises(CatalogError, match=rf"{name} is .*, expected a table: \[{name}\]"):
        read_catalog([tmp_path / "catalog.toml"])


def test_a_catalog_that_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="Is a directory"):
        read_catalog([tmp_path])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("set = { train = nan }", "must be a finite number, got nan"),
        ("set = { train = 2, held = -1 }", "a share of"),
        ("set = { train = inf }", "must be a finite number, got inf"),
        ("cap = { real = -1 }", "0 or more"),
        ('ignore = [{ folder = "x", where = { a = 1 } }]', "ignored by their path alone"),
        ("expected = { fake = -1 }", "0 or more"),
    ],
)  # fmt: skip
def test_impossible_numbers_in_a_catalog_are_refused(tmp_path: Path, entry: str, said: str) -> None:
    where = "" if entry.startswith("set") else 'set = "train"\n'
    with pytest.raises(CatalogError, match=said):
        catalog_of(tmp_path, f'[sources.s]\nlicense = "x"\n{where}real = ["a"]\n{entry}\n')


def test_two_catalogs_of_the_user_do_not_replace_each_others_source_or_set(tmp_path: Path) -> None:
    """The later one replaced the images of the first, also those that were packed."""
    source = '[sources.fotos]\nlicense = "x"\nset = "s"\nroot = "{0}"\nreal = ["{0}"]\n'
    one, two, part = (tmp_path / f"{name}.toml" for name in ("one", "two", "part"))
    one.write_text('[sets]\ns = "train"\n' + source.format("a"))
    two.write_text('[sets]\ns = "train"\n' + source.format("b"))
    part.write_text("[sources.fotos]\nreplay = false\n[sources.dda]\npolicy = 'x'\n")
    with pytest.raises(CatalogError, match=f"{one} and {two} describe source fotos in two ways"):
        read_catalog([BUILT_IN, one, two])
    catalog = read_catalog([BUILT_IN, one, one, part])
    assert catalog.sources["fotos"].root == "a"
    assert not catalog.sources["fotos"].replay
    assert catalog.sources["dda"].policy == "x"
    two.write_text('[sets]\ns = "test"\n')
    with pytest.raises(CatalogError, match=f"{one} and {two} describe set s in two ways"):
        read_catalog([BUILT_IN, one, two])
    two.write_text('[sets]\nphase1 = "test"\n' + source.format("b").replace("fotos", "dda"))
    assert read_catalog([BUILT_IN, one, two]).sources["dda"].root == "b"  # one that ships


def test_two_catalogs_of_the_user_do_not_replace_each_others_suite_or_reference(
    tmp_path: Path,
) -> None:
    """The later one won without a word: a suite measured other sets."""
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    sets = '[sets]\na = "test"\nb = "test"\n'
    for table, first, second, said in (
        ("suites", 'x = ["a"]', 'x = ["a", "b"]', "suite x in two ways; give one of them another"),
        ("reference", 'a = "b"', 'a = "a"', "reference of set a in two ways; name the same set"),
    ):
        one.write_text(f"{sets}[{table}]\n{first}\n")
        two.write_text(f"[{table}]\n{second}\n")
        with pytest.raises(CatalogError, match=f"{one} and {two} describe {said}"):
            read_catalog([BUILT_IN, one, two])
        two.write_text(f"[{table}]\n{first}\n")
        read_catalog([BUILT_IN, one, two])
    one.write_text('[suites]\nall = ["evalgen"]\n')
    assert read_catalog([BUILT_IN, one]).suites["all"] == ["evalgen"]  # one that ships


def test_two_downloads_have_no_root_that_differs_in_case(tmp_path: Path) -> None:
    """On a disk that ignores case, each would delete the files of the other."""
    entry = '[sources.{0}]\nlicense = "x"\nset = "train"\nreal = ["a"]\nroot = "{1}"\n'
    fetch = '[sources.{0}.fetch.git]\nrepository = "https://x.org/{0}"\ncommit = "{1}"\n'
    text = "".join(
        entry.format(name, root) + fetch.format(name, "0" * 40) + 'pattern = "x"\ncount = 1\n'
        + f'manifest_sha256 = "{"0" * 64}"\n'
        for name, root in (("one", "Mine"), ("two", "mine"))
    )  # fmt: skip
    with pytest.raises(CatalogError, match="sources one and two have the root 'mine' and differ"):
        catalog_of(tmp_path, text)


GITHUB = BUILT_IN.with_name("catalog-github.toml")


def test_the_catalog_of_git_repositories_is_pinned() -> None:
    catalog = read_catalog([BUILT_IN, GITHUB])
    sources = {name: catalog.sources[name] for name in tomllib.loads(GITHUB.read_text())["sources"]}
    assert len(sources) == 217
    for name, source in sources.items():
        assert source.fetch is not None, name
        repository = source.fetch.git
        assert repository is not None, name
        assert repository.repository.startswith("https://"), name
        assert repository.count, name
        assert repository.manifest_sha256, name
        assert source.license and source.title, name
        assert bool(source.real) != bool(source.fake), name
        for pattern in source.groups():  # paths begin with the name of the source's folder
            assert pattern[0] != "^" or pattern.startswith(f"^{source.root or name}/"), name
    assert len(catalog.exclude) == 2223
    assert {len(digits) for digits in catalog.exclude} == {16}


def test_exclude_lists_hashes_in_files_beside_the_catalog(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# kept\n0123456789ABCDEF  # one\n\n" + "a" * 64 + "\n")
    path = tmp_path / "catalog.toml"
    path.write_text('exclude = ["list.txt"]\n')
    assert read_catalog([path]).exclude == {"0123456789abcdef", "a" * 64}
    (tmp_path / "list.txt").write_text("0123456789abcdef\n0123\n")
    with pytest.raises(CatalogError, match=r"list\.txt, line 2: '0123', expected the first 16"):
        read_catalog([path])
    for text, words in [('exclude = ["none.txt"]', "cannot be read"), ('exclude = "x"', "a list")]:
        path.write_text(text + "\n")
        with pytest.raises(CatalogError, match=words):
            read_catalog([path])


def test_a_group_goes_to_the_same_set_in_every_version_of_the_program() -> None:
    """With another hash, training would use images that were held out before."""
    assert hash_point("mine/real/a") == 0.6610301559758797
    shares = {"train": 0.6, "val": 0.2, "test": 0.2}
    chosen = [choose_set(f"mine/real/{number}", shares) for number in range(12)]
    assert " ".join(chosen) == "train train train val train train train train val train train train"
    assert sample_key("mine", "mine/real/a.png") == "mine_b9aa5f7ccf4d2b8d"


def test_errors_of_odd_values_are_short_lines(tmp_path: Path) -> None:
    """`nan` differs from itself, so it was a KeyError; a long name was an error of its size."""
    path, long = tmp_path / "catalog.toml", "x" * 500_000
    for text, said in (
        ("[sets]\nmine = nan\n", "sets.mine takes 'train', 'val' or 'test', got NaN"),
        ("[suites]\nmine = nan\n", "mine takes a list, got NaN"),
        ("[reference]\nmine = nan\n", "mine takes a text, got NaN"),
        (f"[suites]\nmine = ['{long}']\n", "names set 'xxx"),
        (f"[sets]\n'{long}' = 'train'\n", "set x"),
        (f"[sets]\n'!{long}' = 'train'\n", "use lower-case letters"),
        (f"[sources.s]\nlicense = 'x'\nreal = ['a']\nset = '{long}'\n", "goes to set 'xxx"),
        (f"[sources.s]\nlicense = 'x'\nreal = ['a']\nset = 'a'\nroot = '../{long}'\n", "root '../"),
        (f"[sources.s]\nlicense = 'x'\nreal = ['a']\nset = {{'{long}' = 2}}\n", "a share of {"),
    ):
        path.write_text(text)
        with pytest.raises(CatalogError) as caught:
            read_catalog([path])
        assert said in str(caught.value) and len(str(caught.value)) < 1000 + len(str(path))
