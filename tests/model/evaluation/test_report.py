"""The report and the scores file, from tables of scores without a network."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from model.evaluation.report import first_of_each, mean_and_std, report, without_scores
from model.evaluation.scores import (
    SCORES_VERSION,
    ScoresError,
    read_scores,
    rows_of,
    write_scores,
)
from model.metrics import measure
from model.score import Scores
from model.verdict import probability
from report.page import mistakes_of, render
from report.terminal import print_report
from sharding.format import ShardSet
from tests.builders import ABOUT, ABOUT_SET, table_of


def prompts(generators: dict[str, float], of_each: int = 4) -> list[dict[str, Any]]:
    """Return rows of a small EvalGEN: 6 prompts, `of_each` images per prompt and generator.

    `generators` gives the mean logit of each generator. The first image of a prompt is easy.
    """
    rng = np.random.default_rng(0)
    return [
        {
            "set": "evalgen", "source": "evalgen", "generator": name, "label": 1,
            "group": f"evalgen/a photo of {prompt}",
            "origin": f"evalgen/GenEval-JPEG/{name}/a photo of {prompt}_{image}.jpg",
            "logit": 9.0 if image == 0 else logit + float(rng.normal()),
        }
        for name, logit in generators.items()
        for prompt in range(6)
        for image in range(of_each)
    ]  # fmt: skip


def reals(name: str, count: int = 30) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [
        {"set": name, "source": "coco", "generator": "coco", "label": 0, "logit": float(logit)}
        for logit in rng.normal(-1, 2, count)
    ]


def test_the_first_image_of_each_prompt() -> None:
    """The first image has the lowest number, in numeric order (9 before 10), even without a 0."""
    origins = [
        "Flux/a cat_10.jpg", "Flux/a cat_9.jpg", "Flux/a dog_0.jpg", "GoT/a cat_0.jpg",
        "GoT/a cat_19.jpg", "GoT/two 3_1.jpg", "GoT/two 3_0.jpg", "old/plain.png", "old/plain2.png",
    ]  # fmt: skip
    groups = np.array([0, 0, 0, 0, 0, 2, 2, 3, 3])  # dog and cat are in one group
    generators = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1])
    first = first_of_each(origins, groups, generators, np.arange(9))
    assert [origins[row] for row in first] == [
        "Flux/a cat_9.jpg", "Flux/a dog_0.jpg", "GoT/a cat_0.jpg", "GoT/two 3_0.jpg",
        "old/plain.png",
    ]  # fmt: skip


def test_a_path_of_many_digits_is_no_error_and_takes_no_longer() -> None:
    origins = ["b" + "9" * 5_000, "b" + "8" * 5_000, *(f"{n}{'1' * 30_000}a/" for n in "12")]
    zeros, start = np.zeros(4, np.int64), time.process_time()
    assert first_of_each(origins, zeros, zeros, np.arange(4)).tolist() == [1, 2, 3]
    assert time.process_time() - start < 5  # 40 s if every digit is tried as the first


def test_mean_and_std_are_those_of_the_published_table() -> None:
    """The paper gives 97.2 and 4.2 for the five recalls of its detector."""
    mean_std = mean_and_std([89.9, 99.5, 97.8, 99.5, 99.5])
    assert round(mean_std["mean"], 1) == 97.2
    assert round(mean_std["std"], 1) == 4.2
    assert mean_and_std([0.5]) == {"mean": 0.5, "std": None}


def test_both_protocols_of_evalgen() -> None:
    rows = prompts({"Flux": 1.2, "GoT": -1.0, "NOVA": 3.0})
    figures = report(table_of(rows, ["evalgen"]))["sets"]["evalgen"]
    every, first = figures["protocols"]["all_images"], figures["protocols"]["first_per_prompt"]
    assert (every["images"], every["prompts"]) == (72, 6)
    assert (first["images"], first["prompts"]) == (18, 6)
    assert list(every["generators"]) == ["Flux", "GoT", "NOVA"]
    assert [one["recall"] for one in first["generators"].values()] == [1.0, 1.0, 1.0]
    assert first["std"] == 0.0
    for name, one in every["generators"].items():
        logits = np.array([row["logit"] for row in rows if row["generator"] == name])
        fake = probability(logits, 2.0)
        assert one["images"] == 24
        assert one["recall"] == pytest.approx((fake >= 0.6).mean())
        assert one["recall_at_0.5"] == pytest.approx((fake >= 0.5).mean())
        assert one["interval"][0] <= one["recall"] <= one["interval"][1]
    recalls = [one["recall"] for one in every["generators"].values()]
    assert every["mean"] == pytest.approx(np.mean(recalls))
    assert every["std"] == pytest.approx(np.std(recalls, ddof=1))
    assert every["interval"][0] < every["mean"] < every["interval"][1]
    assert every["false_positive_rate_at_0.5"] is first["false_positive_rate_at_0.5"] is None
    # With one image per prompt and generator, both protocols would be the same.
    alone = prompts({"Flux": 1.0}, of_each=1)
    assert (
        report(table_of(alone, ["evalgen"]))["sets"]["evalgen"]["protocols"]["first_per_prompt"]
        is None
    )


@pytest.mark.parametrize("of_reals", ["evalgen", "val"])
def test_a_recall_at_half_has_its_false_positive_rate(
    of_reals: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of the report's own threshold, 0.6 here, is another one. The real images are those of
    the set or of its reference.
    """
    of_real = {"set": of_reals, "label": 0, "source": "photos", "generator": "camera"}
    logits = (-1.0, -1.0, 0.2, 0.2, 2.0)
    reals = [{**of_real, "key": f"r{i}", "logit": logits[i]} for i in range(len(logits))]
    scores = table_of(
        [*prompts({"Flux": 1.2, "GoT": -1.0}), *reals], ["evalgen", *({of_reals} - {"evalgen"})],
        reference_reals={"set": "val", "why": "named"}, calibration=None,
    )  # fmt: skip
    result = report(scores)
    figures = result["sets"]["evalgen"]
    assert (figures["reference"] or figures["overall"])["false_positive_rate"] == 0.2
    for protocol in figures["protocols"].values():
        assert protocol["false_positive_rate_at_0.5"] == 0.6
    print_report(result)
    assert "false positives at a threshold of 0.5: 0.600" in capsys.readouterr().out
    page = render(result, scores, mistakes_of(result, scores), {}, "")
    assert "at a threshold of 0.5, with 60.0 % false positives" in " ".join(page.split())


