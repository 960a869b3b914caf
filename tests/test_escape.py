"""Escaping of untrusted text for terminals, spreadsheets, Markdown and logs."""

import html
import json
import os
import re

import pytest

from escape import (
    as_json,
    as_utf8,
    from_spreadsheet_cell,
    markdown,
    one_line,
    printable,
    reason_of,
    spreadsheet_cell,
    typed_reason_of,
    without_paths,
    without_secrets,
)

ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"


@pytest.mark.parametrize(
    "text",
    ["\x1b[2Ja", "\x9b31mred", "\x1b]0;title\x07", "a\rb", "\x7f", "\u202egpj.exe", "caf\udce9",
     "\x00", "\u2028", "\u2066a", "a\u061cb", "pay\u200bpal", "pay\u200dpal", "pay\u200cpal",
     "\u200d", "\u0633\u200c\u200c\u0647", "\u0633\u200c.jpg", "a\u200d\U0001f469",
     "\U0001f468\u200d", "\ufeffa", "a\u2060b", "a\xadb", "\U000e0061",
     "\U0001f468\u200c\U0001f469", "\ue000", "\u200c\u0633", "\u0633\u200d.jpg", "e\u0301\u200cx",
     "\u0647\u200d\u200d", f"{ENGLAND[0]}{ENGLAND[2:]}", ENGLAND[:-1], ENGLAND[1:],
     f"{ENGLAND[0]}\U000e0075\U000e0073\U000e0074\U000e0078\U000e007f"],  # Texas, drawn by few
)  # fmt: skip
def test_terminal_text_has_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    assert printable(shown) == shown


@pytest.mark.parametrize(
    "text",
    ["a\u3164b", "\uffa0", "\u115f", "a\u1160", "a\u034fb", "a\u2800b", "\u2801\u2800.png",
     "a\ufe0f", "a\ufe00", "1\ufe0f.png", "\ufe0f", "a\u180bb", "\u180c", "\u17b4", "\U0001d159",
     "a\U000e0100", "\U000e01ef", "\u2764\ufe00", "\u2764\U000e0100"],
)  # fmt: skip
def test_invisible_characters_that_python_calls_printable_are_escaped(text: str) -> None:
    assert text.isprintable()
    (unseen,) = [c for c in text if ord(c) > 127 and c not in "\u2764\u2801"]
    assert printable(text) == text.replace(unseen, ascii(unseen)[1:-1])
    assert printable(f"\n{text}", "?") == "\n" + text.replace(unseen, "?")


def test_hidden_text_of_variation_selectors_is_escaped() -> None:
    for base, selector in (("\u2764", "\ufe0f"), ("\u8fbb", "\U000e0100"), ("\u1820", "\u180b")):
        assert printable(base + 3 * selector) == base + selector + 2 * ascii(selector)[1:-1]


@pytest.mark.parametrize(
    ("name", "escaped"),
    [("caf\udce9.jpg", r"caf\xe9.jpg"), ("a\ud800b", r"a\ud800b"), ("é😀\u202e\n", "é😀\u202e\n"),
     (r"caf\xe9.jpg", r"caf\xe9.jpg"), ("", "")],
)  # fmt: skip
def test_a_name_that_is_not_utf8_is_escaped_alike_everywhere(name: str, escaped: str) -> None:
    """And only what UTF-8 does not have is."""
    assert as_utf8(name) == escaped
    assert json.loads(as_json({"a": [name]}).encode()) == {"a": [escaped]}
    assert printable(name) == printable(escaped)


def test_printable_text_stays_unchanged() -> None:
    for text in ("FLUX.1 [dev]", "東京 é", "e\u0301", "a\nb", ":skull:"):
        assert printable(text) == text


