"""Tests of the page's control for wrong verdicts: when it is shown, and what it writes."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from streamlit.testing.v1 import AppTest

from model.inference.detector import ImageDetector
from model.mistakes.keep import read_mistakes
from model.verdict import VERDICTS
from page import mistakes
from page.mistakes import is_own_machine
from tests.browser import browse, file_of, html_of, in_browser, settle, wait_for, width_of
from tests.builders import JPEG
from tests.page.conftest import serving

if TYPE_CHECKING:
    from playwright.sync_api import Page

HASH = hashlib.sha256(JPEG).hexdigest()
NO_SIGN, UNCERTAIN, LIKELY = VERDICTS


@pytest.mark.parametrize(
    ("listens_on", "headers", "own"),
    [
        ("127.0.0.1", {"Host": "127.0.0.1:8501"}, True),
        ("localhost", {"Host": "localhost"}, True),
        ("::1", {"Host": "[::1]:8501"}, True),
        ("0.0.0.0", {"Host": "127.0.0.1:8501"}, False),
        (None, {"Host": "127.0.0.1:8501"}, False),
        ("192.168.1.5", {"Host": "127.0.0.1:8501"}, False),
        ("127.0.0.1", {"Host": "detector.example"}, False),
        ("127.0.0.1", {"Host": "127.0.0.1.evil.example:8501"}, False),
        ("127.0.0.1", {}, False),
        ("127.0.0.1", {"Host": "127.0.0.1", "X-Forwarded-For": "203.0.113.5"}, False),
        ("127.0.0.1", {"Host": "127.0.0.1", "Forwarded": "for=203.0.113.5"}, False),
        ("127.0.0.1", {"Host": "127.0.0.1", "X-Real-Ip": "203.0.113.5"}, False),
    ],
)
def test_is_own_machine(listens_on: str | None, headers: dict[str, str], own: bool) -> None:
    assert is_own_machine(listens_on, headers) == own


def draw_control(folder: str, verdict: str, score: float, is_example: bool) -> None:
    """Show the control below a verdict on a page without anything else."""
    from types import SimpleNamespace

    import streamlit as st

    from model import load_detector
    from model.inference.prediction import Prediction
    from page.mistakes import show_mistake
    from page.scored import Scored
    from tests.builders import JPEG

    prediction = Prediction(name="mine.jpg", probability=score, verdict=verdict)
    result = Scored("mine.jpg", prediction, is_example=is_example)
    file = SimpleNamespace(file_id="7", getvalue=lambda: JPEG)
    st.text(show_mistake(load_detector(folder), file, result, verdict))


Draw = Callable[..., AppTest]


@pytest.fixture
def draw(small_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Return a function that shows the control as on the own machine, with folder `kept`."""
    (checkpoint,) = small_runs.glob("small/step_*")
    monkeypatch.setenv("DETECTOR_MISTAKES", str(tmp_path / "kept"))
    monkeypatch.setattr(mistakes, "is_own_machine", lambda *_arguments: True)

    def draw(verdict: str, score: float, is_example: bool = False) -> AppTest:
        arguments = {
            "folder": str(checkpoint), "verdict": verdict, "score": score, "is_example": is_example,
        }  # fmt: skip
        page = AppTest.from_function(draw_control, default_timeout=60, kwargs=arguments).run()
        assert not page.exception
        return page

    return draw


@pytest.mark.parametrize(
    ("verdict", "score", "label", "words"),
    [(LIKELY, 0.9, "real", "a real photograph"), (NO_SIGN, 0.1, "fake", "AI-generated")],
)
def test_a_wrong_verdict_is_kept_after_the_button_is_pressed(
    draw: Draw, tmp_path: Path, verdict: str, score: float, label: str, words: str
) -> None:
    page, folder = draw(verdict, score), tmp_path / "kept"
    assert page.expander[0].label == "This verdict is wrong"
    assert not folder.exists(), "nothing is written before the button is pressed"
    assert page.button[0].label == f"Keep it: this is {words}"
    assert any(f"is {words}," in html and f"in {folder}." in html for html in html_of(page))
    page.button[0].click().run()
    assert [path.name for path in folder.iterdir()] == [f"{HASH}.json"]
    (mistake,) = read_mistakes(folder)
    (given,) = mistake.verdicts
    assert (mistake.label, given.verdict, given.score) == (label, verdict, score)
    assert given.detector.startswith("small/step_0000001 ")
    assert page.text[0].value == "Kept, without its image."
    assert f"<p>Kept, without its image: {folder / HASH}.json</p>" in html_of(page)
    page.checkbox[0].check().run()  # the report stays until the next press
    assert f"<p>Kept, without its image: {folder / HASH}.json</p>" in html_of(page)
    page.button[0].click().run()
    assert (folder / f"{HASH}.jpg").read_bytes() == JPEG
    assert page.text[0].value == "Kept already, with its image."