def test_sets_without_reals_come_first_in_the_headline() -> None:
    rows = reals("val") + [row | {"set": "val"} for row in prompts({"Flux": 2.0})]
    document = report(table_of(rows + prompts({"Flux": 1.0}), ["val", "evalgen"]))
    assert document["headline"][0].startswith("evalgen: NO REAL IMAGES AT HAND")
    assert "--reference-reals" in document["headline"][0]
    assert "of 30 real images called fake" in document["headline"][1]
    overall = document["sets"]["evalgen"]["overall"]
    assert overall["false_positive_rate"] is None and overall["auroc"] is None
    assert overall["recall"] is not None
    assert "gives the share of fakes found and nothing about" in document["sets"]["evalgen"]["note"]


def test_generators_that_training_knew_end_the_headline() -> None:
    table = table_of([*prompts({"A": 1.0}), *reals("evalgen")], ["evalgen"])
    assert "training" not in report(table)["headline"][0]
    table.evaluation["sets"]["evalgen"]["known_generators"] = ["A", "B", "C", "D"]
    document = report(table)
    assert document["headline"][0].endswith("; training had other images of A, B, C and 1 more")
    assert document["sets"]["evalgen"]["known_generators"] == ["A", "B", "C", "D"]


def test_one_image_is_counted_as_one_image() -> None:
    document = report(
        table_of(
            reals("val")[:1] + [row | {"set": "val"} for row in prompts({"A": 9.0})[:1]], ["val"]
        )
    )
    assert "of 1 fake found" in document["headline"][0]
    assert document["headline"][0].endswith("of 1 real image called fake")


