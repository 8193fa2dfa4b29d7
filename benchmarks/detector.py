"""Compare the speed of `BoxDetector` with the original's algorithm, with random weights.

Like the original, the reference processes one image at a time in float32, with eager attention and transformers'
preprocessing, and runs the text tower and all heads for every image. It uses our tagger, which needs less memory than
the original's; this favors the reference. Sizes are those of RAM++ Swin-L/384 and OWLv2-L/14 on a GPU, and small ones
on a CPU.
Usage: `python benchmarks/detector.py [--device cuda] [--batch-size 8]`.
"""

import copy
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import PIL.Image
import torch
import typer
from report import report
from transformers import AutoTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

from mgllava import BoxDetector, RamPlusConfig, RamPlusForImageTagging, RamPlusImageProcessor, RamPlusImageProcessorPil

TOKENIZER = Path(__file__).parents[1] / "tests" / "golden_ram" / "owlv2"
TAGS_PER_IMAGE, BOXES_PER_IMAGE = 15, 20
REAL = {
    "tagger": {},  # the defaults: Swin-L at 384 px, 4585 tags with 51 descriptions
    "vision": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "image_size": 1008,
    "text": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
SMALL = {
    "tagger": {
        "image_size": 192,
        "embed_dim": 48,
        "depths": [2, 2, 6, 2],
        "num_heads": [2, 4, 8, 16],
        "window_size": 6,
        "num_descriptions": 8,
        "hidden_size": 192,
        "intermediate_size": 768,
        "id2label": {index: f"tag {index}" for index in range(400)},
    },
    "vision": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536},
    "image_size": 504,
    "text": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768},
}
STAGES = ("preprocessing", "tagger", "image tower", "text", "heads")


class Clock:
    """Adds up the time of functions, without that of timed functions that they call."""

    def __init__(self, device: str):
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = [0.0]
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed(self, stage: str, function):
        """Return a function with a clock."""

        def run(*args, **kwargs):
            self._wait()
            self._inside.append(0.0)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self._wait()
            elapsed = time.perf_counter() - start
            self.seconds[stage] += elapsed - self._inside.pop()
            self._inside[-1] += elapsed
            return result

        return run

    def wrap(self, stage: str, owner, *names: str) -> None:
        """Put a clock on methods of an object."""
        for name in names:
            setattr(owner, name, self.timed(stage, getattr(owner, name)))

    def best_of(self, runs: int, function) -> dict[str, float]:
        """Return the seconds of each stage in the fastest run; `other` is the rest of `total`."""
        results = []
        for _ in range(runs):
            self.seconds.clear()
            self._wait()
            start = time.perf_counter()
            function()
            self._wait()
            total = time.perf_counter() - start
            results.append({**self.seconds, "other": total - sum(self.seconds.values()), "total": total})
        return min(results, key=lambda result: result["total"])


def make_models(sizes: dict) -> tuple[RamPlusForImageTagging, Owlv2ForObjectDetection, Owlv2Processor]:
    """Build tagger and detector with random weights, and the detector's processor."""
    torch.manual_seed(0)
    tagger_sizes = dict(sizes["tagger"])
    tagger_sizes.setdefault("id2label", {index: f"tag {index}" for index in range(4585)})
    tagger = RamPlusForImageTagging(RamPlusConfig(**tagger_sizes)).eval()
    config = Owlv2Config(
        text_config=sizes["text"],
        vision_config={**sizes["vision"], "image_size": sizes["image_size"], "patch_size": 14},
        projection_dim=sizes["text"]["hidden_size"],
        attn_implementation="sdpa",
    )
    detector = Owlv2ForObjectDetection(config).eval()
    side = {"height": sizes["image_size"], "width": sizes["image_size"]}
    return tagger, detector, Owlv2Processor(Owlv2ImageProcessor(size=side), AutoTokenizer.from_pretrained(TOKENIZER))


