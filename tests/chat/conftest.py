import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from mgllava.chat import ChatSession
from tests.golden_cases import GOLDEN

COFFEE = GOLDEN.parent.parent / "examples" / "coffee.jpg"
PORTRAIT = GOLDEN / "images" / "portrait.png"


class TwoBoxes:
    """A detector that finds a box in each corner, and the second one twice."""

    calls = 0

    def detect(self, images, threshold=0.2):
        self.calls += 1
        found = []
        for image in images:
            width, height = image.size
            corner = [width / 2, height / 2, width, height]
            boxes = torch.tensor([[0, 0, width / 3, height / 3], corner, [corner[0] + 1, *corner[1:]]])
            scores = torch.tensor([0.5, 0.9, 0.8])
            kept = scores > threshold
            labels = [["[cup]", "spoon", "spoon"][index] for index in kept.nonzero().flatten()]
            found.append({"boxes": boxes[kept], "labels": labels, "scores": scores[kept]})
        return found


@pytest.fixture(scope="package")
def model(repository):
    model = AutoModel.from_pretrained(repository, dtype=torch.float32).eval()
    # Greedy answers of random weights repeat one token; with this they go from token to token.
    model.generation_config.update(do_sample=False, repetition_penalty=1.5, max_new_tokens=14)
    return model


@pytest.fixture
def processor(repository):
    processor = AutoProcessor.from_pretrained(repository)
    processor.box_detector = TwoBoxes()
    return processor


@pytest.fixture
def session(model, processor):
    return ChatSession(model, processor)


@pytest.fixture
def seen(model):
    """Counts of images, one for each run of the high-resolution tower."""
    counts = []
    tower = model.model.high_res_vision_tower
    hook = tower.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    yield counts
    hook.remove()


@pytest.fixture
def ask_plainly(model, processor):
    """Answer a whole conversation with a single `generate` call."""

    def ask(messages, **options):
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, **options)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    return ask


def user(text, *images):
    blocks = [{"type": "image", "image": Image.open(path), "boxes": boxes} for path, boxes in images]
    return {"role": "user", "content": [*blocks, {"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": text}
