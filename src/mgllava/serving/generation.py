"""Generate one answer at a time, stop when its client disconnects, and recover from a lack of memory."""

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

from .answers import AnswerFinishedError, AnswerWriter
from .errors import RequestError
from .options import Options
from .sampling import logits_processors

logger = logging.get_logger(__name__)

Result = TypeVar("Result")
# Errors after which a process can no longer use its accelerator have these words, if torch has no class for them.
_DEVICE_ERRORS = ("CUDA error", "HIP error", "device-side assert", "cuDNN error", "CUBLAS_STATUS", "CUDNN_STATUS")


def _call_or_free_memory(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function; if memory does not suffice, free what it took and raise a `RequestError` with status 503."""
    try:
        return function(*args)
    except MemoryError:
        pass
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        logger.error(f"Out of memory: {error}")
    # Only after the `except` block is the traceback gone, and with it the references to the tensors of its frames.
    clear_device_cache(garbage_collection=True)
    raise RequestError(
        "The server's memory does not suffice for this request now. Send a shorter one, with fewer images, or try "
        "again later.",
        code="out_of_memory",
        status=503,
    )


class DeviceHealth:
    """Whether the model's device still computes: after a failed assertion on a GPU, all later calls fail."""

    def __init__(self, device: torch.device):
        self._device = device
        self.failure: str | None = None

    def examine(self, error: BaseException) -> None:
        """Test the device after an error; a failure is final."""
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
        """Raise a `RequestError` with status 503 if the device has failed."""
        if self.failure is not None:
            raise RequestError(self.failure, code="device_failed", status=503)


class Worker:
    """A thread that runs calls one after another."""

    def __init__(self, name: str, health: DeviceHealth):
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._health = health

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function in the thread; a caller that is cancelled before the call starts withdraws it."""
        return await asyncio.wrap_future(self._executor.submit(self._call, function, *args))

    def _call(self, function: Callable[..., Result], *args: Any) -> Result:
        self._health.check()
        try:
            return _call_or_free_memory(function, *args)
        except RequestError:
            raise
        except Exception as error:
            self._health.examine(error)
            raise


@dataclass
class Answer:
    """A whole answer.

    Attributes:
        text: The answer, without stop strings.
        finish_reason: `"length"` if it was cut.
        prompt_tokens: Length of the prompt, images included.
        completion_tokens: How many tokens were generated.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class Generator:
    """Generates answers, one at a time, in one thread: `torch.compile` with CUDA graphs keeps its state per thread.

    `default_seed` is the seed of requests that have none; by default each gets a random one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        context_length: int,
        health: DeviceHealth,
        default_seed: int | None = None,
    ):
        # A copy, as a tokenizer cannot encode and decode at the same time.
        self._model, self._tokenizer = model, copy.deepcopy(tokenizer)
        self._context_length, self._default_seed = context_length, default_seed
        self._worker = Worker("generation", health)

    async def answer(
        self,
        inputs: Any,
        options: Options,
        is_continuation: bool = False,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        """Generate an answer to one prompt; stop when the caller is cancelled.

        The text of a continuation keeps the white space at its start. `on_text` is called in the thread.
        """
        is_cancelled = threading.Event()
        try:
            return await self._worker.run(self._generate, inputs, options, is_continuation, on_text, is_cancelled)
        finally:
            is_cancelled.set()

    async def stream(
        self, inputs: Any, options: Options, is_continuation: bool = False
    ) -> AsyncGenerator[str | Answer, None]:
        """Generate an answer and yield its pieces as they come, and finally the whole answer."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def put(text: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, text)

        task = asyncio.ensure_future(self.answer(inputs, options, is_continuation, put))
        task.add_done_callback(lambda _: put(None))
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
        config.max_new_tokens = min(options.max_tokens, self._context_length - len(prompt))
        seed = self._default_seed if options.seed is None else options.seed
        seed = secrets.randbits(63) if seed is None else seed
        writer = AnswerWriter(
            self._tokenizer,
            self._end_tokens(config),
            options.stop,
            on_text,
            is_cancelled.is_set,
            before=prompt if is_continuation else None,
        )
        arguments: dict[str, Any] = {
            # Moved only now: requests that wait should not take the accelerator's memory.
            **inputs.to(self._model.device),
            "generation_config": config,
            "logits_processor": logits_processors(options, len(prompt), seed),
            "stopping_criteria": StoppingCriteriaList([_StopWhenSet(is_cancelled)]),
        }
        try:
            if (config.num_beams or 1) > 1:  # transformers does not stream beams
                sequences = self._model.generate(**arguments)
                writer.add(sequences[0, len(prompt) :].tolist())
            else:
                self._model.generate(**arguments, streamer=writer)
        except AnswerFinishedError:
            pass
        except ValueError as error:  # raised by transformers for options that do not go together
            raise RequestError(str(error)) from error
        writer.end()
        return Answer(writer.text, writer.finish_reason, len(prompt), writer.num_tokens)

    def _end_tokens(self, config: Any) -> list[int]:
        end = config.eos_token_id
        end = self._model.generation_config.eos_token_id if end is None else end
        return [] if end is None else list(end) if isinstance(end, list | tuple) else [int(end)]


class _StopWhenSet(StoppingCriteria):
    """Stops generation once an event is set."""

    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device, dtype=torch.bool)


__all__ = ["Answer", "DeviceHealth", "Generator", "Worker"]
