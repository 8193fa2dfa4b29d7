"""Several turns from Python: `python examples/chat_session.py [--model FOLDER_OR_HUB_ID]`.

`mgllava chat` does the same in a terminal. A session keeps the KV cache, so it processes each turn and image once.
"""

from pathlib import Path

from small_model import model_name
from transformers import AutoModelForImageTextToText, AutoProcessor

import mgllava  # noqa: F401  (registers MG-LLaVA with the Auto classes)
from mgllava.chat import ChatSession

PICTURE = Path(__file__).parent / "shapes.jpg"
QUESTIONS = ("How many hearts are there?", "What letter is on the orange heart?", "Where is the yellow heart?")


def main() -> None:
    name = model_name(__doc__)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    session = ChatSession(model, AutoProcessor.from_pretrained(name))
    session.max_new_tokens = 20

    session.add_image(PICTURE)  # also between two turns; pass boxes as well to skip the detector
    for question in QUESTIONS:
        print(f"Question: {question}\nAnswer:   ", end="")
        answer = session.ask(question, on_text=lambda piece: print(piece, end="", flush=True))
        print(f"\n          ({answer.num_tokens} tokens, {answer.finish})")


if __name__ == "__main__":
    main()
