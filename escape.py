"""Text from outside, made harmless for a place that obeys some of it: a terminal, a spreadsheet,
Markdown, or whoever reads a log.
"""

import re
from urllib.parse import urlsplit, urlunsplit

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


_ADDRESS = re.compile(r"\b[a-z][a-z0-9+.\-]*://[^\s'\"<>]+", re.IGNORECASE)
_SECRET = re.compile(r"sig|key|token|secret|password|passwd|auth|credential|expires", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """`text` with the names, passwords and signatures taken out of the addresses in it.

    A query that holds anything like a key, a token or a signature goes as a whole: what else
    stands in it is part of what was signed.
    """
    return _ADDRESS.sub(lambda match: _public(match[0]), text) if "://" in text else text


def _public(address: str) -> str:
    try:
        parts = urlsplit(address)
    except ValueError:  # a broken host, such as http://[
        return address.partition("://")[0] + "://..."
    host = parts.netloc.rpartition("@")[2]
    hidden = "***@" if "@" in parts.netloc else ""
    query = "***" if _SECRET.search(parts.query) else parts.query
    fragment = "***" if _SECRET.search(parts.fragment) else parts.fragment
    return urlunsplit((parts.scheme, hidden + host, parts.path, query, fragment))
