"""Choosing tokens: with penalties and biases as in OpenAI's API, and with a generator of its own for each request.

transformers samples with the process's generator, which all requests share: then an answer depends on who else asks.
Here the chosen token gets the highest score, and transformers takes that: adding Gumbel noise to log-probabilities and
taking the best one is the same as drawing from them.
"""

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from mgllava.serving.errors import RequestError
from mgllava.serving.options import Options


def logits_processors(options: Options, prompt_length: int, seed: int) -> LogitsProcessorList:
    """Make what turns logits into the choice that a request asks for.

    Args:
        options ([`Options`]): Of the request.
        prompt_length (`int`): Tokens of the prompt, to which the penalties of OpenAI's API do not apply.
        seed (`int`): Of sampling.

    Returns:
        `LogitsProcessorList`: For greedy generation of transformers.
    """
    processors = LogitsProcessorList()
    if options.frequency_penalty or options.presence_penalty:
        processors.append(_Penalties(options.frequency_penalty, options.presence_penalty, prompt_length))
    if options.logit_bias:
        processors.append(_Bias(options.logit_bias))
    processors.append(_Check())
    if options.temperature > 0:
        processors.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k is not None:
            processors.append(TopKLogitsWarper(options.top_k))
        if options.top_p is not None and options.top_p < 1:
            processors.append(TopPLogitsWarper(float(options.top_p)))
        if options.min_p:
            processors.append(MinPLogitsWarper(float(options.min_p)))
        if options.typical_p is not None and options.typical_p < 1:
            processors.append(TypicalLogitsWarper(float(options.typical_p)))
        processors.append(_Draw(seed))
    return processors


class _Penalties(LogitsProcessor):
    """Lowers the logits of tokens that the answer has already, also by how often it has them."""

    def __init__(self, frequency: float, presence: float, prompt_length: int):
        self._frequency, self._presence, self._prompt_length = frequency, presence, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer = input_ids[:, self._prompt_length :].to(scores.device)
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class _Bias(LogitsProcessor):
    """Adds numbers to the logits of some tokens."""

    def __init__(self, bias: dict[int, float]):
        self._ids, self._values = torch.tensor(list(bias)), torch.tensor(list(bias.values()))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Once on the accelerator, not in every step.
        self._ids, self._values = self._ids.to(scores.device), self._values.to(scores)
        return scores.index_add(1, self._ids, self._values.expand(len(scores), -1))


class _Check(LogitsProcessor):
    """Refuses to choose where there is no choice."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        best = scores.max().item()
        if best == -float("inf"):
            raise RequestError("The options must leave a token to choose, but they exclude all.", "generation_config")
        if not best < float("inf"):
            raise RuntimeError(f"The model computed {best} as a logit. Another dtype may help: --dtype float32.")
        return scores


class _Draw(LogitsProcessor):
    """Draws a token, and gives it the highest score."""

    def __init__(self, seed: int):
        # On the CPU whatever the device is: the same seed gives the same numbers everywhere.
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(scores.shape, dtype=torch.float32).exponential_(generator=self._generator)
        noise.clamp_(min=torch.finfo(torch.float32).tiny)
        return scores.log_softmax(-1) - noise.log_().to(scores.device)
