"""Sessions: answers equal those to one prompt with all turns, and each image is encoded once."""

import base64

import pytest
import torch
from PIL import Image

from mgllava import user_text
from mgllava.chat import ChatError, ChatSession
from tests.chat.conftest import COFFEE, PORTRAIT, assistant, user

# Two boxes inside each image.
BOXES, OTHER_BOXES = [[172, 17, 410, 308], [325, 66, 425, 328]], [[3, 5, 60, 80], [10, 10, 30, 50]]


def test_turns_equal_one_prompt_with_the_whole_conversation(session, ask_plainly, seen):
    session.add_image(COFFEE, BOXES)
    messages, answers = [user("What is this?", (COFFEE, BOXES))], []
    for question in (None, "And what else?", "Why?"):
        if question is not None:
            messages.append(user(question))
        answers.append(session.ask(question or "What is this?").text)
        messages.append(assistant(answers[-1]))
    assert seen == [1]
    for turn in range(3):
        assert ask_plainly(messages[: 2 * turn + 1]) == answers[turn]
    assert len(set(answers)) == 3 and all(answers)


def test_images_in_mid_chat_equal_one_prompt_and_only_new_ones_are_encoded(session, ask_plainly, seen):
    first = session.ask("Hello.").text
    session.add_image(COFFEE, BOXES)
    session.add_image(PORTRAIT, OTHER_BOXES)
    second = session.ask("Compare them.").text
    session.add_image(PORTRAIT, [])
    third = session.ask("And this one?").text
    assert seen == [2, 1]
    messages = [user("Hello."), assistant(first)]
    messages += [user("Compare them.", (COFFEE, BOXES), (PORTRAIT, OTHER_BOXES)), assistant(second)]
    assert ask_plainly(messages[:1]) == first
    assert ask_plainly(messages[:3]) == second
    assert ask_plainly([*messages, user("And this one?", (PORTRAIT, []))]) == third


def test_a_turn_runs_only_what_is_new(session, model):
    lengths, steps = [], []
    layer = model.model.language_model.layers[0]
    hook = model.lm_head.register_forward_pre_hook(lambda *_: lengths.append(session._cache.get_seq_length()))
    layer_hook = layer.register_forward_pre_hook(lambda _, inputs: steps.append(inputs[0].shape[1]))
    session.add_image(COFFEE, BOXES)
    session.ask("What is this?")
    first_prompt, steps[:] = steps[0], []
    session.ask("And now?")
    hook.remove()
    layer_hook.remove()
    assert first_prompt > 576 and steps[0] < 60
    assert lengths[-1] == len(session._cached_ids)


def test_answers_whose_text_has_other_tokens_are_read_as_text(session, ask_plainly, model):
    """Random weights write bytes that form no character; as text these are the ids of the replacement character."""
    tokens = []
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: tokens.append(int(logits[0, -1].argmax())))
    answer = session.ask("Hello.").text
    hook.remove()
    assert session.processor.tokenizer.encode(answer, add_special_tokens=False) != tokens
    assert session.ask("Go on.").text == ask_plainly([user("Hello."), assistant(answer), user("Go on.")])


def test_changed_turns_are_computed_again_with_all_images(session, ask_plainly, seen):
    session.add_image(COFFEE, BOXES)
    session.ask("What is this?")
    session.add_image(PORTRAIT, OTHER_BOXES)
    second = session.ask("And this?").text
    session.messages[1] = assistant("A cup.")
    third = session.ask("Why?").text
    assert seen == [1, 1, 2]
    messages = [user("What is this?", (COFFEE, BOXES)), assistant("A cup.")]
    messages += [user("And this?", (PORTRAIT, OTHER_BOXES)), assistant(second), user("Why?")]
    assert third == ask_plainly(messages)


def test_reset_forgets_turns_and_images(session, ask_plainly, seen):
    session.add_image(COFFEE, BOXES)
    session.ask("What is this?")
    session.add_image(PORTRAIT)
    session.reset()
    # Another image with as many tokens must not find the first one in the cache.
    session.add_image(PORTRAIT, OTHER_BOXES)
    assert session.ask("What is this?").text == ask_plainly([user("What is this?", (PORTRAIT, OTHER_BOXES))])
    session.reset()
    assert session.ask("Hello.").text == ask_plainly([user("Hello.")])
    assert seen == [1, 1, 1]  # the last one is of the plain prompt


