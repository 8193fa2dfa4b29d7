"""The chat in a terminal or a pipe: answers go to stdout, everything else to stderr."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

import PIL.Image
import torch
from accelerate.utils.memory import should_reduce_batch_size
from rich.console import Console
from rich.table import Table

from mgllava.atomic_files import replacing
from mgllava.box_files import BoxFile
from mgllava.visualization import draw_boxes, draw_frames, kept_tokens
from mgllava.visualization.token_map import kept_cells

from .session import ChatError, ChatSession

_VIDEO_HELP = "  /video PATH_OR_URL  show a video, of which frames are sampled\n"
_HELP = """\
A line is a question, except for:
  /image PATH_OR_URL  show an image; the next question is about it (its path or URL alone does the same)
{videos}\
  /reset              forget all turns and all that was shown (also RESET)
  /exit               quit (also EXIT, or Ctrl-D)
  /help               show this text
Ctrl-C stops an answer; what has been generated stays in the conversation."""

# More rows would scroll the question out of view; the picture shows all of them.
_MOST_ROWS = 20
_URL = re.compile(r"https?://\S+")


class ChatTerminal:
    """Reads questions line by line and writes the answers as they come.

    Images with their boxes are drawn to files in `picture_folder`, and so are the frames of videos, side by side.
    `box_file` has the boxes of images and videos by their paths or names; those of others come from the detector.
    """

    def __init__(self, session: ChatSession, picture_folder: Path | None = None, box_file: BoxFile | None = None):
        self.session = session
        self.picture_folder = picture_folder
        self.box_file = box_file
        self._names: set[str] = set()
        self._notes = Console(stderr=True, highlight=False)
        self._is_interactive = sys.stdin.isatty()

    def run(self, images: Sequence[tuple[str, PIL.Image.Image]] = ()) -> None:
        """Show images, each with its name, then read lines until the end of the input."""
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            _never_fail(stream)
        if self._is_interactive:
            _edit_lines()
            self._say("/image shows an image, /reset starts over, /exit quits, /help says more.", "dim")
        for name, picture in images:
            self._attempt(self._show, name, picture)
        while (line := self._read()) is not None:
            if not self._follow(line.strip()):
                break

    def _read(self) -> str | None:
        """Read a line; `None` at the end of the input."""
        if not self._is_interactive:
            return sys.stdin.readline() or None
        while True:
            try:
                return input("> ")
            except KeyboardInterrupt:
                self._say("\n(Ctrl-D or /exit quits)", "dim")
            except EOFError:
                self._say("")
                return None

    def _follow(self, line: str) -> bool:
        """Execute a line; return whether the chat continues."""
        command, _, argument = line.partition(" ")
        word = line.lower()
        if word in ("exit", "quit", "/exit", "/quit"):
            return False
        if word in ("reset", "/reset"):
            self.session.reset()
            self._say("(all turns and images are forgotten)", "dim")
        elif word == "/help":
            self._say(_HELP.format(videos=_VIDEO_HELP if self.session.takes_videos else ""))
        elif command == "/image":
            source = find_image(argument) or argument.strip()
            if source:
                self._attempt(self._show, source)
            else:
                self._say("/image needs a path or URL.", "red")
        elif command == "/video":
            source = find_file(argument) or argument.strip()
            if source:
                self._attempt(self._show_video, source)
            else:
                self._say("/video needs a path or URL.", "red")
        elif image := find_image(line):
            self._attempt(self._show, image)
        elif line.startswith("/"):
            self._say(f"{command[:200]} is neither a command nor an image file; /help lists the commands.", "red")
        elif line:
            self._attempt(self._answer, line)
        return True

    def _attempt(self, action: Callable[..., None], *args: Any) -> None:
        """Call a function; on a failure, report it instead of ending the chat."""
        try:
            action(*args)
        except (ChatError, ImportError) as error:  # the latter: no decoder of videos is installed
            self._say(str(error), "red")
        except KeyboardInterrupt:
            self._say("\n(stopped)", "dim")
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
            self._say(
                f"Out of memory: {str(error).splitlines()[0] if str(error) else 'no memory is left'}\n"
                "The question was not added. /reset clears the conversation; --bits 4 loads a smaller model.",
                "red",
            )
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()

    def _answer(self, question: str) -> None:
        """Ask, and write the answer as it comes."""
        out = sys.stdout

        def write(text: str) -> None:
            out.write(text)
            out.flush()

        answer = self.session.ask(question, on_text=write)
        write("\n")
        if answer.finish == "interrupted":
            self._say("(stopped)", "dim")
        elif answer.finish == "length":
            self._say(f"(cut after {answer.num_tokens} tokens; --max-new-tokens allows more)", "dim")
        if answer.image_outputs is not None:
            self._show_kept(answer.image_outputs)

    def _show_kept(self, outputs: Mapping[str, Any]) -> None:
        """Say which tokens of images the answer is based on, and draw them."""
        for index, image in enumerate(self.session.images):
            try:
                kept, rows, columns = kept_cells(outputs, index)
            except ValueError:  # an image of one view, all of which is seen
                continue
            self._say(
                f"{image.name}: {rows} x {columns} tiles (rows x columns), {kept.sum()} of {kept.size} of their "
                "tokens kept for this question",
                "dim",
            )
            self._save(image.name, "-kept", kept_tokens(image.picture, outputs, index=index))

    def _show(self, source: str, picture: PIL.Image.Image | None = None) -> None:
        """Add an image to the conversation, list its boxes and draw them."""
        boxes = self._boxes_in_file(source)
        with self._notes.status("Looking for objects") if self.session.takes_boxes else nullcontext():
            image = self.session.add_image(source if picture is None else picture, boxes, source)
        width, height = image.picture.size
        title = f"{source}: {width} x {height} pixels"
        if image.objects is not None:
            number = len(image.objects["boxes"])
            title += f", {number} {'object' if number == 1 else 'objects'}"
            if boxes is None and self.session.processor.box_detector is None:
                title += " (there is no box detector to find them)"
        self._say(title)
        if image.objects is not None and number:
            self._notes.print(_table(image.objects))
            self._save(image.name, "", draw_boxes(image.picture, image.objects))

    def _show_video(self, source: str) -> None:
        """Add a video to the conversation, say what was sampled and draw the frames."""
        boxes = self._boxes_in_file(source, "frames")
        with self._notes.status("Reading the video"):
            video = self.session.add_video(source, boxes, source)
        width, height = video.frames[0].size
        title = f"{source}: {len(video.frames)} of {video.num_total_frames} frames, {width} x {height} pixels"
        if video.objects is not None:
            title += f", objects: {', '.join(str(len(entry['boxes'])) for entry in video.objects)}"
            if boxes is None and self.session.processor.box_detector is None:
                title += " (there is no box detector to find them)"
        self._say(title)
        self._save(video.name, "", draw_frames(video.frames, video.objects))

    def _boxes_in_file(self, source: str, kind: str = "boxes") -> dict[str, object] | None:
        """Find the record of an image or video (`kind` is `"frames"`) by its path or, failing that, by its name."""
        for key in (source, Path(source).name, *([Path(source).stem] if kind == "frames" else [])):
            if self.box_file is not None and key in self.box_file and kind in (record := self.box_file[key]):
                return record
        return None

    def _save(self, name: str, ending: str, picture: PIL.Image.Image) -> None:
        """Save what was drawn on an image into a file of its own, whose name is that of the image and `ending`."""
        if self.picture_folder is None:
            return
        stem = re.sub(r"[^\w.-]+", "_", Path(name.split("?")[0]).stem)[:100] or "image"
        stem += ending
        numbered, number = stem, 1
        while numbered in self._names:
            number += 1
            numbered = f"{stem}-{number}"
        self._names.add(numbered)
        path = self.picture_folder / f"{numbered}.jpg"
        try:
            with replacing(path) as partial:
                picture.save(partial, format="JPEG", quality=92)
        except OSError as error:
            self._say(f"The picture cannot be saved: {error}", "red")
        else:
            self._say(f"drawn in {path}", "dim")

    def _say(self, text: str, style: str = "") -> None:
        self._notes.print(text, style=style, markup=False, soft_wrap=True)


def find_image(line: str) -> str | None:
    """Return the URL or path of an image if a line holds nothing else.

    The path may be quoted or escaped, as terminals write it when a file is dropped on them.
    """
    found = find_file(line)
    is_image = found is not None and Path(found).suffix.lower() in PIL.Image.registered_extensions()
    return found if is_image or (found is not None and _URL.fullmatch(found)) else None


def find_file(line: str) -> str | None:
    """Return the URL or path of a file if a line holds nothing else, see [`find_image`]."""
    line = line.strip()
    if _URL.fullmatch(line):
        return line
    try:
        words = shlex.split(line)
    except ValueError:  # an apostrophe
        words = []
    for candidate in (line, *(words if len(words) == 1 else [])):
        path = os.path.expanduser(candidate)
        if os.path.isfile(path):
            return path
    return None


def _table(objects: Mapping[str, Any]) -> Table:
    """List objects in the order of their tokens."""
    boxes = objects["boxes"].tolist()
    labels, scores = objects.get("labels"), objects.get("scores")
    table = Table(box=None, pad_edge=False)
    table.add_column("label", overflow="fold")
    for column in ("score", "x1", "y1", "x2", "y2"):
        table.add_column(column, justify="right", no_wrap=True)
    for row, box in enumerate(boxes[:_MOST_ROWS]):
        label = "" if labels is None else str(labels[row])
        score = "" if scores is None else f"{scores[row]:.2f}"
        table.add_row(label.replace("[", r"\["), score, *(f"{corner:.0f}" for corner in box))
    if len(boxes) > _MOST_ROWS:
        table.add_row(f"and {len(boxes) - _MOST_ROWS} more")
    return table


def _never_fail(stream: TextIO) -> None:
    """Let a stream replace characters that its encoding cannot write or read."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


def _edit_lines() -> None:
    """Let `input` edit lines and remember them, if Python was built with readline."""
    with suppress(ImportError):
        import readline  # noqa: F401


__all__ = ["ChatTerminal", "find_file", "find_image"]
