"""Run VLMEvalKit with the models of this package.

    python -m mgllava.integrations.vlmevalkit MODEL --kit VLMEvalKit -- --data MMBench_DEV_EN --judge exact_matching

VLMEvalKit has no plugins: models are entries of its table `supported_VLM`, and `run.py` reads it. So this command adds
entries to the table, and calls `run.py` in the same process. `run.py` exits with 0 after errors, this command with 1.

Written for VLMEvalKit of August 2026 (commit e8e78f05).
"""

import json
import os
import runpy
import sys
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from mgllava.box_files import BoxFile, MissingBoxesError, read_boxes
from mgllava.chat.loading import load
from mgllava.evaluation.answering import MAX_NEW_TOKENS, Answerer, open_as_stored
from mgllava.evaluation.errors import EvaluationError

_VIEWS = ("full", "center-crop")


class MGLlavaVLM:
    """A model of this package as VLMEvalKit calls it; [`register`] derives the class that the kit knows.

    Args:
        model_path (`str`): Folder or Hub id.
        view (`str`): `"full"`: the whole image, for SliME with its tiles. `"center-crop"`: the square in the middle,
            which the kit's own wrapper of SliME shows.
        box_file (`str`, *optional*): Box file, by the column `index`.
        use_box_detector (`bool`): Whether the model's detector finds the boxes, if there is no box file.
        max_new_tokens (`int`): Maximum length of an answer, in tokens.
        **loading: Options of [`mgllava.chat.loading.load`].

    Raises:
        EvaluationError: If `view` is another one.
        ValueError: If the model cannot be loaded, or a box file is given for a model without boxes.
    """

    INTERLEAVE = True

    def __init__(
        self,
        model_path: str,
        view: str = "full",
        box_file: str | None = None,
        use_box_detector: bool = True,
        max_new_tokens: int = MAX_NEW_TOKENS,
        **loading: Any,
    ):
        super().__init__()
        if view not in _VIEWS:
            raise EvaluationError(f"`view` must be one of {', '.join(_VIEWS)}, got {view!r}.")
        self.view = view
        model, processor = load(model_path, box_file=box_file, use_box_detector=use_box_detector, **loading)
        self.answerer = Answerer(model, processor, max_new_tokens)
        self.box_file: BoxFile | None = None if box_file is None else read_boxes(box_file)
        self.dataset: Any = None
        self.detects = (
            self.answerer.takes_boxes
            and use_box_detector
            and box_file is None
            and processor.box_detector_config is not None
        )

    def set_dump_image(self, dump_image_func: Any) -> None:
        """Take the benchmark from the kit.

        Args:
            dump_image_func (`Callable`): Its method that writes images to files.
        """
        self.dump_image_func = dump_image_func
        self.dataset = getattr(dump_image_func, "__self__", None)

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Tell whether the kit calls [`build_prompt`] instead of that of the benchmark.

        Args:
            dataset (`str`): Name of the benchmark.

        Returns:
            `bool`: Whether there is a box file.
        """
        return self.box_file is not None

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, Any]]:
        """Return the benchmark's own prompt, with the index of the row in each image.

        Boxes are found by it: the name of the image file may be any other.

        Args:
            line (`Mapping`): The row.
            dataset (`str`, *optional*): Name of the benchmark.

        Returns:
            `list[dict]`: The message.
        """
        # The kit has numbers of NumPy.
        index = getattr(line["index"], "item", lambda: line["index"])()
        message = self.dataset.build_prompt(line)
        return [{**part, "index": index} if part["type"] == "image" else part for part in message]

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Answer a message.

        Args:
            message (`Sequence[Mapping]`): Parts `{"type": "text" | "image", "value": ...}`; images are paths.
            dataset (`str`, *optional*): Name of the benchmark.

        Returns:
            `str`: The answer.

        Raises:
            EvaluationError: If a part is neither text nor an image, or there are no boxes for an image.
            BadRowError: If an image cannot be read.
        """
        content: list[dict[str, Any]] = []
        for part in message:
            if part["type"] == "text":
                content.append({"type": "text", "text": part["value"]})
            elif part["type"] == "image":
                content.append({"type": "image", "image": self._open(part["value"]), **self._boxes(part)})
            else:
                raise EvaluationError(f"`message` has a part of type {part['type']!r}, but only text and images work.")
        images = [part for part in content if part["type"] == "image"]
        if self.box_file is not None and len(images) > 1:
            raise EvaluationError(
                f"The row has {len(images)} images, but a box file has one record for it. Leave out `box_file`."
            )
        if self.detects:
            for part, record in zip(images, self.answerer.detect([part["image"] for part in images]), strict=True):
                part["boxes"] = record
        (answer,) = self.answerer.answer_conversations([[{"role": "user", "content": content}]])
        return answer

    def _open(self, image: Any) -> Image.Image:
        picture = open_as_stored(image).image
        if self.view == "full":
            return picture
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        return picture.crop((left, top, left + side, top + side))

    def _boxes(self, part: Mapping[str, Any]) -> dict[str, Any]:
        if not self.answerer.takes_boxes:
            return {}
        if self.box_file is None:
            return {"boxes": {"boxes": []}}
        if "index" not in part:
            raise EvaluationError(
                "`box_file`: the kit does not let models build the prompts of this benchmark, so the row of "
                f"{part['value']} is unknown. Leave out `box_file`."
            )
        try:
            return {"boxes": self.box_file[part["index"]]}
        except MissingBoxesError as error:
            raise EvaluationError(f"`box_file`: {error}") from error


