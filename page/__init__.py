"""The web page that `app.py` starts: images in, verdicts with what they are worth out.

`draw.py` puts the page together. Python writes HTML by `markupsafe`, which escapes what comes from
outside; `style.css` and the `.js` files are what the browser gets.
"""
