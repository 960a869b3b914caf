"""The page in a real browser, on a real server that cannot write any file."""

import csv
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import requests
from PIL import Image

from model.inference.detector import ImageDetector
from model.verdict import percent
from page.figures import of_hundred, verdict_shares
from tests.browser import (
    browse,
    bytes_held,
    copy,
    drop,
    file_of,
    holds,
    in_browser,
    in_window,
    isolated,
    probability_shown,
    violations,
    wait_for,
    width_of,
)
from tests.builders import encode, photo

if TYPE_CHECKING:
    from playwright.sync_api import Route


def probability(detector: ImageDetector, data: bytes) -> str:
    """Return the probability of the same bytes from Python, as the page formats it."""
    (prediction,) = detector.predict([data])
    return percent(prediction.probability)


PHOTO = encode(photo(1, 400, 300))
OTHER = encode(photo(2, 300, 400), "PNG")


@in_browser
def test_one_image_has_the_probability_that_python_gives(visit, detector) -> None:
    page = visit()
    browse(page, file_of("one.jpg", PHOTO))
    wait_for(page, "What the file says", "Nothing about its origin")
    assert probability_shown(page) == probability(detector, PHOTO)
    (prediction,) = detector.predict([PHOTO])
    assert page.get_by_role("heading", name=prediction.verdict[1:]).is_visible()
    wait_for(page, detector.identity)


@in_browser
def test_paste_by_keyboard_by_button_and_without_an_image(visit, detector) -> None:
    page = visit()
    button = page.get_by_role("button", name="Paste from the clipboard")
    button.wait_for()  # from then on the page listens
    page.evaluate("navigator.clipboard.writeText('no picture')")
    page.keyboard.press("Control+V")
    wait_for(page, "There is no image on the clipboard.")
    copy(page, OTHER)
    page.keyboard.press("Control+V")
    wait_for(page, "What the file says", "pasted-1.png")
    # A browser decodes and encodes a copied image again; the pixels of a PNG stay equal.
    assert probability_shown(page) == probability(detector, OTHER)
    button.click()
    wait_for(page, "2 images", "pasted-2.png")
    assert page.get_by_text("There is no image").count() == 0


@in_browser
@pytest.mark.parametrize("where", ["[data-testid=stFileUploaderDropzone]", "h1"])
def test_drop_on_the_drop_zone_or_elsewhere(visit, detector, where: str) -> None:
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
    data = Path(download.value.path()).read_bytes()
    assert data.startswith(b"\xef\xbb\xbf")  # Excel reads UTF-8 only with this mark
    rows = list(csv.DictReader(data.decode("utf-8-sig").splitlines()))
    predictions = detector.predict(images)
    assert [row["path"] for row in rows] == [*(f"{i}.img" for i in range(12)), "notes.jpg"]
    for row, prediction in zip(rows, predictions, strict=False):
        assert float(row["probability"]) == pytest.approx(prediction.probability, abs=1e-6)
        assert row["verdict"] == prediction.verdict
        assert row["checkpoint"] == detector.identity
    assert (rows[12]["probability"], rows[12]["verdict"]) == ("", "unreadable")

    names = page.locator(".images td.name")
    assert names.all_inner_texts() == [*(f"{i}.img" for i in range(12)), "notes.jpg"]
    number = page.get_by_role("columnheader", name="Probability of AI")
    verdict = page.locator(".verdict")
    page.locator("h1").scroll_into_view_if_needed()
    assert not in_window(verdict)
    page.locator(".images tbody tr").nth(1).click()
    page.get_by_role("img", name="1.img", exact=True).wait_for()
    assert in_window(verdict) and in_window(page.locator(".images tbody tr").nth(1))
    number.get_by_role("button").click()
    ranked = sorted(range(12), key=lambda i: -predictions[i].probability)
    assert names.all_inner_texts() == [*(f"{i}.img" for i in ranked), "notes.jpg"]
    assert number.get_attribute("aria-sort") == "descending"
    assert page.evaluate("document.activeElement.innerText") == "Probability of AI"
    fill = page.locator(".images tbody tr i").first
    width = fill.evaluate("(bar) => parseFloat(bar.style.width)")
    assert width == pytest.approx(100 * predictions[ranked[0]].probability, abs=1e-3)
    color = "(one) => getComputedStyle(one)[%r]"
    mark = page.locator(".images tbody tr .mark").first
    assert fill.evaluate(color % "backgroundColor") == mark.evaluate(color % "color")
    page.locator(".images tbody tr").nth(3).locator("td").last.click()  # anywhere on a row
    page.get_by_role("img", name=f"{ranked[3]}.img", exact=True).wait_for()
    assert probability_shown(page) == probability(detector, images[ranked[3]])
    assert names.all_inner_texts()[0] == f"{ranked[0]}.img"  # the order stays
    page.locator(".images").get_by_role("button", name=f"{ranked[5]}.img", exact=True).press(
        "Enter"
    )
    page.get_by_role("img", name=f"{ranked[5]}.img", exact=True).wait_for()
    assert page.evaluate("document.activeElement.innerText") == f"{ranked[5]}.img"
    number.get_by_role("button").click()
    assert names.all_inner_texts()[0] == "notes.jpg"
    number.get_by_role("button").click()
    assert names.all_inner_texts()[0] == "0.img"


