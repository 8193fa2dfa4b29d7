"""The report of an evaluation: one HTML file without scripts or links to other files."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from mgllava.atomic_files import replacing
from mgllava.visualization import draw_boxes, draw_frames

from .errors import BadRowError
from .questions import Question
from .task import Task

REPORT = "report.html"
# Answers shown of those that are right, and of those that are wrong.
SHOWN = 12
# Longer sides in pixels of an image, and of the frames of a video together and each.
_THUMBNAIL, _STRIP, _FRAME = 360, 960, 240
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#222;background:#fff;max-width:1120px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}
table{border-collapse:collapse}
td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:left;overflow-wrap:anywhere}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}tr.main{font-weight:600}
.bars{width:100%;max-width:640px}.bars td{padding:.1em .5em;border:0}.bars td:first-child{text-align:right}
.bars td:nth-child(2){width:55%}.bars i{display:block;height:1em;background:#3b6ea5}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:1em}
.wide{grid-template-columns:repeat(auto-fill,minmax(500px,1fr))}
figure{margin:0;border:1px solid #ddd;border-radius:6px;padding:.6em;border-top:4px solid #2a7d4f}
figure.wrong{border-top-color:#b3402e}figure.open{border-top-color:#888}
img{max-width:100%;display:block;margin:auto}
figcaption{font-size:.86em;white-space:pre-wrap;overflow-wrap:anywhere;max-height:24em;overflow:auto}
.small{color:#666;font-size:.86em}li{overflow-wrap:anywhere}
"""


def write_report(
    path: Path,
    task: Task,
    summary: Mapping[str, Any],
    answers: Mapping[int, Mapping[str, Any]],
    credits: Mapping[int, float],
) -> None:
    """Write the report.

    Args:
        path (`Path`): The HTML file.
        task ([`Task`]): The questions.
        summary (`Mapping`): The content of `scores.json`.
        answers (`Mapping[int, Mapping]`): The answers by number of the question, see [`answer_task`].
        credits (`Mapping[int, float]`): What each of them counts, from 0 to 1; empty without reference answers.
    """
    asked = [question for question in task.questions if "answer" in answers.get(question.number, {})]
    parts = [
        f"<h1>{escape(summary['title'])}</h1>",
        f"<p class=small>{escape(summary['model'])}</p>",
        *_score_table(summary),
        *(f"<p>{escape(note)}</p>" for note in summary["notes"]),
        *_bars(summary),
    ]
    if credits:
        right = [question for question in asked if credits[question.number] >= 0.5]
        wrong = [question for question in asked if credits[question.number] < 0.5]
        for name, group, kind in (("Right answers", right, "right"), ("Wrong answers", wrong, "wrong")):
            parts.append(f"<h2>{name} ({len(group):,})</h2>")
            parts += _gallery(task, _spread(group), answers, kind)
    else:
        parts.append(f"<h2>Answers ({len(asked):,})</h2>")
        parts += _gallery(task, _spread(asked), answers, "open")
    if summary["skipped"]:
        parts.append(f"<h2>Skipped rows ({len(summary['skipped']):,})</h2><ul>")
        parts += [f"<li>{escape(row['place'])}: {escape(row['reason'])}</li>" for row in summary["skipped"]]
        parts.append("</ul>")
    parts.append("<h2>Settings</h2><table>")
    parts += [
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, value in _flat(summary["settings"]).items()
    ]
    parts.append("</table>")
    title = escape(f"{summary['title']}: {summary['model']}")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    with replacing(path) as partial:
        partial.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))


