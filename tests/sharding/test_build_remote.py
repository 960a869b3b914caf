"""Tests of builds with buckets (a local S3 server) and with a local Ray cluster."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from sharding.__main__ import main
from sharding.executor import _why_ray_failed, run_all
from tests.builders import ROOT, build_all, hashes


def command(*arguments: object, environment: dict[str, str]) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-m", "sharding", *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def small(raw: Path, tmp_path: Path) -> Path:
    """Return a raw folder with two of the small sources."""
    for name in ("dummy", "alpha"):
        shutil.copytree(raw / name, tmp_path / "raw" / name)
    shutil.copy(raw / "catalog.toml", tmp_path / "raw")
    return tmp_path / "raw"


@pytest.mark.slow
def test_a_bucket_as_input_and_output(
    s3: dict[str, str], client, small: Path, tmp_path: Path
) -> None:
    client.create_bucket(Bucket="bucket")
    for path in small.rglob("*.*"):
        client.upload_file(str(path), "bucket", f"raw/{path.relative_to(small)}")
    catalog = small / "catalog.toml"
    build = (
        "build",
        "--raw",
        "s3://bucket/raw",
        "--catalog",
        catalog,
        "--out",
        "s3://bucket/shards",
    )
    status, output = command(*build, "--jobs", 2, environment=s3)
    assert status == 0, output
    expected = hashes(build_all(small, tmp_path / "local"))
    for name, digest in expected.items():
        body = client.get_object(Bucket="bucket", Key=f"shards/{name}")["Body"].read()
        assert hashlib.sha256(body).hexdigest() == digest, name
    status, output = command(*build, environment=s3)
    assert status == 0, output
    assert output.count("was up to date") == 1
    client.upload_file(str(small / "alpha/real/007.webp"), "bucket", "raw/alpha/real/003.webp")
    status, output = command(*build, "--jobs", 2, environment=s3)
    assert status == 0, output
    status, output = command("verify", "s3://bucket/shards", environment=s3)
    assert status == 0, output
    catalog.write_text(catalog.read_text().replace('"old"', '"new"'))
    status, output = command(*build, environment=s3)
    assert status == 1
    assert "nothing into set old" in output


@pytest.mark.slow
def test_a_second_build_of_one_bucket_is_refused(s3: dict[str, str], client, small: Path) -> None:
    def hold(age: float) -> None:
        lease = json.dumps({"owner": "elsewhere:1", "renewed": time.time() - age})
        client.put_object(Bucket="held", Key="out/.build/lock.json", Body=lease.encode())

    client.create_bucket(Bucket="held")
    hold(0)
    build = ("build", "--raw", small, "--catalog", small / "catalog.toml", "--out", "s3://held/out")
    status, output = command(*build, environment=s3)
    assert status == 1
    assert "another build is writing s3://held/out" in output
    assert "held by elsewhere:1" in output
    hold(1000)  # expired: its build has died
    status, output = command(*build, "--jobs", 1, environment=s3)
    assert status == 0, output
    left = client.list_objects_v2(Bucket="held")["Contents"]
    assert not [entry for entry in left if "lock" in entry["Key"]]


def test_a_missing_bucket_is_one_error(s3: dict[str, str], client, small: Path) -> None:
    arguments = ("--raw", small, "--catalog", small / "catalog.toml", "--out", "s3://nowhere/x")
    status, output = command("build", *arguments, environment=s3)
    assert status == 1
    assert "Traceback" not in output
    assert "s3://nowhere/x" in output
    nobody = s3 | dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "")
    nobody |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(small)}
    status, output = command("build", *arguments, environment=nobody)
    assert status == 1
    assert "Traceback" not in output
    assert "s3://nowhere/x does not answer: Unable to locate credentials" in output
    assert "nowhere" not in [b["Name"] for b in client.list_buckets()["Buckets"]]  # not created


def test_an_unknown_kind_of_address_is_one_error() -> None:
    result = CliRunner().invoke(main, ["show", "nosuch://x/y"])
    assert result.exit_code == 2
    assert "nosuch" in result.output


@pytest.mark.slow
def test_ray_packs_the_same_bytes(raw: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}
    status, output = command(
        "build", "--raw", raw, "--catalog", raw / "catalog.toml", "--out", tmp_path / "out",
        "--engine", "ray", environment=environment,
    )  # fmt: skip
    assert status == 0, output
    assert hashes(tmp_path / "out") == hashes(data)


def test_only_a_lost_worker_of_ray_is_said_to_lack_memory() -> None:
    errors = pytest.importorskip("ray").exceptions
    for error in (errors.OutOfMemoryError("killed"), errors.WorkerCrashedError()):
        said = _why_ray_failed(error)
        assert "lack of memory" in said and said.endswith("with fewer --jobs")
    setup = errors.RuntimeEnvSetupError("no space left\non\x1b the worker " + "x " * 500)
    for error, reason in (
        (setup, "Failed to set up runtime environment. no space left on\\x1b the worker"),
        (errors.OutOfDiskError("full"), "OutOfDiskError: full"),
    ):
        said = _why_ray_failed(error)
        assert reason in said and "--jobs" not in said
        assert "\n" not in said and len(said) < 500


def test_a_cluster_that_does_not_start_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def fails(**_options: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray raises it

    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(ChildProcessError, match=r"the Ray cluster failed .* node timed out during"):
        list(run_all(len, [("a",)], "ray", 1))


@pytest.mark.slow
def test_a_killed_worker_of_ray_is_one_error() -> None:
    pytest.importorskip("ray")
    program = (
        "import os, signal\nfrom sharding.executor import run_all\n"
        "def end():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "try:\n    list(run_all(end, [()], 'ray', 1))\n"
        "except ChildProcessError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    assert "the Ray cluster lost a task (WorkerCrashedError)" in done.stdout, done.stderr
    assert "with fewer --jobs" in done.stdout
