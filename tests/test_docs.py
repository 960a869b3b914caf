"""Tests of the documents: links resolve, and versions and figures agree with the code."""

import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import click
import pytest

import recipes
from imaging.budget import LARGE_PIXELS
from imaging.decode import MAX_BYTES, MAX_PIXELS
from imaging.signature import why_not_opened
from model.calibration.fit import FEWEST
from model.checkpoint import read_meta
from model.recipe import Recipe
from page.figures import of_hundred, verdict_shares
from serve.limits import MAX_JSON_BYTES, MB, Limits
from sharding import folder as sharding_folder
from sharding.catalog import SHIPPED, read_catalog
from sharding.dedupe import MAX_BITS
from sharding.format import FORMAT_VERSION
from tests import test_budgets as budgets
from tests.builders import ROOT

PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
CURRENT = [page for page in PAGES if page.name != "log.md"]
"""Pages about the present state. An entry of the log describes the state at its date."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def outside_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def anchors_of(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", outside_code(text), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = sum(
            re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", one) is not None for one in anchors
        )
        anchors.add(f"{anchor}-{count}" if count else anchor)
    return anchors


def links_of(page: Path) -> list[str]:
    """Return the links of a page to files and headings of this repository."""
    links = re.findall(r"\]\(([^)\s]+)\)", outside_code(text_of(page)))
    return [link for link in links if not re.match(r"https?:", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    for link in links_of(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors_of(text_of(target)), f"{link}: no such heading"


def test_anchors_of_headings() -> None:
    text = "# Who signed?\n## The `[data]` key\n## A (b), c: 0.5\n```\n# no\n```\n## The data key"
    assert anchors_of(text) == {"who-signed", "the-data-key", "a-b-c-05", "the-data-key-1"}


def test_every_page_is_in_the_index() -> None:
    linked = {(ROOT / "docs" / link).resolve() for link in links_of(ROOT / "docs/README.md")}
    pages = {page for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"}
    assert not {page.name for page in pages - linked}


def test_the_readme_links_what_a_newcomer_needs() -> None:
    linked = set(links_of(ROOT / "README.md"))
    assert {"CONTRIBUTING.md", "benchmarks/README.md", "docs/log.md", "docs/README.md"} <= linked


def versions_stated(text: str) -> list[str]:
    """Return every version number in a text, in the order of the text."""
    return re.findall(r"\b(?:[Vv]ersions?|Python) (\d[\d.]*\d|\d)", text)


def test_the_versions_in_the_documents_are_those_of_the_code(data: Path) -> None:
    """A new version number in a page fails until it is added here with its source."""
    index = text_of(next((data / "old").glob("*.idx")))
    python = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    expected = {
        ROOT / "README.md": [python["requires-python"].removeprefix(">=")],
        ROOT / "docs/shards.md": [str(FORMAT_VERSION), index.split()[0].removeprefix("v")],
        ROOT / "benchmarks/README.md": ["4"],  # of FFmpeg, which SPDL needs
    }
    for page in CURRENT:
        assert versions_stated(text_of(page)) == expected.get(page, []), page.name


def test_versions_stated_in_a_sentence() -> None:
    assert versions_stated("Version 5. A report has version 12, Python 3.11 or newer") == [
        "5", "12", "3.11",
    ]  # fmt: skip
    assert versions_stated("`format_version`, and the versions of two libraries") == []


CLIP = read_meta(ROOT / "detectors/clip")
((FALSE_POSITIVES, RECALL),) = (
    row[1:] for row in CLIP["calibration"]["roc"] if row[0] == CLIP["threshold"]
)
PHASE_1, PHASE_2 = (recipes.load(Recipe, recipes.FOLDER / f"phase{phase}.toml") for phase in (1, 2))
SOURCES = len(tomllib.loads(text_of(ROOT / "sharding/catalog-github.toml"))["sources"])
STREAMLIT = tomllib.loads(text_of(ROOT / ".streamlit/config.toml"))
(UPLOADS_MB,) = re.findall(r'"DETECTOR_UPLOADS_MB"\) or "(\d+)"', text_of(ROOT / "app_server.py"))
(TEST_MINUTES,) = re.findall(r"^test: .*not slow \((\d+) minutes", text_of(ROOT / "Makefile"), re.M)
GPU = text_of(ROOT / "benchmarks/results/gpu_h200_202611.md")


class KeyFigure(NamedTuple):
    """A figure, the pattern that finds it in a page, and the pages that must state it."""

    value: str
    pattern: str
    pages: tuple[str, ...]


KEY_FIGURES = {
    "sources of the detector that ships": KeyFigure(
        str(SOURCES), r"each of (\d+) sources|(\d+) such sources|\b(\d+) sources give",
        ("README.md", "docs/shards.md", "docs/log.md"),
    ),
    "its training images": KeyFigure(
        f"{CLIP['calibration']['reals'] + CLIP['calibration']['fakes']:,}",
        r"learned from ([\d,]+) images", ("README.md",),
    ),
    "its fakes found on new sources": KeyFigure(
        f"{100 * RECALL:.0f}",
        r"left out of training \| (\d+) %|(\d+) % of fakes found at [\d.]+ % false",
        ("README.md", "docs/log.md"),
    ),
    "its false positives on new sources": KeyFigure(
        f"{100 * FALSE_POSITIVES:.1f}",
        r"left out of training \| [^|]*\| ([\d.]+) %|"
        r"% of fakes found at ([\d.]+) % false",
        ("README.md", "docs/log.md"),
    ),
    "its threshold": KeyFigure(
        f"{CLIP['threshold']:.3f}", r"likely AI from a probability of ([\d.]+)",
        ("docs/python.md",),
    ),
    "its band": KeyFigure(
        str(tuple(CLIP["calibration"]["band"])),
        r"^(\(0\.\d{6,}, 0\.\d{6,}\))$", ("docs/python.md",),
    ),
    "its band over HTTP": KeyFigure(
        str(CLIP["calibration"]["band"]), r'"band": (\[[\d., ]+\])', ("docs/api.md",),
    ),
    "web photographs called AI by the original": KeyFigure(
        "15 of 32", r"(\d+ of \d+) web photographs", ("docs/using.md", "docs/evaluation.md"),
    ),
    "minutes of the demo": KeyFigure(
        "2 to 6", r"(\w+ to \w+) minutes", ("README.md", "docs/demo.md"),
    ),
    "minutes of the fast tests": KeyFigure(
        TEST_MINUTES, r"fast tests, (\d+) minutes", ("README.md", "CONTRIBUTING.md"),
    ),
    "epochs and batches of the phases": KeyFigure(
        f"{PHASE_1.run.epochs} epochs at batch {PHASE_1.loading.batch_size}, "
        f"{PHASE_2.run.epochs} at batch {PHASE_2.loading.batch_size}",
        r"(\d+ epochs at batch \d+, \d+ at batch \d+)", ("docs/training.md",),
    ),
    "replay of phase 2": KeyFigure(
        str(PHASE_2.replay.ratio).replace(":", " old : ") + " new",
        r"replay (\d+ old : \d+ new)", ("docs/training.md",),
    ),
    "pixels of the largest image, in millions": KeyFigure(
        str(MAX_PIXELS // 10**6),
        r"more than (\d+) million\s+pixels|largest, (\d+) million|Limits of one file: (\d+) mega",
        ("docs/using.md", "docs/page.md", "docs/design.md"),
    ),
    "MiB of the largest file": KeyFigure(
        str(MAX_BYTES // 2**20), r"files of more than (\d+) MiB|megapixels, (\d+) MiB",
        ("docs/using.md", "docs/design.md"),
    ),
    "pixels of an image that is decoded alone, in millions": KeyFigure(
        str(LARGE_PIXELS // 10**6), r"(\d+) million pixels (?:and|or) more",
        ("docs/api.md", "docs/page.md"),
    ),
    "MB of all uploads to the page": KeyFigure(
        f"{int(UPLOADS_MB):,}", r"uploads together may hold ([\d,]+) MB", ("docs/page.md",),
    ),
    "MB of all bodies over HTTP": KeyFigure(
        f"{Limits().held_bytes // MB:,}", r"all bodies in memory \| ([\d,]+) MB",
        ("docs/api.md",),
    ),
    "MB of a list of addresses": KeyFigure(
        f"{MAX_JSON_BYTES / MB:g}", r"list of addresses [^|]*of one request \| ([\d.]+) MB",
        ("docs/api.md",),
    ),
    "MB of an upload": KeyFigure(
        str(STREAMLIT["server"]["maxUploadSize"]),
        r"files of more than (\d+) MB", ("docs/page.md",),
    ),
    "images of a class for a calibration": KeyFigure(
        str(FEWEST), r"fewer than (\d+) images of a class", ("docs/evaluation.md",),
    ),
    "images of a class in a folder": KeyFigure(
        str(sharding_folder.FEWEST), r"needs at least (\d+) images", ("docs/own-data.md",),
    ),
    "bits between near-duplicates": KeyFigure(
        str(MAX_BITS), r"at most (\d+) bits apart", ("docs/shards.md",),
    ),
    "budgets of a file": KeyFigure(
        f"{budgets.FILE_LINES} lines, functions to {budgets.FUNCTION_LINES} and parameters to "
        f"{budgets.PARAMETERS}",
        r"limits files to (\d+ lines, functions to \d+ and parameters to \d+)",
        ("CONTRIBUTING.md",),
    ),
}  # fmt: skip
"""Figures by name. Their values are read from the code if it has them."""

WORDS = {"two to six": "2 to 6"}


def stated(pattern: str, text: str) -> list[str]:
    """Return the captures of a pattern in a text, with number words as digits."""
    flags = re.M | re.I
    matches = [next(filter(None, match.groups())) for match in re.finditer(pattern, text, flags)]
    return [WORDS.get(one, one) for one in matches]


def findings(page: Path) -> str:
    """Return the part about the present state: the whole page, or the log's table of findings."""
    text = text_of(page)
    return text.partition("\n## 20")[0] if page.name == "log.md" else text


