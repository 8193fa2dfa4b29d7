"""The benchmarks: question form, key of the box file, box limit, score, and files for servers and judges."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import questions as ask
from . import scores, uploads
from .errors import EvaluationError
from .scores import Score
from .tables import Row
from .uploads import Upload

# Number of detections above which the original limits them; without a limit for benchmarks that it does not list.
_BOX_LIMIT = 100


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: Its name in the command.
        title: Its name in reports.
        prompt: Returns the text after the image or video.
        answer: Returns the reference answer, or `None` if the row has none.
        keys: Columns that may hold the id of the box file, the original's first; without any it is the number of the
            row, from 1.
        score: Scores answers; `None` if that takes a judge.
        upload: Writes files for a server or a judge; `None` if there is none to ask.
        upload_for: Who reads these files.
        box_limit: Number of detections above which they are limited; `None`: no limit.
        paper: Name of the benchmark in the paper's table; `None` if it is not there.
        image_of: Path of the image of rows that do not name one; `{}` is the id.
        repeats_ids: Whether ids occur once per file and category, instead of once.
        leaves_out: Whether rows without an image are left out, as in the original: their questions are about text.
        num_frames: Frames that are sampled from each video; `None` for benchmarks of images.
    """

    name: str
    title: str
    prompt: Callable[[Row], str]
    answer: Callable[[Row], Any]
    keys: tuple[str, ...]
    score: Score | None = None
    upload: Upload | None = None
    upload_for: str = ""
    box_limit: int | None = _BOX_LIMIT
    paper: str | None = None
    image_of: str | None = None
    repeats_ids: bool = False
    leaves_out: bool = False
    num_frames: int | None = None


_INDEX = ("index", "question_id", "id")
_QUESTION_ID = ("question_id", "index", "id", "questionId")


def _choices(name: str, title: str, paper: str | None = None, upload_for: str = "") -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        prompt=ask.choice_prompt,
        answer=ask.choice_answer,
        keys=_INDEX,
        score=scores.score_choices,
        upload=uploads.upload_choices,
        upload_for=upload_for,
        paper=paper,
    )


def _videos(name: str, title: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        prompt=ask.free_prompt,
        answer=ask.text_answer,
        keys=_QUESTION_ID,
        score=scores.score_videos,
        upload=uploads.upload_videos,
        upload_for="a judge (GPT-3.5 in the original)",
        box_limit=None,
        num_frames=8,
    )


_ALL = (
    _choices("mmbench-dev", "MMBench dev", "MMB-D"),
    _choices("mmbench-test", "MMBench test", "MMB-T", "the server of MMBench"),
    _choices("mmbench-dev-cn", "MMBench dev, Chinese"),
    _choices("mmbench-test-cn", "MMBench test, Chinese", upload_for="the server of MMBench"),
    _choices("seed", "SEED-Bench (images)", "SEED-I"),
    _choices("scienceqa", "ScienceQA (images)", "SQA-I"),
    _choices("ai2d", "AI2D", "AI2D"),
    _choices("mmstar", "MMStar", "MMStar"),
    _choices("mmmu", "MMMU"),
    _choices("multiple-choice", "Multiple choice"),
    Benchmark(
        name="textvqa",
        title="TextVQA",
        prompt=ask.short_prompt,
        answer=ask.human_answers,
        keys=("question_id", "image_id", "index", "id"),
        score=scores.score_softly,
        upload=uploads.upload_lines,
        upload_for="LLaVA's scripts",
        paper="TextVQA",
    ),
    Benchmark(
        name="docvqa",
        title="DocVQA",
        prompt=ask.document_prompt,
        answer=ask.list_answer,
        keys=("index", "questionId", "question_id", "id"),
        score=scores.score_documents,
        upload=uploads.upload_docvqa,
        upload_for="the server of the Robust Reading Competition",
        paper="DocVQA",
    ),
    Benchmark(
        name="pope",
        title="POPE",
        prompt=ask.yes_no_prompt,
        answer=ask.yes_no_answer,
        keys=_QUESTION_ID,
        score=scores.score_pope,
        repeats_ids=True,
    ),
    Benchmark(
        name="hallusionbench",
        title="HallusionBench",
        prompt=ask.hallusion_prompt,
        answer=ask.yes_no_answer,
        keys=("index",),
        score=scores.score_hallusion,
        leaves_out=True,
    ),
    Benchmark(
        name="mme",
        title="MME",
        prompt=ask.mme_prompt,
        answer=ask.yes_no_answer,
        keys=_INDEX,
        score=scores.score_mme,
    ),
    Benchmark(
        name="gqa",
        title="GQA",
        prompt=ask.short_prompt,
        answer=ask.text_answer,
        keys=_QUESTION_ID,
        score=scores.score_gqa,
        upload=uploads.upload_gqa,
        upload_for="the evaluation script of GQA",
    ),
    Benchmark(
        name="vqav2",
        title="VQAv2",
        prompt=ask.short_prompt,
        answer=ask.human_answers,
        keys=_QUESTION_ID,
        score=scores.score_softly,
        upload=uploads.upload_vqav2,
        upload_for="the server of VQAv2",
        box_limit=None,
        paper="VQAv2",
    ),
    Benchmark(
        name="llava-wild",
        title="LLaVA-Bench in the wild",
        prompt=ask.free_prompt,
        answer=lambda row: None,
        keys=_QUESTION_ID,
        upload=uploads.upload_lines,
        upload_for="the judge of LLaVA-Bench (GPT-4)",
        box_limit=None,
        paper="LLaVA-W",
    ),
    Benchmark(
        name="mmvet",
        title="MM-Vet",
        prompt=ask.free_prompt,
        answer=lambda row: None,
        keys=_QUESTION_ID,
        upload=uploads.upload_mmvet,
        upload_for="the server of MM-Vet",
        box_limit=None,
        paper="MMVet",
    ),
    Benchmark(
        name="mathvista",
        title="MathVista",
        prompt=ask.mathvista_prompt,
        answer=ask.text_answer,
        keys=("pid", "index", "id"),
        upload=uploads.upload_mathvista,
        upload_for="MathVista's scripts (GPT-4 extracts the answers)",
        box_limit=None,
    ),
    Benchmark(
        name="mmvp",
        title="MMVP",
        prompt=ask.mmvp_prompt,
        answer=ask.text_answer,
        keys=(),
        image_of="MMVP Images/{}.jpg",
        upload=uploads.upload_mmvp,
        upload_for="the grader of MMVP (GPT-4)",
        box_limit=None,
        paper="MMVP",
    ),
    _videos("msvd-qa", "MSVD-QA"),
    _videos("msrvtt-qa", "MSRVTT-QA"),
    _videos("video-qa", "Questions about videos"),
    Benchmark(
        name="exact-match",
        title="Exact match",
        prompt=ask.free_prompt,
        answer=ask.text_answer,
        keys=_QUESTION_ID,
        score=scores.score_exactly,
    ),
)
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name.

    Args:
        name (`str`): A name of `BENCHMARKS`; case does not matter, and `_` counts as `-`.

    Returns:
        [`Benchmark`]: The benchmark.

    Raises:
        EvaluationError: If there is no such benchmark.
    """
    found = BENCHMARKS.get(name.lower().replace("_", "-"))
    if found is None:
        raise EvaluationError(f"`benchmark` must be one of {', '.join(BENCHMARKS)}, got {name!r}.")
    return found


__all__ = ["BENCHMARKS", "Benchmark", "find_benchmark"]