def make_images(count: int) -> list[PIL.Image.Image]:
    """Draw landscape and portrait images of 640x480 pixels."""
    generator = np.random.default_rng(0)
    shapes = [(480, 640, 3) if index % 2 else (640, 480, 3) for index in range(count)]
    coarse = [generator.integers(0, 256, (shape[0] // 16, shape[1] // 16, 3), dtype=np.uint8) for shape in shapes]
    return [
        PIL.Image.fromarray(pixels).resize((shape[1], shape[0]), PIL.Image.Resampling.BICUBIC)
        for pixels, shape in zip(coarse, shapes, strict=True)
    ]


@torch.no_grad()
def find_like_the_original(images, tagger, tagger_processor, detector, processor, threshold: float, clock: Clock):
    """Tag and detect one image at a time, and compute everything that the original computes."""
    preprocess_tags = clock.timed("preprocessing", tagger_processor)
    preprocess = clock.timed("preprocessing", processor)
    tag = clock.timed("tagger", lambda pixels: tagger.post_process_image_tagging(tagger(pixels))[0]["labels"])
    results = []
    for image in images:
        pixels = preprocess_tags(image, return_tensors="pt")["pixel_values"].to(tagger.device)
        prompts = ["a photo of " + label.lower() for label in tag(pixels)] or ["a photo of "]
        inputs = preprocess(text=[prompts], images=image, return_tensors="pt").to(detector.device)
        outputs = detector(**inputs)
        size = [(image.height, image.width)]
        found = processor.post_process_grounded_object_detection(outputs, threshold, size)[0]
        results.append({name: value.cpu() for name, value in found.items() if name != "text_labels"})
    return results


def calibrate(detector: BoxDetector, images: list[PIL.Image.Image]) -> float:
    """Set tag thresholds and return a score threshold such that an image has a usual number of tags and boxes."""
    tagger = detector._tagger
    pixels = tagger.pixel_values([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images[:2]])
    with torch.no_grad():
        logits = tagger.model(pixel_values=pixels.to(tagger.model.device, tagger.model.dtype)).logits
    limit = logits.float().sigmoid().flatten().sort(descending=True).values[2 * TAGS_PER_IMAGE].item()
    tagger.model.config.thresholds = [limit] * tagger.model.config.num_labels
    scores = torch.cat([found["scores"] for found in detector.detect(images[:2], threshold=0.0)])
    return scores.sort(descending=True).values[2 * BOXES_PER_IMAGE].item()


def image_tower_flop(sizes: dict) -> float:
    """Return the FLOP of the matrix products in OWLv2's image tower for one image, 2 per multiply-add."""
    width, inner, layers = (
        sizes["vision"][name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    patches = (sizes["image_size"] // 14) ** 2
    tokens = patches + 1
    layer = 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * inner
    return layers * layer + 2 * patches * 3 * 14**2 * width


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Return the measured FLOP per second of a large matrix product."""
    side = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    clock = Clock(device)
    run = clock.timed("matmul", lambda: left @ right)
    run()
    return 2 * side**3 / clock.best_of(10, run)["total"]


def main(
    device: Annotated[str, typer.Option(help="cpu (small sizes) or cuda (real sizes)")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="images at a time")] = 8,
) -> None:
    """Compare the seconds per image, in total and of each stage."""
    sizes, dtype = (REAL, torch.bfloat16) if device == "cuda" else (SMALL, torch.float32)
    tagger, owlv2, processor = make_models(sizes)
    tagger_processor = RamPlusImageProcessorPil(
        size={"height": tagger.config.image_size, "width": tagger.config.image_size}
    )
    reference_tagger, reference_owlv2 = copy.deepcopy(tagger).to(device), copy.deepcopy(owlv2).to(device)
    reference_tagger.set_attn_implementation("eager")
    reference_owlv2.set_attn_implementation("eager")

    images = make_images(batch_size)
    detector = BoxDetector(
        tagger,
        owlv2,
        tagger_processor=RamPlusImageProcessor(size=tagger_processor.size),
        detector_processor=processor,
        device=device,
        dtype=dtype,
    )
    start = time.perf_counter()
    detector.embed_vocabulary()
    vocabulary_seconds = time.perf_counter() - start
    threshold = calibrate(detector, images)
    reference_tagger.config.thresholds = detector._tagger.model.config.thresholds

    ours = Clock(device)
    fast = detector._detector
    ours.wrap("preprocessing", detector._tagger, "pixel_values")
    ours.wrap("tagger", detector._tagger.model, "forward")
    ours.wrap("preprocessing", fast, "pixel_values")
    ours.wrap("image tower", fast, "image_features")
    ours.wrap("text", fast.prompt_embeds, "get")
    ours.wrap("heads", fast, "class_logits", "patch_boxes")
    detector.detect(images, threshold=threshold, batch_size=batch_size)
    measured = ours.best_of(3, lambda: detector.detect(images, threshold=threshold, batch_size=batch_size))

    slow = Clock(device)
    slow.wrap("image tower", reference_owlv2.owlv2.vision_model, "forward")
    slow.wrap("text", reference_owlv2.owlv2.text_model, "forward")
    slow.wrap("heads", reference_owlv2, "class_predictor", "box_predictor", "objectness_predictor")
    arguments = (reference_tagger, tagger_processor, reference_owlv2, processor, threshold, slow)
    find_like_the_original(images[:1], *arguments)
    reference = slow.best_of(2, lambda: find_like_the_original(images, *arguments))

    rows = [
        {
            "stage": stage,
            "reference s/image": reference.get(stage, 0.0) / batch_size,
            "ours s/image": measured.get(stage, 0.0) / batch_size,
            "times faster": reference.get(stage, 0.0) / max(measured.get(stage, 0.0), 1e-9),
            "share of reference": reference.get(stage, 0.0) / reference["total"],
            "share of ours": measured.get(stage, 0.0) / measured["total"],
        }
        for stage in (*STAGES, "other", "total")
    ]
    kind = "real" if device == "cuda" else "small"
    flop, rate = image_tower_flop(sizes), matmul_rate(device, dtype)
    tower, total = measured["image tower"] / batch_size, measured["total"] / batch_size
    title = (
        f"Tags and boxes on {device}, {kind} sizes, batch of {batch_size}, {dtype}. "
        f"Roofline: the image tower's {flop / 1e12:.3g} TFLOP take {flop / rate:.3g} s at the {rate / 1e12:.3g} "
        f"TFLOP/s of a large matrix product; it takes {tower:.3g} s ({flop / rate / tower:.0%} of the roofline), "
        f"everything {total:.3g} s ({flop / rate / total:.0%}). All prompts, once: {vocabulary_seconds:.3g} s"
    )
    report(f"detector_{device}", title, rows)


if __name__ == "__main__":
    typer.run(main)
