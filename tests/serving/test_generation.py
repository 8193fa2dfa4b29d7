"""Cases that are hard to cause in a running server: out of memory, a failed device, and invalid bytes."""

import asyncio

import pytest
import torch
from transformers import BatchFeature, GenerationConfig

from mgllava.serving import generation
from mgllava.serving.answers import AnswerFinishedError, AnswerWriter
from mgllava.serving.errors import RequestError
from mgllava.serving.generation import DeviceHealth, Generator
from mgllava.serving.image_urls import ImageHosts
from mgllava.serving.limits import ServingLimits
from mgllava.serving.options import Options
from mgllava.serving.prompts import PromptMaker
from mgllava.serving.sampling import logits_processors


class Model:
    """Fails at generation, or generates until it is stopped."""

    device = torch.device("cpu")
    generation_config = GenerationConfig(eos_token_id=2)

    def __init__(self, error=None):
        self.error, self.steps = error, 0

    def generate(self, input_ids, stopping_criteria=None, **kwargs):
        if self.error is not None:
            raise self.error
        while not stopping_criteria(input_ids, None).all():
            self.steps += 1
        return input_ids


@pytest.fixture
def freed(monkeypatch):
    calls = []
    monkeypatch.setattr(generation, "clear_device_cache", lambda **kwargs: calls.append(kwargs))
    return calls


def inputs():
    return BatchFeature({"input_ids": torch.tensor([[1, 2]])})


def generator(model, processor, health=None):
    return Generator(model, processor.tokenizer, 64, health or DeviceHealth(model.device))


def options(**kwargs):
    return Options(GenerationConfig(), **kwargs)


async def answer(model, processor):
    return await generator(model, processor).answer(inputs(), options())


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=["device", "cpu", "python"])
def test_out_of_memory_frees_memory_and_is_reported(processor, freed, error):
    with pytest.raises(RequestError) as raised:
        asyncio.run(answer(Model(error), processor))
    assert (raised.value.status, raised.value.code) == (503, "out_of_memory") and len(freed) == 1


def test_error_of_an_option_is_an_error_of_the_request(processor):
    with pytest.raises(RequestError, match="must be positive"):
        asyncio.run(answer(Model(ValueError("`length` must be positive")), processor))


def test_device_error_is_final(processor):
    """A failed assertion on a GPU makes all later calls fail, also those of other requests."""
    model = Model(RuntimeError("CUDA error: device-side assert triggered"))

    async def run():
        health = DeviceHealth(model.device)
        served = generator(model, processor, health)
        with pytest.raises(RuntimeError):
            await served.answer(inputs(), options())
        assert "must be restarted" in health.failure
        model.error = None
        with pytest.raises(RequestError) as raised:
            await served.answer(inputs(), options())
        assert (raised.value.status, raised.value.code) == (503, "device_failed")

    asyncio.run(run())


@pytest.mark.parametrize(
    "message",
    [
        *("CUDA error: an illegal memory access", "HIP error: unspecified launch failure", "cuDNN error: internal"),
        *("device-side assert triggered", "CUBLAS_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_INTERNAL_ERROR"),
    ],
)
def test_errors_of_devices_are_known_by_their_words(message):
    health = DeviceHealth(torch.device("cpu"))
    health.examine(ValueError(message))  # torch raises a RuntimeError
    health.check()
    health.examine(RuntimeError(message))
    assert "cpu has failed" in health.failure
    first = health.failure
    health.examine(RuntimeError("CUDA error: another one"))
    assert health.failure == first


