"""The command `mgllava export`."""

from typing import Annotated

import typer

from mgllava.model_files.errors import ConversionError

from .console import errors_as_messages, progress_bars, say
from .options import Output, Overwrite, Revision


@errors_as_messages()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model of this package: folder or Hub id.")],
    output: Output,
    revision: Revision = None,
    tagger: Annotated[
        str | None, typer.Option(help="Image tagger to add: folder or Hub id.", show_default="the processor's")
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(help="Zero-shot object detector to add: folder or Hub id.", show_default="the processor's"),
    ] = None,
    with_detector: Annotated[
        bool,
        typer.Option("--with-detector", help="Copy tagger and object detector into the folder, also from the Hub."),
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload the result to this model repository on the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a new repository is private.")] = False,
    tag: Annotated[
        str | None,
        typer.Option(help="With --push: tag of the upload; the card names it.", show_default="v and the version"),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Load the result in a process that cannot import this package.")] = True,
    overwrite: Overwrite = False,
) -> None:
    """Write a complete model folder, which loads without this package and has a model card."""
    from mgllava.hub import export_repository, upload_repository
    from mgllava.hub.export import default_tag
    from mgllava.hub.upload import check_destination

    tag = tag or default_tag()
    if push is not None:
        check_destination(push, tag, private)
    elif private:
        raise ConversionError("`private` applies to uploads: pass `push` too.")
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
    say(f"Wrote {written}")
    if push is not None:
        url = upload_repository(written, push, tag, private=private)
        say(f"Uploaded to {url}, tag {tag}")


__all__ = ["export"]