@pytest.mark.parametrize("name", KEY_FIGURES)
def test_every_page_states_the_same_figure(name: str) -> None:
    value, pattern, pages = KEY_FIGURES[name]
    for page in PAGES:
        figures = stated(pattern, findings(page))
        where = page.relative_to(ROOT).as_posix()
        assert set(figures) <= {value}, where
        assert figures or where not in pages, f"{where} no longer states it as the pattern expects"


def test_the_cost_of_the_threshold_is_that_of_the_detector_that_ships() -> None:
    calibration = CLIP["calibration"]
    shares = verdict_shares(calibration["roc"], tuple(calibration["band"]))
    for name, of in zip(("real images", "fakes"), shares, strict=True):
        cells = [of_hundred(share) for share in (of.no_sign, of.uncertain, of.likely)]
        row = f"| Of 100 {name} | {' | '.join(cells)} |"
        assert row in text_of(ROOT / "docs/page.md")


def test_the_error_of_the_example_of_the_api_is_that_of_its_bytes() -> None:
    (error,) = re.findall(r'"error": "([^"]+)"', text_of(ROOT / "docs/api.md"))
    (digits,) = re.findall(r"begins with ((?:[0-9a-f]{2} ?)+)\)", error)
    assert why_not_opened(bytes.fromhex(digits), "") == error


