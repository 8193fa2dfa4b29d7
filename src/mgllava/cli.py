"""The command line: `mgllava …`."""

import typer

from mgllava.commands.chat import chat
from mgllava.commands.convert import convert, convert_ram_plus
from mgllava.commands.detect import detect
from mgllava.commands.export import export
from mgllava.commands.serve import serve
from mgllava.commands.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _mgllava() -> None:
    """MG-LLaVA for transformers."""


for _command in (convert, convert_ram_plus, export, chat, serve, detect, train):
    app.command()(_command)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
