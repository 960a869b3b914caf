"""Run the web page on which a visitor uploads images and sees the verdicts of `predict.py`.

Streamlit runs this script: `streamlit run app.py`. `make app` runs it by `app_server.py`, which
limits the memory for uploads. Main entry: `page.draw.main()`, which takes and returns nothing and
draws the page; the code of the page is in `page/`. The detector is the checkpoint in the
environment variable DETECTOR_CHECKPOINT, or else the newest run in the folder DETECTOR_RUNS
(default `runs`), or else the shipped one. If it cannot be loaded, the page says why, also if
DETECTOR_RUNS names a folder that does not exist.

Uploaded files and their results are kept in memory only (Streamlit's uploader and
`st.session_state`), until the image is removed or the page is closed. The page writes a file only
if the visitor reports a verdict as wrong, which is possible only on a page that no other machine
can reach (`page/mistakes.py`). Limits and colors are in `.streamlit/config.toml`.
"""

from page.draw import main

if __name__ == "__main__":
    main()
