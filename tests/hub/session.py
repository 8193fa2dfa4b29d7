"""Uses of a model folder: with the package if this is imported, or without it if this runs as a script.

The script takes a file of jobs and a folder for the results, so that one process runs all jobs.
"""

import json
import os
import re
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path = [path for path in sys.path if not (Path(path) / "mgllava").is_dir()]
    sys.modules["mgllava"] = None

import numpy as np
import torch
from datasets.fingerprint import Hasher
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    pipeline,
)

REMOTE = {"trust_remote_code": True}
BOXES = [[0, 10, 70, 60], [20, 0, 50, 80]]


def conversation_for(processor):
    """A question about the picture, with boxes if the model has any."""
    image = {"type": "image", "image": picture()}
    if hasattr(type(processor), "box_detector"):
        image["boxes"] = BOXES
    return [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]


def picture():
    """Return an image of noise, 120 pixels wide and 90 high."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def classes(*objects):
    """Name the packages and classes of objects; remote code is in `transformers_modules`."""
    return [f"{type(entry).__module__.split('.')[0]}:{type(entry).__name__}" for entry in objects]


def load(name, **options):
    """Load a model with its configuration as an argument, and its processor."""
    config = AutoConfig.from_pretrained(name, **REMOTE, **options)
    model, info = AutoModelForImageTextToText.from_pretrained(
        name, config=config, dtype=torch.float32, output_loading_info=True, **REMOTE, **options
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval(), AutoProcessor.from_pretrained(name, **REMOTE, **options)


@torch.no_grad()
def answers(model, processor):
    """Compute pixels, boxes, logits and greedy answers for an image, and for a batch with a text-only prompt."""
    hello = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    conversations = [conversation_for(processor), hello]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    results = {}
    for name, conversation in (("single", conversations[0]), ("batch", conversations)):
        inputs = processor.apply_chat_template(conversation, processor_kwargs={"padding": True}, **options)
        results |= {f"{name}.{key}": value for key, value in inputs.items()}
        results[f"{name}.logits"] = model(**inputs).logits
        results[f"{name}.answer"] = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return results


def mgllava(name, again=None, **options):
    """Compute answers, and pixels with both backends; save the model again and compute the answers again."""
    model, processor = load(name, **options)
    tensors = answers(model, processor)
    image_processors = []
    for backend in ("torchvision", "pil"):
        image_processors.append(AutoImageProcessor.from_pretrained(name, backend=backend, **REMOTE, **options))
        tensors[f"pixels.{backend}"] = image_processors[-1](picture(), return_tensors="pt")["pixel_values"]
    if again is not None:
        model.save_pretrained(again)
        processor.save_pretrained(again)
        tensors |= {f"again.{key}": value for key, value in answers(*load(again)).items()}
    return tensors, {"classes": classes(model, model.config, processor, processor.image_processor, *image_processors)}


@torch.no_grad()
def video(name, file):
    """Compute inputs, logits and an answer for a video file, and for an array of frames next to text."""
    model, processor = load(name)
    frames = np.random.default_rng(0).integers(0, 256, (5, 24, 32, 3), dtype=np.uint8)
    boxes = [[[2, 3, 20, 18]], []]
    tensors = {}
    for kind, block in (("file", {"path": file}), ("array", {"video": frames})):
        content = [{"type": "video", **block, "boxes": boxes}, {"type": "text", "text": "What happens?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_frames": 2},
        )
        tensors |= {f"{kind}.{key}": value for key, value in inputs.items()}
        tensors[f"{kind}.logits"] = model(**inputs).logits
        tensors[f"{kind}.answer"] = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    alone = AutoVideoProcessor.from_pretrained(name, **REMOTE)
    tensors["alone.pixels"] = alone(frames, num_frames=2, return_tensors="pt")["pixel_values_videos"]
    return tensors, {"classes": classes(model, processor, processor.video_processor, alone)}


@torch.no_grad()
def question(name, image):
    """Compute the boxes that the small model's detector finds in an image, and an answer."""
    model, processor = load(name)
    content = [
        {"type": "image", "image": Image.open(image)},
        {"type": "text", "text": "what is left of the green ring?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return {"boxes": inputs["boxes"], "answer": answer[:, inputs["input_ids"].shape[1] :]}, {"classes": classes(model)}


def refused(name):
    """What is said about a model whose code may not run."""
    said = []
    for auto_class in (AutoModel, AutoProcessor):
        try:
            auto_class.from_pretrained(name, trust_remote_code=False)
        except ValueError as error:
            said.append(str(error))
    return {}, {"refused": said}


def other_classes(name, **options):
    """Load with the other Auto classes, the PIL backend, the tokenizer alone, and a pipeline."""
    models = [
        auto_class.from_pretrained(name, **REMOTE, **options) for auto_class in (AutoModel, AutoModelForMultimodalLM)
    ]
    processor = AutoProcessor.from_pretrained(name, backend="pil", **REMOTE, **options)
    tokenizers = [AutoTokenizer.from_pretrained(name, trust_remote_code=trust, **options) for trust in (False, True)]
    ids = [tokenizer("Hello there")["input_ids"] for tokenizer in (*tokenizers, processor.tokenizer)]
    assert ids[0] == ids[1] == ids[2]
    # As `datasets.map` does.
    assert Hasher.hash(processor) == Hasher.hash(processor)
    answer = pipeline("image-text-to-text", model=name, device="cpu", **REMOTE, **options)
    said = answer(
        text=conversation_for(processor),
        return_full_text=False,
        generate_kwargs={"max_new_tokens": 4, "do_sample": False},
    )
    loaded = (*models, processor, processor.image_processor, answer.model)
    return {}, {"classes": classes(*loaded), "pipeline": said[0]["generated_text"]}


@torch.no_grad()
def ram_plus(name, again=None):
    """Tag an image with both backends, both Auto classes and a pipeline; save the model and tag again."""
    model = AutoModel.from_pretrained(name, **REMOTE).eval()
    classifier = AutoModelForImageClassification.from_pretrained(name, **REMOTE)
    tensors, image_processors = {}, []
    for backend in ("torchvision", "pil"):
        image_processors.append(AutoImageProcessor.from_pretrained(name, backend=backend, **REMOTE))
        inputs = image_processors[-1](picture(), return_tensors="pt")
        tensors |= {f"pixels.{backend}": inputs["pixel_values"], f"logits.{backend}": model(**inputs).logits}
    tags = pipeline("image-classification", model=name, device="cpu", **REMOTE)(picture(), top_k=3)
    facts = {"classes": classes(model, model.config, classifier, *image_processors), "pipeline": tags}
    if again is not None:
        model.save_pretrained(again)
        image_processors[0].save_pretrained(again)
        tensors |= {f"again.{key}": value for key, value in ram_plus(again)[0].items()}
    return tensors, facts


def detection(name, again=None, **options):
    """Find boxes with the processor's tagger and detector; save the processor and find boxes again."""
    processor = AutoProcessor.from_pretrained(name, **REMOTE, **options)
    (found,) = processor.detect(picture())
    inputs = processor(picture(), "<image>", return_tensors="pt")
    tagger = processor.box_detector._tagger
    facts = {
        "labels": found["labels"],
        "classes": classes(processor.box_detector, *([] if tagger is None else [tagger.model])),
    }
    if again is not None:
        processor.save_pretrained(again)
        (repeated,) = AutoProcessor.from_pretrained(again, **REMOTE).detect(picture())
        assert repeated["labels"] == found["labels"]
    return {"boxes": found["boxes"], "scores": found["scores"], "inputs": inputs["boxes"]}, facts


def adapter(name, path):
    """Compute the answers of a model with a PEFT adapter."""
    from peft import PeftModel

    model, processor = load(name)
    return answers(PeftModel.from_pretrained(model, path).eval(), processor), {"classes": classes(model)}


def card(name, folder):
    """Run the first example of a model card unchanged, in a folder with a photo."""
    os.chdir(folder)
    picture().save("photo.jpg")
    code = re.search(r"```python\n(.*?)```", (Path(name) / "README.md").read_text(), re.DOTALL)[1]
    lines = []
    exec(code, {"print": lines.append})
    return {}, {"printed": len(lines)}


def main():
    warnings.filterwarnings("error", category=DeprecationWarning, module="transformers_modules")
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for key, (action, arguments) in jobs.items():
        tensors, facts = globals()[action](**arguments)
        save_file({name: value.contiguous() for name, value in tensors.items()}, results / f"{key}.safetensors")
        (results / f"{key}.json").write_text(json.dumps(facts))
    loaded = [name for name in sys.modules if name.split(".")[0] == "mgllava" and sys.modules[name] is not None]
    assert not loaded, loaded


if __name__ == "__main__":
    main()