def test_the_error_rates_of_the_examples_have_a_threshold() -> None:
    """`predict.py` refuses a rate below the smallest of the detector that ships."""
    for option, name in (("fpr", "at_fpr"), ("miss", "at_miss")):
        pattern = rf"predict\.py \S+ --max-{option} ([\d.]+)|at_rates\(max_{option}=([\d.]+)\)"
        texts = [text_of(page) for page in PAGES]
        texts.append(text_of(ROOT / "model/inference/detector.py"))
        rates = [float(rate) for text in texts for rate in stated(pattern, text)]
        assert rates and min(rates) >= min(CLIP["calibration"][name])[0]


@pytest.mark.parametrize("phase", [1, 2])
def test_the_header_of_a_demo_recipe_has_the_figures_of_its_page(phase: int) -> None:
    head = text_of(ROOT / f"recipes/demo-phase{phase}.toml").partition("\n\n")[0]
    reached = re.search(
        r"on `(\S+)` AUROC .*?recall ([\d.]+) at ([\d.]+) % false", head.replace("\n# ", " ")
    )
    assert reached
    name, recall, false_positives = reached.groups()
    row = re.findall(rf"^│ {name} .*$", text_of(ROOT / "docs/demo.md"), re.M)[0]
    pairs = re.findall(r"([\d.]+) -> ([\d.]+)", row)  # phase 1 -> phase 2
    assert recall == pairs[1][phase - 1]
    assert f"{float(false_positives) / 100:.3f}" == pairs[2][phase - 1]


