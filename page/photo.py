"""Show an uploaded image on the web page with a frame around each crop that the network sees (one
frame if both are equal), and on request a heatmap over the crops.

Main entry: `show_photo(detector, file, result)` puts the image and a switch for the heatmap on the
page (Streamlit), and returns nothing. The heatmap (of the regions that raised the score) is
computed once per image; if it cannot be computed, the reason is shown. `page.scored.score_all()`
must have been called before in the same session, because it makes the store of the heatmaps.

- `detector`: the `ImageDetector` that `page.detector.loaded_detector()` returns.
- `file`: the uploaded file (Streamlit's `UploadedFile`).
- `result`: its `Scored`, which `score_all()` returns; not that of a refused file.

`photo_html(result, preprocess, heatmaps, busy)` returns the figure as HTML (`Markup`).

- `result`: as above.
- `preprocess`: the detector's image sizes, `detector.preprocess`.
- `heatmaps`: JPEG files as bytes, one for each crop (default (): none).
- `busy`: True if the figure says that the heatmap is being computed (default False).

`crops_of(preprocess, size)` takes the size of the image in pixels (width, height) and returns the
crops, a list of (left, top, width, height) as fractions of the image's width and height: the
resized crop, then the detail if there is one. `shown_reason(error)` returns the text of an error of
a heatmap without paths of this machine.
"""

from collections.abc import Sequence

import numpy as np
import streamlit as st
from markupsafe import Markup
from PIL import Image
from streamlit.runtime.uploaded_file_manager import UploadedFile

import console
from imaging.decode_lock import Busy, decode_lock, hold
from model.inference import gradcam
from model.inference.detector import ImageDetector
from page.html import show
from page.scored import Scored, as_jpeg, data_url
from pipeline.augment import center_crop_params
from pipeline.preprocess import Preprocess


def crops_of(
    preprocess: Preprocess, size: tuple[int, int]
) -> list[tuple[float, float, float, float]]:
    """Return the crops (left, top, width, height) that the network sees of an image of `size`
    (width, height), as fractions of the width and the height: the resized one, then the detail if
    there is one.
    """
    width, height = size
    params = center_crop_params(preprocess, np.array([width]), np.array([height])).row(0)
    return [
        (left / width, top / height, wide / width, high / height)
        for top, left, high, wide in params.windows
    ]


def photo_html(
    result: Scored, preprocess: Preprocess, heatmaps: Sequence[bytes] = (), busy: bool = False
) -> Markup:
    """Return the figure as HTML. `heatmaps` (JPEG files), one for each crop, cover the crops;
    `busy` shows that they are being computed.
    """
    crops = crops_of(preprocess, result.size)
    crops = crops[:1] if crops[-1] == crops[0] else crops  # equal crops of a small image
    size, whole = preprocess.crop_size, min(crops[0][2:]) > 0.999
    frames = []
    for number, crop in enumerate(crops):
        kind = "detail" if number else "whole" if whole else ""
        inside: Markup | str = ""
        if heatmaps:
            name = f"Heatmap of {'the detail of ' if number else ''}{result.printable_name}"
            inside = Markup('<img src="{}" alt="{}">').format(data_url(heatmaps[number]), name)
        elif busy and not number:
            inside = Markup('<span class="busy">Computing the heatmap</span>')
        place = "left: {:.3f}%; top: {:.3f}%; width: {:.3f}%; height: {:.3f}%".format(
            *(100 * share for share in crop)
        )
        frames.append(
            Markup('<div class="crop {}" style="{}">{}</div>').format(kind, place, inside)
        )
    seen = "the whole image" if whole else "the part in the frame"
    detail = ", and the small frame at full resolution" if len(crops) > 1 else ""
    return Markup(
        '<figure class="photo"><div class="picture"><img src="{}" alt="{}">{}</div>'
        "<figcaption><b><bdi>{}</bdi></b> The network sees {}, at {} x {} pixels{}.{}</figcaption>"
        "</figure>"
    ).format(
        data_url(result.preview), result.printable_name, Markup("").join(frames),
        result.printable_name, seen, size, size, detail,
        Markup("<br>{}").format(gradcam.MEANING) if heatmaps else "",
    )  # fmt: skip


def shown_reason(error: Exception) -> str:
    """Return the reason for which there is no heatmap, for visitors: without paths of this machine,
    which go to the log.
    """
    if not isinstance(error, gradcam.NoCaptumError):
        return str(error)
    console.log.warning("%s", error)
    return "A heatmap needs the library captum. The log of this page says how to install it."


def show_photo(detector: ImageDetector, file: UploadedFile, result: Scored) -> None:
    """Show the image and a switch for its heatmap; the image stays visible meanwhile."""
    picture = st.empty()
    if not st.toggle("Heatmap: regions that changed the score", key="heatmap"):
        show(photo_html(result, detector.preprocess), picture)
        return
    maps = st.session_state["heatmaps"]
    if file.file_id not in maps:
        show(photo_html(result, detector.preprocess, busy=True), picture)
        try:
            data = file.getvalue()
            with decode_lock(data), hold(detector.lock):
                drawn = gradcam.heatmap(detector, data)
            crops = np.split(drawn, detector.preprocess.crops)
            maps[file.file_id] = [as_jpeg(Image.fromarray(crop)) for crop in crops]
        except (gradcam.ExplainError, Busy) as error:
            show(photo_html(result, detector.preprocess), picture)
            show(Markup('<p class="card refused">{}</p>').format(shown_reason(error)))
            return
    show(photo_html(result, detector.preprocess, maps[file.file_id]), picture)
