"""`benchmarks.contenders` explains its arguments, although only `benchmarks.loader` calls it."""

from click.testing import CliRunner

from benchmarks.contenders import main


def test_help_and_missing_arguments_are_no_traceback() -> None:
    assert "Time the loader NAME" in CliRunner().invoke(main, ["--help"]).stdout
    result = CliRunner().invoke(main, ["pil"])
    assert result.exit_code == 2 and "Missing argument 'PLACE'" in result.stderr
