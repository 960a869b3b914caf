"""The web page: `make app`. Drop, browse or paste images; the verdicts are those of `predict.py`.

What was uploaded is in memory while the page shows it, and nowhere else: Streamlit's uploader holds
the files, `st.session_state` what was found about them, and both go with the image or the page.
`app.js` is what the browser does; `.streamlit/config.toml` holds limits and colors.
"""

import base64
import io
import logging
import os
import threading
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import streamlit as st
from PIL import Image
from starlette.formparsers import MultiPartParser
from streamlit.runtime import get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.runtime.scriptrunner_utils.script_run_context import ScriptRunContext
from streamlit.runtime.uploaded_file_manager import UploadedFile

import console
from escape import markdown
from imaging.decode import MAX_BYTES, decode
from imaging.turns import Busy, turn
from model import load_detector
from model.checkpoint import NoCheckpointError
from model.inference import fitness, gradcam, provenance, results, signatures
from model.inference.detector import ImageDetector
from model.inference.prediction import UNREADABLE, Prediction
from model.inference.provenance import Evidence, read_evidence
from model.shipped.backbone import MissingError, is_shipped
from model.verdict import capital, of_hundred, percent

log = logging.getLogger("ai_images_detector")

HERE = Path(__file__).parent

# Where checkpoints are looked for: `DETECTOR_RUNS=demo/runs make app` shows the demo's. Not the
# newest run's best one: `DETECTOR_CHECKPOINT=runs/phase1 make app`.
RUNS, CHECKPOINT = "DETECTOR_RUNS", "DETECTOR_CHECKPOINT"

MIN_SIDE_PX = 32
"""A shorter side is refused: no known set has smaller images, and a guess looks like a finding."""

GRACE_S = float(os.environ.get("DETECTOR_GRACE_S", "30"))
"""Seconds from the closing of a page to the end of all it held."""

# The longer side of what is shown; the detector sees the whole file.
PREVIEW_PX, THUMBNAIL_PX = 768, 96

# Starlette would pass larger uploads through a temporary file on their way into memory.
MultiPartParser.spool_max_size = MAX_BYTES

# How a verdict looks: colors that are told apart without telling red from green, and an icon.
LOOKS = {
    "likely AI": ("orange", ":material/auto_awesome:"),
    "uncertain": ("gray", ":material/help:"),
    "no sign of AI": ("blue", ":material/photo_camera:"),
    UNREADABLE: ("red", ":material/broken_image:"),
}

# The browser's tab. Not a named icon: Streamlit lets the browser fetch those from another host.
ICON = """<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32" viewBox="0 0 32 32">
<rect x="2" y="5" width="28" height="22" rx="5" fill="#2456c8"/>
<path d="M16 5h9a5 5 0 0 1 5 5v12a5 5 0 0 1-5 5h-9z" fill="#e0682b"/>
<circle cx="16" cy="16" r="6" fill="none" stroke="#fff" stroke-width="3"/></svg>"""

LIMITS = """
- **A probability is not a proof.** Do not accuse anybody on the strength of this page alone.
- **It knows what it was trained on.** A newer generator, an unusual camera, a screenshot, heavy
  filters, or a picture that was compressed many times can mislead it, in both directions.
- **It looks at the middle of the image**, scaled to a few hundred pixels. A small edited spot in a
  real photograph can go unseen.
- **It judges how pixels were made**, not whether what they show is true.
- **A pasted picture has lost what its file said about itself**; upload the file to read that.
"""

paste = st.components.v2.component(
    "paste",
    html="<button type=button hidden>Paste from the clipboard</button><span role=status></span>",
    css="""
button { font: inherit; font-size: 0.875rem; padding: 0.45rem 0.75rem; margin-right: 0.75rem;
  color: inherit; background: none; cursor: pointer;
  border: 1px solid var(--st-border-color); border-radius: var(--st-button-radius); }
button:hover { color: var(--st-primary-color); border-color: var(--st-primary-color); }
button:focus-visible { outline: 2px solid var(--st-primary-color); outline-offset: 2px; }
span { font-size: 0.875rem; }
""",
    js=(HERE / "app.js").read_text(encoding="utf-8"),
)


