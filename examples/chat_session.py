"""Several turns from Python: `python examples/chat_session.py [--model FOLDER_OR_HUB_ID]`.

`mgllava chat` is the same in a terminal. A session keeps what the model has read: no turn is read again, and no image
is looked at twice.
"""

from pathlib import Path

from small_model import model_name
from transformers import AutoModelForImageTextToText, AutoProcessor

import mgllava  # noqa: F401  (makes the Auto classes know MG-LLaVA)
from mgllava.chat import ChatSession

COFFEE = Path(__file__).parent / "coffee.jpg"
BOXES = [[172, 17, 410, 308], [325, 66, 425, 328]]


def main() -> None:
    name = model_name(__doc__)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    session = ChatSession(model, AutoProcessor.from_pretrained(name))
    session.max_new_tokens = 20

    for question in ("Hello.", "What is on the table?", "And what is in it?"):
        if question == "What is on the table?":
            session.add_image(COFFEE, BOXES)  # at any time; without boxes the processor's detector finds them
        print(f"Question: {question}\nAnswer:   ", end="")
        answer = session.ask(question, on_text=lambda piece: print(piece, end="", flush=True))
        print(f"\n          ({answer.num_tokens} tokens, {answer.finish})")


if __name__ == "__main__":
    main()
