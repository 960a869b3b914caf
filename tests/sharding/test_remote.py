"""Buckets and clusters: a real S3-speaking server on this machine, and a real local Ray."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sharding.test_build import ROOT, hashes


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which s3:// means moto's server."""
    log = (tmp_path_factory.mktemp("s3") / "log").open("w+")
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    address = ""
    for _ in range(300):
        log.seek(0)
        if found := [w for w in log.read().split() if w.startswith("http://127.0.0.1:")]:
            address = found[0]
            break
        time.sleep(0.1)
    assert address, "moto's server did not start"
    yield {
        "AWS_ENDPOINT_URL": address,
        "FSSPEC_S3_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.terminate()
    server.wait()
    log.close()


def command(*arguments: object, environment: dict[str, str]) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-m", "sharding", *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


def bucket(environment: dict[str, str], script: str) -> str:
    """Run a few lines with a file system `s3`, apart from this process and its event loop."""
    result = subprocess.run(
        [sys.executable, "-c", f"import s3fs, sys; s3 = s3fs.S3FileSystem()\n{script}"],
        env=os.environ | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return result.stdout


def test_a_bucket_as_input_and_output(
    s3: dict[str, str], raw: Path, data: Path, tmp_path: Path
) -> None:
    bucket(s3, f"s3.mkdir('work'); s3.put({str(raw)!r}, 'work/raw', recursive=True)")
    catalog = raw / "catalog.toml"
    build = ("build", "--raw", "s3://work/raw", "--catalog", catalog, "--out", "s3://work/shards")
    status, output = command(*build, "--jobs", 2, environment=s3)
    assert status == 0, output
    bucket(s3, f"s3.get('work/shards', {str(tmp_path / 'got')!r}, recursive=True)")
    assert hashes(tmp_path / "got") == hashes(data)
    status, output = command(*build, environment=s3)
    assert status == 0, output
    assert output.count("was up to date") == 3
    status, output = command("verify", "s3://work/shards", environment=s3)
    assert status == 0, output
    status, output = command("show", "s3://work/shards/old", environment=s3)
    assert status == 0, output
    assert "alpha" in output


def test_a_bucket_has_one_builder_at_a_time(s3: dict[str, str], raw: Path) -> None:
    lease = json.dumps({"owner": "elsewhere:1", "renewed": time.time()})
    bucket(s3, f"s3.mkdir('held'); s3.pipe_file('held/out/.build/lock.json', {lease.encode()!r})")
    build = ("build", "--raw", raw, "--catalog", raw / "catalog.toml", "--out", "s3://held/out")
    status, output = command(*build, environment=s3)
    assert status == 1
    assert "another build is writing s3://held/out" in output
    assert "held by elsewhere:1" in output
    old = json.dumps({"owner": "elsewhere:1", "renewed": time.time() - 1000})
    bucket(s3, f"s3.pipe_file('held/out/.build/lock.json', {old.encode()!r})")
    status, output = command(*build, environment=s3)  # its builder has died
    assert status == 0, output
    assert "lock.json" not in bucket(s3, "print(s3.ls('held/out/.build'))")


def test_a_bucket_that_is_not_there_is_one_error(s3: dict[str, str], raw: Path) -> None:
    catalog = raw / "catalog.toml"
    status, output = command(
        "build", "--raw", raw, "--catalog", catalog, "--out", "s3://nowhere/x", environment=s3
    )
    assert status == 1
    assert "Traceback" not in output
    status, output = command("show", "nosuch://x/y", environment=s3)
    assert status == 1
    assert "Traceback" not in output


def test_ray_packs_the_same_bytes(raw: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}
    status, output = command(
        "build", "--raw", raw, "--catalog", raw / "catalog.toml", "--out", tmp_path / "out",
        "--engine", "ray", environment=environment,
    )  # fmt: skip
    assert status == 0, output
    assert hashes(tmp_path / "out") == hashes(data)
