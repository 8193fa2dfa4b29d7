"""The main job, end to end: convert an original checkpoint, load it, ask about a photograph (`make demo`).

Usage: `python examples/demo.py [FOLDER]`; FOLDER, `demo-output` by default, then has the model of the other examples.

The checkpoint is the small one that the tests use. Its weights are random, so its answers are noise; everything
around the weights is what the published models go through.
"""

import subprocess
import sys
from pathlib import Path

from PIL import Image
from rich.console import Console
from transformers import AutoModel, AutoProcessor, TextStreamer

import mgllava  # noqa: F401  (makes the Auto classes know MG-LLaVA)
from mgllava.visualization import draw_boxes

ROOT = Path(__file__).parent.parent
CHECKPOINT, IMAGE = ROOT / "tests" / "golden", ROOT / "examples" / "coffee.jpg"
BOXES = {"cup": [172, 17, 410, 308], "saucer": [76, 68, 481, 390], "spoon": [325, 66, 425, 328]}
QUESTION = "What is on the table?"


def main() -> None:
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
    console = Console()
    console.rule("1. Convert the original checkpoint")
    repository = output / "model"
    sources = {
        "--checkpoint": CHECKPOINT / "xtuner" / "iter_10.pth",
        "--llm": CHECKPOINT / "llm",
        "--vision-tower": CHECKPOINT / "clip",
        "--high-res-tower": CHECKPOINT / "convnext",
        "--prompt-template": "vicuna",
    }
    arguments = [str(part) for option in sources.items() for part in option]
    command = [sys.executable, "-m", "mgllava.cli", "convert", *arguments, "--output", str(repository), "--overwrite"]
    subprocess.run(command, check=True)
    for path in sorted(path for path in repository.iterdir() if path.suffix != ".py"):
        console.print(f"  {path}  {path.stat().st_size / 1e3:,.1f} kB", highlight=False)

    console.rule("2. Load it")
    model = AutoModel.from_pretrained(repository)
    processor = AutoProcessor.from_pretrained(repository)
    console.print(f"  {type(model).__name__}, {model.num_parameters():,} parameters, {type(processor).__name__}")

    console.rule("3. Ask about a photograph")
    image = Image.open(IMAGE)
    draw_boxes(image, {"boxes": list(BOXES.values()), "labels": list(BOXES)}).save(output / "boxes.png")
    content = [
        {"type": "image", "image": image, "boxes": list(BOXES.values())},
        {"type": "text", "text": QUESTION},
    ]
    conversation = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    fused = model.config.image_seq_length
    console.print(
        f"  examples/{IMAGE.name}: {fused} fused tokens and {placeholders - fused} object tokens ({', '.join(BOXES)})"
    )
    console.print(f"  the boxes are drawn in {output / 'boxes.png'}", highlight=False)
    console.print(f"\n[bold]Question[/bold]  {QUESTION}")
    console.print("[bold]Answer[/bold]    ", end="")
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
    model.generate(**inputs, max_new_tokens=24, do_sample=False, repetition_penalty=2.0, streamer=streamer)
    console.print(
        "\n[yellow]The weights of this small checkpoint are random, so the answer is noise. "
        "Convert a published checkpoint with `mgllava convert` for answers.[/yellow]"
    )


if __name__ == "__main__":
    main()
