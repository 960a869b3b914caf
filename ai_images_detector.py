"""The command that the wheel installs: `ai-images-detector predict photo.jpg`.

Each of its commands is one that a checkout has too (`COMMANDS`), loaded when it is called.
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import click

# The names of the program's modules are common ones (`model`, `report`): those beside this file are
# meant, whatever the current folder or PYTHONPATH hold.
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import console  # noqa: E402
from installed import NAME, install_extra  # noqa: E402

COMMANDS = {
    "predict": ("predict", "", "Say of images whether they are AI-generated."),
    "app": ("", "", "Show the web page that does so in a browser."),
    "serve": ("serve.__main__", "", "Answer HTTP requests with what `predict` says of images."),
    "fetch": ("model.__main__", "fetch", "Fetch the backbone that a detector that ships needs."),
    "build": ("sharding.__main__", "build", "Pack raw datasets into shard sets."),
    "train": ("train", "", "Train a detector on shard sets, or on folders of images."),
    "evaluate": ("evaluate", "", "Measure a checkpoint on shard sets, or compare two reports."),
}
"""The module of each command, its name there if the module has several, and what it does: said
here, for the module is not loaded to say it. `app` is below.
"""


class _Commands(console.Group):
    """Loads a command when it is called, and none for the list of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """All names, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command of that name, if there is one."""
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
def main() -> None:
    """Is this image a real photograph, or AI-generated?

    What is read and written lies below the current folder (data/, runs/) unless an option says
    otherwise. More commands: python -m sharding, python -m pipeline, python -m model.
    """


@click.command("app", cls=console.Command)
@console.listen(port=8501)
@console.options("checkpoint", "runs")
@click.pass_context
def app(context: click.Context, host: str, port: int, checkpoint: Path | None, runs: Path) -> None:
    """Show a web page that says of images whether they are AI-generated.

    It runs on this machine until Ctrl-C. Of its settings that are environment variables
    DETECTOR_RUNS and DETECTOR_CHECKPOINT count where the option is not given.
    """
    if find_spec("streamlit") is None:
        raise click.ClickException(f"streamlit is not installed; {install_extra('app')}")
    if checkpoint:
        os.environ["DETECTOR_CHECKPOINT"] = str(checkpoint)
    if context.get_parameter_source("runs") is not click.core.ParameterSource.DEFAULT:
        os.environ["DETECTOR_RUNS"] = str(runs)
    from streamlit.web.cli import main as streamlit

    console.say(f"the page: http://{host}:{port}, until Ctrl-C")
    # Streamlit reads the settings in .streamlit/ beside the script.
    script = str(HERE / "app_server.py")
    streamlit(["run", script, f"--server.address={host}", f"--server.port={port}"])


if __name__ == "__main__":
    main()