def test_system_message_survives_reset(model, processor, ask_plainly):
    session = ChatSession(model, processor, system="Be brief.")
    expected = ask_plainly([{"role": "system", "content": "Be brief."}, user("Hello.")])
    assert session.ask("Hello.").text == expected
    session.reset()
    assert session.ask("Hello.").text == expected != ask_plainly([user("Hello.")])


def interrupt_after(model, steps):
    """Raise `KeyboardInterrupt` between two layers, so that the first has one token more than the second."""
    calls = []

    def hook(*_):
        calls.append(None)
        if len(calls) == steps:
            raise KeyboardInterrupt

    return model.model.language_model.layers[1].register_forward_pre_hook(hook)


def test_interrupted_answer_keeps_the_tokens_so_far(session, model, ask_plainly, seen):
    session.add_image(COFFEE, BOXES)
    hook, heard = interrupt_after(model, 6), []
    answer = session.ask("What is this?", on_text=heard.append)
    hook.remove()
    assert (answer.finish, answer.num_tokens) == ("interrupted", 5)
    assert "".join(heard).strip() == answer.text
    assert len(session._cached_ids) <= min(layer.get_seq_length() for layer in session._cache.layers)
    question = user("What is this?", (COFFEE, BOXES))
    assert answer.text == ask_plainly([question], max_new_tokens=5)
    assert session.ask("Go on.").text == ask_plainly([question, assistant(answer.text), user("Go on.")])
    assert seen == [1, 1, 1]


def test_an_interrupt_before_the_first_token_removes_the_question(session, model, ask_plainly):
    first = session.ask("Hello.").text
    session.add_image(COFFEE, BOXES)
    hook = interrupt_after(model, 1)
    with pytest.raises(KeyboardInterrupt):
        session.ask("What is this?")
    hook.remove()
    # The image still waits for a question.
    expected = ask_plainly([user("Hello."), assistant(first), user("What?", (COFFEE, BOXES))])
    assert session.ask("What?").text == expected


@pytest.mark.parametrize("where", ["in the first layers", "after the last layer", "after the answer"])
def test_after_an_error_the_question_is_removed(session, model, processor, ask_plainly, monkeypatch, where):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    layers = model.model.language_model.layers
    hook = (model.lm_head if where == "after the last layer" else layers[1]).register_forward_hook(fail)
    if where == "after the answer":
        hook.remove()
        monkeypatch.setattr(processor, "decode", fail)
    session.add_image(PORTRAIT, OTHER_BOXES)
    with pytest.raises(torch.OutOfMemoryError):
        session.ask("What?")
    hook.remove()
    monkeypatch.undo()
    assert session.messages == [] and session.images == []
    # Another image with as many tokens must not find the first one in the cache.
    session._waiting.clear()
    session.add_image(COFFEE, BOXES)
    assert session.ask("What?").text == ask_plainly([user("What?", (COFFEE, BOXES))])


def test_full_context_is_an_error_and_the_chat_continues(session, model, monkeypatch):
    session.ask("Hello.")
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", len(session._cached_ids) + 40)
    with pytest.raises(ChatError, match=r"the conversation has \d+ tokens, but the model's context has \d+"):
        session.ask("What is this? " * 20)
    answer = session.ask("Hi")
    assert answer.finish == "length" and 0 < answer.num_tokens < 14
    assert len(session._cached_ids) + 1 == model.config.text_config.max_position_embeddings


def test_finish_says_whether_the_model_ended_the_answer(session, model):
    tokens = []
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: tokens.append(int(logits[0, -1].argmax())))
    answer = session.ask("Hello.")
    hook.remove()
    assert (answer.finish, answer.num_tokens) == ("length", 14)
    session.reset()
    session.generation_config.eos_token_id = [2, tokens[0]]
    answer = session.ask("Hello.")
    assert (answer.finish, answer.num_tokens) == ("end", 1)