@pytest.mark.parametrize(
    "name",
    [
        "Screenshot 2026-01-01 at 9.41.00\u202fAM.png",  # macOS
        "IMG\xa02026.jpg",
        "写真\u3000まとめ.jpg",
        "\u0639\u06a9\u0633\u200c\u0647\u0627\u06cc.jpg",  # Persian
        "\u0646\u0647\u0654\u200c\u0647\u0627.jpg",  # with a mark before the joiner
        "PDF\u200c\u0647\u0627.jpg",  # Latin with the plural of Persian
        "\u06f5\u200c\u062a\u0627\u06cc\u06cc \u0639\u06a9\u0633\u200c\u06f2.jpg",  # digits
        "\u06f1\u06f4\u06f0\u06f3 \u0647\u200d.jpg",  # a year, with its abbreviation
        "क्\u200dष.jpg",
        "ಸಾಫ್ಟ್\u200cವೇರ್.jpg",
        "র\u200d্যাম.jpg",  # Bengali, before the virama
        "അവന്\u200d.jpg",  # Malayalam, at the end of a word
        "👨\u200d👩\u200d👧 picnic.jpg",
        f"{ENGLAND}\U0001f3f4\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f.jpg",
        "☀\ufe0f.png ❤\ufe0e 1\ufe0f\u20e3 #\ufe0f\u20e3 \xa9\ufe0f \u3030\ufe0f",
        "\u8fbb\U000e0100\u6751 \u845b\U000e0101.jpg \ufa1e\ufe00",  # forms of ideographs
        "\u182e\u1823\u180b\u1829\u182d\u1823\u182f \u1820\u180d.jpg",  # Mongolian
        "\u2801\u2803\u2800\u2809.txt",  # Braille
        "❤\ufe0f\u200d🔥 👨🏽\u200d🌾 🙂\u200d↔\ufe0f.jpg",
    ],
)
def test_names_are_shown_as_people_write_them(name: str) -> None:
    assert printable(name) == name
    hidden = f"{name[:1]}\u202e{name}\u200b"
    assert printable(hidden) == rf"{name[:1]}\u202e{name}\u200b"
    assert printable(hidden, " ") == f"{name[:1]} {name} "


FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2", "@SUM(1)", "\t=1", "\r=1", "\uff1d1"]


def test_spreadsheet_cells_contain_no_formula_and_stay_distinct() -> None:
    texts = [*FORMULAS, *(f"'{text}" for text in FORMULAS), *(f"''{text}" for text in FORMULAS),
             "", "'", "'quoted'", "a=1", "photo.jpg"]  # fmt: skip
    cells = [spreadsheet_cell(text) for text in texts]
    assert len(set(cells)) == len(texts)
    assert [from_spreadsheet_cell(cell) for cell in cells] == texts
    for cell in cells[: len(FORMULAS)]:
        assert cell[0] == "'"
    assert cells[-5:] == texts[-5:]
    for separator in ";\t":  # of cells, for some programs, whatever quotes are around the text
        texts = [f"x{separator}{text}" for text in (*FORMULAS, *(f"'{f}" for f in FORMULAS))]
        cells = [spreadsheet_cell(text) for text in texts]
        assert all(cell.split(separator)[1][0] == "'" for cell in cells)
        assert [from_spreadsheet_cell(cell) for cell in cells] == texts


# Regular expressions that these libraries apply to text after parsing, when backslashes are gone:
# mdast-util-gfm-autolink-literal 2, remark-emoji 5, Streamlit 1.67 (remarkMaterialIcons).
AFTER_PARSING = (
    r"(https?://|www(?=\.))([-.\w]+)([^ \t\r\n]*)",
    r"([-.\w+]+)@([-\w]+(?:\.[-\w]+)+)",
    r":\+1:|:-1:|:[\w-]+:",
    r":(material|streamlit)/(\w+):?",
)


