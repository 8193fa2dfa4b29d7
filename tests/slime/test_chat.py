"""A conversation with SliME, and the pictures of what a question keeps."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from mgllava.chat import ChatSession
from mgllava.chat.terminal import ChatTerminal
from mgllava.visualization import kept_tokens


@pytest.fixture
def session(slime, slime_processor):
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)
    return ChatSession(slime, slime_processor, generation_config=config)


def noise(width, height):
    pixels = np.random.default_rng(0).integers(64, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_later_turns_keep_what_one_prompt_with_all_turns_keeps(session, slime, slime_processor):
    image = noise(400, 300)
    session.add_image(image)
    answers = [session.ask(question) for question in ("What is this?", "And where is it?")]
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]}
    ]
    messages += [{"role": "assistant", "content": answers[0].text}, {"role": "user", "content": "And where is it?"}]
    inputs = slime_processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = slime.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(output.kept_tokens, answers[1].image_outputs["kept_tokens"])
    text = slime_processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.strip() == answers[1].text


def test_help_names_videos_only_for_models_that_take_them(session, monkeypatch, capsys):
    for session.takes_videos in (False, True):
        monkeypatch.setattr(sys, "stdin", io.StringIO("/help\n"))
        ChatTerminal(session).run()
        said = capsys.readouterr().err
        assert "/image" in said
        assert ("/video" in said) == session.takes_videos


def test_the_terminal_says_and_draws_what_was_kept(session, tmp_path, monkeypatch, capsys):
    noise(640, 360).save(tmp_path / "photo.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {tmp_path / 'photo.png'}\nWhat?\nWhy?\n"))
    ChatTerminal(session, tmp_path / "drawn").run()
    said = capsys.readouterr().err
    assert "photo.png: 2 x 2 tiles (rows x columns), " in said and " of 64 of their tokens kept" in said
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["photo-kept-2.jpg", "photo-kept.jpg"]


@pytest.mark.parametrize("order", ["spatial", "flat"])
def test_a_picture_is_dim_where_tokens_are_dropped(order):
    """Of a picture of 672 x 672 pixels, 2 x 2 tiles of 4 x 4 tokens; each token is 84 pixels wide."""
    kept = torch.ones(2, 577 + 64, dtype=torch.bool)
    row, column = 5, 2  # the second row of the lower left tile, third column
    place = row * 8 + column if order == "spatial" else 32 + 4 + 2
    kept[1, 577 + place] = False
    images = {
        "pooler_output": [torch.zeros(641, 1)] * 2,
        "last_hidden_state": torch.zeros(2, 576, 1),
        "image_grids": torch.tensor([[2, 2], [2, 2]]),
        "local_order": order,
    }
    picture = Image.new("RGB", (672, 672), (200, 200, 200))
    outputs = {"kept_tokens": kept.flatten(), "image_outputs": images}
    drawn = np.asarray(kept_tokens(picture, outputs, index=1))
    dimmed = (drawn == 50).all(-1)
    expected = np.zeros((672, 672), dtype=bool)
    expected[row * 84 : (row + 1) * 84, column * 84 : (column + 1) * 84] = True
    assert (dimmed == expected).mean() > 0.999
    for lines in ((drawn == 255).all(axis=(0, 2)), (drawn == 255).all(axis=(1, 2))):  # the borders of the tiles
        assert 1 <= len(np.flatnonzero(lines)) <= 2 and 330 < np.flatnonzero(lines).mean() < 342
    assert not (np.asarray(kept_tokens(picture, outputs, index=0)) == 50).any()


def test_what_cannot_be_drawn_is_named():
    picture = Image.new("RGB", (10, 10))
    with pytest.raises(ValueError, match="must have `kept_tokens` and `image_outputs`, got logits"):
        kept_tokens(picture, {"logits": 1})
    images = {"pooler_output": [torch.zeros(576, 1)], "image_grids": torch.zeros(1, 2, dtype=torch.int64)}
    outputs = {"kept_tokens": torch.ones(576), "image_outputs": images}
    with pytest.raises(ValueError, match="has no tiles"):
        kept_tokens(picture, outputs)
    with pytest.raises(ValueError, match="`index` must be from 0 to 0"):
        kept_tokens(picture, outputs, index=1)


def test_an_image_after_turns_of_text_alone(session, slime, slime_processor):
    """The keys and values of the text before the first image are used again."""
    first = session.ask("Hello.")
    image = noise(640, 360)
    session.add_image(image)
    lengths = []
    hook = slime.model.register_forward_pre_hook(lambda *_: lengths.append(session._cache.get_seq_length()))
    second = session.ask("What is this?")
    hook.remove()
    assert lengths[0] > 0
    question = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": first.text}]
    messages.append({"role": "user", "content": question})
    inputs = slime_processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = slime.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(output.kept_tokens, second.image_outputs["kept_tokens"])
    text = slime_processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.strip() == second.text
