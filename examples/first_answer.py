"""Ask about a picture: `python examples/first_answer.py [--model FOLDER_OR_HUB_ID]`."""

from pathlib import Path

from small_model import model_name
from transformers import AutoModelForImageTextToText, AutoProcessor

import mgllava  # noqa: F401  (registers MG-LLaVA with the Auto classes)

PICTURE = Path(__file__).parent / "shapes.jpg"


def main() -> None:
    name = model_name(__doc__)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    processor = AutoProcessor.from_pretrained(name)

    # The processor's own detector finds the objects; `"boxes": [[x1, y1, x2, y2], …]` would set them instead.
    image = {"type": "image", "path": str(PICTURE)}
    question = {"type": "text", "text": "What letter is on the cyan square?"}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [image, question]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    print("Question:", question["text"])
    print("Answer:  ", processor.post_process_image_text_to_text(new_tokens)[0])


if __name__ == "__main__":
    main()
