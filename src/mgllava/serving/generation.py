"""Generation, one answer at a time, that stops when nobody waits for it and survives a lack of memory."""

import asyncio
import copy
import secrets
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from mgllava.serving.answers import AnswerFinishedError, AnswerWriter
from mgllava.serving.errors import RequestError
from mgllava.serving.options import Options
from mgllava.serving.sampling import logits_processors

logger = logging.get_logger(__name__)

Result = TypeVar("Result")
# How errors after which a process cannot use its accelerator any more begin, where torch has no class for them.
_DEVICE_ERRORS = ("CUDA error", "HIP error", "device-side assert", "cuDNN error", "CUBLAS_STATUS", "CUDNN_STATUS")


def with_free_memory_after_failure(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call a function; where memory does not suffice, free what it took.

    Args:
        function (`Callable`): What to call.
        *args: Its arguments.
        **kwargs: Its arguments.

    Returns:
        What the function returns.

    Raises:
        RequestError: With status 503, if memory did not suffice.
    """
    try:
        return function(*args, **kwargs)
    except MemoryError:
        pass
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        logger.error(f"Out of memory: {error}")
    # The traceback has gone by here, and with it what kept the tensors of its frames.
    clear_device_cache(garbage_collection=True)
    raise RequestError(
        "The server's memory does not suffice for this request now. Send a shorter one, with fewer images or boxes, "
        "or try again later.",
        code="out_of_memory",
        status=503,
    )


class DeviceHealth:
    """Whether the model's device still computes. A failed assertion on a GPU makes all later calls fail.

    Args:
        device (`torch.device`): The model's device.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.failure: str | None = None

    def examine(self, error: BaseException) -> None:
        """Find out after an error whether the device works; if it does not, that is final.

        Args:
            error (`BaseException`): What went wrong.
        """
        is_device_error = isinstance(error, getattr(torch, "AcceleratorError", ())) or (
            isinstance(error, RuntimeError) and any(word in str(error) for word in _DEVICE_ERRORS)
        )
        try:
            torch.ones(1, device=self._device).sum().item()
        except Exception:
            is_device_error = True
        if is_device_error and self.failure is None:
            self.failure = f"The device {self._device} has failed. The server must be restarted; its log says more."
            logger.critical(f"{self.failure} {error}")

    def check(self) -> None:
        """Refuse work that cannot be done.

        Raises:
            RequestError: With status 503, if the device has failed.
        """
        if self.failure is not None:
            raise RequestError(self.failure, code="device_failed", status=503)


class Worker:
    """A thread that does one thing after another.

    Args:
        name (`str`): Of the thread.
        health ([`DeviceHealth`]): What examines failures.
    """

    def __init__(self, name: str, health: DeviceHealth):
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._health = health

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function in the thread; a caller that is cancelled while it waits takes it back.

        Args:
            function (`Callable`): What to call.
            *args: Its arguments.

        Returns:
            What the function returns.

        Raises:
            RequestError: If memory does not suffice, or the device has failed.
        """
        return await asyncio.wrap_future(self._executor.submit(self._call, function, *args))

    def _call(self, function: Callable[..., Result], *args: Any) -> Result:
        self._health.check()
        try:
            return with_free_memory_after_failure(function, *args)
        except RequestError:
            raise
        except Exception as error:
            self._health.examine(error)
            raise


@dataclass
class Answer:
    """A whole answer.

    Attributes:
        text (`str`): Its text, without stop strings.
        finish_reason (`str`): `"stop"` or `"length"`.
        prompt_tokens (`int`): Length of the prompt, images and boxes included.
        completion_tokens (`int`): How many tokens were generated.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class Generator:
    """Generates answers, one at a time, in one thread: `torch.compile` with CUDA graphs keeps its state in the thread.

    Args:
        model ([`MGLlavaForConditionalGeneration`]): The model.
        tokenizer: Its tokenizer, of which a copy decodes: tokenizers cannot encode and decode at the same time.
        health ([`DeviceHealth`]): What examines failures.
        default_seed (`int`, *optional*): Seed of requests that have none; by default each gets another one.
    """

    def __init__(self, model: Any, tokenizer: Any, health: DeviceHealth, default_seed: int | None = None):
        self._model, self._tokenizer = model, copy.deepcopy(tokenizer)
        self._default_seed = default_seed
        self._worker = Worker("generation", health)

    async def answer(
        self,
        inputs: Any,
        options: Options,
        is_continuation: bool = False,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        """Generate an answer; stop when the caller is cancelled.

        Args:
            inputs (`BatchFeature`): One prompt.
            options ([`Options`]): How to generate.
            is_continuation (`bool`): Whether the text continues that of the prompt, white space included.
            on_text (`Callable`, *optional*): Called with each piece of the text, in the thread.

        Returns:
            [`Answer`]: The answer.

        Raises:
            RequestError: If an option does not fit, memory does not suffice, or the device has failed.
        """
        is_cancelled = threading.Event()
        try:
            return await self._worker.run(self._generate, inputs, options, is_continuation, on_text, is_cancelled)
        finally:
            is_cancelled.set()

    async def stream(
        self, inputs: Any, options: Options, is_continuation: bool = False
    ) -> AsyncGenerator[str | Answer, None]:
        """Generate an answer and give its pieces as they come, and at last the whole of it.

        Args:
            inputs (`BatchFeature`): One prompt.
            options ([`Options`]): How to generate.
            is_continuation (`bool`): See [`answer`].

        Yields:
            `str` or [`Answer`].

        Raises:
            RequestError: See [`answer`].
        """
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def hand_on(text: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, text)

        task = asyncio.ensure_future(self.answer(inputs, options, is_continuation, hand_on))
        task.add_done_callback(lambda _: hand_on(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _generate(
        self,
        inputs: Any,
        options: Options,
        is_continuation: bool,
        on_text: Callable[[str], None],
        is_cancelled: threading.Event,
    ) -> Answer:
        prompt = inputs["input_ids"][0].tolist()
        config = copy.copy(options.config)
        config.max_new_tokens = options.max_tokens
        seed = self._default_seed if options.seed is None else options.seed
        writer = AnswerWriter(
            self._tokenizer,
            self._end_tokens(config),
            options.stop,
            on_text,
            is_cancelled.is_set,
            before=prompt if is_continuation else None,
        )
        has_beams = (config.num_beams or 1) > 1
        arguments: dict[str, Any] = {
            # Moved here and not earlier: requests that wait should not take the accelerator's memory.
            **inputs.to(self._model.device),
            "generation_config": config,
            "logits_processor": logits_processors(
                options, len(prompt), secrets.randbits(63) if seed is None else seed
            ),
            "stopping_criteria": StoppingCriteriaList([_StopWhenSet(is_cancelled)]),
        }
        try:
            if has_beams:  # which transformers does not stream
                sequences = self._model.generate(**arguments)
                writer.add(sequences[0, len(prompt) :].tolist())
            else:
                self._model.generate(**arguments, streamer=writer)
        except AnswerFinishedError:
            pass
        except ValueError as error:  # what transformers says of options that do not fit each other
            raise RequestError(str(error)) from error
        writer.end()
        return Answer(writer.text, writer.finish_reason, len(prompt), writer.num_tokens)

    def _end_tokens(self, config: Any) -> list[int]:
        end = config.eos_token_id
        end = self._model.generation_config.eos_token_id if end is None else end
        return [] if end is None else list(end) if isinstance(end, list | tuple) else [int(end)]


class _StopWhenSet(StoppingCriteria):
    """Stops when nobody waits."""

    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device, dtype=torch.bool)