def test_the_suites_of_the_test_sets_are_those_of_the_catalog() -> None:
    suites = read_catalog(SHIPPED).suites
    rows = re.findall(r"^\|.*\? \| (.*) \| (.*) \|$", text_of(ROOT / "docs/test-sets.md"), re.M)
    assert len(rows) == 7
    for sets, column in rows:
        named = set(re.findall(r"`([a-z0-9-]+)`", sets))
        expected = {suite for suite, listed in suites.items() if named & set(listed)} - {"all"}
        assert set(column.split(", ")) == expected, sets


def test_the_figures_of_the_gpu_are_those_of_its_results() -> None:
    section = text_of(ROOT / "docs/loading.md").partition("## On a GPU\n")[2]
    section += "".join(re.findall(r"on one H200,.*?\[figures\]", text_of(ROOT / "README.md"), re.S))
    figures = re.findall(r"\d,\d{3}|93\.6", section)
    assert len(figures) == 10
    for figure in figures:
        assert figure in GPU, figure


def test_the_findings_of_the_log_have_a_section_and_its_date() -> None:
    rows = re.findall(r"^\| .* \| (\S+) \| \[(.*?)\]\(#", findings(ROOT / "docs/log.md"), re.M)
    headings = re.findall(r"^## (\S+) (.*)$", text_of(ROOT / "docs/log.md"), re.M)
    assert len(rows) >= 20
    assert set(rows) <= set(headings)


def named_in_changelog(pattern: str) -> set[str]:
    """Return the captures of a pattern in the entries of the changelog, but not what is gone."""
    text = re.sub(r"^- Gone: .*?(?=^- )", "", text_of(ROOT / "CHANGELOG.md"), flags=re.S | re.M)
    return set(re.findall(pattern, " ".join(text.split())))


@pytest.mark.parametrize("package", ["sharding", "pipeline", "model"])
def test_the_commands_of_the_changelog_exist(package: str) -> None:
    main: click.Group = import_module(f"{package}.__main__").main
    lines = named_in_changelog(rf"`(?:python -m )?{package} ([a-z][a-z |]*)")
    commands = {name.split()[0] for line in lines for name in line.split("|") if name.strip()}
    assert commands and commands <= main.commands.keys()


def test_the_benchmarks_of_the_changelog_exist() -> None:
    names = {
        name for line in named_in_changelog(r"`(?:python -m )?benchmarks\.(\w+(?: \| \w+)*)")
        for name in line.split(" | ")
    }  # fmt: skip
    assert len(names) > 10
    assert not {name for name in names if not (ROOT / f"benchmarks/{name}.py").exists()}


def test_the_recipe_keys_of_the_changelog_exist() -> None:
    tables = re.split(r"^## \[(\w+).*\]$", text_of(ROOT / "docs/recipe-keys.md"), flags=re.M)[1:]
    known = {
        f"{table}.{key}" for table, text in zip(tables[::2], tables[1::2], strict=True)
        for key in re.findall(r"^\| `(\w+)` \|", text, re.M)
    }  # fmt: skip
    keys = named_in_changelog(rf"`((?:{'|'.join(tables[::2])})\.[a-z_]+)(?=[` =])")
    assert len(keys) > 20 and keys <= known


def test_the_options_of_the_changelog_exist() -> None:
    code = "\n".join(
        text_of(path) for folder in (".", "model", "sharding", "serve", "benchmarks")
        for path in (ROOT / folder).glob("*.py")
    )  # fmt: skip
    options = named_in_changelog(r"(?<=[` ])(--[a-z-]+)")
    assert len(options) > 20
    of_click = {"--help", "--version"}
    assert not {option for option in options - of_click if f'"{option}"' not in code}
