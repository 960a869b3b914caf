"""Escape untrusted text for a terminal, a spreadsheet or Markdown, and remove secrets and private
paths.

Main entries: none raises an error. Most functions take one `text` (str) and return a new str.
`printable()` replaces control characters, which a terminal would execute, and characters that a
reader cannot see by visible escapes (or by its `replacement`); newlines stay. `as_utf8()` escapes
only what UTF-8 cannot encode: other bytes of a file name, and single surrogates. `as_json(value)`
returns a value as JSON with such texts. `spreadsheet_cell()` puts a `'` before a text, or a part
after `;` or a tab, that would run as a formula, and `from_spreadsheet_cell()` takes its result and
returns the original text. `markdown()` returns one line in which markup is escaped and addresses do
not become links; all words stay readable. (A text that is only a number with a full stop, such as
`7.`, is not escaped: it can show as a list item.) `without_secrets()` replaces the logins, queries
and fragments of web addresses (passwords, tokens, signatures) by `***`. `reason_of(error)` returns
the message of an exception as one line, without secrets, and `typed_reason_of(error)` puts the name
of its type before it. `one_line(error)` returns a message for the user: for an `OSError`, the file
and the reason. `text_fault(error)` describes an error of reading a text or JSON file.
`too_many_files(error)` returns the message for an error of too many open files, else None.
`without_paths(value)` takes a record (a dict, a list, or any value in one) and returns it without
private paths and secrets.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from tempfile import gettempdir
from typing import Any
from unicodedata import bidirectional, category, combining

# First characters of a formula by OWASP's page "CSV Injection", and their full-width forms, which
# some programs run too. Quotes before them are matched so that escaping can be undone.
_FORMULA = r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"
# Some programs read `;` and tabs as separators of cells, whatever quotes are around them.
_START = r"(?:^|(?<=[;\t]))"
_RUNS = re.compile(f"{_START}(?={_FORMULA})")
_ESCAPED = re.compile(f"{_START}'(?={_FORMULA})")


def printable(text: str, replacement: str | None = None) -> str:
    """Replace all characters that a terminal would execute or that deceive a reader by escapes, or
    each by `replacement`: control characters, marks that change the writing direction, invisible
    characters, and bytes of a file name that are not UTF-8. Newlines and what people write stay:
    spaces of any width, joiners within words and emoji, tags in the flags of England, Scotland and
    Wales, and variation selectors after emoji, ideographs and Mongolian letters.
    """
    if text.isprintable() and not _UNSEEN.search(text):
        return text
    return "".join(
        c if _is_shown(text, at) else _code(c) if replacement is None else replacement
        for at, c in enumerate(text)
    )


def _code(character: str) -> str:
    """Return the escape of a character: `\\xff` for a byte that is not UTF-8, which Python keeps as
    the surrogate U+DCFF, else that of Python.
    """
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return ascii(character)[1:-1]


_SURROGATE = re.compile("[\ud800-\udfff]")


def as_utf8(text: str) -> str:
    """Escape what UTF-8 cannot encode, so that every program can read the text: bytes of a file
    name that are not UTF-8 (`\\xff`) and single surrogates (`\\ud800`).
    """
    return _SURROGATE.sub(lambda match: _code(match[0]), text)


def as_json(value: Any, **options: Any) -> str:
    """Return a value as JSON text in UTF-8, with the escapes of `as_utf8` in its texts. `options`
    are arguments of `json.dumps`, such as `indent`.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    return _SURROGATE.sub(lambda match: f"\\{_code(match[0])}", text)


def _is_shown(text: str, at: int) -> bool:
    """Return whether the character at the index `at` may be shown as it is. A joiner (ZWJ, ZWNJ)
    may where people need it: at a virama of Indic scripts, at an Arabic letter, in emoji.
    """
    character = text[at]
    if _UNSEEN.match(character):
        return bool(_VARIED.fullmatch(text[max(0, at - 1) : at + 2]))
    if character.isprintable() or character == "\n" or category(character) == "Zs":
        return True
    if "\U000e0020" <= character <= "\U000e007f":  # a tag
        start = text.rfind("\U0001f3f4", max(0, at - 6), at)
        flag = _FLAG.match(text, start) if start >= 0 else None
        return flag is not None and at < flag.end()
    if character not in (_ZWJ, _ZWNJ):
        return False
    before, after = text[at - 1] if at else " ", text[at + 1 : at + 2] or " "
    if at and _VIRAMA in (combining(before), combining(after)):
        return True
    letter = text[max(0, at - 5) : at].rstrip(_ARABIC_MARKS)[-1:] or " "
    is_arabic = bidirectional(letter) == "AL", bidirectional(after) == "AL"
    if all(is_arabic) or (is_arabic[0] and after.isalnum()) or (is_arabic[1] and before.isalnum()):
        return True
    if character == _ZWJ and before in _HEHS and after not in (_ZWJ, _ZWNJ):
        return True
    return bool(_EMOJI_PARTS.fullmatch(before + character + after))


