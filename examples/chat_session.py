"""Several turns from Python: `python examples/chat_session.py [--model FOLDER_OR_HUB_ID]`.

`mgllava chat` is the same in a terminal. A session keeps what the model has read: no turn is read again, and no image
is looked at twice.
"""

from pathlib import Path

from small_model import model_name
from transformers import AutoModelForImageTextToText, AutoProcessor

import mgllava  # noqa: F401  (makes the Auto classes know MG-LLaVA)
from mgllava.chat import ChatSession

PICTURE = Path(__file__).parent / "shapes.jpg"
QUESTIONS = ("How many hearts are there?", "What letter is on the orange heart?", "Where is the yellow heart?")


def main() -> None:
    name = model_name(__doc__)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    session = ChatSession(model, AutoProcessor.from_pretrained(name))
    session.max_new_tokens = 20

    session.add_image(PICTURE)  # also between two turns; boxes may follow, if the detector shall not look for them
    for question in QUESTIONS:
        print(f"Question: {question}\nAnswer:   ", end="")
        answer = session.ask(question, on_text=lambda piece: print(piece, end="", flush=True))
        print(f"\n          ({answer.num_tokens} tokens, {answer.finish})")


if __name__ == "__main__":
    main()
