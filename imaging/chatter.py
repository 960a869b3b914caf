"""Copy standard input to standard error, line by line, without the lines of image decoders and
without empty ones.

`imaging/quiet.py` runs this file as a process of its own, between a training process and its
standard error. It needs only the standard library, and no argument. After the line `END` it writes
a newline to standard output: all that came before was copied. It ends when every process that
writes to its input has closed it or died.
"""

import contextlib
import os
import re
import signal
import sys

_CHATTER = re.compile(
    # nvImageCodec
    rb"\[(ERROR|WARNING|FATAL)\] ?(\x1b\[0m)?\[[\w-]*(decoder|parser|ext|imgcodec)\w*\]"
    rb"|\[ ?(ERROR|WARN|INFO):\d+@[\d.]+\]"  # OpenCV
    rb"|^(Corrupt JPEG data: |Premature end of JPEG|Invalid SOS parameters for sequential JPEG"
    rb"|Inconsistent progression sequence for component|Unknown Adobe color transform"
    rb"|Warning: unknown JFIF revision|Bogus |Unsupported marker type 0x|Invalid JPEG file struct"
    rb"|Invalid progressive|Quantization table 0x|Huffman table 0x|Didn't expect more than one scan"
    rb"|Unsupported JPEG |Not a JPEG file|Sorry, there are legal|Empty JPEG image"
    rb"|Invalid component ID \d|Input file read error"
    rb"|libpng (warning|error): )"
    rb"|^> |^\s*'[^']*' (is|where) |^Unsupported number of channels"  # OpenCV's second lines
)

END = b"\0imaging.quiet\0\n"
"""A line that is not copied but answered."""


def main() -> None:
    """Copy until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the writer may say more before it ends
    for read in sys.stdin.buffer:
        line = read.removesuffix(END)  # it follows a line without an end directly
        if line.strip() and not _CHATTER.search(line):
            # A line that cannot be written is dropped: a full pipe would stop the writer.
            with contextlib.suppress(OSError):
                os.write(2, line)
        if line != read:
            with contextlib.suppress(OSError):  # nobody waits for the answer
                os.write(1, b"\n")


if __name__ == "__main__":
    main()
