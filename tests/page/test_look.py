"""Accessibility of the page by axe: every state, on wide, dark, phone and zoomed screens."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from page.examples import examples
from tests.browser import (
    browse,
    file_of,
    in_browser,
    in_window,
    settle,
    violations,
    wait_for,
    width_of,
)
from tests.builders import encode, photo

if TYPE_CHECKING:
    from playwright.sync_api import Page

PHOTO = file_of("one.jpg", encode(photo(1, 400, 300)))
BROKEN = file_of("broken.jpg", b"<html>")
NAME = "a_name_without_any_place_to_break_it_" * 3
MANY = [PHOTO, file_of(f"{NAME}.png", encode(photo(2, 300, 400), "PNG")), BROKEN]

WIDE = {"viewport": {"width": 1280, "height": 900}}
DARK = {**WIDE, "color_scheme": "dark"}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
ZOOMED = {"viewport": {"width": 640, "height": 450}, "device_scale_factor": 2}


@in_browser
@pytest.mark.parametrize("state", ["start", "one", "many", "refused", "mistake"])
@pytest.mark.parametrize(
    "options", [WIDE, DARK, PHONE, ZOOMED], ids=["wide", "dark", "phone", "zoom"]
)
def test_axe_finds_nothing_and_nothing_scrolls_sideways(
    visit: Callable[..., "Page"], state: str, options: dict[str, object],
    claimed: tuple[bytes, str],
) -> None:  # fmt: skip
    page = visit(**options)
    files = {
        "start": [], "one": [PHOTO], "many": MANY, "refused": [BROKEN],
        "mistake": [file_of("one.jpg", claimed[0])],
    }[state]  # fmt: skip
    if files:
        browse(page, *files)
        wait_for(page, "not an image" if state == "refused" else "What the file says")
    else:
        page.locator(".rate").first.wait_for()
        page.locator(".examples img").first.wait_for()
    if state == "mistake":
        settle(page)
        page.get_by_text("This verdict is wrong").click()
        page.get_by_role("button", name="Keep it").click()
        wait_for(page, "Not kept: ")  # this server may not write
    assert violations(page) == []
    for kind in ("likely", "uncertain", "none") if state == "many" else ():
        mark = page.locator(".images .chosen .mark")  # the row has a background of its own
        mark.evaluate("(mark, kind) => { mark.className = `mark ${kind}`; }", kind)
        assert violations(page) == []
    icons = page.locator("[data-testid=stIconMaterial], .icon")
    assert icons.count() > 0
    assert all(icon.get_attribute("aria-hidden") == "true" for icon in icons.all())
    assert width_of(page) == options["viewport"]["width"]
    ground = page.locator("[data-testid=stApp]").evaluate(
        "(e) => getComputedStyle(e).backgroundColor"
    )
    assert (ground == "rgb(17, 21, 27)") == ("color_scheme" in options)


@in_browser
def test_axe_can_find_something(visit: Callable[..., "Page"]) -> None:
    page = visit()
    page.evaluate("document.querySelector('h1').style.color = '#ddd'")
    assert any(line.startswith("color-contrast") for line in violations(page))


@in_browser
def test_an_example_is_an_image_like_any_other(visit: Callable[..., "Page"]) -> None:
    page = visit()
    for example in examples():
        page.get_by_role("button", name=example.title, exact=True).wait_for()
    page.get_by_role("button", name="Drawn by a program", exact=True).dblclick()  # one file only
    page.get_by_role("img", name="dawn.jpg", exact=True).wait_for()
    wait_for(page, "algorithmicMedia", "Their verdicts do not show how good the detector is")
    assert page.get_by_text("Or try an example").count() == 0
    status = page.locator(".for-readers[role=status]")
    status.filter(has_text="dawn.jpg: ").wait_for(state="attached")
    said = status.text_content()
    assert said.startswith("dawn.jpg: ") and said.endswith("A probability is not a proof.")
    page.emulate_media(forced_colors="active")  # backgrounds are removed unless a part keeps them
    for part in (".icon", ".scale i", ".scale b", ".stSlider div", ".stCheckbox div"):
        kept = page.locator(part).first.evaluate("(e) => getComputedStyle(e).forcedColorAdjust")
        assert kept == "none", part


@in_browser
@pytest.mark.parametrize("count", [1, 3])
def test_on_a_phone_the_image_and_its_verdict_are_in_the_window(
    visit: Callable[..., "Page"], count: int
) -> None:
    page = visit(**{**PHONE, "viewport": {"width": 390, "height": 420}})
    names = [f"{index}.jpg" for index in range(count)]
    browse(page, *(file_of(name, encode(photo(1, 400, 300))) for name in names))
    wait_for(page, "Heatmap")
    result = page.locator(".verdict" if count == 1 else ".images tbody tr").first
    top = "document.querySelector('.st-key-results').getBoundingClientRect().top"
    page.wait_for_function(f"0 < {top} && {top} < 99")
    for part in ("img", ".said" if count == 1 else ".mark"):
        assert result.locator(part).first.is_visible()
        assert in_window(result.locator(part).first)
