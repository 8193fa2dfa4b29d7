"""Ask a running server about a picture: boxes in the request, and a streamed answer.

Usage: `mgllava serve MODEL` in one terminal, `python examples/serve_client.py [URL] [MODEL]` in another;
needs `pip install openai`. URL is `http://localhost:8000/v1` by default, MODEL the first one that the server lists.
"""

import base64
import sys
from pathlib import Path

import openai

PICTURE = Path(__file__).parent / "shapes.jpg"
BOXES = {"square": [228, 49, 303, 122], "heart": [50, 122, 89, 155]}


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
    client = openai.OpenAI(base_url=url, api_key="none")  # the client requires a key, the server does not
    model = sys.argv[2] if len(sys.argv) > 2 else next(iter(client.models.list())).id

    encoded = base64.b64encode(PICTURE.read_bytes()).decode()
    content = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/jpeg;base64,{encoded}"},
            "boxes": list(BOXES.values()),  # x1, y1, x2, y2 in pixels; without them the server's detector finds boxes
        },
        {"type": "text", "text": "What letter is on the cyan square?"},
    ]
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], max_tokens=100, temperature=0, stream=True
    )
    usage = None
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
        usage = chunk.usage or usage
    print(f"\n{usage.prompt_tokens} tokens in the prompt, {usage.completion_tokens} in the answer")


if __name__ == "__main__":
    main()
