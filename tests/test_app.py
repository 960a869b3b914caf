"""The web page in a real browser, on a real server that may not write a single byte to a file."""

import contextlib
import csv
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import requests
from PIL import Image

import app
from imaging import turns
from model import load_detector
from model.calibrate import calibrate
from model.checkpoint import annotate
from model.inference.detector import ImageDetector
from model.score import score_set
from pipeline.loader import open_loader
from pipeline.loading import Loading
from sharding.format import open_shards
from tests.browser import (
    CHROMIUM,
    browse,
    bytes_held,
    copy,
    drop,
    file_of,
    holds,
    probability_shown,
    wait_for,
    width_of,
)
from tests.builders import ROOT, encode, photo, train_tiny

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request


def in_browser(test: Callable) -> Callable:
    """Marks of a test that opens the page."""
    test = pytest.mark.filterwarnings("ignore::DeprecationWarning")(test)
    return pytest.mark.slow(
        pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")(test)
    )


# --- fast ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "said"),
    [(0.0, "under 0.1%"), (0.0009, "under 0.1%"), (0.0012, "0.1%"), (0.4567, "45.7%"),
     (0.999, "99.9%"), (0.9991, "over 99.9%"), (1.0, "over 99.9%")],
)  # fmt: skip
def test_a_probability_is_never_a_certainty(p: float, said: str) -> None:
    assert app.percent(p) == said


def test_a_share_is_never_none_or_all() -> None:
    said = [app.of_hundred(share).replace("*", "") for share in (0.0, 0.004, 0.05, 0.996, 1.0)]
    assert said == ["fewer than 1", "fewer than 1", "about 5", "more than 99", "more than 99"]


def test_a_large_image_makes_no_small_one_wait_and_no_one_waits_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "LARGE_PIXELS", 10_000)
    monkeypatch.setattr(turns, "WAIT_S", 0.1)
    small, large = encode(photo(1, 50, 50)), encode(photo(1, 200, 100), "PNG")
    assert [turns.pixels_of(data) for data in (small, large, b"none")] == [2500, 20_000, 0]
    taken = []
    with turns.turn(large):
        with turns.turn(small):
            taken.append("small")
        with pytest.raises(turns.Busy, match="busy with other images"), turns.turn(large):
            taken.append("large")
    with turns.turn(large):
        taken.append("large again")
    assert taken == ["small", "large again"]

    class Found:
        def predict(self, _images: object) -> None:
            raise AssertionError("it was not this image's turn")

    with turns.turn(large):
        scored = app.score(Found(), "a.png", large)
    assert scored.prediction.verdict == app.UNREADABLE
    assert "try this one again later" in scored.prediction.error


# --- in the browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint that is trained, and calibrated, on the tiny sets."""
    folder = train_tiny(data, tmp_path_factory.mktemp("runs"), "run.epochs=4")
    detector = load_detector(runs=folder)
    shards = open_shards([data / "new"])
    loading = Loading(backend="pil", num_workers=0)
    scores = score_set(
        detector.net,
        open_loader(
            shards, preprocess=detector.preprocess, loading=loading, device=detector.device
        ),
    )
    fitted = calibrate(scores.labels, scores.logits)
    annotate(detector.checkpoint, fitted.entries({"new": "0"}))
    return folder


@pytest.fixture(scope="module")
def detector(runs: Path) -> ImageDetector:
    return load_detector(runs=runs)


