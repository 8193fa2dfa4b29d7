"""Videos: decoding, preprocessing and the towers for the frames of a video at once, against one frame after the other.

Also the memory of the towers with and without steps. By default small towers on the CPU; `--size real` takes those of
the published models. Usage: `python benchmarks/video.py [--device cuda] [--size real]`. Needs PyAV.
"""

import io
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import av
import numpy as np
import torch
import typer
from memory_watch import MemoryWatch
from report import report

from mgllava import MGLlavaConfig, MGLlavaModel, MGLlavaVideoProcessor
from mgllava.processing.video_reading_mgllava import read_video

FRAMES = 8
_TEXT = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "patch_size": 14,
            "image_size": 336,
            "num_attention_heads": 4,
        },
        "high_res_vision_config": {"depths": [1, 1, 1, 1], "hidden_sizes": [24, 48, 96, 192]},
    },
    "real": {},
}


def make_video(seconds: int, width: int, height: int) -> bytes:
    """Encode moving noise as H.264, 30 frames per second."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    picture = noise.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(file, "w", format="mp4") as output:
        track = output.add_stream("libx264", rate=30)
        track.width, track.height, track.pix_fmt = width, height, "yuv420p"
        for index in range(30 * seconds):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 4 * index, axis=1), format="rgb24")
            output.mux(track.encode(frame))
        output.mux(track.encode(None))
    return file.getvalue()


def read_one_by_one(data: bytes, indices: list[int]) -> torch.Tensor:
    """Decode the file again for each frame."""
    return torch.cat([read_video(data, lambda _, index=index: [index]).frames for index in indices])


def measure(action: Callable[[], Any], device: str, repeats: int) -> tuple[float, float, Any]:
    """Return the seconds of the fastest of several runs, the extra peak memory in GB, and the result."""
    seconds, peaks, result = [], [], None
    for _ in range(repeats):
        result = None
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated(), time.perf_counter()
            result = action()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            peaks.append((torch.cuda.max_memory_allocated() - before) / 1e9)
        else:
            with MemoryWatch() as watch:
                result = action()
            seconds.append(watch.seconds)
            peaks.append(watch.extra_gb)
    return min(seconds), max(peaks), result


@torch.no_grad()
def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    size: Annotated[Literal["small", "real"], typer.Option(help="Size of the towers.")] = "small",
    seconds: Annotated[int, typer.Option(help="Length of the video.")] = 10,
    repeats: Annotated[int, typer.Option(help="Runs of each way; the fastest counts.")] = 5,
) -> None:
    """Measure all steps, and write the report."""
    data = make_video(seconds, 640, 360)
    processor = MGLlavaVideoProcessor()
    config = MGLlavaConfig(text_config=_TEXT, video_token_id=32001 % 64, image_token_id=0, **SIZES[size])
    model = MGLlavaModel(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()

    rows = []

    def add(step: str, way: str, action: Callable[[], Any]) -> Any:
        spent, memory, result = measure(action, device if step == "towers" else "cpu", repeats)
        rows.append({"step": step, "way": way, "seconds": spent, "extra GB": memory})
        return result

    clip = add("decode", "one pass", lambda: processor.read_clips(data)[0])
    again = add("decode", "frame by frame", lambda: read_one_by_one(data, clip.metadata.frames_indices))
    assert torch.equal(clip.frames, again)
    inputs = add("preprocess", "all frames", lambda: processor(clip, return_tensors="pt"))
    arguments = {
        name: value.to(device, model.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }
    expected = None
    for steps in (FRAMES, 4, 2, 1):
        way = {FRAMES: "all frames", 1: "frame by frame"}.get(steps, f"{steps} frames per step")
        features = add(
            "towers", way, partial(model.get_video_features, **arguments, frames_per_step=steps)
        ).pooler_output
        expected = features[0] if expected is None else expected
        difference = float((features[0] - expected).abs().max() / expected.abs().max())
        rows[-1]["relative difference"] = difference
    for row in rows:
        row.setdefault("relative difference", 0.0)
    report(f"video_{size}_{device}", f"{FRAMES} frames of a video of {seconds} s, 640 x 360, {size} towers", rows)


if __name__ == "__main__":
    typer.run(main)
