"""Run the commands of the installed wheel, such as `ai-images-detector predict photo.jpg`.

Main entry: `main()`, a click group: the console command `ai-images-detector`. From Python, call it
with the list of words, as in `main(["predict", "photo.jpg"])`; like every click command it ends
with SystemExit, which has the exit code. It has seven subcommands (`COMMANDS`). Six of them are
commands of a checkout, with the same arguments, output and files:

- `predict`, `train` and `evaluate` are `predict.py`, `train.py` and `evaluate.py`.
- `serve` is `python -m serve`, `fetch` is `python -m model fetch`, `build` is `python -m sharding
  build`.

The seventh, `app`, is the function `app()` here. It starts the web page with Streamlit and serves
it on this machine until Ctrl-C. It ends with exit code 1 if Streamlit is not installed. Its
options:

- `--host` and `--port`: the address of the page (default 127.0.0.1 and 8501).
- `--checkpoint`: the detector, as a checkpoint folder, a run's folder, or the name of a shipped
  detector.
- `--runs`: the folder of the runs. Without `--checkpoint`, its newest run is used, or the shipped
  detector if the folder has no run. If the folder does not exist, the page says so.
- `--verbose`: more log lines, with tracebacks.

If neither `--checkpoint` nor `--runs` is given, the environment variable DETECTOR_CHECKPOINT is
used like the first, else DETECTOR_RUNS like the second. If neither is set: the newest run in
`runs`, or the shipped detector if there is none.

`--version` prints the version. `context` is given by click. `HERE` is the folder of the program's
modules. A subcommand is imported only when it is called.
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import click

# The modules have common names (`model`, `report`). This line makes sure that the modules next to
# this file are imported, not modules from the current folder or PYTHONPATH.
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import cli  # noqa: E402
import console  # noqa: E402
from installed import NAME, install_extra, program_version  # noqa: E402

COMMANDS = {
    "predict": ("predict", "", "Print for each image whether it is AI-generated."),
    "app": ("", "", "Start a web page for checking images in a browser."),
    "serve": ("serve.__main__", "", "Start an HTTP API that checks images."),
    "fetch": ("model.__main__", "fetch", "Download the backbone of a shipped detector."),
    "build": ("sharding.__main__", "build", "Pack raw datasets into shard sets."),
    "train": ("train", "", "Train a detector on shard sets, or on a folder of images."),
    "evaluate": ("evaluate", "", "Measure a detector on shard sets, or compare reports."),
}
"""Command -> (module, its name in the module's group if there is one, help text). The help text is
repeated here because listing the commands must not import their modules. `app` is defined below.
"""


class _Commands(console.Group):
    """Click group that imports a command only when it is called, not to list it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return all command names, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return the command of that name; None if there is none."""
        if cmd_name == "app":
            return app
        if cmd_name not in COMMANDS:
            return None
        module, child, _ = COMMANDS[cmd_name]
        command = import_module(module).main
        return command.commands[child] if child else command

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands for `--help`."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, said) for name, (*_, said) in COMMANDS.items()])


@click.group(NAME, cls=_Commands)
@click.version_option(program_version(), prog_name=NAME)
def main() -> None:
    """Tell real photographs from AI-generated images.

    Commands read and write below the current folder (data/, runs/) unless an option names another
    folder. More commands: python -m sharding, python -m pipeline, python -m model.
    """


@click.command("app", cls=console.Command)
@cli.listen(port=8501)
@cli.options("checkpoint_or_shipped", "runs")
def app(host: str, port: int, checkpoint: Path | None, runs: Path) -> None:
    """Start a web page that tells whether images are AI-generated.

    The page is served from this machine until Ctrl-C. Without --runs and --checkpoint, the
    environment variables DETECTOR_RUNS and DETECTOR_CHECKPOINT are used.
    """
    if find_spec("streamlit") is None:
        raise click.ClickException(f"streamlit is not installed; {install_extra('app')}")
    if checkpoint and checkpoint.is_file():
        from model.shipped.backbone import no_checkpoint

        raise click.ClickException(no_checkpoint(checkpoint))
    if checkpoint:
        os.environ["DETECTOR_CHECKPOINT"] = str(checkpoint)
    if cli.given("runs"):
        os.environ["DETECTOR_RUNS"] = str(runs)
        if not checkpoint:
            os.environ.pop("DETECTOR_CHECKPOINT", None)
    from streamlit.web.cli import main as streamlit

    console.say(f"page: {console.address(host, port)} (Ctrl-C stops it)")
    # Streamlit reads its settings from .streamlit/ in the folder of the script.
    script = str(HERE / "app_server.py")
    streamlit(["run", script, f"--server.address={host}", f"--server.port={port}"])


if __name__ == "__main__":
    main()
