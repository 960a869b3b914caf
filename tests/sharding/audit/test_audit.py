"""Tests of the shortcut report: planted shortcuts are found, and sets without one are clean."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from sharding.__main__ import main as sharding
from sharding.audit import audit, histograms, match
from sharding.audit import metadata as facts
from sharding.audit.libraries import one_thread
from sharding.catalog import read_catalog
from sharding.format import ShardSet, open_shards
from tests.builders import (
    MakeImage,
    build_all,
    encode,
    grouped,
    partly,
    photo,
    random_size,
    write_shards,
)

JPEG, PNG, WEBP = "jpg", "png", "webp"


def planted(rng: np.random.Generator, label: int, _number: int) -> tuple[str, int, int]:
    """Return a format and a size; every fake is a PNG and every real image a JPEG."""
    return PNG if label else JPEG, *random_size(rng)


def clean(rng: np.random.Generator, _label: int, _number: int) -> tuple[str, int, int]:
    """Return a format and a size that are independent of the label."""
    return [JPEG, PNG, WEBP][rng.integers(3)], *random_size(rng)


def half_webp(rng: np.random.Generator, label: int, number: int) -> tuple[str, int, int]:
    """Return a format and a size; 22 of the fakes are WebP, all other images are JPEG."""
    return WEBP if label and number < 22 else JPEG, *random_size(rng)


# set -> source -> (how its images are made, reals, fakes)
PLAN: dict[str, dict[str, tuple[MakeImage, int, int]]] = {
    "planted": {"mixed": (planted, 40, 40), "few": (planted, 20, 12)},
    "clean": {"even": (clean, 120, 120)},
    "partly": {"half": (partly, 150, 150)},
    "single": {"cameras": (planted, 35, 0), "generator": (planted, 0, 35)},
    "videos": {"clips": (grouped, 180, 180)},
    "lonely": {"fakes": (planted, 0, 10)},
    "apart": {"sorted": (planted, 24, 36)},
    "webps": {"small": (half_webp, 35, 35)},
    "alike": {"shuffled": (clean, 24, 36)},
    "handful": {"sorted_few": (planted, 4, 4)},
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("audit"), PLAN)


def shards_of(sets: Path, name: str) -> ShardSet:
    return open_shards([sets / name])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(sharding, ["audit", *[str(argument) for argument in arguments]])


@pytest.fixture(scope="module")
def matched(sets: Path) -> match.Match:
    """Match of the set `partly`."""
    return match.match_classes(shards_of(sets, "partly"))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no histograms, which takes longest."""
    monkeypatch.setattr(histograms, "draw", lambda *_: None)


LONG = "n" * 250
"""Name of a set, too long for a file with an ending or for a title."""


