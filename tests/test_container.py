"""The container files: they pass the linter and copy all needed modules."""

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from model.shipped.backbone import cached_path
from serve.__main__ import main as serve
from tests.builders import ROOT, imports_of


def test_the_files_of_the_container_pass_their_linter() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_container_is_pinned_and_its_user_can_read_it() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^FROM (.*)", text, re.M) == re.findall(
        r"^FROM (\S+@sha256:\w{64})$", text, re.M
    )
    copies, readable, user = (text.rindex(word) for word in ("\nCOPY", "chmod -R a+rX .", "\nUSER"))
    assert copies < readable < user
    pinned = (ROOT / "constraints.txt").read_text()
    for name in ("uv", "streamlit", "torch", "pillow", "simplejpeg"):
        assert re.search(rf"^{name}==\d", pinned, re.M), name
    assert text.count("--constraint constraints.txt") == 2


def test_the_advised_build_for_a_gpu_has_the_cuda_of_the_pinned_torch() -> None:
    """Another build of torch needs other versions of CUDA's libraries than those pinned."""
    pinned = (ROOT / "constraints.txt").read_text()
    major, minor = re.search(r"^cuda-toolkit==(\d+)\.(\d+)", pinned, re.M).groups()
    for name in ("Dockerfile", "docs/page.md"):
        advised = re.findall(r"TORCH=(cu\d+)", (ROOT / name).read_text(encoding="utf-8"))
        assert advised == [f"cu{major}{minor}"], name


def test_the_container_has_all_modules_that_the_page_imports() -> None:
    copies = re.findall(r"^COPY (.*)", (ROOT / "Dockerfile").read_text(), re.M)
    copied = {word.rstrip("/") for line in copies for word in line.split()[:-1]}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    needed, open_ends = (
        {".streamlit", "pyproject.toml", "constraints.txt"},
        ["app", "app_server", "serve"],
    )
    while open_ends:
        name = open_ends.pop()
        files = list((ROOT / name).rglob("*.py")) or [ROOT / f"{name}.py"]
        needed.add(name if (ROOT / name).is_dir() else f"{name}.py")
        imported = {module.partition(".")[0] for file in files for module in imports_of(file)}
        ours = {one for one in imported if (ROOT / one).is_dir() or (ROOT / f"{one}.py").exists()}
        open_ends += [one for one in ours if not {one, f"{one}.py"} & needed]
    assert needed <= copied
    assert all(any(fnmatch(path, pattern) for pattern in let_in) for path in copied)


def test_the_compose_services_have_the_right_command_port_and_rights() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert services.keys() == {"page", "api"}
    dockerfile = (ROOT / "Dockerfile").read_text()
    folders = re.search(r"install --directory --owner page (.*)", dockerfile)[1].split()
    exposed = re.search(r"^EXPOSE (.*)", dockerfile, re.M)[1].split()
    for service in services.values():
        assert service["user"] == "10001" and service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        for volume in service["volumes"]:
            assert volume.split(":")[1] in folders  # a new volume gets the owner of this folder
        (port,) = service["ports"]
        host, outside, inside = port.split(":")
        assert host == "127.0.0.1" and outside == inside and inside in exposed
    api = services["api"]
    assert api["command"][:3] == ["python", "-m", "serve"]
    context = serve.make_context("serve", api["command"][3:])
    assert context.params["host"] == "0.0.0.0"
    assert api["ports"] == [f"127.0.0.1:{context.params['port']}:{context.params['port']}"]
    assert f"127.0.0.1:{context.params['port']}/readyz" in api["healthcheck"]["test"][-1]
    assert int(api["stop_grace_period"].removesuffix("s")) > context.params["timeout"]


def test_the_backbone_of_the_detector_that_ships_is_mounted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a run, the page of a container needs it."""
    text = (ROOT / "Dockerfile").read_text()
    assert "DETECTOR_CACHE=/cache" in text
    for name in ("DETECTOR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    mount = f'-v "{cached_path("").parent}:/cache:ro"'.replace(str(Path.home()), "$HOME")
    page = (ROOT / "docs/page.md").read_text(encoding="utf-8").partition("## In a container")[2]
    assert mount in text and mount in page
    assert page.index("python -m model fetch") < page.index("docker run")
