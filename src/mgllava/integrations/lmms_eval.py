"""The model `mgllava` of lmms-eval, with boxes; lmms-eval finds it by the entry point `lmms_eval.models`.

    lmms-eval --model mgllava --model_args pretrained=MODEL,boxes=detector --tasks pope_local --include_path TASKS

`python -m mgllava.integrations.lmms_eval TASK DATA --output TASKS` writes a variant of a task of lmms-eval that reads
local Parquet files instead of the Hub, or a task of questions about videos (msvd-qa, msrvtt-qa, video-qa), which
lmms-eval lacks.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import Accelerator
from tqdm import tqdm

from mgllava.box_files import BoxFile, read_boxes
from mgllava.chat.loading import load
from mgllava.evaluation.answering import MAX_NEW_TOKENS, Answerer, greedy, open_as_stored, open_video
from mgllava.evaluation.benchmarks import BENCHMARKS
from mgllava.evaluation.box_sources import boxes_in_file
from mgllava.evaluation.errors import BadRowError, EvaluationError
from mgllava.evaluation.metrics import token_f1
from mgllava.evaluation.normalization import normalize_answer
from mgllava.evaluation.task import describe, load_task
from mgllava.extras import import_extra
from mgllava.families import takes_videos


def manifest() -> Any:
    """Describe the model to lmms-eval.

    Returns:
        `ModelManifest`: Its name and class.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mgllava", chat_class_path=f"{__name__}.MGLlavaChat")


# After `manifest`: if this module is imported first, they load the entry points of models, and so call it.
from lmms_eval import utils  # noqa: E402
from lmms_eval.api.model import lmms  # noqa: E402
from lmms_eval.protocol import ChatMessages  # noqa: E402

# The first is that of videos, about which there are several questions.
_KEYS = ("video_name", "index", "question_id", "questionId", "pid", "id")
_SOURCES = ("none", "file", "detector")


