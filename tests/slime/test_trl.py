"""SliME in TRL's own trainers: what it learns, and the log-probabilities of preferences."""

import pytest
import torch

pytest.importorskip("trl")

from mgllava.training import MGLlavaDataCollator
from tests.training import trl_session
from tests.training.trl_session import ANSWERS, REJECTED, answer, pictures, question, watch

SAMPLES = range(len(ANSWERS))


def collate(processor, answers):
    """What our own collator makes of the samples with these answers."""
    samples = [
        {"messages": [question(sample, with_boxes=False), answer(text)], "images": pictures(sample)}
        for sample, text in zip(SAMPLES, answers, strict=True)
    ]
    return MGLlavaDataCollator(processor)(samples)


@pytest.mark.parametrize(
    "form", ["dpo", "prompt_completion", *(pytest.param(form, marks=pytest.mark.slow) for form in ("messages", "kto"))]
)
def test_answers_are_learned_from_images(form, slime_folder, tmp_path):
    model, processor = trl_session.load(slime_folder)
    running = trl_session.trainer(form, model, processor, tmp_path, with_boxes=False, learning_rate=1e-3)
    seen, before = watch(model), model.model.local_compressor.q_proj.weight.clone()
    running.train()
    answers = (ANSWERS, REJECTED) if form == "dpo" else (ANSWERS,)
    expected = [row[row != -100].tolist() for given in answers for row in collate(processor, given)["labels"]]
    assert sorted(seen["learned"]) == sorted(expected)
    assert not torch.equal(model.model.local_compressor.q_proj.weight, before)


def test_log_probabilities_of_preferences_are_those_of_the_model(slime_folder, tmp_path):
    model, processor = trl_session.load(slime_folder)
    running = trl_session.trainer("dpo", model, processor, tmp_path, with_boxes=False)
    batch = next(iter(running.get_train_dataloader()))
    model.eval()  # without the noise of training
    got = running.compute_ref_log_probs(running.model, batch)
    for log_probs, answers in zip(got, (ANSWERS, REJECTED), strict=True):
        inputs = collate(processor, answers)
        labels = inputs["labels"]
        with torch.no_grad():
            scores = model(**inputs).logits.log_softmax(-1)
        of_labels = scores[:, :-1].gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        expected = (of_labels * (labels[:, 1:] != -100)).sum(-1)
        torch.testing.assert_close(log_probs.sort().values, expected.sort().values, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("form", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("do_tile", "unknown"), [(True, "crop_to_patches"), (False, "image_grids")])
def test_trainers_that_know_no_tiles_stop_before_the_first_step(form, do_tile, unknown, slime_folder, tmp_path):
    """TRL takes the tiles for those of InternVL. If this test fails, docs/training.md may promise more."""
    model, processor = trl_session.load(slime_folder)
    processor.image_processor.do_tile = do_tile
    running = trl_session.trainer(form, model, processor, tmp_path, with_boxes=False)
    with pytest.raises(TypeError, match=unknown):
        running.train()
    assert running.state.global_step == 0