def test_reals_of_another_set_are_the_reference() -> None:
    rows = prompts({"Flux": 1.0, "GoT": 0.5}) + reals("test")
    reference = {"set": "test", "why": "the catalog's default"}
    document = report(table_of(rows, ["evalgen"], reference_reals=reference))
    assert list(document["sets"]) == ["evalgen"]
    one = document["sets"]["evalgen"]
    assert one["overall"]["reals"] == 0
    labels = np.array([row["label"] for row in rows])
    fake = probability(np.array([row["logit"] for row in rows]), 2.0)
    wanted = measure(labels, fake, 0.6)
    assert one["reference"]["false_positive_rate"] == wanted.false_positive_rate > 0
    assert one["reference"]["auroc"] == wanted.auroc
    assert one["generators"]["GoT"]["reals"] == 30
    assert "of 30 real images of test called fake" in document["headline"][0]
    assert "30 real images of test (the catalog's default)" in one["note"]
    # A set's own reals have priority, unless --reference-reals names another set.
    own = [row | {"set": "evalgen", "logit": -9.0} for row in reals("evalgen", 11)]
    kept = report(table_of(rows + own, ["evalgen"], reference_reals=reference))["sets"]["evalgen"]
    assert kept["reference"] is None
    assert kept["generators"]["GoT"]["reals"] == 11
    table = table_of(rows + own, ["evalgen"])
    table.evaluation["sets"]["evalgen"]["reference_reals"] = reference
    asked = report(table)
    assert asked["sets"]["evalgen"]["reference"]["reals"] == 30
    assert asked["sets"]["evalgen"]["overall"]["reals"] == 11


def test_figures_of_classes_sources_and_generators() -> None:
    rows = prompts({"Flux": 1.0, "GoT": 0.5}) + reals("evalgen")
    rows += [row | {"source": "faces"} for row in reals("evalgen", 9)]
    rows.append({"set": "evalgen", "label": 0, "logit": None, "valid": False, "error": "cut off",
                 "source": "coco"})  # fmt: skip
    document = report(table_of(rows, ["evalgen"]))
    one = document["sets"]["evalgen"]
    assert one["overall"]["count"] == 48 + 39
    assert one["overall"]["groups"] == 6 + 39
    assert one["unreadable"] == [f"evalgen:k{len(rows) - 1}: cut off"]
    assert set(one["sources"]) == {"evalgen", "coco", "faces"}
    assert one["sources"]["faces"]["reals"] == 9
    assert one["sources"]["faces"]["auroc"] is None
    assert "auroc" not in one["sources"]["faces"]["intervals"]
    real, fake = one["classes"]["real"], one["classes"]["fake"]
    assert (real["count"], fake["count"]) == (39, 48)
    assert real["accuracy"] == pytest.approx(1 - one["overall"]["false_positive_rate"])
    assert fake["accuracy"] == one["overall"]["recall"] == fake["recall"]
    assert real["nll"] is not None and real["f1"] is None and real["ece"] is None
    # Each generator is compared with all reals.
    assert {name: m["reals"] for name, m in one["generators"].items()} == {"Flux": 39, "GoT": 39}
    verdicts = one["verdicts"]
    assert sum(verdicts["real"].values()) == 39
    assert verdicts["fake"]["likely AI"] == round(48 * one["overall"]["recall"])
    assert verdicts["real"]["uncertain"] > 0
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_groups_of_two_sets_are_kept_apart() -> None:
    """Each of two sets has a group `s/0`; one set provides the reference reals."""
    rows = [{"set": "evalgen", "label": 1, "group": "s/0", "logit": 1.0}] * 3
    rows += [{"set": "test", "label": 0, "group": "s/0", "logit": -1.0}] * 3
    reference = {"set": "test", "why": "--reference-reals"}
    figures = report(table_of(rows, ["evalgen"], reference_reals=reference))["sets"]["evalgen"]
    assert figures["overall"]["groups"] == 1
    assert figures["reference"]["groups"] == 2
    assert figures["overall"]["intervals"] == {}


def test_a_set_without_a_readable_image_has_a_report() -> None:
    rows = [{"set": "a", "label": 1, "logit": None, "valid": False, "error": "gone"}] * 2
    document = report(table_of(rows, ["a"]))
    assert document["headline"] == ["a: no image could be scored"]
    assert document["sets"]["a"]["overall"]["count"] == 0
    assert len(document["sets"]["a"]["unreadable"]) == 2
    assert without_scores(document) == "no image of a has a score; the first: a:k0: gone"
    reference = {"set": "test", "why": "--reference-reals"}
    document = report(table_of(rows + reals("test"), ["a"], reference_reals=reference))
    assert document["headline"] == ["a: no image could be scored"]


