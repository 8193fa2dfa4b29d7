"""Evaluation of SliME: answers of a batch are those of lone questions, with all tiles, and there are no boxes."""

from PIL import Image

from mgllava.evaluation import Answerer
from mgllava.integrations.vlmevalkit import MGLlavaVLM


def noise(width, height):
    return Image.effect_noise((width, height), 90).convert("RGB")


def test_answers_of_a_batch_are_those_of_lone_questions(slime, slime_processor):
    answerer = Answerer(slime, slime_processor, 5)
    assert not answerer.takes_boxes
    images, prompts = [noise(90, 40), noise(40, 40)], ["What is it?", "And how many of them are there?"]
    together = answerer.answer(images, prompts)
    alone = [answerer.answer([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    assert together == alone and any(alone)


def test_both_views_of_the_kit(slime, slime_processor, monkeypatch, tmp_path):
    monkeypatch.setattr("mgllava.integrations.vlmevalkit.load", lambda *_, **__: (slime, slime_processor))
    image = noise(700, 340)
    image.save(tmp_path / "1.png")
    message = [{"type": "image", "value": str(tmp_path / "1.png")}, {"type": "text", "value": "What is it?"}]
    shown = {"full": image, "center-crop": image.crop((180, 0, 520, 340))}
    for view, picture in shown.items():
        seen = []
        wrapper = MGLlavaVLM("folder", view=view, max_new_tokens=3)
        answer = wrapper.answerer.answer_conversations
        monkeypatch.setattr(
            wrapper.answerer,
            "answer_conversations",
            lambda talks, seen=seen, answer=answer: seen.append(talks[0][0]["content"][0]) or answer(talks),
        )
        assert isinstance(wrapper.generate_inner(message), str)
        assert seen[0]["image"].size == picture.size and "boxes" not in seen[0]
