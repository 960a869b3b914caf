"""States of C2PA signatures (trusted, signer unknown, invalid), and lists of trust anchors."""

import datetime
import errno
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509

from model.c2pa import signatures
from model.c2pa.signatures import (
    TrustList,
    TrustListError,
    parse_trust_list,
    read_trust_list,
    usual_trust_list,
)
from model.inference.provenance import MAX_TEXT, Evidence, read_evidence
from storage import cache_folder
from tests.builders import encode
from tests.provenance_files import (
    PICTURE,
    Authority,
    certificate,
    make_authority,
    new_key,
    pem,
    self_signed,
    sign,
    signer_of,
)

UNKNOWN = "valid, signer unknown"
MADE_BY = "trainedAlgorithmicMedia"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return make_authority()


@pytest.fixture(scope="module")
def other() -> Authority:
    return make_authority()


def trust_in(*certificates: x509.Certificate, name: str = "anchors.pem") -> TrustList:
    return parse_trust_list(pem(*certificates), name, name)


def checked(data: bytes, trust: TrustList | None) -> Evidence:
    """Return the only evidence of a signed file, and check that its text begins with its state."""
    (evidence,) = read_evidence(data, trust)
    assert evidence.state and evidence.value.startswith(f"{evidence.state} (")
    return evidence


@pytest.fixture(scope="module", params=["JPEG", "PNG"])
def signed(request: pytest.FixtureRequest, authority: Authority) -> bytes:
    return sign(authority.signer(), encode(PICTURE, request.param), request.param, MADE_BY)


def test_a_chain_to_an_anchor_is_trusted(signed: bytes, authority: Authority) -> None:
    for anchor in (authority.root, authority.intermediate):
        evidence = checked(signed, trust_in(anchor))
        assert evidence.state == "trusted"
        assert evidence.value.startswith("trusted (anchors.pem): signed by Example Images Ltd, ")
        assert evidence.suggests == "AI"


def test_a_chain_to_no_anchor_is_unknown(signed: bytes, other: Authority) -> None:
    evidence = checked(signed, trust_in(other.root))
    start = f"{UNKNOWN} (not in anchors.pem): signed in the name of Example Images Ltd, "
    assert evidence.value.startswith(start)
    assert checked(signed, None).value.startswith(f"{UNKNOWN} (no trust list): signed in the")


def test_a_changed_pixel_is_invalid(signed: bytes, authority: Authority, other: Authority) -> None:
    """For any signer and any list."""
    changed = bytearray(signed)
    changed[-30] ^= 1
    for trust in (trust_in(authority.root), trust_in(other.root), None):
        value = checked(bytes(changed), trust).value
        why = "assertion.dataHash.mismatch: the file was changed after it was signed"
        assert value.startswith(f"invalid ({why}): signed in the name of Example Images Ltd")


def test_anybody_can_sign_as_adobe(authority: Authority) -> None:
    signer, own = self_signed("Adobe Inc.")
    data = sign(signer, encode(PICTURE), "JPEG", "digitalCapture")
    evidence = checked(data, trust_in(authority.root))
    assert evidence.state == UNKNOWN
    assert "signed in the name of Adobe Inc., " in evidence.value
    assert checked(data, None).state == UNKNOWN
    assert checked(data, trust_in(own)).state == "trusted"  # only if the list contains it


def test_a_forged_chain_is_unknown(authority: Authority) -> None:
    """Two forgeries: authorities with the same names, and the real intermediate certificate with a
    leaf that it did not sign. Names and certificates are public; only the keys are secret.
    """
    trust = trust_in(authority.root)
    forged = sign(make_authority().signer(), encode(PICTURE), "JPEG", MADE_BY)
    assert checked(forged, trust).state == UNKNOWN
    key = new_key()
    leaf = certificate("Signer", key, "Intermediate", key, is_ca=False)
    borrowed = signer_of(pem(leaf, authority.intermediate), key)
    assert checked(sign(borrowed, encode(PICTURE), "JPEG", MADE_BY), trust).state == UNKNOWN


