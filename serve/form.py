"""Parse an uploaded multipart form piece by piece in memory, without files on disk.

Main entry: `Form(content_type, max_files)` takes the header Content-Type of the request (text, with
the boundary), and the largest number of files. `feed(data)` takes the next bytes of the body and
returns nothing. `finish()`, called after the last bytes, returns a list of the files as (name,
bytes); a file without a name is called `image N` (N: its position, from 0). The class and its
methods raise `Refused` (serve/limits.py; status 400 or 413) if the form is invalid or incomplete,
has no file, has a field that is no file, or has too many files. The caller limits the total size.
`too_many(max_files)` returns the error for too many files, for other callers to raise.
"""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.limits import Refused


class Form:
    """Parser of a multipart form: pass the bytes to `feed`, then get the files from `finish`.

    `files` lists (name, bytes) of the complete files. A file without a name is called `image N`.
    """

    def __init__(self, content_type: str, max_files: int):
        """Read the boundary from the content type.

        Raises:
            Refused: there is no valid boundary.
        """
        self.files: list[tuple[str, bytes]] = []
        self.max_files = max_files
        self.is_whole = False
        self._field, self._value, self._disposition = bytearray(), bytearray(), b""
        self._name, self._data = "", bytearray()
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._of_field,
                    "on_header_value": self._of_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._of_data,
                    "on_part_end": self._end,
                    "on_end": self._whole,
                },
            )
        except FormParserError as error:
            raise _refused(f"the boundary is invalid ({error})") from error
        if not boundary:
            raise _refused("the content type has no boundary")

    def feed(self, data: bytes) -> None:
        """Parse the next bytes of the body.

        Raises:
            Refused: the form is invalid, has a field that is not a file, or has too many files.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _refused(str(error)[:200]) from error

    def finish(self) -> list[tuple[str, bytes]]:
        """Return (name, bytes) of all files, after the last byte was fed.

        Raises:
            Refused: the form is incomplete, or has no file.
        """
        if not self.is_whole:
            raise _refused("it ends before its closing boundary")
        if not self.files:
            raise Refused(400, "the form has no file; send one, with curl: -F image=@photo.jpg")
        return self.files

    def _begin(self) -> None:
        self._disposition, self._data = b"", bytearray()

    def _of_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _of_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field, self._value = bytearray(), bytearray()

    def _end_headers(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data":
            raise _refused("a part has no Content-Disposition: form-data")
        if b"filename" not in options:
            raise Refused(
                400,
                f"the form field {name[:100]!r} is a text, not a file; send a file, with curl: "
                "-F image=@photo.jpg",
            )
        if len(self.files) == self.max_files:
            raise too_many(self.max_files)
        self._name = options[b"filename"].decode("utf-8", "replace") or f"image {len(self.files)}"

    def _of_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _end(self) -> None:
        self.files.append((self._name, bytes(self._data)))
        self._data = bytearray()

    def _whole(self) -> None:
        self.is_whole = True


def too_many(max_files: int) -> Refused:
    """Return the error for a request with more than `max_files` images."""
    return Refused(413, f"the request has more than {max_files} images; send several requests")


def _refused(reason: str) -> Refused:
    return Refused(400, f"the form cannot be read: {reason}")