@dataclass(frozen=True)
class Scored:
    """What was found about an image; `preview` and `thumbnail` are small JPEG files."""

    name: str
    prediction: Prediction
    evidence: Sequence[Evidence] = ()
    preview: bytes = b""
    thumbnail: bytes = b""


@st.cache_resource(show_spinner="Loading the detector")
def loaded_detector() -> ImageDetector:
    """The checkpoint, loaded once."""
    signatures.usual_trust_list()  # one that cannot be used is said at once
    return load_detector(folder_in(CHECKPOINT), runs=folder_in(RUNS) or Path("runs"))


def why_not(error: Exception) -> str:
    """Why there is no detector, and what whoever runs the page has to do."""
    if isinstance(error, MissingError):
        there = "in the folder of this program, then reload this page"
        return f"This page has no detector yet: {error} {there}."
    if isinstance(error, NoCheckpointError):
        return (
            f"This page has no detector: {str(error).partition(';')[0]}. Start it with {RUNS} or "
            f"{CHECKPOINT} as the folder of one that was trained, or without both to take the one "
            "that ships (python -m model fetch brings its weights)."
        )
    if isinstance(error, ValueError | OSError):
        return console.one_line(error)
    return f"the checkpoint cannot be loaded ({type(error).__name__}: {error})"


def folder_in(variable: str) -> Path | None:
    """The folder that a variable of the environment names, as options take one.

    Raises:
        ValueError: an address, or no folder.
    """
    value = os.environ.get(variable)
    try:
        return console.LocalPath(file_okay=False).convert(value, None, None) if value else None
    except click.BadParameter as error:
        raise ValueError(f"{variable}: {error.message}") from error


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


def script_context() -> ScriptRunContext:
    """What Streamlit knows of the page that this thread draws."""
    context = get_script_run_ctx()
    assert context is not None  # every line here runs in a page
    return context


@st.cache_resource(scope="session", on_release=close_soon, show_spinner=False)
def this_page() -> str:
    """The id of the session. Streamlit lets go of it when the page's connection ends."""
    return script_context().session_id


# --- in -------------------------------------------------------------------------------------------


def uploads() -> list[UploadedFile]:
    """The ways in, and what came through them."""
    number = st.session_state.setdefault("uploader", 0)
    with st.container(key="images"):  # app.js finds the uploader by this name
        files = st.file_uploader(
            "Drop images anywhere on this page, browse, or paste with Ctrl+V",
            accept_multiple_files=True,
            key=f"uploader-{number}",
        )
    with st.container(horizontal=True, vertical_alignment="center"):
        paste(key="paste")
        if files:
            st.button("Remove all", on_click=forget, args=(files,), icon=":material/delete:")
    return files


def forget(files: Sequence[UploadedFile]) -> None:
    """Drop the files now rather than when the page is closed."""
    context = script_context()
    for file in files:
        context.uploaded_file_mgr.remove_file(  # type: ignore[attr-defined]  # not in the protocol
            context.session_id, file.file_id
        )
    st.session_state["uploader"] += 1  # a new uploader is an empty one


def score_all(detector: ImageDetector, files: Sequence[UploadedFile]) -> dict[str, Scored]:
    """What is known of each file, by its id; only new files are scored."""
    before = st.session_state.get("scored", {})
    scored = {file.file_id: before[file.file_id] for file in files if file.file_id in before}
    maps = st.session_state.get("heatmaps", {})
    st.session_state["scored"] = scored  # what is no longer shown is gone
    st.session_state["heatmaps"] = {key: maps[key] for key in maps.keys() & scored.keys()}
    fresh = [file for file in files if file.file_id not in scored]
    bar = st.empty()
    for index, file in enumerate(fresh):
        bar.progress(index / len(fresh), f"Looking at {markdown(file.name)}")
        scored[file.file_id] = score(detector, file.name, file.getvalue())
    bar.empty()
    return {file.file_id: scored[file.file_id] for file in files}