def test_a_device_that_no_longer_computes_has_failed(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no more")

    monkeypatch.setattr(torch, "ones", fail)
    health = DeviceHealth(torch.device("cpu"))
    health.examine(KeyError("a bug"))
    with pytest.raises(RequestError) as raised:
        health.check()
    assert (raised.value.status, raised.value.code) == (503, "device_failed")


def test_other_errors_leave_the_device_healthy(processor):
    health = DeviceHealth(torch.device("cpu"))
    health.examine(KeyError("a bug"))
    assert health.failure is None


def test_cancelled_answer_stops_and_a_waiting_one_never_starts(processor):
    async def run():
        models = [Model(), Model()]
        served = generator(models[0], processor)
        tasks = []
        for model in models:
            served._model = model
            tasks.append(asyncio.ensure_future(served.answer(inputs(), options())))
            while models[0].steps == 0:
                await asyncio.sleep(0.01)
        for task in reversed(tasks):
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.wait_for(served._worker.run(lambda: None), 10)  # the thread is free
        assert models[0].steps > 0

    asyncio.run(run())


def write(tokenizer, tokens, stop=(), before=None):
    pieces = []
    writer = AnswerWriter(tokenizer, [2], stop, pieces.append, lambda: False, before=before)
    writer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    try:
        for token in tokens:
            writer.put(torch.tensor([token]))
    except AnswerFinishedError:
        pass
    writer.end()
    writer.end()  # transformers calls it too
    assert "".join(pieces) == writer.text
    return writer, pieces


def test_invalid_bytes_do_not_end_an_answer(processor):
    """A letter in byte fallback is complete, but the next byte makes both invalid, so earlier text changes."""
    tokens = processor.tokenizer.convert_tokens_to_ids(["<0x47>", "<0xE2>", "o", "r"])
    assert write(processor.tokenizer, tokens)[0].text == "G\N{REPLACEMENT CHARACTER}or"


def test_characters_of_several_tokens_come_whole(processor):
    text = "Grüße, 你好 🙂!"
    tokens = processor.tokenizer.encode(text, add_special_tokens=False)
    writer, pieces = write(processor.tokenizer, tokens)
    assert writer.text == text and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_no_part_of_a_stop_string_is_sent(processor):
    text = "one two three four"
    tokens = processor.tokenizer.encode(text, add_special_tokens=False)
    for start in range(len(text)):
        for stop in (text[start : start + 1], text[start : start + 5]):
            writer, _ = write(processor.tokenizer, tokens, [stop, "absent"])
            assert writer.text == text[: text.index(stop)].lstrip() and writer.finish_reason == "stop"
    writer, _ = write(processor.tokenizer, tokens, ["four and more"])
    assert writer.text == text and writer.finish_reason == "length"


def test_answers_have_no_leading_space_and_continuations_keep_it(processor):
    tokenizer = processor.tokenizer
    tokens = tokenizer.encode("word and", add_special_tokens=False)
    word = tokenizer.encode("and", add_special_tokens=False)
    assert write(tokenizer, word)[0].text == "and"
    assert write(tokenizer, tokens[-len(word) :], before=tokens[: -len(word)])[0].text == " and"


def test_tokens_after_the_end_are_padding(processor):
    word = processor.tokenizer.encode("one two", add_special_tokens=False)
    writer, _ = write(processor.tokenizer, [*word, 2, *word])
    assert (writer.text, writer.num_tokens, writer.finish_reason) == ("one two", len(word) + 1, "stop")
    writer = AnswerWriter(processor.tokenizer, [2], (), lambda text: None, lambda: False)
    writer.add([*word, 2, *word])
    assert writer.num_tokens == len(word) + 1


def test_control_tokens_are_no_text(processor):
    word = processor.tokenizer.encode("one", add_special_tokens=False)
    writer, _ = write(processor.tokenizer, [*word, processor.tokenizer.bos_token_id, *word])
    assert "one" in writer.text and processor.tokenizer.bos_token not in writer.text


def test_a_character_that_was_cut_is_marked(processor):
    tokens = processor.tokenizer.convert_tokens_to_ids(["<0x47>", "<0xE2>"])
    assert write(processor.tokenizer, tokens)[0].text == "G\N{REPLACEMENT CHARACTER}"


def test_text_that_cannot_begin_a_stop_string_is_written_at_once(processor):
    pieces = []
    tokens = processor.tokenizer.encode("one two", add_special_tokens=False)
    for stop, held in (((), ""), (("x",), ""), (("o!",), "o"), (("wo!", "o!"), "wo")):
        pieces.clear()
        AnswerWriter(processor.tokenizer, [2], stop, pieces.append, lambda: False).add(tokens)
        assert "".join(pieces) == "one two".removesuffix(held)


def test_a_client_that_has_left_ends_the_answer(processor):
    writer = AnswerWriter(processor.tokenizer, [2], (), lambda text: None, lambda: True)
    with pytest.raises(AnswerFinishedError):
        writer.put(torch.tensor([[1]]))


def test_raw_prompts_keep_their_text_though_placeholders_are_text(processor):
    maker = PromptMaker(processor, 4096, ServingLimits(), ImageHosts(), DeviceHealth(torch.device("cpu")), {})
    for prompt in ("An <image> tag", "<image>", "a<image><image>b", "Say </s> it"):
        ids = asyncio.run(maker.from_text(prompt, "prompt"))["input_ids"][0].tolist()
        assert processor.image_token_id not in ids and ids[0] == processor.tokenizer.bos_token_id
        assert processor.decode(ids[1:]).replace(" ", "") == prompt.replace(" ", "")
        assert ("</s>" in prompt) == (processor.tokenizer.eos_token_id in ids)
        assert "< " not in processor.decode(ids[1:])


def test_end_token_at_the_length_limit_is_a_stop(processor):
    assert write(processor.tokenizer, [5, 2])[0].finish_reason == "stop"
    assert write(processor.tokenizer, [5, 6])[0].finish_reason == "length"


def test_sampling_draws_from_the_distribution_and_from_its_own_generator():
    logits = torch.tensor([[0.0, 1.0, 2.0, -float("inf")]])
    ids = torch.tensor([[1]])

    def draw(seed, number=1, **kwargs):
        processors = logits_processors(options(temperature=1.0, **kwargs), 1, seed)
        return [int(processors(ids, logits.clone()).argmax()) for _ in range(number)]

    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = torch.tensor(draw(1, 4000))
    assert torch.equal(torch.get_rng_state(), state)
    expected = logits[0].softmax(0)
    assert torch.allclose(torch.bincount(drawn, minlength=4) / 4000, expected, atol=0.03)
    assert draw(7, 20) == draw(7, 20) != draw(8, 20)
    assert set(draw(1, 200, top_k=1)) == {2} and set(draw(1, 200, top_k=2)) == {1, 2}
    assert set(draw(1, 200, min_p=0.5)) == {2} and set(draw(1, 200, top_p=0.0)) == {2}


def test_penalties_count_the_answer_and_not_the_prompt():
    ids = torch.tensor([[3, 3, 0, 1, 1]])
    processors = logits_processors(options(frequency_penalty=0.5, presence_penalty=1.0, logit_bias={2: 7.0}), 2, 0)
    assert processors(ids, torch.zeros(1, 4)).tolist() == [[-1.5, -2.0, 7.0, 0.0]]
    for one, expected in (
        ({"frequency_penalty": 0.5}, [-0.5, -1.0, 0.0, 0.0]),
        ({"presence_penalty": 1.0}, [-1.0, -1.0, 0.0, 0.0]),
        ({"logit_bias": {2: 7.0, 0: -1.0}}, [-1.0, 0.0, 7.0, 0.0]),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            scores = logits_processors(options(**one), 2, 0)(ids, torch.zeros(1, 4, dtype=dtype))
            assert scores.tolist() == [expected]


def test_no_allowed_token_and_nan_are_errors():
    processors = logits_processors(options(), 1, 0)
    with pytest.raises(RequestError, match="exclude all"):
        processors(torch.tensor([[1]]), torch.full((1, 3), -float("inf")))
    with pytest.raises(RuntimeError, match="float32"):
        processors(torch.tensor([[1]]), torch.tensor([[1.0, float("nan")]]))
