"""The state of a C2PA signature is shown in the table, CSV, JSON lines and the page."""

import csv
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import predict
from model import load_detector
from model.c2pa import signatures
from page.detector import loaded_detector
from page.scored import score
from page.verdict import evidence_html
from tests.builders import encode
from tests.provenance_files import PICTURE, make_authority, pem, self_signed, sign

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

UNKNOWN = "valid, signer unknown"
STATES = {"adobe.jpg": UNKNOWN, "changed.jpg": "invalid", "signed.jpg": "trusted"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a photo for each signature state, and the trust list `anchors.pem`."""
    folder = tmp_path_factory.mktemp("signed")
    authority = make_authority()
    signed = sign(authority.signer(), encode(PICTURE), "JPEG", "digitalCapture")
    changed = bytearray(signed)
    changed[-30] ^= 1
    adobe = sign(self_signed("Adobe Inc.")[0], encode(PICTURE), "JPEG", "digitalCapture")
    for name, data in zip(STATES, (adobe, changed, signed), strict=True):
        (folder / name).write_bytes(data)
    (folder / "anchors.pem").write_bytes(pem(authority.root))
    return folder


@pytest.fixture
def ask(small_runs: Path, folder: Path) -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        command = [str(folder), "--runs", str(small_runs), *map(str, arguments)]
        return CliRunner().invoke(predict.main, command)

    return run


def test_json_lines_and_csv_contain_the_state(ask: Callable[..., Result], folder: Path) -> None:
    anchors = folder / "anchors.pem"
    result = ask("--trust-list", anchors, "--format", "jsonl")
    assert result.exit_code == 0, result.output
    assert "C2PA trust list: anchors.pem, 1 anchors, SHA-256 " in result.stderr
    rows = {Path(row["path"]).name: row for row in map(json.loads, result.stdout.splitlines())}
    assert {name: row["provenance"][0]["state"] for name, row in rows.items()} == STATES
    cells = ask("--trust-list", anchors, "--format", "csv").stdout
    by_name = {Path(row["path"]).name: row for row in csv.DictReader(io.StringIO(cells))}
    for name, state in STATES.items():
        assert by_name[name]["provenance"].startswith(f"C2PA: {state} (")


def test_the_fetched_trust_list_is_used_and_logged(
    ask: Callable[..., Result], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (folder / "anchors.pem").read_bytes()
    monkeypatch.setenv("DETECTOR_CACHE", str(tmp_path))
    monkeypatch.setattr(signatures, "CACHED", "list.json")
    kept = {"fetched": "2026-01-02T03:04:05+00:00", "pem": data.decode(),
            "sha256": hashlib.sha256(data).hexdigest()}  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps(kept))
    result = ask()
    assert "C2PA trust list: C2PA list of 2026-01-02, 1 anchors" in result.stderr
    assert "days old; `python -m model fetch --trust-list` downloads the newest" in result.stderr
    assert "trusted (C2PA list of 2026-01-02): signed by Example Images Ltd" in result.stdout
    for state in STATES.values():
        assert f"the file says: C2PA: {state} (" in result.stdout


def test_predict_stops_at_once_on_an_unusable_trust_list(
    ask: Callable[..., Result], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = ask("--trust-list", folder / "signed.jpg")
    assert result.exit_code == 2 and "holds no certificate" in result.stderr
    assert "loading the detector" not in result.stderr
    monkeypatch.setenv("DETECTOR_TRUST_LIST", str(folder / "none.pem"))
    result = ask()
    assert result.exit_code == 2 and "DETECTOR_TRUST_LIST: " in result.stderr


def test_the_page_shows_the_signature_state(
    folder: Path, small_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTOR_TRUST_LIST", str(folder / "anchors.pem"))
    detector = load_detector(runs=small_runs)
    for name, state in STATES.items():
        scored = score(detector, name, (folder / name).read_bytes())
        assert state in evidence_html(scored.evidence, 2)
    monkeypatch.setenv("DETECTOR_TRUST_LIST", str(folder / "none.pem"))
    monkeypatch.setenv("DETECTOR_RUNS", str(small_runs))
    with pytest.raises(ValueError, match=r"DETECTOR_TRUST_LIST: .*none.pem cannot be read"):
        loaded_detector.__wrapped__()
