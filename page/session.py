"""Free the memory of a visitor's session when uploaded files are removed or the page is closed. All
functions need a running Streamlit server.

Main entries: `this_session()` takes nothing, returns the id (text) of the visitor's Streamlit
session, and makes Streamlit call `close_soon()` with this id when the page is closed. It is called
while Streamlit draws the page. `close_soon(session)` takes such an id, returns at once, and deletes
the session after `GRACE_S` seconds (environment variable `DETECTOR_GRACE_S`, default 30) unless the
page is connected again at that moment.

`forget(files)` takes a list of uploaded files (`UploadedFile`), deletes them at once, and returns
nothing. The uploader is empty the next time `page.uploads.uploads()` draws it; this function must
have drawn it in this session before, else `forget()` raises KeyError after the files are deleted.
It is called while Streamlit draws the page, or by a button of the page (`on_click`).

`script_context()` returns Streamlit's context of the page that is being drawn. `seconds_of(text)`
returns the value of `DETECTOR_GRACE_S` as a number; if the text is no number, it raises SystemExit.
"""

import math
import os
import threading
from collections.abc import Sequence

import streamlit as st
from streamlit.runtime import get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.runtime.scriptrunner_utils.script_run_context import ScriptRunContext
from streamlit.runtime.uploaded_file_manager import UploadedFile


def seconds_of(text: str) -> float:
    """Return the value of the variable DETECTOR_GRACE_S; without a value, 30.

    Raises:
        SystemExit: it is no number of seconds.
    """
    try:
        seconds = float(text or "30")
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= threading.TIMEOUT_MAX:
        raise SystemExit(f"Error: DETECTOR_GRACE_S is {text!r}, expected a number of seconds")
    return seconds


GRACE_S = seconds_of(os.environ.get("DETECTOR_GRACE_S", ""))
"""Seconds after which the data of a closed page is deleted."""


def script_context() -> ScriptRunContext:
    """Return Streamlit's context of the page that this thread draws."""
    context = get_script_run_ctx()
    assert context is not None  # only called while a page is drawn
    return context


def close_soon(session: str) -> None:
    """Delete the session of a closed page, unless the page reconnects within `GRACE_S` seconds (a
    phone that slept).

    Streamlit itself deletes the session only when another page is closed later, which may be never.
    """
    runtime = get_instance()

    def close() -> None:
        if not runtime.is_active_session(session):
            runtime.close_session(session)  # deletes files, state and pictures

    loop = runtime._get_async_objs().eventloop  # sessions are closed in this loop
    timer = threading.Timer(GRACE_S, loop.call_soon_threadsafe, [close])
    timer.daemon = True
    timer.start()


@st.cache_resource(scope="session", on_release=close_soon, show_spinner=False)
def this_session() -> str:
    """Return the id of the session. When the page disconnects, Streamlit calls `close_soon`."""
    return script_context().session_id


def forget(files: Sequence[UploadedFile]) -> None:
    """Delete the files now, not only when the page is closed."""
    context = script_context()
    for file in files:
        context.uploaded_file_mgr.remove_file(  # type: ignore[attr-defined]  # not in the protocol
            context.session_id, file.file_id
        )
    st.session_state["uploader"] += 1  # a new key: a new, empty uploader