def score(detector: ImageDetector, name: str, data: bytes) -> Scored:
    """One image: its probability, or why it is refused."""
    try:
        with turn(data):
            prediction = detector.predict(data)
            if prediction.error:
                return Scored(name, prediction)
            picture = Image.fromarray(decode(data))
    except Busy as error:
        refused = Prediction(name=name, probability=None, verdict=UNREADABLE, error=str(error))
        return Scored(name, refused)
    if min(picture.size) < MIN_SIDE_PX:
        size = f"{picture.width} x {picture.height} pixels"
        reason = f"{size}: too small to judge; at least {MIN_SIDE_PX} are needed each way"
        return Scored(name, replace(prediction, probability=None, verdict=UNREADABLE, error=reason))
    picture.thumbnail((PREVIEW_PX, PREVIEW_PX))
    preview = as_jpeg(picture)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    evidence = read_evidence(data, signatures.usual_trust_list())
    return Scored(name, prediction, evidence, preview, as_jpeg(picture))


def as_jpeg(picture: Image.Image) -> bytes:
    """For showing only."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=90)
    return stream.getvalue()


# --- out ------------------------------------------------------------------------------------------


def moved(detector: ImageDetector) -> ImageDetector:
    """The detector with the threshold that the slider stands at."""
    threshold = st.session_state.get("threshold", detector.threshold)
    return detector if threshold == detector.threshold else replace(detector, asked=threshold)


def show_table(
    detector: ImageDetector, scored: Mapping[str, Scored], verdicts: Mapping[str, str]
) -> str:
    """Many images at a glance; returns the id of the one to show in full."""
    counts = Counter(verdicts.values())
    said = ", ".join(f"{counts[name]} {name}" for name in LOOKS if name in counts)
    st.subheader(f"{len(scored)} images: {said}", anchor=False)
    refused = [f"- {refusal(result)}" for result in scored.values() if result.prediction.error]
    if refused:
        st.error("\n".join(refused), icon=":material/broken_image:")
    # A heading sorts too, but no key reaches it.
    order = st.segmented_control(
        "Order", ["As added", "Most likely AI first"], default="As added", required=True
    )
    ids = list(scored)
    if order != "As added":
        ids.sort(key=lambda key: -(scored[key].prediction.probability or 0.0))
    shown = [scored[key] for key in ids]
    if st.session_state.get("chosen") not in scored:
        st.session_state["chosen"] = ids[0]
    table = f"table-{hash(tuple(ids))}"  # a selection is a row's number: other rows, another table

    def choose() -> None:
        if rows := st.session_state[table]["selection"]["rows"]:
            st.session_state["chosen"] = ids[rows[0]]

    probabilities = [result.prediction.probability for result in shown]
    number = f"{capital(fitness.word_for(detector.meta))} of AI"
    st.dataframe(
        {
            "Image": [as_data_url(result.thumbnail) for result in shown],
            "Verdict": [capital(verdicts[key]) for key in ids],
            number: [None if p is None else 100 * p for p in probabilities],
            "File": [result.name for result in shown],
        },
        column_config={
            "Image": st.column_config.ImageColumn(width=64),
            "Verdict": st.column_config.TextColumn(width=100),
            number: st.column_config.ProgressColumn(
                min_value=0, max_value=100, format="%.1f%%", width=130
            ),
        },
        row_height=56,
        hide_index=True,
        placeholder="-",
        key=table,
        on_select=choose,
        selection_mode="single-row",
        alt=f"The images with verdict, {fitness.word_for(detector.meta)} and file name",
    )
    st.download_button(
        "Download as CSV",
        as_csv(detector, scored, verdicts),
        "verdicts.csv",
        "text/csv",
        on_click="ignore",
        icon=":material/download:",
    )
    return st.selectbox("Show in full", ids, key="chosen", format_func=lambda key: scored[key].name)


def as_csv(
    detector: ImageDetector, scored: Mapping[str, Scored], verdicts: Mapping[str, str]
) -> str:
    """The table as `predict.py --format csv` writes it."""
    lines = [results.header("csv")]
    for key, result in scored.items():
        values = (
            result.name, result.prediction.probability, verdicts[key], result.prediction.error,
            result.evidence, detector.identity,
        )  # fmt: skip
        lines.append(results.line("csv", dict(zip(results.COLUMNS, values, strict=True))))
    return "\n".join(lines) + "\n"


def as_data_url(jpeg: bytes) -> str | None:
    """A picture that is fetched from nowhere."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode() if jpeg else None