@pytest.mark.parametrize(
    "text",
    ["https://evil.example/a", "HTTP://evil.example", "www.evil.example", "WWW.evil.example",
     "me@evil.example", ":material/verified:", ":streamlit:", ":+1:", "[a](https://evil.example)",
     "![](https://evil.example/x.png)", "<b>x</b>", "`a`", "$x$", "# head", "- item", "1. item",
     "&lt;", ":red[x]", "a\n\nb", "~~x~~", "a | b", "+ item", "=== ", "CC-BY-4.0"],
)  # fmt: skip
def test_markdown_shows_the_text_without_markup(text: str) -> None:
    shown = markdown(text)
    assert "\n" not in shown
    assert not re.match(r"[-+=]|\d+\.\s", shown)  # lists, headings
    assert not re.search(r"(?<!\\)[\[\]()<>`*_#$~|&:]", shown)
    parsed = html.unescape(re.sub(r"\\(.)", r"\1", shown))
    for pattern in AFTER_PARSING:
        assert not re.search(pattern, parsed, re.IGNORECASE), pattern
    assert parsed.replace("\N{WORD JOINER}", "") == html.unescape(" ".join(text.split()))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:pass@host:8080/a?b=1", "https://***@host:8080/a?***"),
        ("https://me:p@ss@host/a", "https://***@host/a"),
        ("http://me:p'ss@host", "http://***@host"),
        ("s3://KEY:SECRET@bucket/a", "s3://***@bucket/a"),
        ("s3://bucket/a?versionId=b&token=c", "s3://bucket/a?***"),
        ("https://host/a?X-Amz-Signature=abc&x=1", "https://host/a?***"),
        ("HTTPS://host/a?sv=1&sig=abc", "HTTPS://host/a?***"),
        ("https://host/a#access_token=abc", "https://host/a#***"),
        ("https://host/a?abc", "https://host/a?***"),
        ("http://me:pass@[broken?b=1", "http://***@[broken?***"),
        ("/a?token=abc&x=1", "/a?***"),
        ("s3://bucket/photo?.jpg", "s3://bucket/photo?.jpg"),
        ("photo#1?.jpg", "photo#1?.jpg"),
        ("no address, me:pass@host", "no address, me:pass@host"),
    ],
)
def test_addresses_lose_their_secrets(address: str, shown: str) -> None:
    assert without_secrets(address) == shown
    assert without_secrets(f"'{address}' and {address}") == f"'{shown}' and {shown}"
    assert without_secrets(f"({address}): HTTP 500") == f"({shown}): HTTP 500"
    assert without_secrets(shown) == shown


def test_the_cost_of_removing_secrets_is_linear() -> None:
    """A quadratic pattern needs minutes for this text."""
    text = "http://" * 20_000
    assert without_secrets(f"{text}host/a b?") == f"{text}host/a b?"
    assert without_secrets(f"{text}host/a?b=1") == f"{text}host/a?***"


def test_only_paths_of_this_machine_are_cut() -> None:
    """Free text and names stay whole. Two paths of one file name stay two keys."""
    kept = ["~5 % of x / y", "C: drive / disk", "a/b", "3: x", "s3://bucket/x", ".hidden/x", 5,
            "~5/10 images", "~1/2", "//cdn.x/y", "/", "~"]  # fmt: skip
    assert without_paths(kept) == kept
    cut = ["/home/me/x", "~/y/x", "~me/x", "~_me/x", "~é/x", "~\\x", "./x", "..\\x", "C:\\me\\x",
           "c:/me/x", "//server/a/x", "\\\\server\\me\\x", "file:///home/me/x",
           "FILE:/x"]  # fmt: skip
    assert without_paths("//me:pass@cdn.x/y?token=abc") == "//***@cdn.x/y?***"
    assert without_paths({"of": cut}) == {"of": ["x"] * len(cut)}
    assert without_paths({"/a/x": 1, "b/x": 2, "/b/x": {"~/c": 3}}) == {
        "x": 1, "b/x": 2, "x (3)": {"c": 3}
    }  # fmt: skip


def test_a_reason_is_one_line_without_secrets() -> None:
    assert reason_of(ValueError("a\n  b\tc")) == "a b c"
    assert reason_of(TimeoutError()) == "TimeoutError"
    assert typed_reason_of(KeyError("label")) == "KeyError: 'label'"
    address = f"{'x' * 282} https://me:s3cret@host/file"  # cut within the password
    assert len(reason_of(OSError(address))) == 300
    assert "s3c" not in reason_of(OSError(address))


def test_an_error_of_a_descriptor_is_one_line() -> None:
    """Python then has a number for the name of the file."""
    with pytest.raises(IsADirectoryError) as refused:
        os.fdopen(os.open("/", os.O_RDONLY))
    assert one_line(refused.value) == "Is a directory"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(24, "Too many open files"), "ulimit -n 4096"),
        (OSError(24, "Too many open files", "/a"), "ulimit -n 4096"),
        (OSError(23, "Too many open files in system"), "end other programs"),
        (OSError("[Errno 24] Too many open files: '/a'"), "ulimit -n 4096"),
        (RuntimeError("Too many open files. Communication with the workers"), "ulimit -n 4096"),
        (FileNotFoundError(2, "No such file", "folder/Too many open files"), None),
        (ValueError("Too many open files"), None),
    ],
)
def test_too_many_open_files_come_with_advice(error: Exception, advice: str | None) -> None:
    assert ("too many files are open" in one_line(error)) == (advice is not None)
    assert (advice or "") in one_line(error)