@pytest.fixture(scope="module")
def address(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server as `make app` starts it. The system refuses it every byte written to a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "streamlit", "run", "app_server.py", "--server.port", str(port),
    ]  # fmt: skip
    server = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"DETECTOR_RUNS": str(runs), "TMPDIR": str(tmp_path_factory.mktemp("tmp")),
                          "PYTHONDONTWRITEBYTECODE": "1", "DETECTOR_GRACE_S": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )  # fmt: skip
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(server.stdout), daemon=True)
    reader.start()
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            if requests.get(f"{address}/_stcore/health", timeout=5).text == "ok":
                break
        assert server.poll() is None, said
        time.sleep(0.1)
    yield address
    server.terminate()
    server.wait()
    reader.join()
    server.stdout.close()
    assert "Traceback" not in "".join(said), "".join(said)


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: "Browser", address: str) -> Iterator[Callable[..., "Page"]]:
    """Opens the page: `visit(color_scheme="dark")`. At the end: nobody but the server was asked for
    anything, and the browser reported no error.
    """
    contexts, strange = [], []

    def ask(request: "Request") -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            strange.append(request.url)

    def visit(**options: object) -> "Page":
        context = chromium.new_context(
            permissions=["clipboard-read", "clipboard-write"], accept_downloads=True, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(150_000)
        page.on("request", ask)
        page.on("pageerror", lambda error: strange.append(str(error)))
        page.goto(address)
        page.get_by_text("What this page can and cannot tell").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not strange


def probability(detector: ImageDetector, data: bytes) -> str:
    """What Python says of the same bytes."""
    (prediction,) = detector.predict([data])
    return app.percent(prediction.probability)


PHOTO = encode(photo(1, 400, 300))
OTHER = encode(photo(2, 300, 400), "PNG")


@in_browser
def test_one_image_has_the_probability_that_python_gives(visit, detector) -> None:
    page = visit()
    browse(page, file_of("one.jpg", PHOTO))
    wait_for(page, "What the file says", "Nothing of where it comes from")
    assert probability_shown(page) == probability(detector, PHOTO)
    (prediction,) = detector.predict([PHOTO])
    assert page.get_by_role("heading", name=prediction.verdict[1:]).is_visible()
    wait_for(page, detector.identity)


@in_browser
def test_pasting_by_the_keyboard_by_the_button_and_nothing(visit, detector) -> None:
    page = visit()
    button = page.get_by_role("button", name="Paste from the clipboard")
    button.wait_for()  # from then on the page listens
    page.evaluate("navigator.clipboard.writeText('no picture')")
    page.keyboard.press("Control+V")
    wait_for(page, "There is no picture on the clipboard.")
    copy(page, OTHER)
    page.keyboard.press("Control+V")
    wait_for(page, "What the file says", "pasted-1.png")
    # A browser decodes and encodes what is copied; of a PNG the pixels stay.
    assert probability_shown(page) == probability(detector, OTHER)
    button.click()
    wait_for(page, "2 images", "pasted-2.png")
    assert page.get_by_text("There is no picture").count() == 0


@in_browser
@pytest.mark.parametrize("where", ["[data-testid=stFileUploaderDropzone]", "h1"])
def test_dropping_on_the_drop_zone_or_beside_it(visit, detector, where: str) -> None:
    page = visit()
    drop(page, where, "fallen.jpg", PHOTO)
    wait_for(page, "What the file says", "fallen.jpg")
    assert probability_shown(page) == probability(detector, PHOTO)


@in_browser
def test_many_images_in_a_table_and_as_csv(visit, detector) -> None:
    images = [encode(photo(seed, 100, 90), "PNG" if seed % 2 else "JPEG") for seed in range(12)]
    page = visit()
    files = [file_of(f"{i}.img", data) for i, data in enumerate(images)]
    browse(page, *files, file_of("notes.jpg", b"<html>"))
    wait_for(page, "13 images", "1 unreadable", "not an image this program reads")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    rows = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
    predictions = detector.predict(images)
    assert [row["path"] for row in rows] == [*(f"{i}.img" for i in range(12)), "notes.jpg"]
    for row, prediction in zip(rows, predictions, strict=False):
        assert float(row["probability"]) == pytest.approx(prediction.probability, abs=1e-6)
        assert row["verdict"] == prediction.verdict
        assert row["checkpoint"] == detector.identity
    assert (rows[12]["probability"], rows[12]["verdict"]) == ("", "unreadable")

    page.get_by_text("Most likely AI first").click()
    page.wait_for_timeout(1500)  # the answer closes the list
    page.get_by_role("combobox").press("ArrowDown")
    page.get_by_role("option").first.wait_for()
    shown = page.get_by_role("option").all_inner_texts()  # those that fit
    ranked = sorted(range(12), key=lambda i: -predictions[i].probability)
    assert len(shown) >= 5
    assert shown == [*(f"{i}.img" for i in ranked), "notes.jpg"][: len(shown)]
    page.get_by_role("option", name=f"{ranked[3]}.img", exact=True).click()
    page.get_by_role("img", name=f"{ranked[3]}.img", exact=True).wait_for()
    assert probability_shown(page) == probability(detector, images[ranked[3]])


def bomb() -> bytes:
    """A PNG of 3 kB that claims 40,000 x 40,000 pixels."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(3_000_000))), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@in_browser
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("broken.jpg", PHOTO[:2000], "JPEG does not decode"),
        ("page.png", b"<html>", "not an image this program reads"),
        ("empty.png", b"", "empty file"),
        ("bomb.png", bomb(), "more than the 200 allowed"),
        ("tiny.png", encode(photo(1, 31, 200), "PNG"), "31 x 200 pixels: too small to judge"),
        (
            "![a](http://x/y) :red[b] $c$.png", b"?",
            "![a](http:\u2060//x/y) :\u2060red[b] $c$.png: not an",
        ),
    ],
    ids=["broken", "other", "empty", "bomb", "tiny", "markdown"],
)  # fmt: skip
def test_a_refusal_is_one_clear_line(visit, name: str, content: bytes, said: str) -> None:
    page = visit()
    browse(page, file_of(name, content))
    wait_for(page, said)
    page.wait_for_timeout(500)
    assert page.get_by_role("alert").count() == 1
    assert page.get_by_role("alert").inner_text().count(said) == 1
    assert page.get_by_role("slider").count() == 0
    browse(page, file_of("fine.png", OTHER))
    wait_for(page, "2 images", "1 unreadable")


@in_browser
def test_what_a_file_says_is_no_markup(visit) -> None:
    """No link, icon, picture or formula comes of a file's name or metadata."""
    exif = Image.Exif()
    exif[0x010F] = "www.evil.example me@evil.example :material/verified: :+1:"
    exif[0x0110] = "https://evil.example [a](https://evil.example) ![b](https://evil.example/x) $x$"
    name = "https:evil www.evil.example :smile: [a](b).jpg"
    page = visit()
    browse(page, file_of(name, encode(photo(1), exif=exif)))
    wait_for(page, "What the file says", "camera")
    page.wait_for_timeout(500)
    main = page.get_by_test_id("stMain")
    assert main.locator("a").count() == 0
    assert main.locator("img[src*=evil], .katex").count() == 0
    shown = main.inner_text().replace("\u2060", "")
    for text in (exif[0x010F], exif[0x0110], name):
        assert text in shown
    assert main.get_by_test_id("stIconMaterial").filter(has_text="verified").count() == 0


@in_browser
def test_no_other_page_may_frame_this_one(address: str) -> None:
    answer = requests.get(address, timeout=10)
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Frame-Options"] == "DENY"


@in_browser
def test_a_file_that_is_too_large_is_refused_before_it_is_sent(visit, address, tmp_path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(50 * 2**20 + 1)
    holds(address, 0)
    page = visit()
    browse(page, tmp_path / "huge.png")
    wait_for(page, "50.0MB or smaller")
    assert bytes_held(address) == 0


@in_browser
def test_the_slider_moves_the_verdict_and_says_what_it_costs(visit, detector) -> None:
    calibration = detector.meta["calibration"]
    stops = sorted({detector.threshold, *(row[0] for row in calibration["roc"])})
    telling = max(calibration["roc"], key=lambda row: row[2] - row[1])
    assert telling[1] < telling[2] - 0.05, "false positives and recall could be swapped unseen"
    page = visit()
    browse(page, file_of("one.jpg", PHOTO))
    slider = page.get_by_role("slider")
    for row in (calibration["roc"][0], telling, calibration["roc"][-1]):
        threshold, false, true = row
        slider.press("Home")
        for _ in range(stops.index(threshold)):
            slider.press("ArrowRight")
        (prediction,) = replace(detector, asked=threshold).predict([PHOTO])
        if threshold != detector.threshold:
            wait_for(page, f"No sign of AI below {100 * threshold:.3g}%, likely AI from")
            page.get_by_role("heading", name=prediction.verdict[1:]).wait_for()
        wait_for(
            page,
            f"{app.of_hundred(false)} of 100 real photographs".replace("*", ""),
            f"{app.of_hundred(true)} of 100 fakes are found".replace("*", ""),
            f"Measured on new: {calibration['reals']} real and {calibration['fakes']} fake",
        )


@in_browser
def test_the_heatmap_takes_the_place_of_the_image(visit) -> None:
    page = visit()
    browse(page, file_of("one.jpg", PHOTO))
    page.get_by_role("img", name="one.jpg", exact=True).wait_for()
    page.get_by_text("Heatmap: what moved the score").click()
    overlay = page.get_by_role("img", name="Heatmap of one.jpg")
    overlay.wait_for()
    assert overlay.evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [32, 32]
    wait_for(page, "Red raised the score for AI")
    page.get_by_text("Heatmap: what moved the score").click()
    page.get_by_role("img", name="one.jpg", exact=True).wait_for()


@in_browser
def test_a_phone_never_scrolls_sideways(visit) -> None:
    page = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    assert width_of(page) == 390
    name = "a_name_without_any_place_to_break_it_" * 3 + ".jpg"
    browse(page, file_of(name, PHOTO))
    wait_for(page, "What the file says")
    assert width_of(page) == 390
    browse(page, file_of("two.png", OTHER), file_of(name + ".jpg", b"?" * 40))
    wait_for(page, "3 images")
    page.get_by_text("What this page can and cannot tell").click()
    wait_for(page, "A probability is not a proof")
    assert width_of(page) == 390


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_follow_the_system_and_are_legible(visit, scheme: str) -> None:
    """Contrast of text by WCAG 2.2: 4.5, and 3 for large text."""
    page = visit(color_scheme=scheme)
    browse(page, file_of("one.jpg", PHOTO), file_of("x.jpg", b"?"))
    wait_for(page, "2 images", "What the file says")

    def luminance(color: str) -> float:
        values = [int(v) / 255 for v in re.findall(r"\d+", color)[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = "(one) => [getComputedStyle(one).color, getComputedStyle(one).fontSize]"
    ground = luminance(
        page.locator("[data-testid=stApp]").evaluate("(e) => getComputedStyle(e).backgroundColor")
    )
    assert (ground < 0.05) == (scheme == "dark")
    headings = page.get_by_role("heading").all()
    texts = page.locator("[data-testid=stMarkdownContainer] p").all()
    for element in [*headings, *texts]:
        if not element.is_visible() or element.evaluate("(e) => !!e.closest('[role=alert]')"):
            continue
        color, size = element.evaluate(style)
        bright, dim = sorted((luminance(color), ground), reverse=True)
        needed = 3.0 if float(size[:-2]) >= 24 else 4.5
        assert (bright + 0.05) / (dim + 0.05) >= needed, (element.inner_text(), color)


@in_browser
def test_the_keyboard_reaches_everything(visit) -> None:
    page = visit()
    browse(page, file_of("one.jpg", PHOTO), file_of("two.png", OTHER))
    wait_for(page, "2 images", "What the file says")
    page.locator("canvas").first.wait_for()
    reached = []
    for _ in range(45):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                """() => {
                  let one = document.activeElement;
                  while (one.shadowRoot?.activeElement) one = one.shadowRoot.activeElement;
                  return `${one.getAttribute("aria-label") ?? ""} ${one.innerText ?? ""} `
                    + (one.dataset.testid ?? "");
                }"""
            )
        )
    order = [
        "Remove one.jpg", "Add files", "Paste from the clipboard", "Remove all", "As added",
        "data-grid-canvas", "Download as CSV", "Show in full", "Heatmap", "Say likely AI",
        "What this page can and cannot tell",
    ]  # fmt: skip
    places = [next((i for i, one in enumerate(reached) if name in one), None) for name in order]
    assert None not in places, dict(zip(order, places, strict=True))
    assert places == sorted(places)


@in_browser
def test_nothing_is_kept(visit, address: str) -> None:
    """The server cannot write to files at all (its fixture); here, its memory. The image is large
    enough that uploads would go through a temporary file."""
    large = encode(np.random.default_rng(0).integers(0, 256, (1100, 1100, 3), np.uint8), "PNG")
    assert len(large) > 3_000_000
    holds(address, 0)  # of the tests before
    page = visit()
    browse(page, file_of("one.png", large), file_of("two.jpg", PHOTO))
    wait_for(page, "2 images", "What the file says")
    holds(address, len(large) + len(PHOTO))
    page.get_by_role("button", name="Remove one.png").click()
    page.get_by_text("2 images").wait_for(state="detached")
    holds(address, len(PHOTO))
    page.get_by_role("button", name="Remove all").click()
    page.get_by_text("What the file says").wait_for(state="detached")
    holds(address, 0)
    browse(page, file_of("two.jpg", PHOTO))
    wait_for(page, "What the file says")
    holds(address, len(PHOTO))
    page.close()
    holds(address, 0)
