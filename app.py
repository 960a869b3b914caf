"""The web page: `make app`. Drop, browse or paste images; the verdicts are those of `predict.py`.

What was uploaded is in memory while the page shows it, and nowhere else: Streamlit's uploader holds
the files, `st.session_state` what was found about them, and both go with the image or the page.
Only a wrong verdict is written to a file, where whoever runs the page asks for it
(`page/mistakes.py`).
The page itself is in `page/`; `.streamlit/config.toml` holds limits and colors.
"""

from page.draw import main

if __name__ == "__main__":
    main()
