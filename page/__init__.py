"""Web page: upload images, see verdicts and the error rates of the detector. Main entry:
`draw.main()`.

`markupsafe` escapes all untrusted text in the HTML. `style.css` and the `.js` files are sent to the
browser.
"""