# Invisible characters that Python calls printable: the grapheme joiner, fillers of Hangul, vowels
# of Khmer, variation selectors, the empty cell of Braille, a note without a head.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U0001d159\U000e0100-\U000e01ef]"
)
_IDEOGRAPHS = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_EMOJI = "\u2190-\u2bff\U0001f000-\U0001faff"
# Invisible characters that are kept, with their neighbors: variation selectors after an emoji, a
# key, an ideograph or a Mongolian letter, and the empty cell within Braille.
_VARIED = re.compile(
    f"[{_EMOJI}\xa9\xae\u203c\u2049\u2122\u2139\u3030\u303d\u3297\u3299][\ufe0e\ufe0f].?"
    f"|[#*0-9][\ufe0e\ufe0f]\u20e3|[{_IDEOGRAPHS}][\ufe00-\ufe02\U000e0100-\U000e01ef].?"
    "|[\u1820-\u18aa][\u180b-\u180d\u180f].?|[\u2801-\u28ff]\u2800[\u2801-\u28ff]",
    re.DOTALL,
)

_ZWJ, _ZWNJ = "\N{ZERO WIDTH JOINER}", "\N{ZERO WIDTH NON-JOINER}"

# Vowel signs and others that are written above or below an Arabic letter.
_ARABIC_MARKS = "".join(map(chr, (*range(0x64B, 0x660), 0x670, *range(0x6D6, 0x6DD))))
# Letters that a ZWJ gives the form of an abbreviation, such as that of the Hijri calendar.
_HEHS = "\N{ARABIC LETTER HEH}\N{ARABIC LETTER HEH GOAL}\N{ARABIC LETTER HEH DOACHASHMEE}"
# Combining class of the signs that remove the vowel of an Indic letter.
_VIRAMA = 9
# A ZWJ between two symbols; the first may have a color of skin or a variation selector.
_EMOJI_PARTS = re.compile(f"[\ufe0f{_EMOJI}]\u200d[{_EMOJI}]")
# The flags of England, Scotland and Wales are a black flag and tags; systems draw no others.
_FLAG = re.compile(
    "\U0001f3f4\U000e0067\U000e0062(?:\U000e0065\U000e006e\U000e0067"
    "|\U000e0073\U000e0063\U000e0074|\U000e0077\U000e006c\U000e0073)\U000e007f"
)


def spreadsheet_cell(text: str) -> str:
    """Put a `'` before a text, or a part of it after `;` or a tab, that a spreadsheet would run as
    a formula. `from_spreadsheet_cell` removes it again, so two different texts stay different.
    """
    return _RUNS.sub("'", text)


def from_spreadsheet_cell(text: str) -> str:
    """Return the text that was passed to `spreadsheet_cell`."""
    return _ESCAPED.sub("", text)


# Three Streamlit parts turn plain text into links and icons after Markdown was parsed, so that a
# backslash does not help: mdast-util-gfm-autolink-literal, remark-emoji and `:material/name:`.
_SEPARATE = re.compile(r"[:@](?=\S)|(?<=www)(?=\.)", re.IGNORECASE)
_JOINER = "\N{WORD JOINER}"
_MARKUP = re.compile(r"[\\`*_{}\[\]()<>#|~:$&]|^[-+=]|(?<=\d)\.(?=\s)")


def markdown(text: str) -> str:
    """Escape `text` as one line of Markdown without markup, links, icons or formulas. An invisible
    character (word joiner) keeps addresses from becoming links.
    """
    line = " ".join(printable(text).split())
    return _MARKUP.sub(r"\\\g<0>", _SEPARATE.sub(lambda match: match[0] + _JOINER, line))


_LOGIN = re.compile(r"""(?:(?<=://)|(?<=^//))[^/\s"<>]*@""")
# The lookahead ends a failed attempt at the next address, so that the cost is linear.
_WEB_QUERY = re.compile(
    r"""(https?://(?:(?!https?://)[^\s'"<>?#])*[?#])[^\s'"<>]*[^\s'"<>,.:;)]""", re.IGNORECASE
)
# The library requests writes addresses without their host, such as `/file?token=...`. A `?` in a
# file pattern has no `=` after it.
_ASSIGNMENTS = re.compile(r"""([?#])[^\s'"<>?#=]*=[^\s'"<>]*[^\s'"<>,.:;)]""")


