"""Streamlit script of the web page (`make app`): upload images, see the verdicts of `predict.py`.

Uploaded files and their results are kept in memory only (Streamlit's uploader and
`st.session_state`), until the image is removed or the page is closed. Only a wrong verdict is
written to a file, if the person who runs the page allows it (`page/mistakes.py`). The code of the
page is in `page/`; limits and colors are in `.streamlit/config.toml`. Main entry:
`page.draw.main()`.
"""

from page.draw import main

if __name__ == "__main__":
    main()
