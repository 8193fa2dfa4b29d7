"""Options that several commands share, with one name, help text and default text each.

A parameter of a command has the name of the Python argument that it becomes, even if its option is called differently.
So [`errors_as_messages`] can replace argument names in errors by options.
"""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model: folder or Hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL on the Hub.")]
Bits = Annotated[
    int | None,
    typer.Option(metavar="4|8", help="Load the language model quantized to so many bits.", show_default="as stored"),
]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, float16 or bfloat16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
AttnImplementation = Annotated[
    str | None, typer.Option(help="sdpa, eager, flash_attention_2, … as in from_pretrained.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code of models that bring their own.")
]
# Without a positive form, which is the default.
UseBoxDetector = Annotated[
    bool, typer.Option(" /--no-box-detector", help="Do not look for objects.", show_default=False)
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Read a checkpoint that holds pickled objects next to the weights. The objects are skipped; their code "
        "is not run.",
    ),
]
MaxShardSize = Annotated[str, typer.Option(help="Size of the largest weight file.")]
Output = Annotated[Path, typer.Option(help="Folder to write.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what this command wrote there before; other files are kept.")
]

SAVE_BOXES_HELP = "Folder for drawings of the images with their boxes."
THRESHOLD_HELP = "Lower limit of the boxes' scores."