def refusal(result: Scored) -> str:
    """Which file was refused, and why."""
    return f"**{markdown(result.name)}**: {markdown(result.prediction.error)}"


def show_image(detector: ImageDetector, file: UploadedFile, result: Scored, said: str) -> None:
    """One image in full."""
    left, right = st.columns([3, 2], gap="medium")
    with left:
        color, icon = LOOKS[said]
        st.subheader(f":{color}[{icon} {capital(said)}]", anchor=False)
        probability = result.prediction.probability
        assert probability is not None  # what was refused is not shown
        st.markdown(f"{capital(fitness.number(detector.meta))}: **{percent(probability)}**")
        st.html(scale(probability, detector.band))
        st.caption(f"{capital(fitness.proof(detector.meta))}.")
        st.markdown("**What the file says**")
        if result.evidence:
            st.markdown("\n".join(f"- {as_markdown(item)}" for item in result.evidence))
            st.caption(provenance.MEANING)
        else:
            st.caption("Nothing of where it comes from. That is usual: most sites strip it.")
    with right:
        picture = st.empty()
        st.caption(markdown(result.name))
        if st.toggle("Heatmap: what moved the score", key="heatmap"):
            show_heatmap(detector, file, picture)
        else:
            picture.image(result.preview, width="stretch", alt=result.name)


def as_markdown(item: Evidence) -> str:
    """One thing that the file says, marked where it names AI."""
    mark = ":orange-badge[names AI] " if item.suggests == "AI" else ""
    return f"{mark}**{markdown(item.kind)}**: {markdown(item.value)} ({markdown(item.where)})"


def show_heatmap(
    detector: ImageDetector, file: UploadedFile, picture: st.delta_generator.DeltaGenerator
) -> None:
    """What moved the score, over what the network sees of the image; made once."""
    maps = st.session_state["heatmaps"]
    if file.file_id not in maps:
        try:
            data = file.getvalue()
            with picture, st.spinner("Asking the network"), turn(data):
                maps[file.file_id] = gradcam.heatmap(detector, data)
        except (gradcam.ExplainError, Busy) as error:
            picture.error(markdown(str(error)))
            return
    picture.image(maps[file.file_id], width="stretch", alt=f"Heatmap of {file.name}")
    st.caption(gradcam.MEANING)


def scale(p: float, band: tuple[float, float]) -> str:
    """A probability as a mark on a line from real to AI, with where it is uncertain."""
    low, high = (100 * end for end in band)
    blue, gray, orange = "rgb(59 130 246 / .55)", "rgb(128 128 128 / .35)", "rgb(224 104 43 / .7)"
    return f"""
<div role="img" aria-label="{percent(p)} on a scale from real to AI-generated">
<div style="position: relative; height: 10px; border-radius: 5px; background: linear-gradient(
  to right, {blue} {low:.2f}%, {gray} {low:.2f}% {high:.2f}%, {orange} {high:.2f}%)">
<div style="position: absolute; left: calc({100 * p:.2f}% - {16 * p:.2f}px); top: -3px; width: 16px;
  height: 16px; border-radius: 50%; background: currentColor"></div></div>
<div style="display: flex; justify-content: space-between; font-size: .875rem; opacity: .8;
  margin-top: 6px"><span>real</span><span>AI-generated</span></div></div>"""


