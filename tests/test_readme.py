"""Tests that the commands in the pages parse, and that those of the README run."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import click
import pillow_heif
import pytest
from click.testing import CliRunner
from PIL import Image

import ai_images_detector
import evaluate
import predict
import train
from model.__main__ import main as model
from model.checkpoint import find, read_meta
from model.shipped.backbone import CLIP_8_BIT, cached_path
from pipeline.__main__ import main as pipeline
from serve.__main__ import main as serve
from sharding.__main__ import main as sharding
from tests.builders import ROOT, encode, photo
from tests.goldens import check_printed

# The log keeps old commands that no longer exist.
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "log.md"),
]  # fmt: skip
COMMANDS = {
    "train.py": train.main, "evaluate.py": evaluate.main, "predict.py": predict.main,
    "-m sharding": sharding, "-m pipeline": pipeline, "-m model": model, "-m serve": serve,
}  # fmt: skip


def typed(prefix: str) -> list[str]:
    """Return the lines in code blocks of the pages that begin with `prefix`."""
    texts = [re.sub(r" *\\\n *", " ", page.read_text(encoding="utf-8")) for page in PAGES]
    blocks = [block for text in texts for block in re.findall(r"```\w*\n(.*?)```", text, re.S)]
    lines = [line for block in blocks for line in block.split("\n")]
    lines += [line for text in texts for line in re.findall(r"^    (\S.*)$", text, re.M)]
    commands = [re.sub(r"^[A-Z_]+=\S+ ", "", line.split(" #")[0].strip()) for line in lines]
    return sorted({command for command in commands if command.startswith(prefix)})


@pytest.mark.parametrize("line", typed("make "))
def test_make_targets_exist(line: str) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    for target in shlex.split(line)[1:]:
        assert "=" in target or target in targets, line


def test_the_pages_set_only_variables_of_the_makefile() -> None:
    variables = re.findall(r"^([A-Z]+) [?:]=", (ROOT / "Makefile").read_text(), re.M)
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    named = {name for text in texts for name in re.findall(r"make [a-z-]+ ([A-Z]+)=", text)}
    assert "PYTHON" in named and named <= set(variables)


@pytest.mark.parametrize("python", ["python3", ".venv/bin/python"])
def test_the_gpu_tests_install_nothing_with_a_python_of_your_own(python: str) -> None:
    """A GPU machine may reach no package registry (benchmarks/README.md)."""
    dry_run = ["make", "--no-print-directory", "--dry-run", "--always-make", "test-gpu"]
    own = subprocess.check_output([*dry_run, f"RUN={python}"], cwd=ROOT, text=True)
    tests = "tests/pipeline tests/model/training/test_step_waits.py"
    assert own == f'REQUIRE_GPU=1 {python} -m pytest -m "gpu and not slow" {tests}\n'
    assert "pip install" in subprocess.check_output(dry_run, cwd=ROOT, text=True)


def test_the_packages_for_a_gpu_machine_have_the_runner_of_its_tests() -> None:
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    lines = re.findall(r"-m pip (?:wheel|install) .*wheels.*", page)
    assert len(lines) == 2 and all(line.endswith(" pytest") for line in lines)


@pytest.mark.parametrize("line", typed("python "))
def test_python_commands_parse(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = next((name for name in COMMANDS if line.startswith(f"python {name}")), None)
    if benchmark := re.match(r"python (-m (benchmarks\.\w+))", line):
        name = benchmark[1]
    if name is None and line.startswith(("python -m venv ", "python -m pip ")):
        return
    if name is None:
        assert (ROOT / shlex.split(line)[1]).exists(), line
        return
    arguments = shlex.split(line.removeprefix(f"python {name}"))
    for argument in arguments:  # create the files that the command needs
        is_path = re.search(r"[/.]", argument) or argument.isupper()
        if is_path and not argument.startswith("-") and "=" not in argument:
            path = tmp_path / argument
            path.parent.mkdir(parents=True, exist_ok=True)
            is_file = path.suffix or argument == "FILE"
            path.write_text("") if is_file else path.mkdir(exist_ok=True)
    command: click.Command = COMMANDS.get(name) or import_module(benchmark[2]).main
    if isinstance(command, click.Group) and arguments and arguments[0] in command.commands:
        command = command.commands[arguments.pop(0)]
    command.make_context(name, arguments)


@pytest.mark.parametrize("line", typed("detector/bin/ai-images-detector "))
def test_installed_commands_parse(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    command = ai_images_detector.main.get_command(click.Context(ai_images_detector.main), name)
    command.make_context(name, arguments)


def test_the_four_commands_are_shown() -> None:
    text = (ROOT / "README.md").read_text()
    for command in (
        "make demo", "make test", "python -m sharding build", "python train.py --phase 2",
        "python evaluate.py --shards evalgen", "python predict.py dir/",
    ):  # fmt: skip
        assert command in text


README = (ROOT / "README.md").read_text(encoding="utf-8")

RUN_ELSEWHERE = {
    "make setup": "every Makefile target that runs tests runs it first",
    "make app": "tests/test_app_server.py",
    "make demo": "tests/sharding/demo/test_render.py",
    "make test": "it runs this test",
}
"""Commands of the README that other tests run -> the tests that run them."""


def section(title: str) -> str:
    """Return the text below a heading of the README."""
    return README.split(f"## {title}\n")[1].partition("\n## ")[0]


def commands_of(text: str) -> list[str]:
    """Return the commands in a text: its indented lines."""
    return re.findall(r"^    (\S.*)$", text, re.M)


VERDICT, TRAIN = section("Is this photo AI-generated?"), section("Train your own")
WHOLE = section("The whole program")

needs_clip = pytest.mark.skipif(
    not any(cached_path(file.sha256).exists() for file in CLIP_8_BIT.files),
    reason="the backbone of the shipped detector is missing; run `python -m model fetch`",
)


def test_every_command_of_the_readme_is_run_by_a_test() -> None:
    typed_lines = {line.partition(" #")[0].strip() for line in commands_of(README)}
    run = {line.partition(" #")[0].strip() for line in commands_of(VERDICT + TRAIN + WHOLE)}
    assert typed_lines == run
    makes = set(re.findall(r"make [a-z-]+", README))
    assert makes == RUN_ELSEWHERE.keys()


def test_the_page_on_your_own_images_has_the_same_commands() -> None:
    page = (ROOT / "docs/own-data.md").read_text(encoding="utf-8")
    for line in commands_of(TRAIN):
        assert line.partition("  #")[0].strip() in page


@pytest.fixture
def shell(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that runs a line in an empty folder with the scripts and returns stdout."""
    for name in ("train.py", "evaluate.py", "predict.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    def run(line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    return run


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python -m sharding build", "To try everything without a download: make demo"),
        ("python train.py --phase 1", "no shard set at data/shards/phase1"),
        ("python train.py --phase 2", "no shard set at data/shards/phase2"),
        ("python evaluate.py --shards evalgen", "no checkpoint below runs; train one with"),
        ("python predict.py dir/", "'dir/' does not exist"),
    ],
)
def test_a_command_without_its_data_says_what_is_missing(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The large recipe needs a GPU and 400,000 images, so its commands run on nothing here."""
    assert command in {line.partition(" #")[0].strip() for line in commands_of(WHOLE)}
    monkeypatch.chdir(tmp_path)
    line = command.removeprefix("python ")
    program = next(name for name in COMMANDS if line.startswith(name))
    result = CliRunner().invoke(COMMANDS[program], shlex.split(line.removeprefix(program)))
    assert result.exit_code in (1, 2)
    assert said in result.output and "Traceback" not in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("Error")]) <= 1


@pytest.mark.slow
def test_a_script_runs_outside_of_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    done = subprocess.run(
        [sys.executable, "train.py", "--phase", "2"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "no shard set at data/shards/phase2" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@needs_clip
def test_the_readme_shows_the_real_output_of_predict(
    shell: Callable[[str], str], tmp_path: Path
) -> None:
    fractal = Image.effect_mandelbrot((640, 480), (-1.5, -0.2, -1.2, 0.1), 100).convert("RGB")
    (tmp_path / "dir").mkdir()
    fractal.save(tmp_path / "photo.jpg")
    fractal.save(tmp_path / "dir/same.png")
    pillow_heif.from_pillow(fractal).save(tmp_path / "photo.heic")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(tmp_path / "photo.jpg", "inside.jpg")
    _, fetch, predict_one, predict_many = commands_of(VERDICT)
    shell(fetch)
    shown = re.search(r"```\n(probability.*?)```", VERDICT, re.S)
    assert shown
    check_printed(shell(predict_one), shown[1])
    shell(predict_many)
    rows = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert [row["path"] for row in rows] == [
        "photo.heic", "dir/same.png", "photos.zip/inside.jpg",
    ]  # fmt: skip
    code = re.search(r"```python\n(.*?)```", VERDICT, re.S)
    assert code and shell(f"python -c {shlex.quote(code[1])}") == "no sign of AI\n"


def write_photos(folder: Path, count: int) -> None:
    """Write smooth noise as JPEG files. Every second pixel of a fake is darker."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = photo(zlib.crc32(f"{folder.name}/{number}".encode()), 128, 112)
        if folder.name not in ("photos", "real"):
            pixels[::2, ::2] //= 2
        (folder / f"{number:03d}.jpg").write_bytes(encode(pixels, quality=90))


@pytest.mark.slow
@needs_clip
def test_the_training_of_the_readme_works_with_few_images(
    shell: Callable[[str], str], tmp_path: Path
) -> None:
    for name, count in (("photos", 150), ("sdxl", 75), ("flux", 75)):
        write_photos(tmp_path / "data/raw/mine" / name, count)
    for name in ("real", "fake"):
        write_photos(tmp_path / "photos" / name, 40)
    folder, *five = commands_of(TRAIN)
    shell(folder)
    assert read_meta(find(tmp_path / "runs", tmp_path / "runs/photos"))["metrics"]["sets"]
    for line in five:
        shell(line)
    report = json.loads((tmp_path / "runs/mine/evaluation/mine-test/report.json").read_text())
    figures = report["sets"]["mine-test"]["overall"]
    assert figures["recall"] > 0.9 and figures["false_positive_rate"] < 0.1
    assert (tmp_path / "runs/mine/evaluation/mine-test/report.html").exists()
