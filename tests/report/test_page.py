"""The report for people: CSV tables, and the page, also in a real browser."""

import csv
import io
import re
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.evaluation.report import report as report_on
from model.evaluation.scores import ScoresError, ScoreTable, write_scores
from pipeline.perturb import PERTURBATIONS
from report.charts import histogram_chart, reliability_chart, roc_chart
from report.files import write_report
from report.page import Estimate, HeadlineRates, mistakes_of, render
from report.tables import figures_csv, table_csv, write_tables
from report.thumbnails import Misclassified, thumbnails, worst_mistakes
from sharding.format import ShardSet
from tests.browser import unprinted, violations
from tests.builders import table_of

HOSTILE = "<script>window.hacked = 1</script>"


def rows(name: str, reals: int, fakes: int, seed: int = 0, **more: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    labels = [0] * reals + [1] * fakes
    return [
        {
            "set": name, "key": f"{name}_{i:05d}", "label": label,
            "source": ["street", "studio", "a-source-of-a-very-long-name_without_end"][i % 3],
            "generator": ["camera", "phone"][i % 2] if not label else f"generator-{i % 7}",
            "logit": float(rng.normal(4 * label - 2, 3)),
        } | more
        for i, label in enumerate(labels)
    ]  # fmt: skip


def robustness() -> dict[str, Any]:
    """Build a result of `report_robustness` with rates that fall along the grid."""
    shift = {"images": 9, "mean": -1.5, "low": -2.0, "high": -1.0, "of_gap": -0.4}
    rates = {"reals": 50, "fakes": 50, "balanced_accuracy": 0.9, "auroc": 0.95}
    lines = [
        {
            "name": way.name, "family": way.family, "amount": way.amount, "what": way.what,
            "images": 100, **rates, "recall": 0.9 - i / 100, "false_positive_rate": i / 100,
            "intervals": {"recall": [0.5, 0.95], "false_positive_rate": [0.0, 0.3]},
            "flip_rate": i / 200, "flip_rate_real": 0.0, "flip_rate_fake": 0.1,
            "shift": {"real": None, "fake": shift}, "failed": i % 2, "failed_first": "too large",
        }
        for i, way in enumerate(PERTURBATIONS)
    ]  # fmt: skip
    before = rates | {"recall": 0.9, "false_positive_rate": 0.0}
    swap = {"name": "fakes-as-reals", "what": "fakes re-encoded as JPEG 95 420", "images": 100,
            "shift": {"real": None, "fake": shift}, "before": before,
            "after": before | {"recall": 0.2}, "failed": 0, "failed_first": None}  # fmt: skip
    container = {"format": "JPEG", "chroma": "420", "quality": 95, "share": 0.8,
                 "name": "JPEG 95 420"}  # fmt: skip
    return {"images": 100, "of": 300, "unreadable": 0, "images_sha256": "a", "perturbations": lines,
            "codec_swap": [swap], "containers": {"real": container, "fake": None}}  # fmt: skip


def made(rows_: list[dict[str, Any]], *names: str, **about: Any) -> tuple[dict, ScoreTable]:
    scores = table_of(rows_, [*names], **({"threshold": 0.5, "calibration": None} | about))
    return report_on(scores), scores


def page_of(
    report: dict, scores: ScoreTable, command: str = "python evaluate.py --shards val"
) -> str:
    return render(report, scores, mistakes_of(report, scores), {}, command)


class Text(HTMLParser):
    """Collect the tags, links and words of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action", "poster")
        ]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_wrong_file_of_scores_changes_no_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("the report before")
    (tmp_path / "wrong.parquet").write_text("no scores")
    report, _ = made(rows("val", 5, 5), "val")
    with pytest.raises(ScoresError, match="is not a file of scores"):
        write_report(report, tmp_path / "wrong.parquet", tmp_path, tmp_path)
    assert (tmp_path / "report.json").read_text() == "the report before"
    with pytest.raises(FileNotFoundError):
        write_report(report, tmp_path / "none.parquet", tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    _, other = made(rows("test", 5, 5), "test")
    write_scores(tmp_path / "scores.parquet", [other.table], other.evaluation)
    with pytest.raises(ScoresError, match="has no images of val, which the report names"):
        write_report(report, tmp_path / "scores.parquet", tmp_path, tmp_path)
    assert (tmp_path / "report.json").read_text() == "the report before"


def test_a_recall_needs_a_false_positive_rate() -> None:
    recall = Estimate(0.9, 0.8, 0.95, 100)
    with pytest.raises(ValueError, match="must be shown with a false-positive rate"):
        HeadlineRates(recall, None)
    assert HeadlineRates(recall, None, missing="no reals").missing


def test_without_reals_the_page_says_so_instead_of_the_rate() -> None:
    page = page_of(*made(rows("evalgen", 0, 60), "evalgen"))
    assert "not known" in page and "NO REAL IMAGES AT HAND" in page
    section = page[page.index('<section id="set-0">') :]
    # Each block with a recall repeats the sentence.
    for heading in ("Fakes found, by generator", "<h3>Sources</h3>"):
        block = section[section.index(heading) :].removeprefix("<h3>").partition("<h3>")[0]
        assert "There are no real images here" in block
    assert "ROC curve" not in page


def test_fakes_are_shown_with_the_reference_reals_of_another_set() -> None:
    about = {"reference_reals": {"set": "photos", "why": "the catalog's default"}}
    document, scores = made(rows("evalgen", 0, 60) + rows("photos", 80, 0, 1), "evalgen", **about)
    page = page_of(document, scores)
    assert "80 reals of photos" in page and "ROC curve" in page and "not known" not in page
    rate = document["sets"]["evalgen"]["reference"]["false_positive_rate"]
    assert page.count(f"{100 * rate:.1f}\N{NO-BREAK SPACE}%") >= 2  # headline, and the generators


def test_one_image_is_counted_as_one_image() -> None:
    page = page_of(*made(rows("val", 1, 1), "val"))
    assert "1 fake<" in page and "1 real<" in page
    assert not re.search(r"\b1 (?:fakes|reals|images|prompts)\b", page)


def test_names_are_escaped() -> None:
    hostile = rows(HOSTILE, 30, 30, source=HOSTILE, generator=f"$\\frac{HOSTILE}", origin=HOSTILE)
    document, scores = made(hostile, HOSTILE, run=HOSTILE, checkpoint=HOSTILE, commit=HOSTILE)
    document["sets"][HOSTILE]["robustness"] = robustness()
    page = page_of(document, scores, HOSTILE)
    assert "script" not in Text(page).tags
    assert "<script" not in page and page.count("&lt;script&gt;") > 8


def test_names_are_shown_with_escapes_in_the_page_and_the_tables(tmp_path: Path) -> None:
    """A CSV file of scores may hold any: terminals would execute them, and readers misread them."""
    name, shown = "n\x1b[31m\u202egnp\x07\u3164", r"n\x1b[31m\u202egnp\x07\u3164"
    texts = dict.fromkeys(("source", "generator", "origin", "key"), name)
    document, scores = made(rows(name, 30, 30, **texts), name, checkpoint=name, commit=name)
    document["sets"][name]["robustness"] = robustness()
    page = page_of(document, scores, f"evaluate.py {name}")
    tables = [path.read_text(encoding="utf-8") for path in write_tables(document, tmp_path)]
    for text in (page, *tables):
        assert shown in text
        assert not ({*name} - {*shown}) & {*text}


def test_the_page_fetches_nothing_and_has_all_parts() -> None:
    document, scores = made(rows("val", 60, 60), "val")
    document["sets"]["val"]["robustness"] = robustness()
    page = page_of(document, scores)
    text = Text(page)
    assert not [link for link in text.links if not link.startswith(("#", "data:"))]
    assert not {"script", "iframe", "object"} & set(text.tags)
    said = " ".join(" ".join(text.words).split())
    for expected in (
        "fakes found", "reals called fake", "ROC curve", "Reliability", "Verdicts", "generator-3",
        "Robustness", "jpeg-30", "longer side at most 512 pixels, then JPEG 40", "Codec swap",
        "80 % JPEG 95 420", "no lossy format", "Reals called fake with the highest",
        "Details of the run", "python evaluate.py --shards val", "runs/a/step_1",
    ):  # fmt: skip
        assert expected in said, expected
    ids = page.split(' id="')[1:]
    own = [i.split('"')[0] for i in ids if i.startswith("set-") or i.startswith("run")]
    assert len(own) == len(set(own)) == 2


def test_pages_of_extreme_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image; equal scores; an uncertain band; more sources than histograms; unreadable rows."""
    monkeypatch.setattr("report.page.MOST_HISTOGRAMS", 3)
    one = rows("val", 1, 0)
    assert "called fake" in page_of(*made(one, "val"))
    same = [row | {"logit": 0.0} for row in rows("val", 5, 5)]
    assert "ROC curve" in page_of(*made(same, "val"))
    many = [row | {"source": f"s{i}"} for i, row in enumerate(rows("val", 30, 30))]
    page = page_of(*made(many, "val", calibration={"band": [0.2, 0.5], "fitted_on": ["x"],
                                                   "reals": 1, "fakes": 1}))  # fmt: skip
    assert "Smaller sources, not shown here: 57" in page and "uncertain from 0.200" in page
    unread = [*rows("val", 9, 9), {"set": "val", "key": "bad", "label": 1, "valid": False,
                                   "logit": None, "error": "cut short"}]  # fmt: skip
    page = page_of(*made(unread, "val"))
    assert "1 of 19 images without a score. The first: val:bad: cut short" in page


NO_MISTAKE = "No image of this set was misclassified."


def test_a_set_without_a_readable_image_leaves_the_others_their_page(tmp_path: Path) -> None:
    unreadable = {"valid": False, "logit": None, "error": "gone"}
    gone = [row | unreadable for row in rows("b", 3, 3)]
    _, table = made(rows("a", 30, 30) + gone, "a", "b")
    page = page_of(report_on(table), table)
    assert "b: no image could be scored" in page
    assert "6 of 6 images without a score" in page
    assert NO_MISTAKE not in page_of(*made(gone, "b"))
    right = [row | {"logit": 9.0 if row["label"] else -9.0} for row in rows("a", 9, 9)]
    assert NO_MISTAKE in page_of(*made(right, "a"))
    write_scores(tmp_path / "scores.parquet", [table.table], table.evaluation)
    assert write_report(report_on(table), tmp_path / "scores.parquet", tmp_path, tmp_path)


def test_worst_mistakes() -> None:
    document, scores = made(rows("val", 80, 80) + rows("other", 40, 40, 3), "val", "other")
    fake, label = scores.numbers("probability"), scores.numbers("label")
    own = np.array([name == "val" for name in scores.table.column("set").to_pylist()])
    mistakes = worst_mistakes(scores, "val", 0.5, 4)
    alarms = np.sort(fake[own & (label == 0) & (fake >= 0.5)])[::-1][:4]
    missed = np.sort(fake[own & (label == 1) & (fake < 0.5)])[:4]
    assert [m.probability for m in mistakes] == [*alarms, *missed]
    assert {m.set for m in mistakes} == {"val"}
    assert [m.label for m in mistakes] == [0] * 4 + [1] * 4
    assert max(len(of_set) for of_set in mistakes_of(document, scores).values()) <= 24


def test_thumbnails_are_made_of_the_given_mistakes(new: ShardSet) -> None:
    keys = new.table.column("key").to_pylist()
    wanted = [Misclassified("new", keys[i], "", "", "", 0, 0.9) for i in (7, 3)]
    pictures = thumbnails({"new": new}, wanted)
    assert set(pictures) == {("new", keys[7]), ("new", keys[3])}
    assert all(address.startswith("data:image/jpeg;base64,") for address in pictures.values())
    assert len(set(pictures.values())) == 2


def test_tables(tmp_path: Path) -> None:
    document, _scores = made(rows("val", 60, 60), "val")
    (tmp_path / "robustness.csv").write_text("of an earlier report\n")
    assert [path.name for path in write_tables(document, tmp_path)] == ["figures.csv"]
    assert not (tmp_path / "robustness.csv").exists()
    lines = list(csv.DictReader(io.StringIO(figures_csv(document))))
    assert [line["what"] for line in lines].count("generator") == 7
    overall = document["sets"]["val"]["overall"]
    assert float(lines[0]["recall"]) == overall["recall"]
    assert float(lines[0]["auroc_low"]) == overall["intervals"]["auroc"][0]
    assert next(line for line in lines if line["name"] == "fake")["false_positive_rate"] == ""
    document["sets"]["val"]["robustness"] = robustness()
    assert [path.name for path in write_tables(document, tmp_path)] == [
        "figures.csv",
        "robustness.csv",
    ]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "robustness.csv").read_text())))
    assert [line["kind"] for line in lines] == ["perturbation"] * len(PERTURBATIONS) + [
        "codec swap"
    ]
    assert (lines[-1]["recall_before"], lines[-1]["recall"]) == ("0.9", "0.2")
    assert (lines[0]["shift_fake_low"], lines[0]["shift_real"]) == ("-2.0", "")