def register(name: str, model_path: str, **options: Any) -> list[str]:
    """Add a model to VLMEvalKit's table, under one name for each view.

    Args:
        name (`str`): Name of the model in the kit.
        model_path (`str`): Folder or Hub id.
        **options: Arguments of [`MGLlavaVLM`].

    Returns:
        `list[str]`: The added names: `NAME` and `NAME-center-crop`.

    Raises:
        ImportError: If VLMEvalKit cannot be imported.
        EvaluationError: If the kit has a model of this name.
    """
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel

    # The kit asks for `BaseModel`, whose `generate` checks messages and calls `generate_inner`.
    kind = type("MGLlavaVLM", (MGLlavaVLM, BaseModel), {})
    names = {name: "full", f"{name}-center-crop": "center-crop"}
    if taken := [new for new in names if new in supported_VLM]:
        raise EvaluationError(f"`name`: VLMEvalKit has a model {taken[0]} already. Choose another name.")
    for new, view in names.items():
        supported_VLM[new] = partial(kind, model_path=model_path, view=view, **options)
    return list(names)


def failures(folder: Path, name: str, since: float) -> list[str]:
    """Return what went wrong in runs of a model, of which VLMEvalKit writes `status.json`.

    Args:
        folder (`Path`): The kit's `--work-dir`.
        name (`str`): Name of the model in the kit.
        since (`float`): Time after which the runs ended.

    Returns:
        `list[str]`: One text per benchmark that failed; or one that there is no such file.
    """
    written = [path for path in folder.glob(f"{name}/*/status.json") if path.stat().st_mtime >= since]
    if not written:
        return [f"{folder / name} has no status.json of this run."]
    found = []
    for path in written:
        for benchmark, status in json.loads(path.read_text(encoding="utf-8"))["datasets"].items():
            reason = status.get("error_message") or status.get("skip_reason")
            if "error_message" in status or reason == "invalid_dataset":
                found.append(f"{benchmark}: {reason}")
    return found


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model: folder or Hub id.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS]", help="Options of VLMEvalKit's run.py, except --model."),
    ] = None,
    kit: Annotated[Path, typer.Option(help="Folder with the source of VLMEvalKit.")] = Path("VLMEvalKit"),
    name: Annotated[
        str | None, typer.Option(help="Name in the kit's tables.", show_default="that of the folder")
    ] = None,
    view: Annotated[
        str, typer.Option(help="full, or center-crop: only the square in the middle, as the kit shows SliME.")
    ] = "full",
    box_file: Annotated[Path | None, typer.Option(help="Box file of `mgllava detect`, by the column index.")] = None,
    use_box_detector: Annotated[
        bool, typer.Option(" /--no-box-detector", help="Do not look for objects.", show_default=False)
    ] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of an answer, in tokens.")] = MAX_NEW_TOKENS,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL on the Hub.")] = None,
    bits: Annotated[int | None, typer.Option(metavar="4|8", help="Load the model quantized to so many bits.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code of models that bring their own.")
    ] = False,
) -> None:
    """Evaluate a model with VLMEvalKit's run.py."""
    run = kit / "run.py"
    if not run.is_file():
        raise typer.BadParameter(f"--kit must be the folder of VLMEvalKit, but {run} does not exist.")
    if view not in _VIEWS:
        raise typer.BadParameter(f"--view must be one of {', '.join(_VIEWS)}, got {view!r}.")
    sys.path.insert(0, str(kit.absolute()))
    names = register(
        name or Path(model).name,
        model,
        box_file=None if box_file is None else str(box_file),
        use_box_detector=use_box_detector,
        max_new_tokens=max_new_tokens,
        revision=revision,
        bits=bits,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    chosen, options = names[_VIEWS.index(view)], arguments or []
    if "MMEVAL_ROOT" in os.environ:
        folder = os.environ["MMEVAL_ROOT"]
    else:
        known = ArgumentParser(add_help=False, allow_abbrev=False)
        known.add_argument("--work-dir", default="outputs")
        folder = known.parse_known_args(options)[0].work_dir
    # Times of files may be those of the last second.
    since = time.time() - 1
    sys.argv = [str(run), "--model", chosen, *options]
    runpy.run_path(str(run), run_name="__main__")
    if failed := failures(Path(folder), chosen, since):
        raise SystemExit("\n".join(["VLMEvalKit did not evaluate everything.", *failed]))


if __name__ == "__main__":
    typer.run(main)

__all__ = ["MGLlavaVLM", "failures", "main", "register"]
