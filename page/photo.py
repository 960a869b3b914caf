"""Show an uploaded image on the web page with a frame around the crop that the network sees, and on
request a heatmap over this crop.

Main entry: `show_photo(detector, file, result)` puts the image and a switch for the heatmap on the
page (Streamlit), and returns nothing. The heatmap (Grad-CAM: regions that changed the score) is
computed once per image; if it cannot be computed, the reason is shown. `page.scored.score_all()`
must have been called before in the same session, because it makes the store of the heatmaps.

- `detector`: the `ImageDetector` that `page.detector.loaded_detector()` returns.
- `file`: the uploaded file (Streamlit's `UploadedFile`).
- `result`: its `Scored`, which `score_all()` returns; not that of a refused file.

`photo_html(result, preprocess, heatmap, busy)` returns the figure as HTML (`Markup`).

- `result`: as above.
- `preprocess`: the detector's image sizes, `detector.preprocess`.
- `heatmap`: a JPEG file as bytes (default b"": none).
- `busy`: True if the figure says that the heatmap is being computed (default False).

`crop_of(preprocess, size)` takes the size of the image in pixels (width, height) and returns the
crop (left, top, width, height) as fractions of the image's width and height.
"""

import numpy as np
import streamlit as st
from markupsafe import Markup
from PIL import Image
from streamlit.runtime.uploaded_file_manager import UploadedFile

from imaging.decode_lock import Busy, decode_lock
from model.inference import gradcam
from model.inference.detector import ImageDetector
from page.html import show
from page.scored import Scored, as_jpeg, data_url
from pipeline.augment import Preprocess, center_crop_params


def crop_of(preprocess: Preprocess, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the crop (left, top, width, height) that the network sees of an image of `size`
    (width, height), as fractions of the width and the height.
    """
    width, height = size
    params = center_crop_params(preprocess, np.array([width]), np.array([height]))
    return (
        float(params.left[0]) / width,
        float(params.top[0]) / height,
        float(params.width[0]) / width,
        float(params.height[0]) / height,
    )


def photo_html(
    result: Scored, preprocess: Preprocess, heatmap: bytes = b"", busy: bool = False
) -> Markup:
    """Return the figure as HTML. `heatmap` (a JPEG file) covers the crop; `busy` shows that the
    heatmap is being computed.
    """
    crop = crop_of(preprocess, result.size)
    place = "left: {:.3f}%; top: {:.3f}%; width: {:.3f}%; height: {:.3f}%".format(
        *(100 * share for share in crop)
    )
    inside: Markup | str = ""
    if heatmap:
        inside = Markup('<img src="{}" alt="Heatmap of {}">').format(data_url(heatmap), result.name)
    elif busy:
        inside = Markup('<span class="busy">Computing the heatmap</span>')
    size = preprocess.crop_size
    whole = min(crop[2:]) > 0.999
    seen = (
        f"The network sees the whole image, at {size} x {size} pixels."
        if whole
        else f"The network sees the part in the frame, at {size} x {size} pixels."
    )
    return Markup(
        '<figure class="photo"><div class="picture"><img src="{}" alt="{}">'
        '<div class="crop{}" style="{}">{}</div></div>'
        "<figcaption><b>{}</b> {}{}</figcaption></figure>"
    ).format(
        data_url(result.preview), result.name, " whole" if whole else "", place, inside,
        result.name, seen, Markup("<br>{}").format(gradcam.MEANING) if heatmap else "",
    )  # fmt: skip


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
            with decode_lock(data):
                maps[file.file_id] = as_jpeg(Image.fromarray(gradcam.heatmap(detector, data)))
        except (gradcam.ExplainError, Busy) as error:
            show(photo_html(result, detector.preprocess), picture)
            show(Markup('<p class="card refused">{}</p>').format(error))
            return
    show(photo_html(result, detector.preprocess, maps[file.file_id]), picture)