def test_images_without_a_score_are_in_the_headline() -> None:
    """Else a detector that abstains looks better than it is."""
    gone = {"logit": None, "valid": False, "error": "no verdict"}
    rows = [*prompts({"Flux": 1.0}), *(row | gone for row in prompts({"GoT": 1.0}))]
    more = [*reals("test"), *(row | gone for row in reals("test", 7))]
    reference = {"set": "test", "why": "--reference-reals"}
    document = report(table_of(rows + more, ["evalgen"], reference_reals=reference))
    (sentence,) = document["headline"]
    assert sentence.endswith("called fake; 31 of 85 images without a score")
    assert without_scores(document) == ""
    assert len(document["sets"]["evalgen"]["unreadable"]) == 24
    (alone,) = report(table_of(rows, ["evalgen"]))["headline"]
    assert alone.endswith("; 24 of 48 images without a score")
    (whole,) = report(table_of([*prompts({"A": 1.0}), *reals("evalgen")], ["evalgen"]))["headline"]
    assert "without" not in whole


def scored(shards: ShardSet, failed: tuple[int, ...] = ()) -> Scores:
    rows = np.setdiff1d(np.arange(len(shards)), failed)
    labels = shards.column("label")[rows].astype(np.int64)
    logits = np.linspace(-4, 4, len(rows)).astype(np.float32)
    return Scores(rows, labels, logits, dict.fromkeys(failed, "does not decode"))


def test_scores_are_written_and_read_row_by_row(
    old: ShardSet, new: ShardSet, tmp_path: Path
) -> None:
    about = ABOUT | {"sets": {"old": ABOUT_SET, "new": ABOUT_SET}, "temperature": 2.0}
    parts = [rows_of("old", old, scored(old, (3, 7)), 2.0), rows_of("new", new, scored(new), 2.0)]
    path = tmp_path / "scores.parquet"
    write_scores(path, parts, about)
    table = read_scores(path)
    assert table.evaluation == {**about, "scores_version": SCORES_VERSION}
    rows = table.table.to_pylist()
    assert len(rows) == len(old) + len(new)
    index = old.table.to_pylist() + new.table.to_pylist()
    names = ("key", "sha256", "source", "generator", "split", "group", "origin", "label")
    for row, wanted in zip(rows, index, strict=True):
        assert {name: row[name] for name in names} == {name: wanted[name] for name in names}
    assert rows[3]["valid"] is False and rows[3]["logit"] is None and rows[3]["probability"] is None
    assert (rows[3]["error"], rows[4]["error"]) == ("does not decode", "")
    valid = [row for row in rows if row["valid"]]
    assert len(valid) == len(rows) - 2
    logits = np.array([row["logit"] for row in valid])
    assert [row["probability"] for row in valid] == probability(logits, 2.0).tolist()
    assert {row["set"] for row in rows[: len(old)]} == {"old"}
    first = path.read_bytes()
    write_scores(path, parts, about)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]


def test_a_class_without_any_score_is_not_called_missing() -> None:
    gone = {"logit": None, "valid": False, "error": "no verdict"}
    fakes = prompts({"Flux": 1.0})
    unread = [row | gone for row in reals("evalgen")]
    document = report(table_of([*fakes, *unread], ["evalgen"]))
    (sentence,) = document["headline"]
    assert sentence.startswith("evalgen: NONE OF 30 REAL IMAGES COULD BE SCORED, so no false")
    assert sentence.endswith("; 30 of 54 images without a score")
    note = document["sets"]["evalgen"]["note"]
    assert note.startswith("None of 30 real images could be scored: recall gives")
    document = report(table_of([*(row | gone for row in fakes), *reals("evalgen")], ["evalgen"]))
    assert "called fake; none of 24 fakes could be scored; 24 of 54" in document["headline"][0]
    assert document["sets"]["evalgen"]["note"].startswith("None of 24 fake images could be scored")
    reference = {"set": "test", "why": "--reference-reals"}
    away = [row | gone for row in reals("test", 7)]
    (sentence,) = report(table_of([*fakes, *away], ["evalgen"], reference_reals=reference))[
        "headline"
    ]
    assert sentence.startswith("evalgen: NONE OF 7 REAL IMAGES COULD BE SCORED")
    assert sentence.endswith("; 7 of 31 images without a score")


def test_a_set_whose_reals_have_no_score_takes_no_others() -> None:
    """As the robustness test, which is planned before any image is read."""
    gone = {"logit": None, "valid": False, "error": "no verdict"}
    rows = [*prompts({"Flux": 1.0}), *(row | gone for row in reals("evalgen", 3)), *reals("test")]
    reference = {"set": "test", "why": "the catalog's default"}
    one = report(table_of(rows, ["evalgen"], reference_reals=reference))["sets"]["evalgen"]
    assert one["reference"] is None and one["overall"]["reals"] == 0