@pytest.fixture(scope="module")
def reported(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """What the command says about the set `handful` and a set named `LONG`, which has only fake
    images, and the folder of its report.
    """
    folder = tmp_path_factory.mktemp("reported")
    (folder / LONG).symlink_to(sets / "lonely")
    return run(sets / "handful", folder / LONG, "--out", folder / "out"), folder / "out"


def test_a_planted_shortcut_is_found_and_named(sets: Path) -> None:
    steps: list[int] = []
    report = audit.audit(shards_of(sets, "planted"), on_step=steps.append)
    assert sum(steps) == audit.steps_of(shards_of(sets, "planted"))
    assert report.verdict == "strong"
    assert report.pooled.auroc > 0.99
    assert 0.9 < report.pooled.low < report.pooled.high <= 1
    assert report.features["format"].alone.auroc > 0.99
    assert report.features["size"].alone.auroc < 0.7
    assert report.features["EXIF"].alone.auroc == 0.5  # no image has any
    assert "format PNG: 100 % fake (52 images)" in map(str, report.shortcuts)
    assert "format JPEG: 100 % real (60 images)" in map(str, report.shortcuts)
    assert not any(value.value == facts.NO_JPEG for value in report.shortcuts)
    mixed, few = report.sources["mixed"], report.sources["few"]
    assert (mixed.reals, mixed.fakes, few.reals, few.fakes) == (40, 40, 20, 12)
    assert mixed.within.auroc > 0.99
    # A perfect split is reported for any number of images.
    assert few.within.auroc > 0.99
    assert 0.8 < few.within.low
    assert few.note == ""
    assert mixed.from_others.auroc > 0.4
    assert any("re-encoded" in line for line in audit.advice_of(report))


def test_few_images_do_not_hide_a_perfect_split(sets: Path) -> None:
    report = audit.audit(shards_of(sets, "apart"))
    assert report.verdict == "strong"
    assert report.pooled.auroc > 0.99
    assert report.sources["sorted"].within == report.pooled
    assert report.features["format"].alone.auroc > 0.99
    assert "size" not in report.features  # as good as guessing, but too few images to be sure
    said = list(map(str, report.shortcuts))
    assert "format JPEG: 100 % real (24 images)" in said
    assert "format PNG: 100 % fake (36 images)" in said
    assert report.notes == [
        "Few images: 24 groups of real and 36 of fake images. They are enough only because "
        "metadata separates them so well."
    ]
    with pytest.raises(match.MatchError, match="only 0 real and 0 fake images"):
        match.match_classes(shards_of(sets, "apart"))


def test_a_feature_of_a_small_set_is_not_called_guessing(sets: Path) -> None:
    """The trees of a fold have 28 images of each class, and about 18 of them are WebP."""
    report = audit.audit(shards_of(sets, "webps"))
    assert report.features["format"].alone.auroc > 0.75


@pytest.mark.parametrize("name", ["alike", "handful"])
def test_few_images_without_a_perfect_split_are_not_measured(sets: Path, name: str) -> None:
    report = audit.audit(shards_of(sets, name))
    assert (report.verdict, report.pooled, report.features) == ("unknown", None, {})
    assert report.notes[0].startswith("Too few images to measure: ")
    (source,) = report.sources.values()
    assert source.note.startswith("too few: ")


def test_a_set_without_jpegs_is_measured_and_palettes_are_named(tmp_path: Path) -> None:
    """No image has a JPEG quality, so the classifier has no values of this feature to bin."""
    for label, name in enumerate(("real", "fake")):
        folder = tmp_path / "raw" / "drawings" / name
        folder.mkdir(parents=True)
        for number in range(16):
            image = Image.fromarray(photo(100 * label + number, 40, 44))
            (image.quantize(64) if label else image).save(folder / f"{number}.png")
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(
        '[sets]\ndrawings = "test"\n[sources.drawings]\nlicense = "x"\nset = "drawings"\n'
        'real = ["real"]\nfake = ["fake"]\n'
    )
    build_all(tmp_path / "raw", tmp_path / "shards", catalog=read_catalog([catalog]))
    result = run(tmp_path / "shards" / "drawings", "--out", tmp_path, "--match", tmp_path / "m.csv")
    assert result.exit_code == 1
    assert "drawings: shortcut by metadata: strong" in result.output
    assert "bits per pixel 4 to 6: 100 % fake (16 images)" in result.output
    assert "30 of each are needed" in result.output


@pytest.mark.usefixtures("no_pictures")
def test_an_error_of_a_library_is_not_reported_as_a_reason(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("window shape cannot be larger than input array shape")

    monkeypatch.setattr(match, "match_classes", broken)
    run(sets / "lonely", "--out", tmp_path, "--match", tmp_path / "list.csv")
    assert not (tmp_path / "report.json").exists()


def test_shuffling_a_feature_that_the_classifier_uses_lowers_the_auroc(sets: Path) -> None:
    """In the set `partly`, only features that follow from the format separate the classes."""
    features = audit.audit(shards_of(sets, "partly")).features
    follows = {"format", "bits per pixel", "JPEG quality", "JPEG tables", "chroma"}
    lost = sum(features[name].drop for name in follows)
    assert lost > 0.05
    assert all(abs(features[name].drop) < lost / 2 for name in features.keys() - follows)


def test_without_a_shortcut_the_interval_covers_guessing(sets: Path) -> None:
    report = audit.audit(shards_of(sets, "clean"))
    assert report.pooled.low <= 0.5 <= report.pooled.high
    assert report.pooled.high - report.pooled.low < 0.2
    assert report.verdict == "little"
    assert "there is nothing to do" in " ".join(audit.advice_of(report))


def test_groups_do_not_leak_between_folds(sets: Path) -> None:
    """Each video has its own image size, so another frame of the video reveals the label."""
    metadata = facts.metadata_of(shards_of(sets, "videos"))
    assert len(np.unique(metadata.groups)) == 60
    size = facts.FEATURES["size"]
    with one_thread():
        apart = audit._cross_validate(metadata, facts.assign_folds(metadata, 0), size, 0)
        mixed = audit._cross_validate(metadata, np.arange(len(metadata)) % 5, size, 0)
    assert apart.low <= 0.5 <= apart.high
    assert mixed.auroc > 0.75
    # 60 videos are little evidence, for any number of frames.
    assert apart.high - apart.low > 0.2


def test_folds_keep_groups_whole_and_balance_the_classes(sets: Path) -> None:
    for name in ("videos", "planted"):
        metadata = facts.metadata_of(shards_of(sets, name))
        folds = facts.assign_folds(metadata, 3)
        for group in np.unique(metadata.groups):
            assert len(set(folds[metadata.groups == group])) == 1
        for label in (0, 1):
            counts = np.bincount(folds[metadata.labels == label], minlength=facts.FOLDS)
            groups = len(np.unique(metadata.groups[metadata.labels == label]))
            size = (metadata.labels == label).sum() / groups
            assert counts.max() - counts.min() <= 2 * size


def test_a_source_with_one_class_is_a_shortcut_itself(sets: Path) -> None:
    report = audit.audit(shards_of(sets, "single"))
    assert report.source_name.auroc == 1
    assert {one.note for one in report.sources.values()} == {"only real images", "only fake images"}
    assert all(one.within is None for one in report.sources.values())
    assert any("2 of 2 sources have one class only" in note for note in report.notes)


def test_a_set_of_one_class_is_not_measured_and_says_so(sets: Path) -> None:
    report = audit.audit(shards_of(sets, "lonely"))
    assert (report.pooled, report.across, report.features) == (None, None, {})
    assert report.verdict == "unknown"
    assert report.notes[0].startswith("There are only fake images: ")


def test_the_interval_of_an_auroc_covers_95_percent() -> None:
    low, high = audit.auroc_interval(0.8, 50, 60)
    assert low < 0.8 < high
    mirrored = audit.auroc_interval(0.2, 60, 50)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-3)
    certain = audit.auroc_interval(1.0, 40, 40)
    assert certain[1] == 1
    assert 0.85 < certain[0] < 0.99
    assert audit.auroc_interval(0.8, 5_000, 6_000)[0] > low
    # The interval must cover the true AUROC in 95 % of samples of two normal distributions.
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        real, fake = rng.normal(0, 1, 40), rng.normal(1, 1, 50)
        area = (fake[:, None] > real).mean()
        low, high = audit.auroc_interval(area, 40, 50)
        covered += low <= 0.7602 <= high  # the normal distribution function at 1 / sqrt(2)
    assert 0.92 < covered / 400 < 0.98


def test_the_published_format_counts(tmp_path: Path) -> None:
    """A GIF is packed as PNG, but a model may learn from traces of the GIF format."""
    folder = tmp_path / "raw" / "old_web" / "real"
    folder.mkdir(parents=True)
    (folder / "a.gif").write_bytes(encode(photo(1), "GIF"))
    (folder / "b.png").write_bytes(encode(photo(2), "PNG"))
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "c.jpg").write_bytes(encode(photo(3, 90, 60), "JPEG", exif=turned))
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(
        '[sets]\nweb = "train"\n[sources.old_web]\nlicense = "x"\nset = "web"\nreal = ["real"]'
    )
    build_all(tmp_path / "raw", tmp_path / "shards", catalog=read_catalog([catalog]))
    shards = shards_of(tmp_path / "shards", "web")
    metadata = facts.metadata_of(shards)
    rows = {Path(origin).name: row for row, origin in enumerate(shards.table["origin"].to_pylist())}

    def named(file: str, column: int) -> str:
        return metadata.names[column][int(metadata.values[rows[file], column])]

    assert [named(file, 0) for file in ("a.gif", "b.png", "c.jpg")] == ["GIF", "PNG", "JPEG"]
    assert [named(file, 8) for file in ("a.gif", "c.jpg")] == ["none", "with a rotation"]
    assert [named(file, 7) for file in ("b.png", "c.jpg")] == [facts.NO_JPEG, "420"]
    width, height, aspect, bits, quality = metadata.values[rows["c.jpg"], 1:6]
    assert (width, height, quality) == (60, 90, 75)
    assert aspect == pytest.approx(60 / 90)
    assert bits == pytest.approx(8 * int(shards.column("size")[rows["c.jpg"]]) / (60 * 90))
    assert np.isnan(metadata.values[rows["b.png"], 5])


