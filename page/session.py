"""The session of a visitor: when everything that it holds is let go of."""

import os
import threading
from collections.abc import Sequence

import streamlit as st
from streamlit.runtime import get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.runtime.scriptrunner_utils.script_run_context import ScriptRunContext
from streamlit.runtime.uploaded_file_manager import UploadedFile

GRACE_S = float(os.environ.get("DETECTOR_GRACE_S", "30"))
"""Seconds from the closing of a page to the end of all it held."""


def script_context() -> ScriptRunContext:
    """What Streamlit knows of the page that this thread draws."""
    context = get_script_run_ctx()
    assert context is not None  # every line here runs in a page
    return context


def close_soon(session: str) -> None:
    """Forget a page that was closed, unless it comes back (a phone that slept) within `GRACE_S`.

    Left to itself, Streamlit forgets it when another page is closed later, which may be never.
    """
    runtime = get_instance()

    def close() -> None:
        if not runtime.is_active_session(session):
            runtime.close_session(session)  # files, state and pictures

    loop = runtime._get_async_objs().eventloop  # closing a session is allowed there only
    timer = threading.Timer(GRACE_S, loop.call_soon_threadsafe, [close])
    timer.daemon = True
    timer.start()


@st.cache_resource(scope="session", on_release=close_soon, show_spinner=False)
def this_session() -> str:
    """The id of the session. Streamlit lets go of it when the page's connection ends."""
    return script_context().session_id


def forget(files: Sequence[UploadedFile]) -> None:
    """Drop the files now rather than when the page is closed."""
    context = script_context()
    for file in files:
        context.uploaded_file_mgr.remove_file(  # type: ignore[attr-defined]  # not in the protocol
            context.session_id, file.file_id
        )
    st.session_state["uploader"] += 1  # a new uploader is an empty one
