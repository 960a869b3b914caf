"""Parts of the page, tested without a browser."""

import contextlib
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from markupsafe import Markup
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imaging import decode
from imaging import decode_lock as locks
from model import load_detector
from model.inference import gradcam
from model.inference.prediction import UNREADABLE, Prediction
from model.inference.provenance import Evidence, read_evidence
from model.verdict import percent
from page.cost import hundred_html
from page.draw import sentence
from page.examples import examples
from page.figures import Measured, VerdictShares, measured_on, of_hundred, rates, verdict_shares
from page.photo import crops_of, photo_html, shown_reason
from page.scored import Scored, score
from page.session import seconds_of
from page.start import figures_html
from page.table import row, summary
from page.verdict import evidence_html, refused_html, scale_html
from pipeline.preprocess import Preprocess
from tests.builders import JPEG, encode, photo

ROC = [(0.1, 0.5, 1.0), (0.4, 0.3, 0.9), (0.7, 0.04, 0.6), (0.9, 0.0, 0.2)]
SOURCES = {
    "a": {"reals": 300, "fakes": 0, "false_positive_rate": 0.1, "recall": None, "uncertain": 0.5},
    "b": {"reals": 100, "fakes": 0, "false_positive_rate": 0.0, "recall": None, "uncertain": 0.1},
    "c": {"reals": 0, "fakes": 100, "false_positive_rate": None, "recall": 0.4, "uncertain": 0.2},
}


