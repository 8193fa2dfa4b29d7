"""Detectors and taggers of the golden data, small random ones, and one written here."""

import json
from functools import partial
from pathlib import Path

import PIL.Image
import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    SwinConfig,
)

GOLDEN_RAM = Path(__file__).parents[1] / "golden_ram"
OWLV2 = GOLDEN_RAM / "owlv2"
EXPECTED = json.loads((GOLDEN_RAM / "expected" / "expected.json").read_text())
CASES = EXPECTED["boxes_legacy"]


def golden_image(case):
    return PIL.Image.open(GOLDEN_RAM / case["image"])


def labels_of(case):
    return [prompt.removeprefix("a photo of ") for prompt in case["prompts"]]


def assert_same_boxes(found, expected, scores=1e-4, pixels=0):
    assert found["labels"] == expected["labels"]
    options = {"rtol": 0, "check_dtype": False}
    boxes, wanted = (torch.as_tensor(value["boxes"]).reshape(-1, 4).double() for value in (found, expected))
    torch.testing.assert_close(boxes, wanted, atol=pixels, **options)
    wanted = torch.as_tensor(expected["scores"])
    torch.testing.assert_close(torch.as_tensor(found["scores"]), wanted, atol=scores, **options)


class WholePicture:
    """Finds the whole picture as one object, and records the pictures that it is called with."""

    def __init__(self):
        self.seen = []

    def detect(self, images):
        assert isinstance(images, list) and all(isinstance(image, PIL.Image.Image) for image in images)
        self.seen += images
        return [{"boxes": [[0, 0, *image.size]], "labels": ["all"], "scores": [0.9]} for image in images]


def boxes_of(images, processor):
    return processor(images, ["<image>"] * len(images), return_tensors="pt")["boxes"]


def boxes_from_worker(images, processor, start_method):
    """Process images in a worker process of a DataLoader, which gets a copy of the processor."""
    (boxes,) = torch.utils.data.DataLoader(
        images,
        batch_size=len(images),
        num_workers=1,
        multiprocessing_context=start_method,
        collate_fn=partial(boxes_of, processor=processor),
    )
    return boxes


def grounding_dino():
    """Model and processor; the ids of the prompt's control tokens are constants of the model's code."""
    vocabulary = {f"[unused{index}]": index for index in range(1100)}
    words = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    for index, word in {**words, 1030: "cat", 1031: "dog", 1032: "red", 1033: "bus"}.items():
        del vocabulary[f"[unused{index}]"]
        vocabulary[word] = index
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )
    bert = BertConfig(
        vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()
    }
    config = GroundingDinoConfig(backbone_config=swin, text_config=bert, d_model=32, num_queries=10, **sizes)
    image_processor = GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 256})
    return (
        GroundingDinoForObjectDetection(config).eval(),
        GroundingDinoProcessor(image_processor, BertTokenizer(vocab=vocabulary)),
    )
