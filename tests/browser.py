"""Operate the web page in a browser as a person does, and read its content."""

import base64
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import requests

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page
    from streamlit.testing.v1 import AppTest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def in_browser(test: Callable) -> Callable:
    """Mark a test that opens the page: slow, and skipped without Chromium."""
    test = pytest.mark.filterwarnings("ignore::DeprecationWarning")(test)
    return pytest.mark.slow(
        pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")(test)
    )


def html_of(page: "AppTest") -> list[str]:
    """Return the HTML elements of a page that runs in Streamlit's AppTest, without styles."""
    bodies = [element.proto.body for element in page.get("html")]
    return [body for body in bodies if not body.startswith("<style>")]


def file_of(name: str, data: bytes) -> dict[str, object]:
    return {"name": name, "mimeType": "", "buffer": data}


def browse(page: "Page", *files: dict[str, object] | Path) -> None:
    """Choose files in the browser's upload dialog."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name=re.compile("Upload|Add files")).click()
    chooser.value.set_files(list(files))


def copy(page: "Page", data: bytes) -> None:
    """Put an image, the bytes of a PNG file, on the clipboard."""
    page.evaluate(
        """async (data) => {
          const blob = await (await fetch("data:image/png;base64," + data)).blob();
          await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }""",
        base64.b64encode(data).decode(),
    )


def drop(page: "Page", where: str, name: str, data: bytes) -> None:
    """Drop a file on the element `where`, a CSS selector."""
    transfer = page.evaluate_handle(
        """([name, data]) => {
          const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], name));
          return transfer;
        }""",
        [name, base64.b64encode(data).decode()],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event(where, event, {"dataTransfer": transfer})


def wait_for(page: "Page", *texts: str) -> None:
    """Wait until the page shows each of the texts."""
    for text in texts:
        page.get_by_text(text).first.wait_for()


def settle(page: "Page") -> None:
    """Wait until the script of the page has run to its end after a click."""
    page.wait_for_timeout(500)  # the click reaches the server
    page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for()


def probability_shown(page: "Page") -> str:
    """Return the probability shown for the only image on the page."""
    return page.locator(".verdict strong").inner_text()


def width_of(page: "Page") -> int:
    """Return the width of the content in px. If wider than the window, it scrolls sideways."""
    return page.evaluate(
        "Math.max(document.documentElement.scrollWidth,"
        " ...[...document.querySelectorAll('[data-testid=stMain]')]"
        ".map((part) => part.scrollWidth))"
    )


def in_window(part: "Locator") -> bool:
    """Return whether all of the element is in the window, but for part of a pixel: browsers scroll
    by whole pixels.
    """
    return part.evaluate(
        "(part) => { const box = part.getBoundingClientRect();"
        " return box.top > -1 && box.bottom < innerHeight + 1; }"
    )


def isolated(part: "Locator") -> bool:
    """Return whether text of another writing direction in an element, such as the name of a file,
    leaves the text around it as it is.
    """
    return part.evaluate(
        "(part) => [part, ...part.querySelectorAll('bdi')]"
        ".some((one) => getComputedStyle(one).unicodeBidi === 'isolate')"
    )


def violations(page: "Page") -> list[str]:
    """What axe finds, its best practices too: rule, element, why."""
    from axe_playwright_python.sync_playwright import Axe

    page.wait_for_timeout(700)  # colors fade in
    return [
        f"{rule['id']}: {node['html'][:200]} {node['failureSummary']}"
        for rule in Axe().run(page).response["violations"]
        for node in rule["nodes"]
    ]


def unprinted(page: "Page") -> set[str]:
    """Return the elements with a background of their own that browsers do not print, by the class
    of their parent. Cards and links to sections are as good without one.
    """
    return set(
        page.evaluate(
            """() => [...document.querySelectorAll("main *:not(.card, nav *)")].filter((part) => {
              const { backgroundColor, printColorAdjust } = getComputedStyle(part);
              return backgroundColor !== "rgba(0, 0, 0, 0)" && printColorAdjust !== "exact";
            }).map((part) => `${part.parentElement.className} ${part.tagName}`)"""
        )
    )


def bytes_held(address: str) -> int:
    """Return the bytes of uploads in the server's memory, from its metrics."""
    text = requests.get(f"{address}/_stcore/metrics", timeout=10).text
    lines = [line for line in text.splitlines() if 'cache_type="UploadedFileManager"' in line]
    return sum(int(line.rpartition(" ")[2]) for line in lines if "bytes" in line)


def holds(address: str, expected: int) -> None:
    """Wait up to 30 s until the server has `expected` bytes of uploads in memory."""
    for _ in range(300):
        if bytes_held(address) == expected:
            return
        time.sleep(0.1)
    raise AssertionError(f"{bytes_held(address)} bytes held after 30 s, expected {expected}")