def test_each_set_has_its_own_reference() -> None:
    """The real images of the first reference served all sets."""
    rows = [*prompts({"Flux": 1.0}), *(row | {"set": "bench"} for row in prompts({"SDXL": 1.0}))]
    rows += [*reals("test"), *(row | {"logit": 3.0} for row in reals("raise", 20))]
    table = table_of(rows, ["evalgen", "bench"])
    for name, other in (("evalgen", "test"), ("bench", "raise")):
        table.evaluation["sets"][name]["reference_reals"] = {"set": other, "why": "named"}
    document = report(table)
    assert document["headline"][0].endswith("of 30 real images of test called fake")
    assert document["headline"][1].endswith("100.0 % (83.2 to 100.0) of 20 real images of raise "
                                            "called fake")  # fmt: skip
    alone = table_of([row for row in rows if row["set"] in ("bench", "raise")], ["bench"],
                     reference_reals={"set": "raise", "why": "named"})  # fmt: skip
    assert report(alone)["sets"]["bench"] == document["sets"]["bench"]
    assert document["sets"]["bench"]["note"].endswith("20 real images of raise (named).")


def test_the_one_reference_of_an_older_file_is_read(old: ShardSet, tmp_path: Path) -> None:
    path, reference = tmp_path / "x.parquet", {"set": "photos", "why": "named", "for_all": False}
    entry = {key: value for key, value in ABOUT_SET.items() if key != "reference_reals"}
    sets = {name: dict(entry) for name in ("photos", "fakes", "both")}
    about = ABOUT | {"sets": sets, "scores_version": 2, "reference_reals": reference}
    is_fake = old.column("label") == 1
    of_set = {"photos": ~is_fake, "fakes": is_fake, "both": is_fake >= 0}
    images = {name: old.take(np.flatnonzero(of)) for name, of in of_set.items()}
    parts = [rows_of(name, shards, scored(shards), 2.0) for name, shards in images.items()]
    for for_all, of_both in ((False, None), (True, {"set": "photos", "why": "named"})):
        write_scores(path, parts, about | {"reference_reals": reference | {"for_all": for_all}})
        read = read_scores(path).evaluation
        assert read["scores_version"] == SCORES_VERSION and "reference_reals" not in read
        chosen = {name: entry["reference_reals"] for name, entry in read["sets"].items()}
        named = {"set": "photos", "why": "named"}
        assert chosen == {"photos": None, "fakes": named, "both": of_both}
    for change in ({"sets": None}, {"reference_reals": 5}, {"reference_reals": named}):
        write_scores(path, parts, about | change)
        with pytest.raises(ScoresError, match=r"metadata that cannot be used \((sets|reference)"):
            read_scores(path)


