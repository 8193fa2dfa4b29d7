"""The data of a recipe: open samples and boxes, and prepare processor and collator for them."""

import copy
import logging
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from mgllava.box_files import detection_settings, open_detector
from mgllava.families import Family, resolve, takes_videos

from .collator import MGLlavaDataCollator
from .dataset import ConversationDataset, SampleSource, open_source, stream_samples
from .errors import TrainingError
from .recipe import DataOptions, DetectorOptions, Recipe
from .run_record import samples_digest
from .samples import frames_of_a_video, labels_of

logger = logging.getLogger(__name__)


def refuse_boxes(recipe: Recipe, family: Family) -> None:
    """Refuse settings of boxes for a model that takes none."""
    for section, options in (("data", recipe.data), ("evaluation", recipe.evaluation)):
        for name in ("boxes", "detector", "allow_other_boxes", "missing_boxes"):
            if options is not None and getattr(options, name) != getattr(DataOptions, name):
                raise TrainingError(f"`{section}.{name}` must not be set: {family.title} takes no boxes.")


def open_data(
    options: DataOptions, processor: Any, family: Family, args: TrainingArguments, section: str
) -> tuple[Any, Any]:
    """Open the samples of a section; return them and a processor with the section's template and number of frames.

    The number of frames of the section `data` is set in the given processor, which is saved with the model.
    """
    if options.num_frames is not None:
        processor = processor if section == "data" else copy.copy(processor)
        _sample_frames(processor, options.num_frames, family, section)
    processor = _with_template(processor, options, family, section)
    given = (options.samples, options.images, options.boxes, options.videos)
    samples, images, boxes, videos = map(_as_list, given)
    if not samples:
        raise TrainingError(f"`{section}.samples` must name a file of samples, e.g. {section}.samples=llava.json.")
    for name, values in (("images", images), ("boxes", boxes), ("videos", videos)):
        if values and len(values) not in (1, len(samples)):
            raise TrainingError(
                f"`{section}.{name}` must have one entry, or one for each of {len(samples)} files, got {len(values)}."
            )
    sources = [
        open_source(path, _at(images, number), _at(boxes, number), _at(videos, number), section=section)
        for number, path in enumerate(samples)
    ]
    _check_detector(options, processor, sources, section)
    try:
        labels_of(processor, must_be_known=options.original_labels)
    except ValueError as error:
        raise TrainingError(f"`{section}`: {error}") from error
    if options.streaming:
        if args.max_steps <= 0:
            raise TrainingError(f"`training.max_steps` must be given if `{section}.streaming` is true.")
        return stream_samples(sources, frames_of_a_video(processor)), processor
    with args.main_process_first(desc="measuring samples"):
        data = ConversationDataset(
            sources,
            processor,
            options.max_text_length,
            options.on_bad_sample,
            options.missing_boxes,
            options.processes,
            options.original_labels,
        )
    return data, processor


def make_collator(options: DataOptions, processor: Any, max_length: int | None) -> MGLlavaDataCollator:
    """Return the collator of a section; longer samples than `max_length` tokens are refused."""
    return MGLlavaDataCollator(
        processor,
        options.max_text_length,
        on_bad_sample=options.on_bad_sample,
        missing_boxes=options.missing_boxes,
        return_sample_ids=True,
        original_labels=options.original_labels,
        max_length=max_length,
    )


def name_detector(processor: Any, given: DetectorOptions | None) -> None:
    """Give the processor the box detector that the recipe names, so that it is saved with the model."""
    if given is None or (given.tagger is None and given.labels is None):
        return  # the processor keeps its own
    tagger, labels = given.tagger, given.labels
    named = open_detector(detector=given.detector, tagger=None if labels else tagger, mode=given.mode)
    processor.box_detector_config = {**named.config, **({"tagger": list(labels)} if labels else {})}
    processor.box_detector = None  # it does not run here
    if given.threshold != DetectorOptions.threshold:
        logger.warning(
            "The boxes were found with a threshold of %s, which cannot be saved with the processor: pass threshold=%s "
            "to `processor.detect`.",
            given.threshold,
            given.threshold,
        )


def digest_of_samples(recipe: Recipe, data: Any) -> str | None:
    """Return a digest of samples and boxes, so that a resumed training notices if the files have changed."""
    if not isinstance(data, ConversationDataset):
        return None  # a stream is read only once
    return samples_digest(data.digest, [Path(path) for path in _as_list(recipe.data.boxes)])


def _with_template(processor: Any, options: DataOptions, family: Family, section: str) -> Any:
    """Return a processor that renders samples by the template of the recipe; the given one is saved with the model."""
    if options.prompt_template is None:
        return processor
    templates = resolve(family.chat_templates) if family.chat_templates else {}
    if options.prompt_template not in templates:
        raise TrainingError(
            f"`{section}.prompt_template` must be null or a template of {family.title} ({', '.join(templates)}), got "
            f"{options.prompt_template!r}."
        )
    processor = copy.copy(processor)
    processor.chat_template = templates[options.prompt_template]
    return processor


def _sample_frames(processor: Any, num_frames: int, family: Family, section: str) -> None:
    """Make a processor sample as many frames as the recipe says."""
    if not takes_videos(processor):
        raise TrainingError(f"`{section}.num_frames` must not be set: this model of {family.title} takes no videos.")
    processor.video_processor = copy.copy(processor.video_processor)
    processor.video_processor.num_frames, processor.video_processor.fps = num_frames, None


def _check_detector(options: DataOptions, processor: Any, sources: list[SampleSource], section: str) -> None:
    """Refuse boxes that were not found by the detector with which the model will be used."""
    files = [source.boxes for source in sources if source.boxes is not None]
    if options.allow_other_boxes or not files:
        return
    given = options.detector
    if given is not None and given.tagger is None and given.labels is None:
        raise TrainingError(
            f"`{section}.detector.tagger` must be the tagger with which {files[0].name} was made: the model folder of "
            f"RAM++, or coco80. `{section}.allow_other_boxes=true` accepts any boxes."
        )
    config = processor.locate_box_detector()
    if given is not None:
        config = open_detector(detector=given.detector, tagger=given.tagger, mode=given.mode).config
    if config is None:
        raise TrainingError(
            f"`{section}.detector` must name the box detector that made {files[0].name}, because the model has none. "
            f"`{section}.allow_other_boxes=true` accepts any boxes."
        )
    labels, threshold = (None, 0.2) if given is None else (given.labels, given.threshold)
    for file in files:
        # Files with boxes of videos say how their frames were sampled.
        num_frames = frames_of_a_video(processor) if "frames" in (file.settings or ()) else None
        expected = detection_settings(config, labels, threshold, num_frames=num_frames)
        try:
            file.check_settings(expected)
        except ValueError as error:
            raise TrainingError(
                f"{error} In a recipe, `{section}.allow_other_boxes=true` accepts any boxes."
            ) from error


def _as_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _at(values: list[str], number: int) -> str | None:
    return None if not values else values[number] if len(values) > 1 else values[0]


__all__ = ["digest_of_samples", "make_collator", "name_detector", "open_data", "refuse_boxes"]