@pytest.mark.parametrize(
    ("verdict", "score", "is_example"), [(UNCERTAIN, 0.5, False), (LIKELY, 0.9, True)]
)
def test_an_uncertain_verdict_and_an_example_have_no_control(
    draw: Draw, verdict: str, score: float, is_example: bool
) -> None:
    assert not draw(verdict, score, is_example).expander


def test_the_control_needs_the_own_machine_and_a_writable_folder(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert draw(LIKELY, 0.9).expander
    with monkeypatch.context() as patched:
        patched.setattr(mistakes, "is_own_machine", is_own_machine)  # the test page has no Host
        assert not draw(LIKELY, 0.9).expander
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path)
        assert not draw(LIKELY, 0.9).expander
    (tmp_path / "file").touch()
    monkeypatch.setenv("DETECTOR_MISTAKES", str(tmp_path / "file"))
    page = draw(LIKELY, 0.9)
    assert not page.expander
    assert any("Not kept: DETECTOR_MISTAKES: " in html for html in html_of(page))
    monkeypatch.setenv("DETECTOR_MISTAKES", str(tmp_path / "file" / "below"))
    assert not draw(LIKELY, 0.9).expander
    monkeypatch.setenv("DETECTOR_MISTAKES", "")
    assert not draw(LIKELY, 0.9).expander
    monkeypatch.delenv("DETECTOR_MISTAKES")
    monkeypatch.chdir(tmp_path)
    assert any(f"in {tmp_path / 'mistakes'}." in html for html in html_of(draw(LIKELY, 0.9)))


def test_an_error_is_shown_in_one_line(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "<b>"))

    page = draw(LIKELY, 0.9)
    page.button[0].click().run()
    monkeypatch.setattr(mistakes, "keep_mistake", full)
    page.button[0].click().run()
    (said,) = (html for html in html_of(page) if "Not kept: " in html)
    assert f"<p>Not kept: {tmp_path}/&lt;b&gt;: No space left on device</p>" in said
    assert page.text[0].value == "The verdict was not kept."
    assert not any("<p>Kept" in html for html in html_of(page))


def open_control(page: "Page", data: bytes) -> None:
    browse(page, file_of("mine.jpg", data))
    wait_for(page, "What the file says")
    settle(page)
    page.get_by_text("This verdict is wrong").click()
    page.get_by_role("button", name="Keep it").wait_for()


@in_browser
def test_the_browser_keeps_a_mistake_with_its_image(
    chromium, runs: Path, detector: ImageDetector, claimed: tuple[bytes, str], tmp_path: Path
) -> None:
    data, verdict = claimed
    sha256, folder = hashlib.sha256(data).hexdigest(), tmp_path / "kept"
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    with serving(runs, tmp_path, writes=True) as address:
        page = chromium.new_page(**phone)
        page.set_default_timeout(150_000)
        page.goto(address)
        page.get_by_role("button", name="Paste from the clipboard").wait_for()
        open_control(page, data)
        page.get_by_text("Keep a copy of the image too").click()
        settle(page)
        page.get_by_role("button", name="Keep it").click()
        wait_for(page, f"Kept, with its image: {folder / sha256}.json")
        settle(page)
        heard = page.locator(".for-readers[role=status]").text_content()
        assert heard.endswith("Kept, with its image.")
        assert width_of(page) == 390
        page.close()
    (mistake,) = read_mistakes(folder)
    assert mistake.image_path(folder).read_bytes() == data
    (given,) = mistake.verdicts
    assert (given.detector, given.verdict) == (detector.identity, verdict)
    assert given.score == pytest.approx(detector.predict(data).probability)
    assert mistake.label == ("real" if verdict == LIKELY else "fake")


@in_browser
def test_a_server_that_cannot_write_shows_the_error(visit, claimed: tuple[bytes, str]) -> None:
    page = visit()
    open_control(page, claimed[0])
    page.get_by_role("button", name="Keep it").click()
    wait_for(page, "Not kept: ", "File too large")
    assert page.locator(".card.refused:visible").count() == 1