class Reason(str):
    """A text that counts its comparisons with others."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Reason.compared += 1
        return str.__eq__(self, other)


def test_each_failure_of_many_keeps_its_own_reason(old: ShardSet) -> None:
    """Each with another reason: the reasons are not compared pair by pair."""
    reasons = {sample: Reason(f"byte {sample} is damaged") for sample in range(len(old))}
    none = np.empty(0, np.int64)
    table = rows_of("old", old, Scores(none, none, none.astype(np.float32), reasons), 1.0)
    assert Reason.compared < len(old)
    assert table.column("error").to_pylist() == [str(reasons[s]) for s in range(len(old))]


def test_scores_that_do_not_match_the_samples_are_refused(old: ShardSet) -> None:
    good = scored(old)
    short = Scores(good.samples[1:], good.labels[1:], good.logits[1:], {})
    twice = Scores(np.append(good.samples[1:], 5), good.labels, good.logits, {})
    for wrong in (short, twice):
        with pytest.raises(ValueError, match="samples of old"):
            rows_of("old", old, wrong, 1.0)


def test_other_files_are_refused_with_one_clear_error(old: ShardSet, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(ScoresError, match="not a file of scores"):
        read_scores(path)
    write_scores(path, [rows_of("old", old, scored(old), 1.0)], {"scores_version": 1})
    said = f"scores version 1, expected {SCORES_VERSION}; measure the checkpoint again with `python"
    with pytest.raises(ScoresError, match=said):
        read_scores(path)
    write_scores(path, [rows_of("old", old, scored(old), 1.0)], {})
    table = pa.parquet.read_table(path)
    pa.parquet.write_table(table.replace_schema_metadata({}), path)
    with pytest.raises(ScoresError, match="not a file of scores"):
        read_scores(path)
    write_scores(path, [rows_of("old", old, scored(old), 1.0)], {})
    whole = path.read_bytes()
    page = bytes(byte ^ 255 for byte in whole[4:20])  # pyarrow raises an OSError for it
    path.write_bytes(whole[:4] + page + whole[20:])
    with pytest.raises(ScoresError, match="not a file of scores"):
        read_scores(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sets": None}, "sets takes an object, got null"),
        ({"sets": {"old": {}}}, "sets.old.index_sha256 is missing"),
        ({"sets": {"old": {**ABOUT_SET, "known_generators": 1}}}, "known_generators takes a list"),
        ({"detector": None}, "detector takes an object, got null"),
        ({"detector": {"kind": "onnx", "name": 3}}, "detector.name takes a text, got 3"),
        ({"threshold": None}, "threshold takes a number from 0 to 1, got null"),
        ({"calibration": {}}, "calibration.band is missing"),
        ({"sets": {"a": ABOUT_SET | {"reference_reals": {"set": "b"}}}}, "reals.why is missing"),
        ({"subset": 5}, "subset takes an object, got 5"),
        ({"step": True}, "step takes a whole number, got true"),
        ({"trained_on": "val"}, 'trained_on takes a list, got "val"'),
        ("sets", "sets is missing"),
        ("maybe_trained_on", "maybe_trained_on is missing"),
        ("temperature", "temperature is missing"),
    ],
)
def test_metadata_that_cannot_be_used_are_one_clear_error(
    old: ShardSet, tmp_path: Path, change: dict | str, said: str
) -> None:
    about = ABOUT | {"sets": {"old": ABOUT_SET}}
    if isinstance(change, str):
        del about[change]
    path = tmp_path / "x.parquet"
    kept = about if isinstance(change, str) else about | change
    write_scores(path, [rows_of("old", old, scored(old), 1.0)], kept)
    with pytest.raises(ScoresError, match=rf"x\.parquet has metadata .*{said}.*; measure the"):
        read_scores(path)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("label", 7, "label of .* is 7, expected 0 to 1"),
        ("label", -1, "label of .* is -1, expected 0 to 1"),
        ("probability", 5.0, r"probability of .* is 5\.0, expected 0 to 1"),
        ("probability", float("nan"), "probability of .* is nan"),
        ("probability", None, "probability of .* is None"),
        ("logit", float("inf"), "logit of .* is inf, expected"),
        ("valid", None, "valid is null in a row"),
        ("set", None, "set is null in a row"),
    ],
)
def test_a_value_out_of_range_is_one_clear_error(
    old: ShardSet, tmp_path: Path, column: str, value: float | None, said: str
) -> None:
    """A label of 7 took an image out of the figures, and a probability of 5 changed them."""
    path = tmp_path / "x.parquet"
    table = rows_of("old", old, scored(old, (3,)), 1.0)
    cells = table.column(column).to_pylist()
    cells[5] = value
    index = table.column_names.index(column)
    field = table.schema.field(column)
    table = table.set_column(index, field, pa.array(cells, field.type))
    write_scores(path, [table], ABOUT | {"sets": {"old": ABOUT_SET}})
    with pytest.raises(ScoresError, match=rf"x\.parquet has a row .*{said}.*; measure the check"):
        read_scores(path)


def test_a_missing_column_is_one_clear_error(old: ShardSet, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_scores(path, [rows_of("old", old, scored(old), 1.0)], {})
    table = pa.parquet.read_table(path)
    text = table.column("key")
    index = table.schema.get_field_index("logit")
    for wrong in (table.drop_columns(["logit"]), table.set_column(index, "logit", text)):
        pa.parquet.write_table(wrong, path)
        with pytest.raises(
            ScoresError, match=r"x\.parquet lacks a column of scores, or .*; measure"
        ):
            read_scores(path)
    pa.parquet.write_table(table.replace_schema_metadata({"evaluation": '{"a": 1}'}), path)
    with pytest.raises(ScoresError, match="version None"):
        read_scores(path)
