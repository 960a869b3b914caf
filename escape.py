"""Text from outside, made harmless for a place that obeys some of it: a terminal, a spreadsheet,
Markdown, or whoever reads a log.
"""

import re

# What OWASP's page "CSV Injection" lists, and its full-width twins, which some programs obey too.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def printable(text: str) -> str:
    """`text` with whatever a terminal would obey or could not show written as an escape: control
    characters, sequences that begin with one, marks that turn the direction of writing, and bytes
    of a file name that are no UTF-8. Line ends stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def spreadsheet_cell(text: str) -> str:
    """`text` with a `'` before what a spreadsheet would run as a formula. `from_spreadsheet_cell`
    takes it away again, so no two texts become one.
    """
    return f"'{text}" if _FORMULA.match(text) else text


def from_spreadsheet_cell(text: str) -> str:
    """The text that `spreadsheet_cell` was given."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


# What makes links and icons of plain text after Markdown was parsed, so that a backslash does not
# help: mdast-util-gfm-autolink-literal, remark-emoji, and Streamlit's `:material/name:`.
_SEPARATE = re.compile(r"[:@](?=\S)|(?<=www)(?=\.)", re.IGNORECASE)
_JOINER = "\N{WORD JOINER}"
_MARKUP = re.compile(r"[\\`*_{}\[\]()<>#|~:$&]|^[-+=]|(?<=\d)\.(?=\s)")


def markdown(text: str) -> str:
    """`text` as one line of Markdown that shows it as it is: no markup, link, icon or formula. An
    invisible character stands where an address would otherwise become a link.
    """
    line = " ".join(printable(text).split())
    return _MARKUP.sub(r"\\\g<0>", _SEPARATE.sub(lambda match: match[0] + _JOINER, line))


_LOGIN = re.compile(r"""(?<=://)[^/\s"<>]*@""")
_WEB_QUERY = re.compile(r"""(https?://[^\s'"<>?#]*[?#])[^\s'"<>]*[^\s'"<>,.:;)]""", re.IGNORECASE)
# As in `/file?token=...`, which requests writes without its host. A `?` of a pattern has no `=`.
_ASSIGNMENTS = re.compile(r"""([?#])[^\s'"<>?#=]*=[^\s'"<>]*[^\s'"<>,.:;)]""")


def without_secrets(text: str) -> str:
    """`text` without the logins, queries and fragments of the addresses in it.

    A query goes as a whole: a signature has no name of its own, and what else stands in a signed
    query is part of what was signed. A `?` or `#` in other text stays, unless a value follows.
    """
    if not any(mark in text for mark in "@?#"):
        return text
    text = _WEB_QUERY.sub(r"\1***", _LOGIN.sub("***@", text))
    return _ASSIGNMENTS.sub(r"\1***", text)
