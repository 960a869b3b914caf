"""Rows of the HTTP API contain the state of C2PA signatures."""

from pathlib import Path

import pytest

from model.c2pa.signatures import TrustListError
from tests.builders import encode
from tests.provenance_files import PICTURE, make_authority, pem, self_signed, sign
from tests.serve.conftest import Serve


def test_a_row_contains_the_signature_state(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = make_authority()
    signed = sign(authority.signer(), encode(PICTURE), "JPEG", "digitalCapture")
    changed = bytearray(signed)
    changed[-30] ^= 1
    adobe = sign(self_signed("Adobe Inc.")[0], encode(PICTURE), "JPEG", "digitalCapture")
    (tmp_path / "anchors.pem").write_bytes(pem(authority.root))
    monkeypatch.setenv("DETECTOR_TRUST_LIST", str(tmp_path / "anchors.pem"))
    client, _ = serve()
    files = [("image", ("x.jpg", data)) for data in (signed, adobe, bytes(changed))]
    answer = client.post("/predict", files=files)
    assert answer.status_code == 200, answer.text
    said = [row["provenance"][0] for row in answer.json()["images"]]
    states = ["trusted", "valid, signer unknown", "invalid"]
    assert [one["state"] for one in said] == states
    for one, state in zip(said, states, strict=True):
        assert one["value"].startswith(f"{state} (")


def test_an_unusable_trust_list_is_an_error_at_start(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTOR_TRUST_LIST", str(tmp_path / "none.pem"))
    with pytest.raises(TrustListError, match=r"DETECTOR_TRUST_LIST: .*none.pem cannot be read"):
        serve()
