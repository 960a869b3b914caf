"""Compute the content of `report.json` from a table of scores: metrics with 95 % intervals per set,
source and generator, and the main results as sentences.

Main entry: `report(scores, on_resamples)` takes a `ScoreTable`, from `read_scores(path)` of
`model/evaluation/scores.py` (a row per image, and a dict about the evaluation). `on_resamples` is
None (default) or a function that is called from time to time with the number of bootstrap resamples
since its last call; each set takes 1,000. It returns the report as a dict, whose fields
`report/fields.py` describes. It writes nothing, needs no network and no images, and raises no
errors of its own.

`rows_of_set(scores, name)` returns the `Rows` of one set. Its arrays have a value per readable
image: `own` (True for an image of this set), `labels`, `probability` (of fake), and `source` and
`generator`, each a pair (codes, names). It also has `origin` (a list of file names) and `groups`
(`Groups` of bootstrap.py). The dict about the evaluation may name a set of reference reals for the
set `name` (`reference_reals` in its entry). The real images of that set then come after its own
images, with `own` False.

`samples_of_set(scores, name)` returns only the numbers of these rows in the table: a pair of int64
arrays, of the set's own images and of the reference reals.

`lines_of(rows)` returns a dict that says which images each line of the report is about: its key
(`LineKey`: "overall", "reference", or a pair such as ("sources", name)) -> `Images` (positions in
`rows` of reals and of fakes, int64).

`first_of_each(origins, groups, generators, rows)` keeps the first image of each prompt and
generator, as in the published protocol of the set EvalGEN. `rows` are positions of images (not a
`Rows`). `origins`, `groups` and `generators` have a value for every image: its original file name,
the number of its group and the number of its generator. It returns the positions that it keeps.
`mean_and_std(recalls)` takes a list of recalls and returns {"mean", "std"}; `std` is None for one
recall. `on_training_data(about)` takes a report, or the dict about the evaluation, and returns the
warnings about sets that the checkpoint was trained on, or perhaps was, as a list of texts.
`on_subset(subset)` takes the entry `subset` of the report and returns the sentence about it.
`without_scores(report)` returns one line on the sets without any score, "" if there is none.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import console
from model.evaluation import bootstrap
from model.evaluation.bootstrap import Groups, Images, Resamples, group_rows, intervals, resample
from model.evaluation.scores import ScoreTable
from model.metrics import measure, what_is_missing
from model.score import DEFAULT_THRESHOLD
from model.verdict import VERDICTS, band_of, verdict
from sharding.format import CLASSES

REPORT_VERSION = 4

REAL, FAKE = range(len(CLASSES))

LineKey = str | tuple[str, str]
"""Key of one line of a set's report: a name, or (kind, name); see `lines_of`."""

_NONE = np.empty(0, np.int64)
_COPIED = (
    "trained_on", "maybe_trained_on", "detector", "checkpoint", "run", "step", "commit",
    "temperature", "threshold", "calibration", "subset",
)  # fmt: skip