def _score_table(summary: Mapping[str, Any]) -> list[str]:
    """Rows of scores, with the paper's numbers next to the main one."""
    paper: Mapping[str, float] = summary["paper"]
    if not summary["scores"]:
        rows = [f"<p>No score: {escape(summary['no_score'])}</p>"]
        if paper:
            rows.append(
                f"<p>The paper reports: {escape(', '.join(f'{key} {value}' for key, value in paper.items()))}.</p>"
            )
        return rows
    head = "".join(f"<th class=n>paper, {escape(name)}</th>" for name in paper)
    rows = [f"<table><tr><th>score</th><th class=n>this run</th>{head}</tr>"]
    for name, value in summary["scores"].items():
        is_main = name == summary["main"]
        cells = "".join(f"<td class=n>{number if is_main else ''}</td>" for number in paper.values())
        kind = " class=main" if is_main else ""
        rows.append(f"<tr{kind}><td>{escape(name)}</td><td class=n>{value:.1f}</td>{cells}</tr>")
    rows.append("</table>")
    counts = summary["rows"]
    rows.append(
        f"<p class=small>{counts['answered']:,} of {counts['all']:,} rows answered, {counts['skipped']:,} skipped, "
        f"{counts['left_out']:,} without an image left out.</p>"
    )
    return rows


def _bars(summary: Mapping[str, Any]) -> list[str]:
    """Horizontal bars of the categories."""
    categories: Mapping[str, float] = summary["categories"]
    if not categories:
        return []
    largest = max(100.0, *categories.values())
    rows = [
        f"<tr><td>{escape(name)}</td><td><i style='width:{100 * value / largest:.1f}%'></i></td>"
        f"<td class=n>{value:.1f}</td></tr>"
        for name, value in categories.items()
    ]
    return ["<h2>By category</h2><table class=bars>", *rows, "</table>"]


def _spread(questions: Sequence[Question]) -> list[Question]:
    """Choose some questions evenly over all."""
    if len(questions) <= SHOWN:
        return list(questions)
    return [questions[number * len(questions) // SHOWN] for number in range(SHOWN)]


def _gallery(
    task: Task, questions: Sequence[Question], answers: Mapping[int, Mapping[str, Any]], kind: str
) -> list[str]:
    parts = [f'<div class="grid{"" if task.num_frames is None else " wide"}">']
    for question in questions:
        line = answers[question.number]
        wanted = "" if question.answer is None else f"\n<b>Expected:</b> {escape(_wanted(question.answer))}"
        seen = _seen(line)
        boxes = "" if seen is None else f"\n<span class=small>{', '.join(_numbers(seen))} boxes</span>"
        parts.append(
            f"<figure class={kind}>{_picture(task, question, line)}<figcaption>{escape(question.prompt)}\n"
            f"<b>Answer:</b> {escape(line['answer'])}{wanted}{boxes}\n"
            f"<span class=small>{escape(str(question.key))}</span></figcaption></figure>"
        )
    parts.append("</div>")
    return parts


def _wanted(answer: str | tuple[str, ...]) -> str:
    return answer if isinstance(answer, str) else " | ".join(dict.fromkeys(answer))


def _picture(task: Task, question: Question, line: Mapping[str, Any]) -> str:
    """Draw an image, or the frames of a video, with the boxes that the model saw, small and inside the page."""
    try:
        frames = task.open(task.find_image(question)).frames
    except BadRowError as error:  # removed since it was asked
        return f"<p class=small>{escape(str(error))}</p>"
    side = _THUMBNAIL if task.num_frames is None else _FRAME
    factor = min(1.0, side / max(frames[0].size))
    smaller = [
        image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor)))) for image in frames
    ]
    limits = smaller[0].size * 2
    shown = []
    for entry in _seen(line) or [{}] * len(frames):
        boxes = [
            [min(max(value * factor, 0), limit) for value, limit in zip(box, limits, strict=True)]
            for box in entry.get("boxes", ())
        ]
        shown.append({"boxes": boxes, "labels": entry["labels"]} if any(entry.get("labels", ())) else {"boxes": boxes})
    if task.num_frames is not None:
        small = draw_frames(smaller, shown)
        small.thumbnail((_STRIP, _STRIP), Image.Resampling.LANCZOS)
    else:
        small = draw_boxes(smaller[0], shown[0]) if shown[0]["boxes"] else smaller[0]
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG")
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="" src="data:image/jpeg;base64,{content}">'


def _seen(line: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """Return the boxes of each frame of an answered question; `None` if the model takes no boxes."""
    return line.get("frames", [line] if "boxes" in line else None)


def _numbers(seen: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(len(entry["boxes"])) for entry in seen]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


__all__ = ["REPORT", "SHOWN", "write_report"]