def test_csv_tables_contain_no_formulas() -> None:
    assert table_csv(["a", "b"], [{"a": "=1+1", "b": -1.5}, {"a": "'+x", "b": None}]) == (
        "a,b\n'=1+1,-1.5\n''+x,\n"
    )


def test_charts_use_the_page_colors_and_stay_small_for_many_images() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200_000)
    fake = 1 / (1 + np.exp(-rng.normal(4 * labels - 2, 3)))
    charts = (
        roc_chart(labels, fake, 0.5), reliability_chart(labels, fake),
        histogram_chart(fake[labels == 0], fake[labels == 1], (0.3, 0.6)),
    )  # fmt: skip
    for chart in charts:
        assert "var(--fake)" in chart and "#" not in chart.replace("url(#", "").replace('"#', "")
        assert len(chart) < 40_000
        assert 'role="img"' in chart and "DejaVu" not in chart


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write three pages: with perturbations, with hostile names, and without real images."""
    folder = tmp_path_factory.mktemp("pages")
    ordinary = made(rows("val", 60, 60) + rows("test", 50, 50, 2), "val", "test")
    ordinary[0]["sets"]["val"]["robustness"] = robustness()
    long = "x" * 200 + HOSTILE
    hostile = made(rows(long, 20, 20, source=long, generator=long), long, run=long)
    hostile[0]["sets"][long]["robustness"] = robustness()
    written = {}
    for name, (report, scores) in {
        "ordinary": ordinary, "hostile": hostile, "fakes": made(rows("evalgen", 0, 40), "evalgen"),
    }.items():  # fmt: skip
        written[name] = folder / f"{name}.html"
        written[name].write_text(page_of(report, scores), encoding="utf-8")
    return written


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
@pytest.mark.parametrize("name", ["ordinary", "hostile", "fakes"])
def test_in_a_browser(
    chromium: Any, pages: dict[str, Path], name: str, width: int, height: int, scheme: str
) -> None:
    context = chromium.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    said, asked, lock = [], [], threading.Lock()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))

    def refuse(route: Any) -> None:
        with lock:
            asked.append(route.request.url)
        route.continue_() if route.request.url == pages[name].as_uri() else route.abort()

    page.route("**/*", refuse)
    page.goto(pages[name].as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    assert not said
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # The contrast that WCAG requires for text (4.5), in light and in dark mode.
    contrast = page.evaluate(CONTRAST)
    assert contrast["dark"] == (scheme == "dark")
    assert min(contrast["ratios"].values()) > 4.5, contrast
    svg = page.locator("figure svg")
    for i in range(svg.count()):
        box = svg.nth(i).bounding_box()
        assert box["width"] > 100 and box["height"] > 50
    assert svg.count() >= 1
    assert violations(page) == []
    for rate in page.locator(".rates").all():
        assert rate.locator(".fpr").count() == 1
        assert rate.locator(".recall").count() == 1
    for bar in page.locator(".bars .row").all():
        assert re.search(r"\d\s%\s+[\d.]+ to [\d.]+\s%$", bar.inner_text().strip())
    assert unprinted(page) == set()
    context.close()


CONTRAST = """() => {
  const probe = document.createElement("span"); document.body.append(probe);
  const light = (color) => {
    probe.style.color = color;
    const parts = getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map(Number);
    const [r, g, b] = parts.map((v) => v / 255).map(
      (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => {
    const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const ratios = {};
  for (const name of ["ink", "muted", "real", "fake"])
    for (const ground of ["page", "card"])
      ratios[`${name} on ${ground}`] = ratio(`var(--${name})`, `var(--${ground})`);
  ratios.warning = ratio("var(--warn-ink)", "var(--warn)");
  return {dark: light("var(--page)") < 0.2, ratios};
}"""