def bomb() -> bytes:
    """Return a PNG file of 3 kB whose header says 40,000 x 40,000 pixels."""
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
        ("all.zip", b"PK\3\4" + bytes(60), "a ZIP archive: unpack it and use the images in it"),
        (
            "![a](http://x/y) :red[b] $c$.png", b"?",
            "![a](http://x/y) :red[b] $c$.png: not an",
        ),
    ],
    ids=["broken", "other", "empty", "bomb", "tiny", "archive", "markdown"],
)  # fmt: skip
def test_a_refusal_is_one_clear_line(visit, name: str, content: bytes, said: str) -> None:
    page = visit()
    browse(page, file_of(name, content))
    wait_for(page, said)
    page.wait_for_timeout(500)
    assert isolated(page.locator(".card.refused b"))
    assert page.locator(".card.refused:visible").count() == 1
    assert page.locator(".card.refused:visible").inner_text().count(said) == 1
    reason = said.rpartition(": ")[2]
    page.locator(".for-readers[role=status]", has_text=reason).wait_for(state="attached")
    assert page.get_by_role("slider").count() == 0
    browse(page, file_of("fine.png", OTHER))
    wait_for(page, "2 images", "1 unreadable")


@in_browser
def test_file_names_and_metadata_are_shown_as_plain_text(visit) -> None:
    """File names and metadata never become links, icons, pictures or formulas."""
    exif = Image.Exif()
    exif[0x010F] = "www.evil.example me@evil.example :material/verified: :+1:"
    exif[0x0110] = "https://evil.example [a](https://evil.example) ![b](https://evil.example/x) $x$"
    name = "https:evil www.evil.example :smile: [a](b).jpg"
    page = visit()
    browse(page, file_of(name, encode(photo(1), exif=exif)))
    wait_for(page, "What the file says", "camera")
    assert all(map(isolated, page.locator("figcaption b, .says b ~ *").all()))
    page.wait_for_timeout(500)
    main = page.get_by_test_id("stMain")
    assert main.locator("a").count() == 0
    assert main.locator("img[src*=evil], .katex").count() == 0
    shown = main.inner_text()
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
    line = page.locator(".st-key-rejected li")
    line.wait_for()  # in view, not in a tooltip
    assert line.inner_text() == "huge.png: File must be 50.0MB or smaller."
    assert bytes_held(address) == 0


@in_browser
def test_every_upload_that_the_server_refuses_is_listed_with_the_reason(visit) -> None:
    page = visit()
    statuses = iter((503, 408, 503))

    def refuse(route: "Route") -> None:
        if route.request.method == "PUT":
            route.fulfill(status=next(statuses))
        else:
            route.continue_()

    page.route("**/_stcore/upload_file/**", refuse)
    lines, name = page.locator(".st-key-rejected li"), "photo\u202egpj.jpg"
    for number, added in enumerate((name, "two.jpg", "three.jpg"), 1):
        browse(page, file_of(added, PHOTO))
        lines.nth(number - 1).wait_for()
    full = "the memory for images is full; remove images, or try again later"
    late = "the upload was interrupted; remove the file and try again"
    assert lines.all_inner_texts() == [
        f"{name}: {full}", f"two.jpg: {late}", f"three.jpg: {full}",
    ]  # fmt: skip
    assert isolated(lines.first.locator("b"))  # the reason is not turned round
    assert violations(page) == []
    spoken = page.locator("[data-testid=stFileChip] [role=alert]")
    assert sorted(spoken.all_text_contents()) == sorted([full, late, full])
    page.unroute("**/_stcore/upload_file/**")
    page.get_by_role("button", name="Remove two.jpg").click()
    lines.nth(2).wait_for(state="detached")
    browse(page, file_of("one.jpg", PHOTO))
    wait_for(page, "What the file says")
    page.get_by_role("button", name="Remove all").click()
    lines.first.wait_for(state="detached")