def test_too_many_names_share_one_code() -> None:
    codes, names = facts._frequent(np.arange(600) % 300, [str(n) for n in range(300)])
    assert codes.max() == 250
    assert len(names) == 251
    assert names[-1] == "others"


def test_the_steps_are_those_of_the_sources_that_are_there(
    sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few images of each kind are enough: the steps do not depend on what is measured."""

    def few(shards: ShardSet) -> ShardSet:
        kinds = 2 * shards.codes("source")[0] + shards.column("label")
        rows = [np.flatnonzero(kinds == kind)[:3] for kind in np.unique(kinds)]
        return shards.take(np.sort(np.concatenate(rows)))

    shards = few(shards_of(sets, "planted"))
    codes, names = shards.codes("source")
    one = shards.take(np.flatnonzero(codes == names.index("mixed")))
    for module in (facts, audit):
        monkeypatch.setattr(module, "MAX_NAMES", 1)
    for some, sources in ((one, 1), (shards, 2), (few(shards_of(sets, "videos")), 1)):
        steps: list[int] = []
        audit.audit(some, on_step=steps.append)
        assert audit.steps_of(some) == sum(steps) == sources + len(facts.FEATURES) + 3
    many = (np.arange(300, dtype=np.int32), [str(n) for n in range(300)])
    assert len(set(facts._frequent(*many)[0])) == 2
    shards._columns["source"] = many
    assert audit.steps_of(shards) == 2 + len(facts.FEATURES) + 3


def test_a_match_balances_the_classes(sets: Path, matched: match.Match) -> None:
    shards = shards_of(sets, "partly")
    assert matched.before.low > 0.6
    assert matched.after.auroc <= audit.LITTLE
    assert matched.after.low <= 0.5
    labels, formats = shards.column("label")[matched.rows], shards.names("format", matched.rows)
    assert labels.sum() * 2 == len(labels) == 2 * matched.per_class
    for name in set(formats):
        of_format = labels[np.array(formats) == name]
        assert of_format.sum() * 2 == len(of_format)
    assert np.array_equal(matched.rows, np.unique(matched.rows))
    assert not np.array_equal(matched.rows, match.match_classes(shards, seed=1).rows)


@pytest.mark.parametrize(
    ("name", "said"), [("planted", "only 0 real and 0 fake"), ("lonely", "only 0 real and 10 fake")]
)
def test_sets_that_cannot_be_matched_are_refused(sets: Path, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said} images .* 30 of each are needed; add sources"):
        match.match_classes(shards_of(sets, name))


def test_the_command_writes_reports_and_histograms(reported: tuple[Result, Path]) -> None:
    result, out = reported
    assert result.exit_code == 0, result.output
    assert "only fake images" in result.output
    report = json.loads((out / "report.json").read_text())
    assert report["audit_version"] == audit.AUDIT_VERSION
    assert list(report["sets"]) == ["handful", LONG]
    assert report["sets"]["handful"]["match"] is None
    pictures = [path for path in out.iterdir() if path.name != "report.json"]
    assert len(pictures) == 2 and out / "handful.png" in pictures
    for picture in pictures:
        with Image.open(picture) as image:
            assert min(image.size) >= 800
            pixels = np.asarray(image.convert("RGB"))
        # More pixels of each color than in the legend.
        real, fake = ((pixels == color).all(-1).sum() for color in ((0, 114, 178), (213, 94, 0)))
        assert fake > 5_000
        assert (real > 5_000) == (picture.name == "handful.png")


@pytest.mark.usefixtures("no_pictures")
def test_the_command_writes_a_sample_list(sets: Path, tmp_path: Path, matched: match.Match) -> None:
    out, listed = tmp_path / "out", tmp_path / "lists" / "partly.csv"
    result = run(sets / "partly", "--out", out, "--match", listed)
    assert result.exit_code == 0, result.output
    assert "shortcut by metadata: strong" in result.output
    partly = json.loads((out / "report.json").read_text())["sets"]["partly"]
    shards = shards_of(sets, "partly")
    assert partly["index_sha256"] == shards.sha256
    assert partly["features"].keys() == facts.FEATURES.keys()
    assert {"auroc", "low", "high"} == partly["pooled"].keys()
    head, *rows = csv.reader(listed.read_text().splitlines())
    assert head == ["set", "key"]
    assert len(rows) == 2 * partly["match"]["per_class"]
    keys = shards.table.column("key").take(matched.rows).to_pylist()
    assert rows == [["partly", key] for key in keys]  # the same in each run
    said = result.output.split("to score it: ")[1].splitlines()[0]
    assert said.endswith(f"evaluate.py --data {sets} --subset {listed}")


def test_sets_in_several_folders_are_scored_by_a_command_each(sets: Path) -> None:
    whole, rows = shards_of(sets, "clean"), np.arange(2)
    other = replace(whole, folders=(Path("other sets/mine"),) * len(whole.folders))
    both = match.commands({"clean": (whole, rows), "mine": (other, rows)}, Path("list.csv"))
    assert [line.partition("evaluate.py ")[2] for line in both] == [
        f"--data {sets} --shards=clean --subset list.csv",
        "--data 'other sets' --shards=mine --subset list.csv",
    ]


@pytest.mark.usefixtures("no_pictures")
def test_the_command_refuses_a_set_of_one_class_and_equal_names(sets: Path, tmp_path: Path) -> None:
    out, listed = tmp_path / "out", tmp_path / "list.csv"
    result = run(sets / "lonely", "--out", out, "--match", listed)
    assert result.exit_code == 1
    assert "list.csv was not written" in result.output
    assert not listed.exists()
    assert "error" in json.loads((out / "report.json").read_text())["sets"]["lonely"]["match"]
    twin = tmp_path / "other" / "lonely"
    twin.parent.mkdir()
    twin.symlink_to(sets / "lonely")
    result = run(sets / "lonely", twin, "--out", out)
    assert result.exit_code == 1
    assert "both named lonely" in result.output


def test_an_empty_set_is_not_measured(copies: Path, tmp_path: Path) -> None:
    out = build_all(copies, tmp_path / "shards")
    result = run(out / "mine", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "There are no images: no shortcut can be measured" in result.output
    assert (tmp_path / "out/mine.png").exists()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["sets"]["mine"]["verdict"] == "unknown"


def test_names_too_long_for_a_file_or_a_title_are_shortened(reported: tuple[Result, Path]) -> None:
    _result, out = reported
    (picture,) = set(out.glob("*.png")) - {out / "handful.png"}
    assert len(picture.name) < 250
    assert LONG in json.loads((out / "report.json").read_text())["sets"]
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("L"))
    assert (pixels[:40, :20] == 255).all()  # the title ends inside of the image


def test_a_note_names_only_some_of_many_sources_of_one_class(sets: Path) -> None:
    metadata = facts.metadata_of(shards_of(sets, "planted"))
    one = audit.SourceAudit(reals=3, fakes=0, within=None, from_others=None, note="")
    notes = audit._notes(metadata, {f"source{n}": one for n in range(30)}, None, None)
    assert any(
        "(source0, source1, source2, source3, source4, source5 and 24 more)" in n for n in notes
    )


def test_without_the_extra_the_error_names_it(
    sets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr("importlib.import_module", missing)
    result = run(sets / "lonely", "--out", tmp_path)
    assert result.exit_code == 1
    assert "install the extra `audit`" in result.output


def test_a_model_of_the_other_sources_has_not_seen_the_source(sets: Path) -> None:
    """It is wrong for every image if the other source has the opposite shortcut."""
    metadata = facts.metadata_of(shards_of(sets, "planted"))
    labels = np.where(metadata.sources == 1, 1 - metadata.labels, metadata.labels)
    turned, columns = replace(metadata, labels=labels), facts.FEATURES["format"]
    folds = facts.assign_folds(turned, 0)
    sources, across = audit._audit_sources(turned, folds, columns, 0, None, lambda _: None)
    assert sources["mixed"].within.auroc > 0.9
    assert sources["mixed"].from_others.auroc < 0.1
    assert across.auroc < 0.1


def test_images_are_matched_within_their_source_if_it_has_both_classes() -> None:
    sources, labels = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 0, 1], np.int8)
    values = np.zeros((5, 10), np.float32)
    values[:, facts.SOURCE[0]] = sources
    metadata = facts.Metadata(values, labels, np.arange(5), {})
    assert match._home(metadata).tolist() == [0, 0, -1, -1, -1]


def test_a_match_balances_each_fold(sets: Path, matched: match.Match) -> None:
    """Otherwise the match itself would push the AUROC after it below 0.5."""
    metadata = facts.metadata_of(shards_of(sets, "partly"))
    folds, labels = facts.assign_folds(metadata, 0)[matched.rows], metadata.labels[matched.rows]
    for fold in range(facts.FOLDS):
        assert labels[folds == fold].mean() == 0.5
