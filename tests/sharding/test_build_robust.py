"""Tests of builds that are killed, or meet a full disk, an unreadable folder or a changed file."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sharding.build import Tolerance, build
from sharding.catalog import read_catalog
from sharding.format import ShardError, open_shards
from tests.builders import (
    ROOT,
    build_all,
    can_mount,
    encode,
    hashes,
    photo,
    run_build,
)  # fmt: skip
from tests.servers import HANG_S


def finish(raw: Path, out: Path) -> None:
    again = run_build(raw, out)
    output = again.communicate(timeout=120)[0].decode()
    assert again.returncode == 0, output


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
@pytest.mark.slow
def test_a_build_killed_at_random_moments_resumes_to_the_same_bytes(
    raw: Path, data: Path, tmp_path: Path, seed: int
) -> None:
    """Send SIGKILL to the build and its workers three times, at random moments."""
    rng = random.Random(seed)
    for _ in range(3):
        process = run_build(raw, tmp_path)
        time.sleep(rng.uniform(0.5, 4))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(raw, tmp_path)
    assert hashes(tmp_path) == hashes(data)
    assert not list(tmp_path.rglob("*.partial")), "a killed write left its file behind"


@pytest.mark.slow
def test_workers_that_survive_a_killed_build_do_no_harm(
    raw: Path, data: Path, tmp_path: Path
) -> None:
    """Send SIGKILL to the build alone: its workers still write while the next build starts."""
    for delay in (0.0, 1.0):
        process = run_build(raw, tmp_path)
        while process.poll() is None and len(_alive(process.pid)) < 5:
            time.sleep(0.02)  # the build, two helpers of Python, two workers
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    finish(raw, tmp_path)
    assert hashes(tmp_path) == hashes(data)
    for _ in range(200):  # the workers exit after a while
        if not _alive(process.pid):
            return
        time.sleep(0.1)
    raise AssertionError("workers still wait for a builder that was killed")


def _alive(group: int) -> list[str]:
    """List the running processes of a process group."""
    alive = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _parent, its_group = path.read_text().rpartition(")")[2].split()[:3]
            alive += [path.parent.name] if int(its_group) == group and state != "Z" else []
    return alive


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_build_ends_quickly_and_resumes(
    raw: Path, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = run_build(raw, tmp_path)
    while process.poll() is None and not (tmp_path / ".build").exists():
        time.sleep(0.05)
    time.sleep(1)
    send = os.killpg if number == signal.SIGINT else os.kill  # only a terminal sends to all
    send(process.pid, number)
    output = process.communicate(timeout=HANG_S)[0].decode()
    assert process.returncode in (0, 130), output
    assert process.returncode != 0 or (tmp_path / "val/index.json").exists()
    assert "Traceback" not in output
    build_all(raw, tmp_path)
    assert hashes(tmp_path) == hashes(data)


@pytest.mark.skipif(not can_mount(), reason="mounting a small file system needs root")
@pytest.mark.slow
def test_a_full_disk_is_one_error_and_the_build_resumes_with_more_space(
    raw: Path, data: Path, tmp_path: Path
) -> None:
    """Use a real file system of 900 kB, which is then enlarged."""
    out = tmp_path / "small"
    out.mkdir()
    build = (
        f"{sys.executable} -m sharding build --raw {raw} --catalog {raw / 'catalog.toml'} "
        f"--out {out} --jobs 2"
    )
    script = f"""
        mount -t tmpfs -o size=900k none {out} || exit 99
        {build}; echo "first: $?"
        mount -o remount,size=64m {out}
        {build}; echo "second: $?"
        cp -r {out} {tmp_path / "kept"}
    """
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "first: 1" in result.stdout, result.stdout + result.stderr
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert "second: 0" in result.stdout, result.stdout + result.stderr
    assert hashes(tmp_path / "kept") == hashes(data)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can switch to another user")
def test_an_unreadable_folder_is_one_error(raw: Path, tmp_path: Path) -> None:
    shutil.copytree(raw, tmp_path / "raw")
    (tmp_path / "raw").chmod(0o755)
    (tmp_path / "raw/alpha/real").chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to(Path("/tmp")) and folder != Path("/tmp"):
            folder.chmod(0o755)
    code = (
        "import os, sys; os.setgid(65534); os.setuid(65534)\n"
        "from sharding.__main__ import main; main()"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    arguments = ["build", "--raw", tmp_path / "raw", "--out", tmp_path / "out"]
    arguments += ["--catalog", tmp_path / "raw/catalog.toml", "--jobs", "1"]
    # Import as root, because another user may not be able to read the files of the interpreter.
    code = (
        "import sharding.__main__, sharding.build, sharding.summary\n"
        "from sharding.catalog import BUILT_IN, read_catalog\n"
        "read_catalog([BUILT_IN])  # runs its late imports\n" + code
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "not readable by this user (mode 0)" in result.stderr
    assert "alpha/real" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_that_changed_at_the_same_size_and_time_is_decoded_by_the_next_build(
    raw: Path, tmp_path: Path
) -> None:
    raw, out = shutil.copytree(raw, tmp_path / "raw"), tmp_path / "out"
    victim = raw / "alpha/real/900.bmp"
    victim.write_bytes(encode(photo(900), "BMP"))
    before = hashes(build_all(raw, out))
    stamp = victim.stat().st_mtime_ns
    victim.write_bytes(encode(photo(901), "BMP"))
    os.utime(victim, ns=(stamp, stamp))
    (raw / "alpha/real/007.webp").unlink()
    with pytest.raises(ShardError, match=r"900\.bmp has changed since this build decoded it"):
        build_all(raw, out, jobs=2)
    assert hashes(out) == before
    build_all(raw, out)
    open_shards([out / "old"])


def test_a_file_that_changes_while_packing_is_noticed(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sharding import build as module
    from sharding.catalog import read_catalog

    shutil.copytree(raw, tmp_path / "raw")
    decide = module.decide

    def change_then_decide(*arguments):
        victim = tmp_path / "raw/alpha/real/003.webp"
        victim.write_bytes((tmp_path / "raw/alpha/real/007.webp").read_bytes())
        return decide(*arguments)

    monkeypatch.setattr(module, "decide", change_then_decide)
    catalog = read_catalog([tmp_path / "raw/catalog.toml"])
    with pytest.raises(ShardError, match=r"003\.webp has changed since this build decoded it"):
        module.build(catalog, tmp_path / "raw", tmp_path / "out", jobs=1)
    monkeypatch.undo()
    module.build(catalog, tmp_path / "raw", tmp_path / "out", jobs=1)
    assert (tmp_path / "out/old/index.json").exists()


def test_the_share_of_bad_files_is_not_rounded(tmp_path: Path) -> None:
    (tmp_path / "s/fake").mkdir(parents=True)
    (tmp_path / "catalog.toml").write_text(
        '[sets]\nold = "test"\n[sources.s]\nlicense = "test"\nset = "old"\nfake = ["fake"]\n'
    )
    for number in range(50):
        data = b"<html>%d" % number if number < 29 else encode(photo(number), "PNG")
        (tmp_path / f"s/fake/{number}.png").write_bytes(data)
    catalog = read_catalog([tmp_path / "catalog.toml"])
    _, built = build(catalog, tmp_path, tmp_path / "out", jobs=1, tolerance=Tolerance(max_bad=0.58))
    assert built[0].index["samples"] == 21
