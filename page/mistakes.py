"""Show a control that records a wrong verdict on the disk, as `predict.py --report-mistake` does.

Main entry: `show_mistake(detector, file, result, said)` shows the control on the page (Streamlit).
It returns a sentence for screen readers on what was kept, or that nothing was. It returns "" if the
control is not shown or the button was never pressed for this file and verdict. Errors are shown,
not raised.

- `detector`: the `ImageDetector` that `page.cost.at_slider(detector)` returns: it has the threshold
  of the slider.
- `file`: the uploaded file (Streamlit's `UploadedFile`).
- `result`: the `Scored` of this file, which `page.scored.score_all()` returns.
- `said`: the verdict of this detector, a text: `detector.verdict(result.prediction.probability)`.
  The control is shown only for "likely AI" and "no sign of AI".

If the visitor presses the button, `SHA256.json` with the true label and the verdict, and on request
a copy of the image, are written to the folder that the environment variable `DETECTOR_MISTAKES`
(constant `MISTAKES`) names. Without the variable, it is `mistakes/`; with an empty one, the control
is not shown.

Three more conditions must hold for the control to be shown:

- No other machine can reach the page; otherwise strangers could store labels and images here.
- The folder, or the one in which it is to be made, can be written.
- The image is not an example.

`keep(folder, data, label, given, name)` writes these files without the page. It returns a
`KeepResult`: `html` (what was kept or why not) and a `sentence`. A right or uncertain verdict makes
no entry. If the image has an entry already, the verdict is added and `label` becomes its label. An
entry that then has no wrong verdict is deleted, with its copy.

- `folder`: Path of the folder; it is made if it does not exist.
- `data`: the bytes of the image file.
- `label`: its true label, "real" or "fake".
- `given`: the `Verdict` that was given, which `model.mistakes.keep.verdict_of(detector,
  probability)` makes.
- `name`: the file name of the image, if a copy is wanted, else None.

`folder_to_keep_in()` returns the folder, or None if the control must not be shown; it raises
ValueError if the variable names a file or an address instead of a folder.
`is_own_machine(listens_on, headers)` returns whether only this machine can reach the page, from the
address that the server listens on (None: all) and the HTTP headers of the request (a mapping).
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

from escape import one_line
from model.inference.detector import ImageDetector
from model.mistakes.keep import Label, MistakeError, Verdict, entry_path, keep_mistake, verdict_of
from model.verdict import VERDICTS, capital
from page.detector import folder_in
from page.html import icon, show
from page.scored import Scored

MISTAKES = "DETECTOR_MISTAKES"
"""Environment variable for the folder. Unset: `mistakes`. Empty: the control is not shown."""

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
"""Addresses by which a machine reaches only itself."""

FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-Ip", "Via")
"""Headers that a proxy adds. Through a proxy on this machine, other machines can reach the page."""

LABELS: dict[str, Label] = {VERDICTS[0]: "fake", VERDICTS[2]: "real"}
"""Wrong verdict -> true label of the image. An *uncertain* verdict is never wrong."""

WORDS: dict[Label, str] = {"fake": "AI-generated", "real": "a real photograph"}


class KeepResult(NamedTuple):
    """Result of keeping a verdict: HTML for the page, and a sentence for screen readers."""

    html: Markup
    sentence: str


def is_own_machine(listens_on: str | None, headers: Mapping[str, str]) -> bool:
    """Return whether only this machine can reach the page.

    The server must listen on a loopback address (None: it listens on all addresses), and the
    request must have a loopback name as `Host` and no header of a proxy. The check of `Host`
    refuses a web site whose name was pointed to this machine (DNS rebinding).
    """
    host = urlsplit(f"//{headers.get('Host', '')}").hostname
    return (
        listens_on in LOOPBACK
        and host in LOOPBACK
        and not any(name in headers for name in FORWARDED)
    )


def folder_to_keep_in() -> Path | None:
    """Return the folder of kept mistakes, or None if the control must not be shown.

    Raises:
        ValueError: the variable is not a folder of this machine.
    """
    own = is_own_machine(config.get_option("server.address"), st.context.headers)
    if not own or os.environ.get(MISTAKES) == "":
        return None
    folder = (folder_in(MISTAKES) or Path("mistakes")).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return folder if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else None


def show_mistake(detector: ImageDetector, file: UploadedFile, result: Scored, said: str) -> str:
    """Show the control below the verdict `said`, if it is allowed. Return the result as a sentence,
    empty if the button was not pressed.
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
                '<p class="quiet">Records that this image is {}, with the verdict and the SHA-256 '
                "of the file, in {}. Every later detector can be tested on the image. Nothing "
                "leaves this machine.</p>"
            ).format(WORDS[label], folder)
        )
        with_image = st.checkbox("Keep a copy of the image too", key=f"copy {file.file_id}")
        reports: dict[tuple[str, str], KeepResult] = st.session_state.setdefault("kept", {})
        if st.button(f"Keep it: this is {WORDS[label]}", key=f"keep {file.file_id}"):
            name = result.name if with_image else None
            given = verdict_of(detector, probability)
            reports[file.file_id, said] = keep(folder, file.getvalue(), label, given, name)
        report = reports.get((file.file_id, said))
        if report:
            show(report.html)
    return report.sentence if report else ""


def keep(folder: Path, data: bytes, label: Label, given: Verdict, name: str | None) -> KeepResult:
    """Keep a wrong verdict, and a copy of the image if `name` is given. Return the result."""
    try:
        kept = keep_mistake(folder, data, label, given, copy_named=name)
    except (MistakeError, OSError) as error:
        return KeepResult(refusal_html(error), "The verdict was not kept.")
    text = capital(kept.text)
    path = entry_path(folder, hashlib.sha256(data).hexdigest())
    place = f": {path}" if kept.kept else ""
    return KeepResult(Markup("<p>{}{}</p>").format(text, place), f"{text}.")


def refusal_html(error: Exception) -> Markup:
    """Return the reason why nothing was kept, as one line of HTML."""
    return Markup('<div class="card refused">{}<p>Not kept: {}</p></div>').format(
        icon("refused"), one_line(error)
    )