class MGLlavaChat(lmms):
    """Models of this package in lmms-eval. The arguments are those of `--model_args`.

    Args:
        pretrained (`str`): Folder or Hub id of a model.
        device (`str`): Device; with several processes each takes its own.
        batch_size (`int`): Documents at a time.
        dtype (`str`): `"auto"` (as stored), `"float32"`, `"float16"` or `"bfloat16"`.
        bits (`int`, *optional*): 4 or 8.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        attn_implementation (`str`, *optional*): As in `from_pretrained`.
        trust_remote_code (`bool`): Whether code of the model's repository may run.
        boxes (`str`, *optional*): `"none"`, `"file"` or `"detector"`; by default `"file"` with a `box_file`, else
            `"detector"` if the model has one.
        box_file (`str`, *optional*): Box file of `mgllava detect`.
        box_key (`str`, *optional*): Field of documents with the ids of the box file; by default the first of
            video_name, index, question_id, questionId, pid and id.
        box_limit (`int`, *optional*): Number of detections above which they are limited; 0 for no limit.
        num_frames (`int`): Frames that are sampled from each video.

    Raises:
        EvaluationError: If an argument is wrong.
        ValueError: If the model cannot be loaded, or boxes are given for a model without boxes.
        BoxFileError: If the box file cannot be read.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = "auto",
        batch_size: int | str = 1,
        dtype: str = "auto",
        bits: int | None = None,
        revision: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        boxes: str | None = None,
        box_file: str | None = None,
        box_key: str | None = None,
        box_limit: int = 100,
        num_frames: int = 8,
        **unknown: Any,
    ):
        super().__init__()
        # lmms-eval passes its own limits to every model.
        unknown = {name: value for name, value in unknown.items() if name != "max_batch_size"}
        if unknown:
            raise EvaluationError(f"`model_args` has {', '.join(unknown)}, which mgllava does not know.")
        if boxes is not None and boxes not in _SOURCES:
            raise EvaluationError(f"`boxes` must be one of {', '.join(_SOURCES)}, got {boxes!r}.")
        if boxes is not None and (boxes == "file") != (box_file is not None):
            raise EvaluationError(f"`boxes` is {boxes}, but `box_file` is {box_file}: `boxes=file` needs a file.")
        if num_frames < 1:
            raise EvaluationError(f"`num_frames` must be at least 1, got {num_frames}.")
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            device = str(accelerator.device)
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self.accelerator = accelerator
        model, processor = load(
            pretrained,
            revision=revision,
            bits=bits,
            dtype=dtype,
            device=device or "auto",
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            boxes=None if boxes == "none" else boxes,
            box_file=box_file,
        )
        self.answerer = Answerer(model, processor)
        self.batch_size = int(batch_size)
        self._box_file: BoxFile | None = None if box_file is None else read_boxes(box_file)
        self._keys = _KEYS if box_key is None else (box_key,)
        self._options: dict[str, Any] = {}
        self._detects = False
        self._num_frames = num_frames
        if self.answerer.takes_boxes:
            self._options["box_limit"] = box_limit or None
            has_detector = processor.box_detector_config is not None
            if boxes == "detector" and not has_detector:
                raise EvaluationError(f"`boxes` is detector, but {pretrained} has none. Choose none or file.")
            self._detects = boxes == "detector" or (boxes is None and box_file is None and has_detector)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests, in their order.

        Args:
            requests (`Sequence[Instance]`): Their `args` are context, function from document to messages, options of
                generation, number of the document, task and split.

        Returns:
            `list[str]`: The answers.

        Raises:
            EvaluationError: If a document has no boxes in the box file, several images or videos that share its boxes,
                or something other than text, images and whole videos; or if a prompt with a video is too long.
            BadRowError: If an image or video cannot be read.
        """
        batches = utils.Collator(
            [request.args for request in requests], lambda args: args[3], group_fn=lambda args: args[2], grouping=True
        )
        answers: list[str] = []
        bar = tqdm(total=len(requests), disable=self._rank != 0, desc="Model Responding")
        for batch in batches.get_batched(n=self.batch_size, batch_fn=None):
            documents = [self.task_dict[task][split][number] for _, _, _, number, task, split in batch]
            conversations = [
                ChatMessages(messages=to_messages(document)).to_hf_messages()
                for (_, to_messages, *_), document in zip(batch, documents, strict=True)
            ]
            options = batch[0][2]
            self._prepare(conversations, documents)
            config = generation_config(self.answerer.model.generation_config, options)
            has_videos = any(block["type"] == "video" for block in _blocks(conversations))
            sampled = {"do_sample_frames": False} if has_videos else {}
            texts = self.answerer.answer_conversations(conversations, config, **self._options, **sampled)
            for (context, *_), text in zip(batch, texts, strict=True):
                answers.append(_cut(text, options.get("until")))
                self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
                bar.update(1)
        bar.close()
        ordered: list[str] = batches.get_original(answers)
        return ordered

    def _prepare(self, conversations: Sequence[list[dict[str, Any]]], documents: Sequence[Any]) -> None:
        """Open images and videos, and give them their boxes."""
        found: list[tuple[dict[str, Any], list[Any]]] = []
        for conversation, document in zip(conversations, documents, strict=True):
            blocks = _blocks([conversation])
            for block in blocks:
                is_video = block["type"] == "video"
                if is_video:
                    visual = self._open_video(block)
                else:
                    visual = open_as_stored(block["image"])
                    block["image"] = visual.image
                if self.answerer.takes_boxes:
                    records = self._boxes(document, len(blocks), self._num_frames if is_video else None)
                    block["boxes"] = records if is_video else records[0]
                found.append((block, visual.frames))
        if self._detects:
            self._detect(found)

    def _open_video(self, block: dict[str, Any]) -> Any:
        """Replace the video of a block by its frames."""
        if not takes_videos(self.answerer.processor):
            raise EvaluationError(
                "The document has a video, but the model takes none. A model of MG-LLaVA that was saved without them "
                "gets them from `mgllava.add_videos`."
            )
        if parts := {"video_start", "video_end"} & set(block):
            raise EvaluationError(
                f"The document has {' and '.join(sorted(parts))}, but only whole videos are supported."
            )
        film = open_video(block["video"], self._num_frames)
        block["video"] = film.clip.frames
        return film

    def _detect(self, found: Sequence[tuple[dict[str, Any], list[Any]]]) -> None:
        """Detect the boxes of all images at once, and of the frames of each video."""
        pictures = [(block, frames[0]) for block, frames in found if block["type"] == "image"]
        records = self.answerer.detect([picture for _, picture in pictures])
        for (block, _), record in zip(pictures, records, strict=True):
            block["boxes"] = record
        for block, frames in found:
            if block["type"] == "video":
                block["boxes"] = self.answerer.detect(frames)

    def _boxes(
        self, document: Mapping[str, Any], visuals: int, num_frames: int | None = None
    ) -> list[Mapping[str, Any]]:
        """Return the boxes of an image, or with `num_frames` of each frame of a video."""
        if self._box_file is None:
            return [{"boxes": []}] * (num_frames or 1)
        key = next((document[name] for name in self._keys if document.get(name) is not None), None)
        if key is None:
            raise EvaluationError(f"`box_key`: the document has no {' or '.join(self._keys)}, but {list(document)}.")
        if visuals > 1:
            raise EvaluationError(
                f"Document {key!r} has {visuals} images or videos, but a box file has one record for it. Set "
                "`boxes` to detector or none."
            )
        try:
            return boxes_in_file(self._box_file, key, num_frames)
        except BadRowError as error:
            raise EvaluationError(f"`box_file`: of the document {key!r}, {error}.") from error

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: the tasks of the paper's benchmarks generate.

        Args:
            requests (`Sequence[Instance]`): The requests.

        Returns:
            `list`: Nothing.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("mgllava answers tasks of the type generate_until only, not loglikelihood.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse tasks of several rounds.

        Args:
            requests (`Sequence[Instance]`): The requests.

        Returns:
            `list`: Nothing.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("mgllava answers tasks of the type generate_until only, not of several rounds.")


def _blocks(conversations: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the images and videos of conversations; raise if there is something else than these and text."""
    blocks = [
        block
        for conversation in conversations
        for message in conversation
        for block in message["content"]
        if block["type"] != "text"
    ]
    if others := {block["type"] for block in blocks} - {"image", "video"}:
        raise EvaluationError(
            f"The document has {', '.join(sorted(others))}, but only images and videos are supported."
        )
    return blocks


def generation_config(own: Any, options: Mapping[str, Any]) -> Any:
    """Turn the options of a task into a generation configuration: greedy, unless they ask for sampling.

    Args:
        own (`GenerationConfig`): That of the model.
        options (`Mapping`): `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `num_beams`; others are not used.

    Returns:
        `GenerationConfig`: The configuration.
    """
    config = greedy(own, int(options.get("max_new_tokens", MAX_NEW_TOKENS)))
    temperature = options.get("temperature") or 0
    if options.get("do_sample", temperature > 0) and temperature > 0:
        config.update(do_sample=True, temperature=temperature, top_p=options.get("top_p") or 1.0)
    config.num_beams = int(options.get("num_beams") or 1)
    return config


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """End an answer before the first of some words."""
    for word in [until] if isinstance(until, str) else until or ():
        text = text.split(word)[0] if word else text
    return text.strip()


def write_local_task(task: str, data: Sequence[Path], output: Path) -> Path:
    """Write a variant of a task of lmms-eval that reads local Parquet files.

    Args:
        task (`str`): Name of a task of lmms-eval, such as `"pope"`.
        data (`Sequence[Path]`): Parquet files with the columns of the dataset on the Hub.
        output (`Path`): Folder for `TASK_local.yaml`, to be passed as `--include_path`.

    Returns:
        `Path`: The file.

    Raises:
        EvaluationError: If lmms-eval has no such task, or a file does not exist.
    """
    # Not imported: that takes a minute.
    folder = Path(utils.__file__).parent / "tasks"
    found = [
        path
        for path in sorted(folder.rglob("*.yaml"))
        if any(
            line.split("#")[0].strip().replace('"', "").replace("'", "") == f"task: {task}"
            for line in path.read_text(encoding="utf-8").splitlines()
        )
    ]
    if not found:
        raise EvaluationError(f"`task`: lmms-eval has no task {task!r}.")
    absent = [str(path) for path in data if not path.is_file()]
    if absent or not data:
        raise EvaluationError(f"`data`: no such file: {', '.join(absent) or 'none was given'}.")
    splits = [
        line.split(":")[1].strip().strip("\"'")
        for line in found[0].read_text(encoding="utf-8").splitlines()
        if line.startswith("test_split:")
    ]
    split = splits[0] if splits else "test"
    # JSON is YAML, so that names of files need no quoting rules of our own.
    content = {
        "include": str(found[0]),
        "task": f"{task}_local",
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: [str(path.absolute()) for path in data]}},
        "test_split": split,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{task}_local.yaml"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def write_video_task(
    benchmark: str,
    data: Sequence[Path],
    output: Path,
    annotations: Path | None = None,
    image_folder: Path | None = None,
) -> Path:
    """Write a task of questions about videos, which lmms-eval lacks, with prompts and scores of `mgllava eval`.

    Args:
        benchmark (`str`): `"msvd-qa"`, `"msrvtt-qa"` or `"video-qa"`.
        data (`Sequence[Path]`): Files with the questions, as of `mgllava eval`.
        output (`Path`): Folder for the task and its data, to be passed as `--include_path`.
        annotations (`Path`, *optional*): File with the answers.
        image_folder (`Path`, *optional*): Folder that paths of videos start from; by default that of the data.

    Returns:
        `Path`: The file of the task.

    Raises:
        EvaluationError: If a question has no answer, or no video, or cannot be asked.
        ImportError: If pyarrow is not installed.
    """
    pa = import_extra("pyarrow", "eval", "The data of a task")
    pq = import_extra("pyarrow.parquet", "eval", "The data of a task")
    task = load_task(benchmark, list(data), annotations=annotations, image_folder=image_folder)
    if task.bad_rows:
        raise EvaluationError(f"`data`: {describe(task.bad_rows)}")
    if not task.has_answers:
        raise EvaluationError("`annotations` must name a file with the answers, since the rows have none.")
    rows = [
        {
            "question_id": str(question.key),
            "video_name": str(question.box_key),
            "video": str(task.find_image(question).absolute()),
            "question": question.prompt,
            "answer": str(question.answer),
        }
        for question in task.questions
    ]
    name = f"{task.benchmark.name.replace('-', '_')}_local"
    output.mkdir(parents=True, exist_ok=True)
    table = output / f"{name}.parquet"
    # All columns are texts, whatever an answer looks like.
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([(column, pa.string()) for column in rows[0]])), table)
    metrics = ("exact_match", "token_f1")
    content = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": [str(table.absolute())]}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": "video",
        # Otherwise lmms-eval takes a video in a format of animations, such as WebP or GIF, for an image.
        "doc_to_messages": "TAG messages_about_video",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "process_results": "TAG score_answer",
        "generation_kwargs": {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0, "do_sample": False, "until": []},
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
    }
    path = output / f"{name}.yaml"
    # JSON is YAML, except for the tags of functions.
    text = re.sub(r'"TAG (\w+)"', r"!function mgllava.integrations.lmms_eval.\1", json.dumps(content, indent=1))
    path.write_text(text + "\n", encoding="utf-8")
    return path


def messages_about_video(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the video of a row of a task of videos, and its question; lmms-eval calls this.

    Args:
        document (`Mapping`): The row.

    Returns:
        `list[dict]`: One message in the form of lmms-eval.
    """
    content = [{"type": "video", "url": document["video"]}, {"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": content}]


def score_answer(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score the answer to a question about a video as `mgllava eval` does; lmms-eval calls this.

    Args:
        document (`Mapping`): A row of the data of the task.
        results (`Sequence[str]`): The answer.

    Returns:
        `dict[str, float]`: Exact match and F1 of the words, from 0 to 1.
    """
    (answer,), wanted = results, document["answer"]
    is_equal = normalize_answer(answer) == normalize_answer(wanted)
    return {"exact_match": float(is_equal), "token_f1": token_f1(answer, wanted)}


def write_task(
    task: str, data: Sequence[Path], output: Path, annotations: Path | None = None, image_folder: Path | None = None
) -> Path:
    """Write a task of videos, or a local variant of a task of lmms-eval."""
    benchmark = BENCHMARKS.get(task.lower().replace("_", "-"))
    if benchmark is not None and benchmark.num_frames is not None:
        return write_video_task(task, data, output, annotations, image_folder)
    if annotations is not None or image_folder is not None:
        raise EvaluationError(
            f"`annotations` and `image_folder` are for tasks of videos; {task} has its answers and images in `data`."
        )
    return write_local_task(task, data, output)


def main(
    task: Annotated[
        str, typer.Argument(help="Name of a task of lmms-eval, such as pope; or msvd-qa, msrvtt-qa, video-qa.")
    ],
    data: Annotated[list[Path], typer.Argument(help="Parquet files of the task's data set; or files of questions.")],
    output: Annotated[Path, typer.Option(help="Folder for the task, for --include_path.")],
    annotations: Annotated[Path | None, typer.Option(help="File with the answers to questions about videos.")] = None,
    image_folder: Annotated[Path | None, typer.Option(help="Folder of videos; by default that of DATA.")] = None,
) -> None:
    """Write a task for lmms-eval that reads local files."""
    typer.echo(f"Wrote {write_task(task, data, output, annotations, image_folder)}")


if __name__ == "__main__":
    typer.run(main)

__all__ = [
    "MGLlavaChat",
    "generation_config",
    "manifest",
    "messages_about_video",
    "score_answer",
    "write_local_task",
    "write_video_task",
]
