"""Show the uploader of the web page: images are browsed for, dropped or pasted.

Main entry: `uploads()` takes nothing, puts the uploader and its buttons on the page (Streamlit),
and returns the list of uploaded files (Streamlit's `UploadedFile`), empty if there are none. The
button "Paste from the clipboard" is shown if the browser allows it, "Remove all" while there are
files. Files that the uploader or the server rejected are listed with the reasons; they are not
returned. `announce(text, files)` makes screen readers speak a text, shows the results of new file
ids, and returns nothing. Uploaded files stay in memory.
"""

from collections.abc import Collection
from pathlib import Path

import streamlit as st
from starlette.formparsers import MultiPartParser
from streamlit.runtime.uploaded_file_manager import UploadedFile

from imaging.decode import MAX_BYTES
from page.html import icon
from page.session import forget

HERE = Path(__file__).parent

# Keeps uploads in memory: Starlette would write larger ones to a temporary file.
MultiPartParser.spool_max_size = MAX_BYTES

_paste = st.components.v2.component(
    "paste",
    html='<button type="button" class="plain" hidden>Paste from the clipboard</button>'
    '<span role="status"></span>',
    js=(HERE / "paste.js").read_text(encoding="utf-8"),
    isolate_styles=False,
)

_rejected = st.components.v2.component(
    "rejected",
    html=f'<div class="card refused" hidden>{icon("refused")}<ul></ul></div>',
    js=(HERE / "rejected.js").read_text(encoding="utf-8"),
    isolate_styles=False,
)

_live = st.components.v2.component(
    "live",
    html='<div class="for-readers" role="status"></div>',
    js=(HERE / "live.js").read_text(encoding="utf-8"),
    isolate_styles=False,
)


def uploads() -> list[UploadedFile]:
    """Show the uploader and its buttons; returns the uploaded files."""
    number = st.session_state.setdefault("uploader", 0)
    with st.container(key="images"):  # paste.js finds the uploader by this key
        files = st.file_uploader(
            "Drop images anywhere on this page, browse, or paste with Ctrl+V",
            accept_multiple_files=True,
            key=f"uploader-{number}",
        )
    with st.container(horizontal=True, vertical_alignment="center", key="beside"):
        _paste(key="paste")
        if files:
            st.button("Remove all", on_click=forget, args=(files,))
    _rejected(key="rejected")
    return files


def announce(text: str, files: Collection[str]) -> None:
    """Let screen readers speak `text`, and scroll to the results if one of the file ids `files` is
    new and the results are not visible.
    """
    _live(key="live", data={"text": text, "files": list(files)})
