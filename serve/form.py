"""A multipart form as it arrives, in memory: no file of it is ever written to a disk."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.limits import Refused


class Form:
    """Takes the bytes of a form by `feed`; `files` are the names and bytes of those that are whole.
    A file without a name is called by its number.
    """

    def __init__(self, content_type: str, max_files: int):
        """Read the boundary out of the content type.

        Raises:
            Refused: it has none.
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
            raise _refused(f"its boundary is wrong ({error})") from error
        if not boundary:
            raise _refused("its content type has no boundary")

    def feed(self, data: bytes) -> None:
        """Read more of the body.

        Raises:
            Refused: it is no form of files, or of too many.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _refused(str(error)[:200]) from error

    def finish(self) -> list[tuple[str, bytes]]:
        """All files, after the last byte.

        Raises:
            Refused: the form breaks off, or has no file.
        """
        if not self.is_whole:
            raise _refused("it breaks off before the boundary that ends it")
        if not self.files:
            raise Refused(400, "the form has no file; with curl: -F image=@photo.jpg")
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
                f"the field {name[:100]!r} of the form is a text, not a file; with curl: "
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
    """The refusal of more images than a request may have."""
    return Refused(413, f"the request has more than {max_files} images; send them in parts")


def _refused(reason: str) -> Refused:
    return Refused(400, f"the form cannot be read: {reason}")
