"""The program `mgllava` with its commands."""

from typing import Annotated

import typer

import mgllava
from mgllava.commands.chat import chat
from mgllava.commands.convert import convert, convert_ram_plus
from mgllava.commands.detect import detect
from mgllava.commands.eval import evaluate
from mgllava.commands.export import export
from mgllava.commands.serve import serve
from mgllava.commands.train import train
from mgllava.noise import hide_noise

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mgllava {mgllava.__version__}")
        raise typer.Exit


@app.callback()
def _mgllava(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """MG-LLaVA for transformers."""
    hide_noise()


for _command in (convert, convert_ram_plus, export, chat, serve, detect, train):
    app.command()(_command)
# `eval` is a built-in function of Python.
app.command("eval")(evaluate)


def main() -> None:
    """Run the command line."""
    app(prog_name="mgllava")


if __name__ == "__main__":
    main()