def test_visitors_see_no_path_of_the_server_if_captum_is_missing(
    monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(gradcam.NoCaptumError) as raised:
        gradcam._require_captum()
    assert "captum" in shown_reason(raised.value) and "/" not in shown_reason(raised.value)
    assert any("install the extra `heatmap`: " in line for line in logged)
    assert shown_reason(gradcam.ExplainError("no map")) == "no map"


@pytest.mark.parametrize(
    ("p", "said"),
    [(0.0, "under 0.1%"), (0.0009, "under 0.1%"), (0.0012, "0.1%"), (0.4567, "45.7%"),
     (0.999, "99.9%"), (0.9991, "over 99.9%"), (1.0, "over 99.9%")],
)  # fmt: skip
def test_a_probability_is_never_a_certainty(p: float, said: str) -> None:
    assert percent(p) == said


def test_a_share_is_never_shown_as_0_or_100() -> None:
    said = [of_hundred(share) for share in (0.0, 0.004, 0.05, 0.996, 1.0)]
    assert said == ["under 1", "under 1", "5", "over 99", "over 99"]


def test_the_first_screen_shows_the_rates_on_left_out_sources() -> None:
    calibration = {
        "fitted_on": ["phase1"], "sources": SOURCES, "roc": ROC, "reals": 400, "fakes": 100,
        "method": "sources left out, pooled",
    }  # fmt: skip
    meta = {"calibration": calibration, "threshold": 0.7}
    measured = rates(meta)
    assert measured.false_positives == Measured(pytest.approx(0.075), 400, 0.0, 0.1)
    assert measured.recall == Measured(pytest.approx(0.4), 100, 0.4, 0.4)
    assert measured.uncertain == pytest.approx(0.36)
    html = figures_html(measured, measured_on(meta))
    assert "phase1" not in html
    assert ">8</span>" in html and ">40</span>" in html and ">36</span>" in html
    assert "400 real images, by source under 1 to 10" in html


def test_without_sources_the_rates_come_from_the_roc_curve() -> None:
    calibration = {"fitted_on": ["val"], "sources": {}, "roc": ROC, "reals": 50, "fakes": 40}
    meta = {"calibration": calibration, "threshold": 0.7}
    measured = rates(meta)
    assert measured.recall == Measured(0.6, 40) and measured.false_positives == Measured(0.04, 50)
    html = figures_html(measured, measured_on(meta))
    assert "of the kinds that the detector was trained on" in html and "by source" not in html
    assert rates({"calibration": None, "threshold": 0.5}) is None
    without = {name: value for name, value in calibration.items() if name != "roc"}
    assert rates({"calibration": without, "threshold": 0.5}) is None
    assert "Not known" in figures_html(None, "")


def test_a_rate_that_no_source_has_is_not_shown() -> None:
    """A stranger's calibration may say so."""
    unknown = {"reals": 9, "fakes": 0, "false_positive_rate": None, "recall": None}
    calibration = {
        "sources": {"a": unknown | {"uncertain": None}, "b": unknown | {"reals": 0, "recall": 1.0}},
        "method": "sources left out, pooled", "roc": [], "reals": 9, "fakes": 9,
    }  # fmt: skip
    calibration["sources"]["b"]["uncertain"] = 0.5
    assert rates({"calibration": calibration, "threshold": 0.5}) is None
    measured = rates({"calibration": calibration | {"roc": ROC}, "threshold": 0.7})
    assert measured.recall == Measured(0.6, 9) and not measured.left_out


def test_a_calibration_without_counts_has_no_figures() -> None:
    """It is allowed, as a stranger may write it; it was a KeyError."""
    alone = {"band": [0.3, 0.6], "roc": ROC}
    assert rates({"calibration": alone, "threshold": 0.5}) is None
    assert "on images of the kinds" in measured_on({"calibration": alone})
    sources = {"a": {"false_positive_rate": 0.1, "recall": 0.9}}
    of_sources = {"sources": sources, "method": "sources left out, pooled"}
    assert rates({"calibration": of_sources, "threshold": 0.5}) is None
    assert "Measured on images of 1 source," in measured_on({"calibration": of_sources})


def test_only_left_out_sources_were_scored_by_detectors_without_them() -> None:
    calibration = {
        "fitted_on": ["val"], "reals": 1000, "fakes": 20, "sources": {"a": {}},
        "method": "validation sets by source, pooled",
    }  # fmt: skip
    assert measured_on({"calibration": calibration}) == (
        "Measured on 1,000 real and 20 fake images of the kinds that the detector was trained on. "
        "On other kinds of images, expect more errors."
    )
    calibration["method"] = "sources left out, pooled"
    assert measured_on({"calibration": calibration}) == (
        "Measured on 1,000 real and 20 fake images of 1 source, each scored by a detector trained "
        "without its source: these images were of a new kind for the detector, as yours may be."
    )


def test_the_verdicts_of_100_images_follow_the_band() -> None:
    reals, fakes = verdict_shares(ROC, (0.4, 0.7))
    assert reals == VerdictShares(pytest.approx(0.7), pytest.approx(0.26), pytest.approx(0.04))
    assert fakes == VerdictShares(pytest.approx(0.1), pytest.approx(0.3), pytest.approx(0.6))
    cells = Markup(hundred_html(ROC, (0.4, 0.7))).striptags()
    assert "Of 100 real images 70 26 4 Of 100 fakes 10 30 60".replace(" ", "") in cells.replace(
        " ", ""
    )
    assert hundred_html(ROC, (0.7, 0.7)).count("<td>-</td>") == 2


def test_the_drawn_frame_is_the_crop_of_the_network() -> None:
    preprocess = Preprocess(resize_size=64, crop_size=32)
    assert crops_of(preprocess, (400, 200)) == [(0.375, 0.25, 0.25, 0.5)]
    prediction = Prediction(name="a", probability=0.4, verdict="uncertain")
    result = Scored("a", prediction, preview=JPEG, size=(400, 200))
    html = photo_html(result, preprocess)
    assert "left: 37.500%; top: 25.000%; width: 25.000%; height: 50.000%" in html
    assert "the part in the frame, at 32 x 32 pixels" in html
    whole = photo_html(replace(result, size=(90, 90)), Preprocess(resize_size=32, crop_size=32))
    assert "crop whole" in whole and "sees the whole image" in whole


def test_the_detail_crop_has_a_frame_and_a_heatmap_of_its_own() -> None:
    preprocess = Preprocess(resize_size=64, crop_size=32, detail_crop=True)
    assert crops_of(preprocess, (400, 200)) == [
        (0.375, 0.25, 0.25, 0.5), (0.46, 0.42, 0.08, 0.16),
    ]  # fmt: skip
    prediction = Prediction(name="a", probability=0.4, verdict="uncertain")
    result = Scored("a", prediction, preview=JPEG, size=(400, 200))
    html = photo_html(result, preprocess)
    assert "crop detail" in html and "left: 46.000%; top: 42.000%; width: 8.000%" in html
    assert "at 32 x 32 pixels, and the small frame at full resolution." in html
    assert "busy" not in html and photo_html(result, preprocess, busy=True).count("busy") == 1
    drawn = photo_html(result, preprocess, [JPEG, JPEG])
    assert "Heatmap of a" in drawn and "Heatmap of the detail of a" in drawn
    small = photo_html(replace(result, size=(20, 20)), replace(preprocess, resize_size=32))
    assert "crop whole" in small and "detail" not in small and "full resolution" not in small


@pytest.mark.parametrize(
    ("state", "kind"),
    [("trusted", "trusted"), ("valid, signer unknown", "unknown"), ("invalid", "invalid")],
)
def test_a_signature_is_shown_with_its_state(state: str, kind: str) -> None:
    value = f"{state} (why): signed by <b>x</b>"
    html = evidence_html([Evidence("C2PA", value, "C2PA manifest", "AI", state)], 3)
    assert f'<span class="state {kind}">{state}</span><bdi> (why): signed by &lt;b&gt;x' in html
    assert (
        html.striptags().count(state) == 1
        and ("names AI" in html) == (state != "invalid")
        and html.startswith('<div class="card"><h3>')
    )
    plain = evidence_html([Evidence("camera", f"{state} (why)", "EXIF")], 2)
    assert "state" not in plain.replace("statement", "")  # evidence without a signature
    assert "most websites remove such information" in evidence_html([], 2)


def test_file_names_and_reasons_are_escaped() -> None:
    prediction = Prediction(name="x", probability=None, verdict=UNREADABLE, error="<i>bad</i>")
    html = refused_html([Scored("<img src=x onerror=alert(1)>", prediction)])
    assert "<img" not in html and "<i>" not in html and "&lt;i&gt;bad" in html


def test_a_name_cannot_turn_the_text_beside_it_round(small_runs: Path) -> None:
    name, detector = "photo\u202egpj.exe", load_detector(runs=small_runs)
    prediction = Prediction(name="x", probability=0.4, verdict="uncertain")
    refused = Prediction(name="x", probability=None, verdict=UNREADABLE, error="empty file")
    judged = Scored(name, prediction, preview=JPEG, size=(400, 200))
    shown = [
        refused_html([Scored(name, refused)]), photo_html(judged, detector.preprocess, [JPEG]),
        row("a", judged, "uncertain")["name"], sentence(detector, judged, "uncertain"),
        sentence(detector, Scored(name, refused), UNREADABLE),
    ]  # fmt: skip
    assert all(r"photo\u202egpj.exe" in text and "\u202e" not in text for text in shown)
    screenshot = "Screenshot at 9.41.00\u202fAM.png"
    assert row("a", replace(judged, name=screenshot), "uncertain")["name"] == screenshot


def test_the_scale_shows_the_band_and_has_an_aria_label() -> None:
    html = scale_html(0.25, (0.4, 0.7))
    assert "width: 40.00%" in html and "width: 30.00%" in html and "left: 25.00%" in html
    assert 'aria-label="25.0% on a scale from 0% to 100%; likely AI begins at 70%"' in html
    assert "uncertain</span>" not in scale_html(0.25, (0.5, 0.5))


def test_the_metadata_of_the_examples_says_that_a_program_drew_them() -> None:
    drawn = examples()
    assert [example.title for example in drawn] == [
        "Drawn by a program", "Drawn, with a simulated camera", "Drawn, with a simulated generator",
    ]  # fmt: skip
    for example in drawn:
        assert Image.open(io.BytesIO(example.data)).size == (640, 480)
        (said,) = read_evidence(example.data)
        assert "algorithmicMedia" in said.value and said.suggests == ""


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf", "1e400"])
def test_an_impossible_grace_period_is_one_line_that_names_the_variable(text: str) -> None:
    with pytest.raises(SystemExit, match=f"^Error: DETECTOR_GRACE_S is '{text}', expected a numb"):
        seconds_of(text)
    assert [seconds_of(text) for text in ("", "0", "1.5")] == [30, 0, 1.5]


def test_an_image_is_decoded_while_the_network_is_in_use(
    small_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, image = load_detector(runs=small_runs), encode(photo(1))
    expected = detector.predict(image)
    assert score(detector, "a.jpg", image).prediction == expected
    monkeypatch.setattr(locks, "WAIT_S", 0.1)
    with ThreadPoolExecutor(1) as other, contextlib.ExitStack() as visitor:
        other.submit(visitor.enter_context, detector.lock).result()
        refused = score(detector, "b.jpg", b"<html>").prediction
        waited = score(detector, "c.jpg", image)
        other.submit(visitor.close).result()
    assert refused.error.startswith("not an image")
    assert "busy with other images" in waited.prediction.error and waited.was_busy


def test_many_images_and_a_sentence_say_which_files_name_ai(small_runs: Path) -> None:
    detector = load_detector(runs=small_runs)
    info = PngInfo()
    info.add_text("parameters", "a castle\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1")
    files = {"a": encode(photo(1)), "b": encode(photo(1), "PNG", pnginfo=info)}
    scored = {name: score(detector, name, data) for name, data in files.items()}
    verdicts = dict.fromkeys(files, "uncertain")
    assert summary(scored, verdicts) == "2 images: 2 uncertain; 1 file names AI"
    marks = [row(name, scored[name], "uncertain")["marks"] for name in files]
    assert marks == [[], [("names AI", "ai")]]
    said = [sentence(detector, scored[name], "uncertain") for name in files]
    assert ["The file itself names AI." in one for one in said] == [False, True]


def test_a_statement_whose_signature_is_invalid_does_not_count(small_runs: Path) -> None:
    """Whoever moves the manifest of an AI image onto a photograph gets such a signature."""
    said = Prediction(name="a", probability=0.4, verdict="uncertain")
    moved = Evidence("C2PA", "invalid (x): AI", "C2PA manifest", "AI", "invalid")
    signed = replace(moved, state="valid, signer unknown")
    label = Evidence("source type", "trainedAlgorithmicMedia", "XMP", "AI")
    scored = {
        name: Scored(name, said, evidence)
        for name, evidence in {"a": [moved], "b": [signed], "c": [moved, label]}.items()
    }
    counts = summary(scored, dict.fromkeys(scored, "uncertain"))
    assert counts == "3 images: 3 uncertain; 2 files name AI; 2 files have an invalid signature"
    counts = summary({"a": scored["a"]}, {"a": "uncertain"})
    assert counts == "1 images: 1 uncertain; 1 file has an invalid signature"
    marks = {
        name: [text for text, _ in row(name, result, "uncertain")["marks"]]
        for name, result in scored.items()
    }
    assert marks == {
        "a": ["invalid signature"], "b": ["names AI"], "c": ["names AI", "invalid signature"],
    }  # fmt: skip
    spoken = sentence(load_detector(runs=small_runs), scored["a"], "uncertain")
    assert "names AI" not in spoken and "The file has an invalid signature." in spoken


def test_large_images_do_not_delay_small_ones_and_waiting_has_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(locks, "LARGE_PIXELS", 10_000)
    monkeypatch.setattr(locks, "WAIT_S", 0.1)
    small, large = encode(photo(1, 50, 50)), encode(photo(1, 200, 100), "PNG")
    assert [locks.pixels_of(data) for data in (small, large, b"none")] == [2500, 20_000, 0]
    info = PngInfo()
    info.add_text("Title", "hello")
    damaged = encode(Image.new("RGB", (200, 100)), "PNG", pnginfo=info).replace(b"hello", b"jello")
    assert locks.pixels_of(damaged) == 20_000  # as the decoder, which leaves the text out
    taken = []
    with locks.decode_lock(large):
        with locks.decode_lock(small):
            taken.append("small")
        with pytest.raises(locks.Busy, match="busy with other images"), locks.decode_lock(large):
            taken.append("large")
    with locks.decode_lock(large):
        taken.append("large again")
    assert taken == ["small", "large again"]

    class Found:
        def predict(self, _images: object) -> None:
            raise AssertionError("it was not this image's turn")

    with locks.decode_lock(large):
        scored = score(Found(), "a.png", large)
    assert scored.prediction.verdict == UNREADABLE
    assert "try this one again later" in scored.prediction.error


@pytest.mark.parametrize("kind", ["PNG", "AVIF"])
def test_an_upload_is_decoded_once(
    small_runs: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A picture of a phone takes seconds, while other visitors wait."""
    detector, calls, upright = load_detector(runs=small_runs), [], decode._upright_pixels
    counted = lambda *args: calls.append(args) or upright(*args)  # noqa: E731
    monkeypatch.setattr(decode, "_upright_pixels", counted)
    scored = score(detector, "a", encode(photo(1, 1000, 900), kind))
    assert len(calls) == 1
    assert scored.size == (1000, 900) and Image.open(io.BytesIO(scored.preview)).size == (768, 691)
    assert scored.prediction.probability is not None