@pytest.mark.parametrize("can_sanitize", sorted({user_text._CAN_SANITIZE, False}))
def test_control_tokens_of_users_are_text_in_every_message(model, processor, monkeypatch, can_sanitize):
    """`</s>` in a question, an answer or the system message must not end a turn; also with transformers 5.16."""
    monkeypatch.setattr(user_text, "_CAN_SANITIZE", can_sanitize)
    tokenizer = processor.tokenizer
    tokens = [*tokenizer.all_special_tokens, processor.image_token]

    def special(session):
        return [token for token in session._cached_ids if token in tokenizer.all_special_ids]

    plain, other = [ChatSession(model, processor, system=f"Be {word}.") for word in ("brief", tokens)]
    for session, question in ((plain, "What?"), (other, f"What is {' '.join(tokens)}?")):
        session.ask(question)
        session.messages[-1] = {"role": "assistant", "content": question}  # as if the model had said it
        session.ask(question)
    prompts = [special(session)[: len(special(plain)) - 1] for session in (plain, other)]
    assert prompts[0] == prompts[1]


def test_placeholders_in_a_question_are_text(session):
    session.add_image(COFFEE, [])
    assert session.ask("What does <image><image> mean?").text


def test_the_users_generation_config_is_not_changed(model, processor):
    config = model.generation_config
    before = config.to_dict()
    session = ChatSession(model, processor)
    session.ask("Hello.")
    assert config.to_dict() == before


def test_objects_are_the_boxes_that_get_tokens(session):
    image = session.add_image(COFFEE)
    # The detector finds three; two of them are one spoon.
    assert image.objects["labels"] == ["spoon", "[cup]"]
    assert image.objects["boxes"].tolist()[0] == [300, 200, 600, 400]
    assert image.objects["scores"].tolist() == pytest.approx([0.9, 0.5])
    assert len(image.detections["boxes"]) == 3
    session.ask("What?")
    placeholders = session._cached_ids.count(session.processor.image_token_id)
    assert placeholders == 576 + 2


def test_detection_threshold_reaches_the_detector(model, processor):
    session = ChatSession(model, processor, detection_threshold=0.6)
    assert session.add_image(COFFEE).detections["labels"] == ["spoon", "spoon"]


def test_detector_runs_once_per_image_and_not_for_given_boxes(session, processor):
    session.add_image(COFFEE)
    session.ask("What?")
    session.ask("Why?")
    assert processor.box_detector.calls == 1
    session.add_image(COFFEE, BOXES)
    session.ask("What?")
    assert processor.box_detector.calls == 1


def test_without_detector_there_are_no_boxes(session, processor, ask_plainly):
    processor.box_detector = None
    assert len(session.add_image(COFFEE).objects["boxes"]) == 0
    assert session.ask("What?").text == ask_plainly([user("What?", (COFFEE, []))])


def test_images_that_cannot_be_read_are_refused_by_name(session, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(PORTRAIT.read_bytes()[:300])
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    for path in (broken, text, tmp_path / "absent.png", tmp_path, "", "http://[bad", "data:image/png;base64,xx"):
        with pytest.raises(ChatError, match="cannot be read as an image"):
            session.add_image(path)
    with pytest.raises(ChatError, match=r"objects in .*coffee.jpg cannot be found: .*must hold x1"):
        session.add_image(COFFEE, [[9, 9, 1, 1]])
    assert session.ask("Hello.").text


def test_images_may_be_of_any_form(session, tmp_path):
    wide = Image.new("RGBA", (3000, 20), "red")
    assert session.add_image(wide).picture.size == (3000, 20)
    turned = Image.open(PORTRAIT).convert("RGB")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert session.add_image(tmp_path / "turned.jpg").picture.size == turned.size[::-1]
    encoded = base64.b64encode(PORTRAIT.read_bytes()).decode()
    assert session.add_image(f"data:image/png;base64,{encoded}").picture.size == turned.size
    assert session.ask("What are these?").text
