"""One step of each of TRL's trainers. Imported, it runs with the package; as a script, where it cannot be imported.

As a script it takes the folder of a model and a file for the results.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path = [path for path in sys.path if not (Path(path) / "mgllava").is_dir()]
    sys.modules["mgllava"] = None

import torch
import trl
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

QUESTION, ANSWERS = "What is in the image?", ["A red circle.", "There are two dogs.", "Red.", "It is on the wall."]
REJECTED = ["A blue square.", "There is one cat in the image.", "Yellow.", "Red."]
# Boxes of the images of each sample; the last has no objects, the third no image.
BOXES = [[[[5, 10, 40, 30], [0, 0, 90, 60]]], [[[10, 5, 20, 50]], [[30, 10, 60, 20]]], [], [[]]]


def pictures(sample):
    return [Image.new("RGB", (90, 60 + 10 * number), "red") for number, _ in enumerate(BOXES[sample])]


def question(sample, with_boxes=True):
    blocks = [{"type": "image", **({"boxes": boxes} if with_boxes else {})} for boxes in BOXES[sample]]
    return {"role": "user", "content": [*blocks, {"type": "text", "text": QUESTION}]}


def answer(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def load(folder, with_remote_code=False):
    """Load model and processor; by the code in the folder where the package cannot be imported, or when told so."""
    if with_remote_code:
        names = ("modeling_mgllava.MGLlavaForConditionalGeneration", "processing_mgllava.MGLlavaProcessor")
        model, processor = (get_class_from_dynamic_module(name, folder) for name in names)
        return model.from_pretrained(folder, dtype=torch.float32), processor.from_pretrained(folder)
    remote = {"trust_remote_code": sys.modules.get("mgllava") is None}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **remote)
    return model, AutoProcessor.from_pretrained(folder, **remote)


def column(form, sample, processor, with_boxes=True):
    """Make a sample as a form of training has it."""
    asked, answered = question(sample, with_boxes), answer(ANSWERS[sample])
    if form in ("messages", "assistant_only"):
        return {"messages": [asked, answered]}
    if form == "text":
        return {"text": processor.apply_chat_template([asked, answered], tokenize=False)}
    if form in ("prompt_completion", "kto"):
        label = {"label": bool(sample % 2)} if form == "kto" else {}
        return {"prompt": [asked], "completion": [answered], **label}
    if form == "dpo":
        return {"prompt": [asked], "chosen": [answered], "rejected": [answer(REJECTED[sample])]}
    return {"prompt": [asked]}


def trainer(form, model, processor, output, rows=None, with_boxes=True, samples=(0, 1, 2, 3), **options):
    """Build the trainer of a form, with one batch of all samples."""
    rows = rows or [
        {**column(form, sample, processor, with_boxes), "images": pictures(sample), "boxes": str(BOXES[sample])}
        for sample in samples
    ]
    arguments = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "per_device_train_batch_size": len(rows),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    common = {"train_dataset": Dataset.from_list(rows), "processing_class": processor}
    remote = {"trust_remote_code": sys.modules.get("mgllava") is None}
    if form in ("messages", "assistant_only", "text", "prompt_completion"):
        config = trl.SFTConfig(**arguments, assistant_only_loss=form == "assistant_only")
        return trl.SFTTrainer(model, config, **common)
    if form == "dpo":
        return trl.DPOTrainer(model, args=trl.DPOConfig(**arguments, **remote), **common)
    if form == "kto":
        return trl.KTOTrainer(model, args=trl.KTOConfig(**arguments, **remote), **common)
    classes = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}
    trainer_class, config_class = classes[form]
    sampling = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "shuffle_dataset": False}
    config = config_class(**{**sampling, **arguments}, **remote)
    return trainer_class(model, reward_funcs=lambda completions, **_: [float(len(str(c))) for c in completions],
                         args=config, **common)  # fmt: skip


def watch(model):
    """Note the learned ids of every row, and the boxes of every image, whenever the model is called with labels."""
    seen = {"learned": [], "boxes": [], "completions": []}
    forward, generate = model.forward, model.generate

    @functools.wraps(forward)  # `generate` reads the names of its arguments
    def watched_forward(*arguments, **inputs):
        if inputs.get("labels") is not None and torch.is_grad_enabled():
            labels = inputs["labels"]
            seen["learned"] += [row[row != -100].tolist() for row in labels]
            seen["is_training"] = True
        output = forward(*arguments, **inputs)
        seen["is_training"] = False
        return output

    def watched_encode(pixel_values, boxes, num_boxes, **options):
        if seen.get("is_training"):
            counts = zip(boxes, num_boxes, strict=True)
            seen["boxes"] += [of_image[:count].tolist() for of_image, count in counts]
        return encode(pixel_values, boxes, num_boxes, **options)

    def watched_generate(*arguments, **inputs):
        output = generate(*arguments, **inputs)
        seen["completions"] += output[:, inputs["input_ids"].shape[1] :].tolist()
        return output

    model.forward, model.generate = watched_forward, watched_generate
    if encode := getattr(model.model, "encode_images", None):
        model.model.encode_images = watched_encode
    return seen


def run(form, folder, with_remote_code=False, **options):
    """Train one step, and return what was learned."""
    torch.manual_seed(0)
    model, processor = load(folder, with_remote_code)
    if with_remote_code:
        assert type(model).__module__.startswith("transformers_modules"), type(model)
    processor.packs_boxes = form in ("grpo", "rloo")
    with tempfile.TemporaryDirectory() as output:
        running = trainer(form, model, processor, output, **options)
        seen = watch(model)
        running.train()
    return {name: seen[name] for name in ("learned", "boxes", "completions")}


FORMS = {
    "messages": {},
    "assistant_only": {},
    # TRL drops the column, unless it is told not to.
    "text": {"remove_unused_columns": False},
    "prompt_completion": {},
    "dpo": {},
    "kto": {},
    "grpo": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2},
}


if __name__ == "__main__":
    results = {form: run(form, sys.argv[1], **options) for form, options in FORMS.items()}
    Path(sys.argv[2]).write_text(json.dumps(results))
