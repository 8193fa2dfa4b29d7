"""Options that several commands share: one word, one help text and one default text for each.

A parameter has the name of the argument that it is passed on as, also where its option is another word: so
[`errors_as_messages`] can name options where errors name arguments.
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
# Without a positive form, which could change nothing.
UseBoxDetector = Annotated[
    bool, typer.Option(" /--no-box-detector", help="Do not look for objects.", show_default=False)
]
Detector = Annotated[
    str | None, typer.Option(help="Zero-shot object detector: folder or Hub id.", show_default="OWLv2-L")
]
Tagger = Annotated[str | None, typer.Option(help="Image tagger: folder or Hub id.")]
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
    bool, typer.Option("--overwrite", help="Replace what this command wrote there before; other files stay.")
]

SAVE_BOXES_HELP = "Folder to draw the images with their boxes in."
THRESHOLD_HELP = "Scores of boxes must be greater."