def test_a_name_cannot_pose_as_a_state(authority: Authority) -> None:
    signer, _ = self_signed("x), trusted (anchors.pem): signed by Adobe Inc.")
    maker = "trusted " * 200
    evidence = checked(
        sign(signer, encode(PICTURE), "JPEG", MADE_BY, maker=maker), trust_in(authority.root)
    )
    assert evidence.state == UNKNOWN
    assert evidence.value.startswith(f"{UNKNOWN} (not in anchors.pem): signed in the name of x),")
    assert len(evidence.value) == MAX_TEXT


def test_threads_with_different_lists_do_not_affect_each_other(
    signed: bytes, authority: Authority, other: Authority
) -> None:
    lists = [trust_in(authority.root), trust_in(other.root), None]
    expected = ["trusted", UNKNOWN, UNKNOWN]
    with ThreadPoolExecutor(8) as pool:
        states = list(pool.map(lambda n: checked(signed, lists[n % 3]).state, range(90)))
    assert states == expected * 30


@pytest.mark.slow
def test_an_expired_certificate_without_a_time_stamp(authority: Authority) -> None:
    """The library refuses to sign with an expired certificate, so the test waits for the expiry."""
    trust = trust_in(authority.root)
    for seconds in (2, 8, 32):  # on a busy machine signing and checking may take longer
        signer = authority.signer(valid=datetime.timedelta(seconds=seconds))
        data = sign(signer, encode(PICTURE), "JPEG", MADE_BY)
        if (before := checked(data, trust).state) == "trusted":
            break
    assert before == "trusted"
    time.sleep(seconds + 1.2)
    value = checked(data, trust).value
    assert value.startswith("invalid (signingCredential.expired: the certificate has expired")


# --- lists ----------------------------------------------------------------------------------------


def test_a_list_is_read_as_the_public_one_is_written(
    authority: Authority, other: Authority, tmp_path: Path
) -> None:
    """The public list has a line of text before each certificate. Any line ends are accepted."""
    parts = [f"Subject\tCN=Root {n}\n".encode() + pem(one.root) for n, one in
             enumerate((authority, other))]  # fmt: skip
    for data in (b"\n".join(parts), b"\n".join(parts).replace(b"\n", b"\r\n")):
        (tmp_path / "list.pem").write_bytes(data)
        trust = read_trust_list(tmp_path / "list.pem")
        assert (trust.name, trust.anchors, trust.fetched) == ("list.pem", 2, None)
        assert trust.pem.encode() == pem(authority.root, other.root)
        assert trust.sha256 == hashlib.sha256(data).hexdigest()
        assert trust.describe() == f"list.pem, 2 anchors, SHA-256 {trust.sha256[:16]}..."


