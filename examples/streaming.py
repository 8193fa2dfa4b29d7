"""Print an answer while it is generated: `python examples/streaming.py [--model FOLDER_OR_HUB_ID]`.

For a terminal, `TextStreamer` is enough and needs no thread. The iterator is for programs that do something else with
the pieces, such as a web page.
"""

from pathlib import Path
from threading import Thread

from small_model import model_name
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer

import mgllava  # noqa: F401  (registers MG-LLaVA with the Auto classes)

PICTURE = Path(__file__).parent / "shapes.jpg"


def main() -> None:
    name = model_name(__doc__)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    processor = AutoProcessor.from_pretrained(name)
    prompt = "USER: <image>\nDescribe the picture. ASSISTANT:"
    inputs = processor(PICTURE, prompt, return_tensors="pt").to(model.device)

    # The timeout ends the loop below if generation fails.
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600)
    options = {"max_new_tokens": 100, "do_sample": False, "streamer": streamer}
    Thread(target=model.generate, kwargs={**inputs, **options}).start()
    pieces = 0
    for piece in streamer:
        print(piece, end="", flush=True)
        pieces += bool(piece)
    print(f"\n({pieces} pieces)")


if __name__ == "__main__":
    main()
