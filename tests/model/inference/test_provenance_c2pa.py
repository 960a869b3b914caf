"""C2PA manifests: read and checked, and never requested from the network."""

import http.server
import io
import threading

import c2pa
import pytest

from model.c2pa import signatures
from model.inference.provenance import read_evidence
from tests.builders import encode
from tests.provenance_files import (
    MIME,
    PICTURE,
    evidence_of,
    make_signer,
    sign,
)


@pytest.fixture(scope="module")
def signer() -> c2pa.Signer:
    return make_signer()


@pytest.mark.parametrize("kind", MIME)
def test_a_signed_manifest_is_read_and_checked(signer: c2pa.Signer, kind: str) -> None:
    signed = sign(signer, encode(PICTURE, kind), kind, "trainedAlgorithmicMedia")
    evidence = evidence_of(signed)
    assert (evidence.kind, evidence.suggests) == ("C2PA", "AI")
    assert evidence.state == "valid, signer unknown"
    assert evidence.value.startswith("valid, signer unknown (no trust list): signed in the name of")
    for said in ("Example Images Ltd", "made with Example Painter", "AI-generated",
                 "trainedAlgorithmicMedia"):  # fmt: skip
        assert said in evidence.value
    middle = bytearray(signed)
    middle[-30] ^= 1
    assert evidence_of(bytes(middle)).state == "invalid"
    taken = evidence_of(sign(signer, encode(PICTURE, kind), kind, "digitalCapture"))
    assert taken.suggests == "camera"


def test_a_remote_manifest_is_not_requested(signer: c2pa.Signer) -> None:
    """An image must not be able to make the program send a request."""
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/manifest.c2pa"
        data = sign(signer, encode(PICTURE), "JPEG", "trainedAlgorithmicMedia", address)
        assert address.encode() in data
        read_evidence(data)
        # Not even if the bytes seem to contain a manifest, so that the library is called.
        read_evidence(data + b"jumb c2pa")
        with pytest.raises(c2pa.C2paError):
            signatures.read_manifest(data, None)
        assert not asked
        # Not by any other feature of the library either: no host is allowed.
        eager = {**signatures.OFFLINE, "verify": {"remote_manifest_fetch": True}}
        with pytest.raises(c2pa.C2paError):
            c2pa.Reader("image/jpeg", io.BytesIO(data), context=c2pa.Context.from_dict(eager))
        assert not asked
        with pytest.raises(c2pa.C2paError):
            c2pa.Reader("image/jpeg", io.BytesIO(data))  # by default the library sends a request
        assert asked
        server.shutdown()


def test_without_the_library_a_manifest_is_only_reported(
    signer: c2pa.Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sign(signer, encode(PICTURE), "JPEG", "trainedAlgorithmicMedia")
    monkeypatch.setattr(signatures, "is_readable", lambda: False)
    assert "install the extra `evidence`" in evidence_of(data).value


def test_a_claim_without_a_source_type(signer: c2pa.Signer) -> None:
    plain = evidence_of(sign(signer, encode(PICTURE), "JPEG", "empty"))
    assert plain.suggests == ""
    named = evidence_of(sign(signer, encode(PICTURE), "JPEG", "empty", maker="ChatGPT"))
    assert named.suggests == "AI"
