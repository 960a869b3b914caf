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
    make_authority,
    make_signer,
    pem,
    self_signed,
    sign,
    sign_edit,
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


@pytest.mark.parametrize(
    ("source", "words", "suggests"),
    [("digitalCapture", "taken with a camera (digitalCapture)", "camera"),
     ("trainedAlgorithmicMedia", "AI-generated (trainedAlgorithmicMedia)", "AI")],
)  # fmt: skip
@pytest.mark.parametrize("changed", [False, True])
def test_a_trusted_signer_does_not_vouch_for_what_was_edited(
    source: str, words: str, suggests: str, changed: bool
) -> None:
    """Anybody can sign a camera's name, and have the file signed by a trusted editor."""
    authority = make_authority()
    trust = signatures.parse_trust_list(pem(authority.root), "the list", "a test")
    forged = bytearray(
        sign(self_signed("Camera Corporation")[0], encode(PICTURE), "JPEG", source, maker="Z6")
    )
    if changed:
        forged[-30] ^= 1
    edited = sign_edit(authority.signer("Editor Inc."), encode(PICTURE), bytes(forged))
    editor, before = read_evidence(edited, trust)
    assert editor.value == "trusted (the list): signed by Editor Inc., made with Example Editor"
    assert (editor.state, editor.suggests) == ("trusted", "")
    assert before.value == (
        "not checked, of an earlier version or a part: signed in the name of Camera Corporation, "
        f"made with Z6, {words}"
    )
    assert (before.kind, before.state, before.suggests) == ("C2PA", "", suggests)


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
    said = evidence_of(data).value
    assert said.endswith("the library of the extra `evidence`: pip install c2pa-python")


def test_a_claim_without_a_source_type(signer: c2pa.Signer) -> None:
    plain = evidence_of(sign(signer, encode(PICTURE), "JPEG", "empty"))
    assert plain.suggests == ""
    named = evidence_of(sign(signer, encode(PICTURE), "JPEG", "empty", maker="ChatGPT"))
    assert named.suggests == "AI"