def without_secrets(text: str) -> str:
    """Replace the logins, queries and fragments of all addresses in `text` by `***`.

    The whole query is removed, because the parameter that holds a signature has no standard name.
    A `?` or `#` in other text stays, unless a `name=value` follows.
    """
    if not any(mark in text for mark in "@?#"):
        return text
    text = _WEB_QUERY.sub(r"\1***", _LOGIN.sub("***@", text))
    return _ASSIGNMENTS.sub(r"\1***", text)


def reason_of(error: BaseException, longest: int = 300) -> str:
    """Return the message of `error` as one line of at most `longest` characters, without secrets.
    An error without a message is named by its type.
    """
    return without_secrets(" ".join(str(error).split()))[:longest] or type(error).__name__


def one_line(error: Exception) -> str:
    """Return the message of an error in one line; for an `OSError`, the file and the reason."""
    if advice := too_many_files(error):
        return advice
    if isinstance(error, OSError) and error.strerror:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None:
            return f"{error.strerror}: standard output, or a temporary file in {gettempdir()}"
        if isinstance(error, ConnectionError | TimeoutError):
            return f"{error.strerror}; check the address and the network"
        if not isinstance(error.filename, str | bytes | os.PathLike):  # None, or a descriptor
            return error.strerror
        name, path = _name_of(error.filename), Path(os.fsdecode(error.filename))
        # Not `path.exists()`: it raises an error below a folder that cannot be searched.
        if isinstance(error, FileNotFoundError) and not os.path.isdir(path.parent):  # noqa: PTH112
            return f"there is no folder {_name_of(path.parent)}; create it, or name another folder"
        there = os.path.exists(path)  # noqa: PTH110
        if isinstance(error, PermissionError) and there and not os.access(path, os.R_OK):
            mode = stat.S_IMODE(path.stat().st_mode)
            return f"{name}: not readable by this user (mode {mode:o})"
        return f"{name}: {error.strerror}"
    return str(error) or type(error).__name__


def too_many_files(error: BaseException) -> str | None:
    """Return the message for an error of too many open files; None for any other error."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None and isinstance(error, OSError | RuntimeError):  # of torch or a worker process
        codes = (errno.ENFILE, errno.EMFILE)  # EMFILE's text is a part of ENFILE's
        code = next((code for code in codes if os.strerror(code) in str(error)), None)
    if code == errno.ENFILE:
        return "too many files are open on this machine; end other programs (limit: fs.file-max)"
    if code == errno.EMFILE:
        return (
            "too many files are open; raise the limit (ulimit -n 4096) or use fewer workers "
            "(loading.num_workers, --jobs)"
        )
    return None


def _name_of(filename: object) -> str:
    name = os.fsdecode(filename) if isinstance(filename, bytes) else str(filename)
    return name if len(name) <= 500 else f"{name[:200]}...{name[-50:]}"


def typed_reason_of(error: BaseException) -> str:
    """Return the type and the message of `error`, for errors of other programs: without the type, a
    message such as that of a KeyError is unclear.
    """
    return f"{type(error).__name__}: {reason_of(error)}"


def text_fault(error: Exception) -> str:
    """Describe why a text or JSON file cannot be used: the bad byte, the line, or the error."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is {error.object[error.start]:#04x}, which is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        place = f"{error.msg} in line {error.lineno}, column {error.colno}"
        return place if error.doc.strip() else "the file is empty"
    return reason_of(error) if isinstance(error, ValueError) else repr(error)[:200]


_PATH = re.compile(
    r"/|\\\\|\.{1,2}[\\/]|[a-z]:[\\/]|file:/|~(?:[^\W\d][\w.-]*)?(?:[\\/]|$)", re.IGNORECASE
)
"""Start of a path of this machine. `~5 % of x / y` and `~5/10 images` do not match."""


def without_paths(value: Any) -> Any:
    """Return a record, or a part of it, without private data: texts that are paths of this machine
    are cut to the file name, if they have one, and secrets are removed from addresses, also in the
    keys of dicts.
    """
    if isinstance(value, Mapping):
        record: dict[Any, Any] = {}
        for key, own in value.items():
            name = without_paths(key)
            if name in record:  # two paths may have the same file name
                name = f"{name} ({len(record) + 1})"
            record[name] = without_paths(own)
        return record
    if isinstance(value, list):
        return [without_paths(own) for own in value]
    if not isinstance(value, str):
        return value
    if _PATH.match(value) and (name := PureWindowsPath(value).name):  # `//host/x` has no name
        return name
    return without_secrets(value) if "//" in value else value