BLOCK = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "holds no certificate; expected a PEM file"),
     ("<html>Not found</html>", "holds no certificate"),
     ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "holds no certificate"),
     (BLOCK.format("AAAA"), "is damaged: certificate 1 cannot be read"),
     (BLOCK.format("AAA"), "is damaged: certificate 1"),
     (BLOCK.format(""), "is damaged: certificate 1"),
     ("-----BEGIN CERTIFICATE-----\nAAAA", "is damaged: certificate 1"),
     ("x" * 2**20 + "x", "more than the limit of 1,048,576"),
     (BLOCK.format("AAAA") * 1001, "holds 1,001 certificates, at most 1,000 are accepted")],
    ids=["empty", "html", "key", "no der", "no base64", "nothing", "cut", "large", "many"],
)  # fmt: skip
def test_a_bad_list_is_refused_in_one_line(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text(text)
    with pytest.raises(TrustListError) as refused:
        read_trust_list(tmp_path / "x.pem")
    message = str(refused.value)
    assert message.startswith(f"--trust-list: {tmp_path}/x.pem ") and reason in message
    assert "\n" not in message


def test_a_damaged_certificate_among_whole_ones_is_named(
    authority: Authority, tmp_path: Path
) -> None:
    """If it were ignored, its signers would become unknown without a message."""
    whole = pem(authority.root).decode()
    lines = whole.splitlines(keepends=True)
    for damaged in ("".join(lines[:3] + lines[4:]), whole.replace("MII", "M!I", 1)):
        (tmp_path / "x.pem").write_text(whole + damaged + whole)
        with pytest.raises(TrustListError, match=r"certificate \d cannot be read"):
            read_trust_list(tmp_path / "x.pem")


def test_a_path_without_a_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, reason in {
        tmp_path / "none.pem": "cannot be read (No such file", tmp_path: "(Is a directory)",
        tmp_path / "fifo": "(not a plain file, but", Path("a\0b"): "cannot be read",
    }.items():  # fmt: skip
        with pytest.raises(TrustListError) as refused:
            read_trust_list(path)
        assert reason in str(refused.value)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the downloaded public list, in an empty cache."""
    monkeypatch.setenv("DETECTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(signatures, "CACHED", "list.json")
    cache_folder().mkdir()
    return cache_folder() / "list.json"


def keep(path: Path, data: bytes, **others: object) -> None:
    kept = {"fetched": "2026-08-21T10:00:00+00:00", "sha256": hashlib.sha256(data).hexdigest(),
            "pem": data.decode(), **others}  # fmt: skip
    path.write_text(json.dumps(kept))


def test_which_list_is_used(
    cached: Path, tmp_path: Path, authority: Authority, other: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The list named by the environment variable, else the downloaded list, else none."""
    assert usual_trust_list() is None
    keep(cached, pem(authority.root))
    assert usual_trust_list() is None  # the result is cached per process
    signatures._usual_trust_list.cache_clear()
    trust = usual_trust_list()
    assert trust and trust.name == "C2PA list of 2026-08-21"
    assert trust.pem.encode() == pem(authority.root)
    day = datetime.date(2026, 8, 22)
    assert trust.describe(day).endswith("..., 1 day old")
    assert trust.describe(day.replace(month=12)).endswith(
        "..., 123 days old; `python -m model fetch --trust-list` downloads the newest"
    )
    (tmp_path / "mine.pem").write_bytes(pem(other.root))
    monkeypatch.setenv("DETECTOR_TRUST_LIST", str(tmp_path / "mine.pem"))
    trust = usual_trust_list()
    assert trust and trust.name == "mine.pem"
    monkeypatch.setenv("DETECTOR_TRUST_LIST", str(tmp_path / "none.pem"))
    with pytest.raises(TrustListError, match=r"^DETECTOR_TRUST_LIST: .*none.pem cannot be read"):
        usual_trust_list()


def test_without_a_home_folder_no_list_was_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a user who is in no table of users."""
    for name in ("DETECTOR_CACHE", "XDG_CACHE_HOME", "DETECTOR_TRUST_LIST"):
        monkeypatch.delenv(name, raising=False)

    def unknown(_path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    assert usual_trust_list() is None
    with pytest.raises(ValueError, match="no home folder; set DETECTOR_CACHE"):
        cache_folder()


@pytest.mark.parametrize("method", ["is_file", "open"])  # the folder, or the file
def test_a_list_that_this_user_may_not_read_is_not_used(
    method: str, cached: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(cached, pem(make_authority().root))

    def refused(path: Path, *_arguments: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, method, refused)
    assert usual_trust_list() is None
    assert usual_trust_list() is None
    (line,) = logged
    assert line == (
        f"{cached}: Permission denied; no C2PA trust list is used. Set DETECTOR_CACHE to a folder "
        "of yours"
    )


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "sha256", "pem", "fetched"])
def test_a_damaged_list_in_the_cache_is_an_error(damage: str, cached: Path) -> None:
    keep(cached, pem(make_authority().root), **({damage: "20"} if damage.isalnum() else {}))
    if not damage.isalnum() or damage == "null":
        cached.write_text(damage)
    with pytest.raises(TrustListError, match=r"list.json, the fetched C2PA trust list, is damaged"):
        usual_trust_list()