def report(scores: ScoreTable, on_resamples: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Return the report on a table of scores, as a dict (layout in `report/fields.py`).
    The result is deterministic.

    `on_resamples(n)` is called after every n bootstrap resamples; each set takes
    `bootstrap.RESAMPLES`.
    """
    about = scores.evaluation
    reports = {name: _report_set(scores, name, on_resamples) for name in about["sets"]}
    sentences = {
        name: _headline(name, set_report, about, _unscored(scores, name))
        + _without_score(scores, name, set_report)
        + _of_known_generators(about["sets"][name])
        for name, set_report in reports.items()
    }
    first = [name for name, set_report in reports.items() if not _has_reals(set_report)]
    return {
        "report_version": REPORT_VERSION,
        "headline": [
            *on_training_data(about),
            *(sentences[name] for name in dict.fromkeys([*first, *reports])),
        ],
        **{name: about[name] for name in _COPIED},
        "band": list(band_of(about)),
        "intervals": {
            "level": bootstrap.LEVEL, "resamples": bootstrap.RESAMPLES, "seed": bootstrap.SEED,
        },
        "sets": {
            name: {
                **about["sets"][name],
                **set_report,
                "unreadable": _unreadable(scores, name),
            }
            for name, set_report in reports.items()
        },
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Rows:
    """Readable rows of one set, followed by the reference reals of another set where needed.

    Each array has one value per row. `own` (bool) is True for rows of the set itself. `reference`
    is the name of the other set, or "".
    """

    own: np.ndarray
    labels: np.ndarray
    probability: np.ndarray  # probability of fake
    source: tuple[np.ndarray, list[str]]
    generator: tuple[np.ndarray, list[str]]
    origin: Sequence[str]
    groups: Groups
    reference: str

    def same_references(self, other: "Rows") -> bool:
        """Return whether both have as many own images, and as many references of the same set."""
        return self.reference == other.reference and np.array_equal(self.own, other.own)

    def where(self, chosen: np.ndarray) -> Images:
        """Return the rows where the mask `chosen` is True, by class."""
        return Images(
            np.flatnonzero(chosen & (self.labels == REAL)),
            np.flatnonzero(chosen & (self.labels == FAKE)),
        )


def rows_of_set(scores: ScoreTable, name: str) -> Rows:
    """Return the rows for the report of set `name`, with reference reals if the set needs them."""
    own, references = samples_of_set(scores, name)
    rows, labels = np.concatenate([own, references]), scores.numbers("label")
    sets, names = scores.codes("set")
    reals = _set_of_reals(scores, name)
    source, generator, group = (scores.codes(n) for n in ("source", "generator", "group"))
    # Two sets may use the same name for different sources or groups; codes keep these apart.
    apart = len(names) * np.stack([source[0], group[0]])[:, rows].astype(np.int64) + sets[rows]
    return Rows(
        own=np.arange(len(rows)) < len(own),
        labels=labels[rows].astype(np.int64),
        probability=scores.numbers("probability")[rows],
        source=(source[0][rows], source[1]),
        generator=(generator[0][rows], generator[1]),
        origin=scores.table.column("origin").take(rows).to_pylist(),
        groups=group_rows(apart[1], apart[0], labels[rows]),
        reference=reals if reals != name else "",
    )


def samples_of_set(scores: ScoreTable, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of `scores`, int64, that the report on set `name` is about: its own readable
    images, and the reference reals of another set (none if it uses its own).
    """
    labels, valid = scores.numbers("label"), scores.numbers("valid")
    own, reals = np.flatnonzero(scores.of_set(name) & valid), _set_of_reals(scores, name)
    if reals == name:
        return own, np.empty(0, np.int64)
    return own, np.flatnonzero(scores.of_set(reals) & valid & (labels == REAL))


def _set_of_reals(scores: ScoreTable, name: str) -> str:
    """Return the name of the set whose real images the report on set `name` uses."""
    reference = scores.evaluation["sets"][name]["reference_reals"]
    there = reference is not None and reference["set"] in scores.codes("set")[1]
    return str(reference["set"]) if there else name


def _unscored(scores: ScoreTable, name: str) -> tuple[int, int]:
    """Count the images without a score, by class, among the images for the report on set `name`."""
    labels, failed = scores.numbers("label"), ~scores.numbers("valid")
    reals = scores.of_set(_set_of_reals(scores, name)) & (labels == REAL) & failed
    fakes = scores.of_set(name) & (labels == FAKE) & failed
    return int(np.count_nonzero(reals)), int(np.count_nonzero(fakes))


def lines_of(rows: Rows) -> dict[LineKey, Images]:
    """Return the images of each report line of a set.

    Keys: "overall", "reference" (only with reference reals of another set) and (kind, name), where
    kind is "classes", "sources" or "generators".
    """
    images = rows.where(rows.own)
    lines: dict[LineKey, Images] = {"overall": images}
    if not rows.own.all():
        lines["reference"] = Images(rows.where(~rows.own).reals, images.fakes)
    reals = lines.get("reference", images).reals
    for label, class_images in enumerate(
        (Images(images.reals, _NONE), Images(_NONE, images.fakes))
    ):
        if len(class_images.reals) or len(class_images.fakes):
            lines["classes", CLASSES[label]] = class_images
    codes, names = rows.source
    for code in np.unique(codes[rows.own]):
        lines["sources", names[code]] = rows.where(rows.own & (codes == code))
    for name, chosen in _by_generator(rows, images.fakes).items():
        lines["generators", name] = Images(reals, chosen)
    return lines


def _report_set(
    scores: ScoreTable, name: str, on_resamples: Callable[[int], None] | None
) -> dict[str, Any]:
    """Return the report entry of one set, without the keys that `report` adds."""
    rows, about = rows_of_set(scores, name), scores.evaluation
    threshold = about["threshold"]
    own_images = rows.where(rows.own)
    lines = lines_of(rows)
    first = first_of_each(rows.origin, rows.groups.of_row, rows.generator[0], own_images.fakes)
    if len(first) < len(own_images.fakes):
        for generator, chosen in _by_generator(rows, first).items():
            lines["first", generator] = Images(_NONE, chosen)
    resamples = resample(rows.probability, lines, rows.groups, threshold, on_resamples=on_resamples)
    figures = {
        key: _figures(rows, images, resamples[key], threshold) for key, images in lines.items()
    }

    def of_kind(kind: str) -> dict[str, Any]:
        return {key[1]: figures[key] for key in sorted(k for k in lines if k[0] == kind)}

    def protocol(kind: str) -> dict[str, Any] | None:
        keys = sorted(key for key in lines if key[0] == kind)
        reals = lines.get("reference", own_images).reals
        return _protocol(rows, reals, {k[1]: (lines[k], figures[k], resamples[k]) for k in keys})

    return {
        "overall": figures["overall"],
        "reference": figures.get("reference"),
        **{kind: of_kind(kind) for kind in ("classes", "sources", "generators")},
        "verdicts": _verdicts(rows, own_images, band_of(about)),
        "protocols": {"all_images": protocol("generators"), "first_per_prompt": protocol("first")}
        if len(own_images.fakes)
        else None,
        "note": _note(figures, about["sets"][name], _unscored(scores, name)),
    }


def _by_generator(rows: Rows, fakes: np.ndarray) -> dict[str, np.ndarray]:
    codes, names = rows.generator
    return {names[code]: fakes[codes[fakes] == code] for code in np.unique(codes[fakes])}


def first_of_each(
    origins: Sequence[str], groups: np.ndarray, generators: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Select from `rows` the first image of each prompt and generator: int64, ascending.

    Images of one prompt share the group, the folder and the file name up to its final number. The
    first image has the lowest number. (EvalGEN: `Flux/a photo of a bench_0.jpg` to `_19.jpg`. Its
    authors use image 0 of each: 553 prompts, 2,765 images.)
    """
    best: dict[tuple[int, int, str], tuple[float, str, int]] = {}
    for row in rows.tolist():
        parts = _NUMBERED.fullmatch(origins[row])
        assert parts is not None  # the pattern matches any text
        stem, number = parts.groups()
        key = int(groups[row]), int(generators[row]), stem
        candidate = float(number or 0), origins[row], row  # float: `int` refuses 4,301 digits
        best[key] = min(best.get(key, candidate), candidate)
    return np.sort(np.array([row for _, _, row in best.values()], np.int64))


_NUMBERED = re.compile(r"(.*?)(?<!\d)(\d*+)(?:\.[^./]*)?", re.DOTALL)
"""Final number of a path. The lookbehind keeps the time linear: each number is tried once."""


def _figures(rows: Rows, images: Images, resamples: Resamples, threshold: float) -> dict[str, Any]:
    chosen = np.concatenate([images.reals, images.fakes])
    return {
        **asdict(measure(rows.labels[chosen], rows.probability[chosen], threshold)),
        "groups": rows.groups.count(chosen),
        "intervals": intervals(images, rows.groups, resamples),
    }


def _protocol(
    rows: Rows,
    reals: np.ndarray,
    generators: Mapping[str, tuple[Images, dict[str, Any], Resamples]],
) -> dict[str, Any] | None:
    if not generators:
        return None
    alarms = rows.probability[reals] >= DEFAULT_THRESHOLD
    fakes = np.concatenate([images.fakes for images, _, _ in generators.values()])
    recalls = {
        name: {
            "images": len(images.fakes),
            "recall": figures["recall"],
            "interval": figures["intervals"].get("recall"),
            "recall_at_0.5": float((rows.probability[images.fakes] >= DEFAULT_THRESHOLD).mean()),
        }
        for name, (images, figures, _) in generators.items()
    }
    mean = np.mean([resamples["recall"] for _, _, resamples in generators.values()], axis=0)
    prompts = rows.groups.count(fakes)
    return {
        "images": len(fakes),
        "prompts": prompts,
        "generators": recalls,
        "interval": bootstrap.interval(mean, prompts),
        **{
            name + at: value
            for at, figure in (("", "recall"), ("_at_0.5", "recall_at_0.5"))
            for name, value in mean_and_std([recall[figure] for recall in recalls.values()]).items()
        },
        "false_positive_rate_at_0.5": float(alarms.mean()) if len(alarms) else None,
    }


def mean_and_std(recalls: Sequence[float]) -> dict[str, float | None]:
    """Return the mean and the standard deviation (n - 1; None for one value).

    DDA's table is computed so: 97.2 and 4.2 for 89.9, 99.5, 97.8, 99.5 and 99.5.
    """
    std = float(np.std(recalls, ddof=1)) if len(recalls) > 1 else None
    return {"mean": float(np.mean(recalls)), "std": std}


def _verdicts(rows: Rows, images: Images, band: tuple[float, float]) -> dict[str, dict[str, int]]:
    """Count the verdicts per class: {class: {verdict: n}}, only for classes with images."""
    counts = {}
    for name, chosen in zip(CLASSES, (images.reals, images.fakes), strict=True):
        if len(chosen):
            of_each = [verdict(p, band) for p in rows.probability[chosen]]
            counts[name] = {said: of_each.count(said) for said in VERDICTS}
    return counts


def _has_reals(set_report: Mapping[str, Any]) -> bool:
    return bool((set_report["reference"] or set_report["overall"])["reals"])


def _note(
    figures: Mapping[LineKey, dict[str, Any]], of_set: Mapping[str, Any], unscored: tuple[int, int]
) -> str | None:
    """Return the sentence on missing real or fake images, or on reference reals; None if neither
    applies. `of_set` is the entry of the set in the dict about the evaluation. `unscored` counts
    the reals and the fakes without a score.
    """
    overall = figures["overall"]
    if "reference" in figures:
        reals = of_set["reference_reals"]
        none = "" if overall["reals"] else "There are no real images here: "
        return (
            f"{none}the reference false positives are those among "
            f"{console.counted(figures['reference']['reals'], 'real image')} of {reals['set']} "
            f"({reals['why']})."
        )
    return what_is_missing(overall["reals"], overall["fakes"], unscored)


def on_training_data(about: Mapping[str, Any]) -> list[str]:
    """Return the first headlines of a report: one on the sets `trained_on` and one on the sets
    `maybe_trained_on` of `about`, each only if there are such sets.
    """
    warnings = []
    if sets := about["trained_on"]:
        warnings.append(
            f"THE CHECKPOINT WAS TRAINED ON {', '.join(sets)}: its figures for these sets say "
            "nothing about images that it has not seen"
        )
    if sets := about["maybe_trained_on"]:
        warnings.append(
            f"THE CHECKPOINT MAY HAVE LEARNED IMAGES OF {', '.join(sets)}: it was trained on "
            "another set of that name; if that was an earlier build of the same images, its "
            "figures say little about images that it has not seen"
        )
    return warnings


def on_subset(subset: Mapping[str, Any]) -> str:
    """Return the sentence of a report on a list of samples."""
    return f"Only the {subset['samples']:,} samples listed in {subset['file']} were scored."


def _headline(
    name: str, set_report: Mapping[str, Any], about: Mapping[str, Any], unscored: tuple[int, int]
) -> str:
    """Return the main result of a set in one sentence. The sentence always gives recall together
    with the false-positive rate, or says that there is no false-positive rate. `unscored` counts
    the reals and the fakes without a score.
    """
    reference = set_report["reference"]
    figures = reference or set_report["overall"]
    if not set_report["overall"]["count"]:
        return f"{name}: no image could be scored"
    recall, alarms = _share(figures, "recall"), _share(figures, "false_positive_rate")
    fakes = console.counted(figures["fakes"], "fake")
    reals = console.counted(figures["reals"], "real image") + (
        f" of {about['sets'][name]['reference_reals']['set']}" if reference else ""
    )
    if alarms is None:
        none, other = "NO REAL IMAGES AT HAND", "a set that has real images"
        if unscored[REAL]:
            counted = console.counted(unscored[REAL], "real image")
            none, other = f"NONE OF {counted.upper()} COULD BE SCORED", "another set"
        # A table without sets cannot name one.
        alone = about["sets"][name]["index_sha256"] == about["detector"].get("sha256")
        advice = "add real images" if alone else f"name {other} with --reference-reals"
        return (
            f"{name}: {none}, so no false-positive rate. That {recall} of {fakes} were found says "
            f"nothing about false alarms; {advice}"
        )
    if recall is None:
        none = "no fake images here"
        if unscored[FAKE]:
            none = f"none of {console.counted(unscored[FAKE], 'fake')} could be scored"
        return f"{name}: {alarms} of {reals} called fake; {none}"
    return f"{name}: {recall} of {fakes} found, {alarms} of {reals} called fake"


def _without_score(scores: ScoreTable, name: str, set_report: Mapping[str, Any]) -> str:
    """Return the end of a set's headline: how many of its images, and of its reference reals, have
    no score; "" if all have one. Otherwise a detector that gives no score for hard images would
    look better than it is.
    """
    if not set_report["overall"]["count"]:
        return ""  # the headline says it
    reals = scores.numbers("label") == REAL
    there = scores.of_set(name) | (reals & scores.of_set(_set_of_reals(scores, name)))
    missing = int(np.count_nonzero(there & ~scores.numbers("valid")))
    count = console.counted(int(np.count_nonzero(there)), "image")
    return f"; {missing:,} of {count} without a score" if missing else ""


def _of_known_generators(of_set: Mapping[str, Any]) -> str:
    """Return the end of a set's headline: generators of its fakes that training had other images of
    (recall on them says nothing about new generators); "" without any.
    """
    known = of_set["known_generators"]
    more = f" and {len(known) - 3} more" if len(known) > 3 else ""
    names = ", ".join(known[:3]) + more
    return f"; training had other images of {names}" if known else ""


def _share(figures: Mapping[str, Any], name: str) -> str | None:
    """Format a metric with its interval: `94.2 % (93.1 to 95.0)`."""
    if figures[name] is None:
        return None
    between = figures["intervals"].get(name)
    shown = f" ({100 * between[0]:.1f} to {100 * between[1]:.1f})" if between else ""
    return f"{100 * figures[name]:.1f} %{shown}"


def without_scores(report: Mapping[str, Any]) -> str:
    """Return one line on the sets of a report without any scored image, or "" if there are none."""
    empty = [name for name, of_set in report["sets"].items() if not of_set["overall"]["count"]]
    reasons = [reason for name in empty for reason in report["sets"][name]["unreadable"]]
    first = f"; the first: {reasons[0]}" if reasons else ""
    return f"no image of {' and '.join(empty)} has a score{first}" if empty else ""


def _unreadable(scores: ScoreTable, name: str) -> list[str]:
    """Return `set:key: reason` for each image of a set that was not scored."""
    failed = np.flatnonzero(scores.of_set(name) & ~scores.numbers("valid"))
    errors, reasons = scores.codes("error")
    keys = scores.table.column("key").take(failed).to_pylist()
    return [
        f"{name}:{key}: {reasons[code]}" for key, code in zip(keys, errors[failed], strict=True)
    ]
