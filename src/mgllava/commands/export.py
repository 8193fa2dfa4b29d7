"""The command `mgllava export`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .console import errors_as_messages, progress_bars


def export(
    model: Annotated[str, typer.Option(help="MG-LLaVA or RAM++ repository: folder or Hub id.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of --model on the Hub.")] = None,
    tagger: Annotated[
        str | None, typer.Option(help="Image tagger to add: folder or Hub id.", show_default="the processor's")
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="Zero-shot detector to add: folder or Hub id.", show_default="the processor's")
    ] = None,
    with_detector: Annotated[
        bool,
        typer.Option("--with-detector", help="Copy tagger and detector into the repository, also those on the Hub."),
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload the result to this repository on the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a new repository is private.")] = False,
    tag: Annotated[
        str | None,
        typer.Option(help="With --push: tag of the upload; the card names it.", show_default="v and the version"),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Load the result in a process that cannot import this package.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier export wrote.")] = False,
) -> None:
    """Write a complete repository: it loads without this package, and has a model card."""
    with errors_as_messages():
        from mgllava.hub import export_repository, upload_repository
        from mgllava.hub.export import default_tag
        from mgllava.hub.upload import check_destination
        from mgllava.model_files.errors import ConversionError

        tag = tag or default_tag()
        if push is not None:
            check_destination(push, tag, private)
        elif private:
            raise ConversionError("--private is about the Hub, and needs --push.")
        with progress_bars() as progress:
            written = export_repository(
                model,
                output,
                revision=revision,
                tagger=tagger,
                detector=detector,
                with_detector=with_detector,
                repo_id=push,
                tag=tag,
                verify=verify,
                overwrite=overwrite,
                progress=progress,
            )
        Console().print(f"Wrote {written}", soft_wrap=True, markup=False)
        if push is not None:
            url = upload_repository(written, push, tag, private=private)
            Console().print(f"Uploaded to {url}, tag {tag}", soft_wrap=True, markup=False)


__all__ = ["export"]
