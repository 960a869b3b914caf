"""The wheel: its files, and all commands in an environment with the wheel and no extras."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from installed import program_version
from tests.builders import ROOT, encode, photo, write_raw

LEFT_OUT = {
    "tests", "benchmarks", "docs", ".ci", ".github", ".dockerignore", ".gitignore",
    ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "LICENSE",
    "Makefile", "README.md", "constraints.txt", "docker-compose.yml", "pyproject.toml",
}  # fmt: skip
"""Files of the checkout that are not installed; LICENSE and README.md are in the wheel's metadata.
"""

EXTRAS = (
    "pandas", "streamlit", "sklearn", "onnxruntime", "onnxscript", "fastapi", "uvicorn", "captum",
    "c2pa", "kagglehub", "ray", "s3fs", "wandb", "pytest",
)  # fmt: skip
"""Modules that are missing in an installation without extras."""

TINY = [
    "preprocess.crop_size=32", "preprocess.resize_size=36", "network.options.dims=[8,8,16,16]",
    "run.epochs=1", "loading.batch_size=40", "loading.num_workers=0",
    'data.train=["old"]', 'data.validate=["val"]',
]  # fmt: skip
"""Options for two training steps: the set `old` has 80 images."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", folder]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("ai_images_detector-*.whl")
    return path


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_contains_the_program_and_its_data_files(wheel: Path) -> None:
    """Every file of the checkout is in the wheel or in `LEFT_OUT`."""
    list_files = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(list_files, cwd=ROOT, check=True, capture_output=True, text=True)
    files = {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}
    expected = {name for name in files if name.partition("/")[0] not in LEFT_OUT}
    found = members(wheel)
    assert {name for name in found if ".dist-info/" not in name} == expected
    for needed in (
        "recipes/phase1.toml", "sharding/catalog.toml", "sharding/kept-for-testing.txt",
        "detectors/clip/weights.safetensors", "detectors/clip/README.md", "report/page.html",
        "serve/docs.html", "page/paste.js", "page/style.css", ".streamlit/config.toml",
        "model/py.typed",
    ):  # fmt: skip
        assert needed in found
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in found)


def test_the_installed_program_knows_its_version(wheel: Path, tmp_path: Path) -> None:
    """The page shows it. pyproject.toml is not in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "from installed import CHECKOUT, program_version; print(CHECKOUT, program_version())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", program_version()]


def test_every_package_has_py_typed(wheel: Path) -> None:
    found = members(wheel)
    packages = {name.partition("/")[0] for name in found if name.endswith("/__init__.py")}
    assert packages and {f"{package}/py.typed" for package in packages} <= found


def test_no_other_distribution_has_a_module_of_the_same_name(wheel: Path) -> None:
    """pip would overwrite the files of the other distribution without a warning."""
    site = Path(sysconfig.get_path("purelib"))
    tops = {name.partition("/")[0] for name in members(wheel) if ".dist-info/" not in name}
    assert "model" in tops and "console.py" in tops
    assert not [top for top in tops if (site / top).exists()]


def test_the_base_installation_requires_no_extra(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    required = metadata.get_all("Requires-Dist")
    base = {line for line in required if "extra ==" not in line}
    assert len(base) > 10 and len(base) < len(required)
    for extra in ("pandas", "streamlit", "scikit-learn", "onnxruntime", "fastapi"):
        assert not [line for line in base if line.startswith(extra)], extra


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with the wheel and no extras; returns its folder of commands."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    python = folder / "bin" / "python"
    constraint = ["--constraint", ROOT / "constraints.txt"]
    environment = {**os.environ, "UV_LINK_MODE": "hardlink"}
    install = [*uv, "pip", "install", "--quiet", "--python", python, *constraint, wheel]
    subprocess.run(install, check=True, env=environment)
    return folder / "bin"


def run(installed: Path, cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment in a folder that is not a checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    program, *rest = map(str, arguments)
    command = [str(installed / program), *rest]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_without_extras_it_packs_trains_and_predicts(installed: Path, tmp_path: Path) -> None:
    found = run(
        installed, tmp_path, "python", "-c",
        "import sys\nfor name in sys.argv[1:]:\n    try: __import__(name)\n"
        "    except ImportError: continue\n    print(name)", *EXTRAS,
    )  # fmt: skip
    assert found.stdout == "", "the environment is not without extras"

    raw = write_raw(tmp_path / "raw")
    (tmp_path / "photo.jpg").write_bytes(encode(photo(0)))
    (tmp_path / "model.py").write_text("raise SystemExit('the wrong module')")
    sets = [word for key in TINY for word in ("--set", key)]
    detector = "ai-images-detector"
    for line in (
        [detector, "build", "--raw", raw, "--catalog", raw / "catalog.toml", "--jobs", 1],
        [detector, "train", "--recipe", "demo-phase1", *sets],
        [detector, "evaluate", "--shards", "val"],
        [detector, "predict", "photo.jpg"],
        ["python", "-m", "ai_images_detector", "predict", "photo.jpg", "--format", "csv"],
    ):
        done = run(installed, tmp_path, *line)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    assert (tmp_path / "runs" / "demo-phase1" / "step_0000002").is_dir()
    assert "photo.jpg" in done.stdout

    for line, extra in (
        ([detector, "app"], "app"), ([detector, "serve"], "serve"),
        ([detector, "predict", "photo.jpg", "--heatmap", "maps"], "heatmap"),
        ([detector, "predict", "photo.jpg", "--onnx", "photo.jpg"], "export"),
    ):  # fmt: skip
        done = run(installed, tmp_path, *line)
        assert done.returncode, line
        python = installed / "python"  # uv made this environment, without pip
        said = f'uv pip install --python {python} "ai-images-detector[{extra}]"'
        assert said in done.stderr
        assert "Traceback" not in done.stderr