@in_browser
def test_the_slider_changes_the_verdict_and_the_figures(visit, detector) -> None:
    calibration = detector.meta["calibration"]
    stops = sorted({detector.threshold, *(row[0] for row in calibration["roc"])})
    telling = max(calibration["roc"], key=lambda row: row[2] - row[1])
    assert telling[1] < telling[2] - 0.05, "false positives and recall could be swapped unseen"
    page = visit()
    browse(page, file_of("one.jpg", PHOTO))
    slider = page.get_by_role("slider")
    for row in (calibration["roc"][0], telling, calibration["roc"][-1]):
        threshold = row[0]
        slider.press("Home")
        for _ in range(stops.index(threshold)):
            slider.press("ArrowRight")
        (prediction,) = replace(detector, asked=(threshold, threshold)).predict([PHOTO])
        if threshold != detector.threshold:
            wait_for(page, f"No sign of AI below {100 * threshold:.3g}%, likely AI from")
            page.get_by_role("heading", name=prediction.verdict[1:]).wait_for()
        asked = replace(detector, asked=(threshold, threshold))
        kinds = "real images", "fakes"
        for name, of in zip(kinds, verdict_shares(calibration["roc"], asked.band), strict=True):
            row = page.get_by_role("row", name=f"Of 100 {name}")
            row.get_by_text(of_hundred(of.likely), exact=True).last.wait_for()
            cells = row.get_by_role("cell").all_inner_texts()
            doubt = of_hundred(of.uncertain) if threshold == detector.threshold else "-"
            assert cells == [of_hundred(of.no_sign), doubt, of_hundred(of.likely)]
        wait_for(
            page, f"Measured on {calibration['reals']} real and {calibration['fakes']} fake images"
        )


@in_browser
def test_the_heatmap_covers_the_crop_and_the_photo_stays(visit) -> None:
    page = visit()
    browse(page, file_of("one.jpg", PHOTO))
    page.get_by_role("img", name="one.jpg", exact=True).wait_for()
    page.get_by_text("Heatmap: regions that changed the score").click()
    overlay = page.get_by_role("img", name="Heatmap of one.jpg")
    overlay.wait_for()
    assert overlay.evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [32, 32]
    wait_for(page, "Red raised the score for AI")
    assert page.get_by_role("img", name="one.jpg", exact=True).is_visible()
    outer, inner = page.locator(".picture").bounding_box(), overlay.bounding_box()
    assert abs(inner["width"] - inner["height"]) <= 1 < outer["width"] - inner["width"]
    page.get_by_text("Heatmap: regions that changed the score").click()
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
def test_the_keyboard_reaches_everything(visit) -> None:
    page = visit()
    browse(page, file_of("one.jpg", PHOTO), file_of("two.png", OTHER))
    wait_for(page, "2 images", "What the file says")
    page.locator(".images").wait_for()
    page.get_by_role("slider").wait_for()  # drawn after the image
    reached, bare = [], set()
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
        if not page.evaluate(IS_RINGED):
            bare.add(reached[-1])
    order = [
        "Remove one.jpg", "Add files", "Paste from the clipboard", "Remove all", "File", "Verdict",
        "Probability of AI", "one.jpg", "two.png", "Download as CSV", "Heatmap", "Threshold",
        "What this page can and cannot tell",
    ]  # fmt: skip
    places = [
        next(
            (i for i, one in enumerate(reached) if re.search(rf"^ ?(keyboard_\w+\s+)?{name}", one)),
            None,
        )
        for name in order
    ]
    assert None not in places, dict(zip(order, places, strict=True))
    assert places == sorted(places)
    assert bare == set(), "no ring shows that these have the focus"
    for kind in ("Add files", "Remove one.jpg"):  # a finger needs 24 px (WCAG 2.2)
        box = page.get_by_role("button", name=kind).bounding_box()
        assert min(box["width"], box["height"]) >= 24


# Whether the element with the focus is drawn with a ring. The page itself needs none.
IS_RINGED = """() => {
  let one = document.activeElement;
  while (one.shadowRoot?.activeElement) one = one.shadowRoot.activeElement;
  const { outlineStyle, boxShadow } = getComputedStyle(one);
  const needsNone = "body, main, [tabindex='-1']"; // the last of these only a script can reach
  return outlineStyle !== "none" || boxShadow !== "none" || one.matches(needsNone);
}"""


@in_browser
def test_nothing_is_kept(visit, address: str) -> None:
    """Check the memory of the server; its fixture already forbids all writes to files. The image is
    so large that Starlette would use a temporary file by default."""
    large = encode(np.random.default_rng(0).integers(0, 256, (1100, 1100, 3), np.uint8), "PNG")
    assert len(large) > 3_000_000
    holds(address, 0)  # nothing is left from earlier tests
    page = visit()
    browse(page, file_of("one.png", large), file_of("two.jpg", PHOTO))
    wait_for(page, "2 images", "What the file says")
    holds(address, len(large) + len(PHOTO))
    page.get_by_role("button", name="Remove one.png").click()
    page.get_by_role("heading", name="2 images").wait_for(state="detached")
    holds(address, len(PHOTO))
    page.get_by_role("button", name="Remove all").click()
    page.get_by_text("What the file says").wait_for(state="detached")
    holds(address, 0)
    browse(page, file_of("two.jpg", PHOTO))
    wait_for(page, "What the file says")
    holds(address, len(PHOTO))
    page.close()
    holds(address, 0)
