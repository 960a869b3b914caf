"""Continue an interrupted measurement: keep the rows that an earlier call has written.

Main entries: `resumable` is the click option `--resume` of a command with `--json FILE`.
`kept(out, title, resume)` returns the content of FILE as a dict if its `title` is this one, else an
empty dict.

- `out`: the `Path` of FILE, or None without `--json`.
- `title`: a text that names the device and all settings of the measurement.
- `resume`: whether `--resume` was given; without it the dict is empty. click.UsageError is raised
  if there is no FILE to continue with.
"""

import json
from pathlib import Path
from typing import Any

import click

resumable = click.option(
    "--resume", is_flag=True,
    help="Keep the rows of --json FILE that an earlier call of this kind has measured.",
)  # fmt: skip


def kept(out: Path | None, title: str, resume: bool) -> dict[str, Any]:
    """Return what an earlier call with this title wrote to `out`, or an empty dict."""
    if resume and out is None:
        raise click.UsageError("--resume needs --json FILE, the file of the earlier call")
    if not resume or out is None or not out.exists():
        return {}
    try:
        earlier = json.loads(out.read_text(encoding="utf-8"))
    except ValueError:  # written in part
        return {}
    return earlier if earlier.get("title") == title else {}