def show_threshold(detector: ImageDetector) -> None:
    """Where "likely AI" begins, and what moving it costs."""
    calibration = detector.meta["calibration"]
    curve = calibration["roc"] if calibration else []
    steps = [row[0] for row in curve] or [step / 20 for step in range(1, 20)]
    with st.container(border=True):
        threshold = st.select_slider(
            f"Say likely AI from this {fitness.word_for(detector.meta)} on",
            sorted({*steps, detector.threshold}),
            value=detector.threshold,
            key="threshold",
            format_func=lambda step: f"{100 * step:.3g}%",
        )
        st.caption(rule(detector))
        if not curve:
            st.warning(
                "This checkpoint is not calibrated: read its probabilities as scores. What a "
                "threshold costs was not measured, so there are no figures here.",
                icon=":material/straighten:",
            )
            return
        # A threshold that was set by hand lies between two: the lower one promises no less.
        _, false, true = max((row for row in curve if row[0] <= threshold), default=curve[0])
        st.markdown(
            f"At this threshold {of_hundred(false)} of 100 real photographs are called AI, and "
            f"{of_hundred(true)} of 100 fakes are found."
        )
        sets = ", ".join(calibration["fitted_on"])
        st.caption(
            f"Measured on {markdown(sets)}: {calibration['reals']:,} real and "
            f"{calibration['fakes']:,} fake images. On images unlike those, expect more of both "
            "mistakes."
        )


def rule(detector: ImageDetector) -> str:
    """What the verdicts mean, in words."""
    ours = moved(detector)
    low, high, own_threshold = (f"{100 * p:.3g}%" for p in (*ours.band, detector.threshold))
    doubt = f", uncertain from there to {high}" if low != high else ""
    aside = f" The checkpoint's own threshold is {own_threshold}." if ours is not detector else ""
    return f"No sign of AI below {low}{doubt}, likely AI from {high} on.{aside}"


def about(detector: ImageDetector) -> None:
    """What the detector cannot know, and which one it is."""
    with st.expander("What this page can and cannot tell"):
        st.markdown(LIMITS)
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    network, created = detector.meta["recipe"]["network"]["name"], detector.meta["created"][:10]
    if not os.environ.get(CHECKPOINT) and is_shipped(detector.checkpoint):
        st.caption(f"There is no trained run: this is {detector.checkpoint.name}, which ships.")
    st.caption(
        f"Model {markdown(network)}, {markdown(detector.identity)}, {created}. Program "
        f"{project['version']}. Images stay in memory while this page shows them; nothing is kept."
    )


def main() -> None:
    """Draw the page."""
    st.set_page_config(page_title="Real or AI-generated?", page_icon=ICON)
    st.title("Real or AI-generated?", anchor=False)
    try:
        detector = loaded_detector()
    except Exception as error:  # whatever a damaged or unreadable checkpoint makes a loader raise
        log.warning("no detector", exc_info=True)
        st.error(markdown(why_not(error)))
        return
    for notice in detector.notices:
        st.warning(markdown(f"{capital(notice.text)}."), icon=":material/warning:")
    this_page()
    files = {file.file_id: file for file in uploads()}
    scored = score_all(detector, list(files.values()))
    if scored:
        ours = moved(detector)
        verdicts = {
            key: result.prediction.verdict if result.prediction.probability is None
            else ours.verdict(result.prediction.probability)
            for key, result in scored.items()
        }  # fmt: skip
        chosen = show_table(ours, scored, verdicts) if len(scored) > 1 else next(iter(scored))
        if scored[chosen].prediction.error:
            st.error(refusal(scored[chosen]), icon=":material/broken_image:")
        else:
            show_image(ours, files[chosen], scored[chosen], verdicts[chosen])
        if not all(result.prediction.error for result in scored.values()):
            show_threshold(detector)
    about(detector)


if __name__ == "__main__":
    main()
