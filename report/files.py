"""Write the files of an evaluation report: `report.json`, CSV tables and an HTML page.

Main entry: `write_report(report, scores, data, out)`.

- `report`: the dict that `evaluate()` or `report_on()` of `model/evaluation/run.py` returns, the
  content of `report.json`.
- `scores`: the `Path` of the evaluation's `scores.parquet`.
- `data`: the folder of all shard sets (packed images), a `Path`, or a `UPath` for an address. The
  sets are used only for pictures of mistakes. A set that is missing there, or is not the one that
  was evaluated, gets no pictures, and a log line says why.
- `out`: the `Path` of the folder to write to, which is made if needed.

It writes `report.json`, `figures.csv`, `robustness.csv` (if measured) and `report.html`, each
atomically, and returns a list of their paths, the page last. The page shows the command line of
this process. Errors:

- `ScoresError` (a ValueError): `scores` is not a file of scores, is one of another version, or
  lacks a set of `report`, so it is of another evaluation. Nothing is written. (Scores of another
  evaluation of the same sets are not noticed.)
- OSError: `scores` cannot be read (nothing is written), or a file cannot be written.

`folder_of(names, data)` returns the name of the folder of a report on these sets.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import console
from escape import as_utf8, without_secrets
from model.evaluation.scores import ScoresError, read_scores
from report.page import write_page
from sharding.format import open_shards
from storage import AnyPath, write_text

REPORT_FILE = "report.json"


def write_report(report: Mapping[str, Any], scores: Path, data: AnyPath, out: Path) -> list[Path]:
    """Write `report.json`, the CSV tables and the page to `out`, each atomically; returns the
    paths.

    The page shows pictures only of sets below `data` that have not changed since they were scored.

    Raises:
        ScoresError: `scores` is not a file of scores, or one of another version.
        OSError: a file cannot be read or written.
    """
    table = read_scores(scores)  # first: an error must not damage an earlier report
    if missing := sorted(report["sets"].keys() - set(table.codes("set")[1])):
        raise ScoresError(f"{scores} has no images of {', '.join(missing)}, which the report names")
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_text(out / REPORT_FILE, text)
    shards = {}
    for name, set_report in report["sets"].items():
        if set_report["index_sha256"] == report["detector"].get("sha256"):
            console.log.info("%s: no pictures on the page: the table has no images", name)
            continue
        try:
            shards[name] = open_shards([data / name])
        except (ValueError, OSError) as error:
            console.log.info("%s: no pictures on the page: %s", name, error)
            continue
        if shards[name].sha256 != set_report["index_sha256"]:
            console.log.info(
                "%s: no pictures on the page: the set in %s has changed since", name, data
            )
            del shards[name]
    command = as_utf8(without_secrets(shlex.join(["python", *sys.argv])))
    return [out / REPORT_FILE, *write_page(report, table, shards, out, command)]


def folder_of(names: Sequence[str], data: AnyPath | str) -> str:
    """Return the name of the folder of a report on sets: their whole names below `data`, because
    two sets in different folders can have the same last part.
    """
    above = Path(str(data)).absolute()  # names are not below an address
    texts = []
    for path in map(Path, names):
        below = path.relative_to(above) if path.is_relative_to(above) else path
        texts.append("-".join(part for part in below.parts if part not in (below.anchor, "..")))
    return "+".join(texts).strip(".") or "sets"
