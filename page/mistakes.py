"""Show a control that keeps a wrong verdict on the disk, as `python -m model mistakes add` does.

Main entry: `show_mistake()` takes the detector, the uploaded file, its result, and its verdict
(`said`). If the user presses the button, `keep()` writes the true label, the verdict and the file's
SHA-256, and on request a copy of the image, to the folder that the environment variable
`DETECTOR_MISTAKES` names (default `mistakes/`). Both functions return in words what was kept:
`show_mistake()` as a sentence for screen readers, `keep()` as a `Report` with HTML. Errors are
shown, not raised.

The control exists only on a page that no other machine can reach (`is_own_machine()`) and whose
folder can be written (`folder_to_keep_in()`): otherwise strangers could store labels and pictures
here.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import streamlit as st
from markupsafe import Markup
from streamlit import config
from streamlit.runtime.uploaded_file_manager import UploadedFile

import console
from model.inference.detector import ImageDetector
from model.mistakes.keep import Label, MistakeError, Verdict, keep_mistake, verdict_of
from model.verdict import VERDICTS
from page.detector import folder_in
from page.html import icon, show
from page.scored import Scored

MISTAKES = "DETECTOR_MISTAKES"
"""The variable that names the folder; `mistakes` without it, and nothing is offered if empty."""

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
"""Names by which a machine reaches itself."""

FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-Ip", "Via")
"""Headers of a proxy, which stands before a page for others even where both are on one machine."""

LABELS: dict[str, Label] = {VERDICTS[0]: "fake", VERDICTS[2]: "real"}
"""What an image is of which a verdict is wrong; an uncertain one claims nothing."""

WORDS: dict[Label, str] = {"fake": "AI-generated", "real": "a real photograph"}


class Report(NamedTuple):
    """What became of a verdict that was to be kept: to be seen, and to be heard."""

    html: Markup
    sentence: str


def is_own_machine(listens_on: str | None, headers: Mapping[str, str]) -> bool:
    """Whether only this machine reaches the page: the server listens on no other address (None is
    all of them), no proxy stands before it, and the browser asked for it by a name of loopback. A
    site that points its own name here, to use this machine from afar, is another one.
    """
    host = urlsplit(f"//{headers.get('Host', '')}").hostname
    return (
        listens_on in LOOPBACK
        and host in LOOPBACK
        and not any(name in headers for name in FORWARDED)
    )


def folder_to_keep_in() -> Path | None:
    """The folder of kept mistakes, or None where this page offers to keep none.

    Raises:
        ValueError: the variable names no folder of this machine.
    """
    own = is_own_machine(config.get_option("server.address"), st.context.headers)
    if not own or os.environ.get(MISTAKES) == "":
        return None
    folder = (folder_in(MISTAKES) or Path("mistakes")).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return folder if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else None


def show_mistake(detector: ImageDetector, file: UploadedFile, result: Scored, said: str) -> str:
    """The control below the verdict `said`, where there may be one; returns what became of it
    in a sentence, empty before it was to be kept.
    """
    probability = result.prediction.probability
    if said not in LABELS or result.is_example or probability is None:
        return ""
    try:
        folder = folder_to_keep_in()
    except ValueError as error:
        show(refusal_html(error))
        return ""
    if folder is None:
        return ""
    label = LABELS[said]
    with st.expander("This verdict is wrong"):
        show(
            Markup(
                '<p class="quiet">Keeps that this image is {}, with the verdict and the SHA-256 of '
                "the file, in {}. Every later detector can be held against it. Nothing leaves this "
                "machine.</p>"
            ).format(WORDS[label], folder)
        )
        with_image = st.checkbox("Keep a copy of the image too", key=f"copy {file.file_id}")
        reports: dict[tuple[str, str], Report] = st.session_state.setdefault("kept", {})
        if st.button(f"Keep it: this is {WORDS[label]}", key=f"keep {file.file_id}"):
            name = result.name if with_image else None
            given = verdict_of(detector, probability)
            reports[file.file_id, said] = keep(folder, file.getvalue(), label, given, name)
        report = reports.get((file.file_id, said))
        if report:
            show(report.html)
    return report.sentence if report else ""


def keep(folder: Path, data: bytes, label: Label, given: Verdict, name: str | None) -> Report:
    """Keep a verdict, and a copy of the image if it has a `name`; what became of it."""
    try:
        kept = keep_mistake(folder, data, label, given, copy_named=name)
    except (MistakeError, OSError) as error:
        return Report(refusal_html(error), "The verdict was not kept.")
    text = f"{kept.text[0].upper()}{kept.text[1:]}"
    path = folder / f"{hashlib.sha256(data).hexdigest()}.json"
    place = f": {path}" if kept.kept else ""
    return Report(Markup("<p>{}{}</p>").format(text, place), f"{text}.")


def refusal_html(error: Exception) -> Markup:
    """Why nothing was kept, in a line."""
    return Markup('<div class="card refused">{}<p>Not kept: {}</p></div>').format(
        icon("refused"), console.one_line(error)
    )
