"""Loading a model and its processor to talk with, for the commands `chat` and `serve`."""

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from mgllava.families import family_of, resolve, takes_boxes
from mgllava.model_files.sources import refuse_revision_of_folder
from mgllava.quantization import quantization_of


def load(
    model: str,
    *,
    revision: str | None = None,
    bits: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    use_box_detector: bool = True,
    **box_options: Any,
) -> tuple[Any, Any]:
    """Load a model and its processor; refuse the options of boxes that are not `None` if the model has no boxes."""
    # Loading takes minutes, so everything else is checked first.
    refuse_revision_of_folder(model, revision)
    if "@" in model and not os.path.exists(model):
        raise ValueError(f"`model` must be a folder or a Hub id, got {model}. Name a revision with `revision`.")
    quantization = None if bits is None else quantization_of(bits)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`dtype` must be 'auto' or a dtype of torch such as 'bfloat16', got {dtype!r}.")
    source: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(model, **source)
    try:
        family = family_of(config)
    except ValueError as error:
        raise ValueError(
            f"`model`: {model} cannot be loaded. {error} For other models, use `transformers chat` and "
            "`transformers serve`."
        ) from error
    processor = AutoProcessor.from_pretrained(model, **source)
    if takes_boxes(processor):
        if not use_box_detector:
            processor.box_detector = None
    else:
        given = {"use_box_detector=False": None if use_box_detector else True, **box_options}
        if getattr(resolve(family.base_model or family.model), "placeholders_to_drop", None) is not None:
            given.pop("picture_folder", None)  # the tokens that a question keeps of an image are drawn there
        if refused := [f"`{name}`" for name, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(refused)} must be left out: {family.title} has no boxes.")
    loaded = AutoModelForImageTextToText.from_pretrained(
        model,
        dtype=dtype,
        device_map=int(device) if device.isdecimal() else device,
        attn_implementation=attn_implementation,
        quantization_config=quantization,
        **source,
    )
    # One bar is enough: tagger and object detector are small, and a second bar would distract.
    logging.disable_progress_bar()
    return loaded, processor


__all__ = ["load"]
