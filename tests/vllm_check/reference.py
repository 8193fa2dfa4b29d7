"""Answers of `generate`, computed in a process without vLLM, which changes the classes of transformers in its own."""

from functools import cache
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor

import mgllava  # noqa: F401


@cache
def loaded(folder):
    torch.set_num_threads(1)
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def generate(folder: Path, conversation, max_new_tokens=24, with_detector=True, **options):
    """Return the ids of a prompt, as the language model sees it, and of its greedy answer without EOS."""
    model, processor = loaded(str(folder))
    detector = processor.box_detector if hasattr(type(processor), "box_detector") else None
    if not with_detector:
        processor.box_detector = None
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    if not with_detector:
        processor.box_detector = detector
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True)
    prompt = inputs["input_ids"][0].tolist()
    end = processor.tokenizer.eos_token_id
    answer = [token for token in output.sequences[0, len(prompt) :].tolist() if token != end]
    if (kept := getattr(output, "kept_tokens", None)) is not None:
        kept = iter(kept.tolist())
        prompt = [token for token in prompt if token != processor.image_token_id or next(kept)]
    return prompt, answer
