"""transformers' `Trainer` for batches that mix samples with and without images."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .checkpoints import clear_incomplete, last_complete_checkpoint, mark_complete
from .errors import TrainingError
from .sampler import ModalityLengthSampler
from .trainable import matching_pattern

logger = logging.getLogger(__name__)

# The collator adds these, but the model does not take them.
_NOT_INPUTS = ("sample_ids", "skipped_samples", "lost_samples")


def _number_of_samples(inputs: dict[str, Any]) -> int:
    """Return from how many samples of a batch is learned: those that were not skipped, and have labels."""
    ids = inputs.get("sample_ids")
    return len(inputs["attention_mask"]) if ids is None else len(ids) - int(inputs.get("lost_samples", 0))


class _Learning(TrainerCallback):
    """Checks that not all samples were skipped, and that the learning rate was not always 0."""

    def __init__(self, trainer: "MGLlavaTrainer"):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the first step of a resumed training."""
        # The state of a checkpoint has the logging, evaluation and save steps with which it was written.
        state.compute_steps(args, state.max_steps)
        self._trainer._first_step = state.global_step
        self._greatest_rate = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Note the learning rate of a step, and let the optimizer leave the weights alone in an empty one."""
        rates = [float(group["lr"]) for group in getattr(optimizer, "param_groups", [{"lr": 1.0}])]
        self._greatest_rate = max(self._greatest_rate, *rates)
        # Gradients of zero would move the weights by momentum and weight decay. DeepSpeed has stepped already, and the
        # scaler of fp16 fails without gradients.
        if self._trainer._is_empty_step and self._trainer.accelerator.scaler is None:
            optimizer.zero_grad()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report lost samples, and warn if training ended before the warm-up raised the learning rate above 0."""
        self._trainer.count_tokens_and_images()
        if self._trainer.lost_samples:
            logger.warning(
                "Nothing was learned from %d samples, whose labels the original loses (`original_labels`).",
                self._trainer.lost_samples,
            )
        steps = state.global_step - self._trainer._first_step
        if steps and not self._greatest_rate:
            logger.warning(
                "The learning rate was 0 in all %d steps, so no weight has changed. Train for more steps, or set "
                "`warmup_steps` to 0.",
                steps,
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if all samples were skipped."""
        if state.global_step > self._trainer._first_step:
            self._trainer.check_learned()


class MGLlavaTrainer(Trainer):
    """Trainer of all model families of this package.

    In addition to [`Trainer`]:

    - `train_sampling_strategy="group_by_length"` groups by modality and length, see [`ModalityLengthSampler`]; the
      dataset needs `lengths`.
    - Training never resumes from an incomplete checkpoint, and old ones are deleted only after a new one is complete.
    - A loss that is NaN or infinite stops the training with an error that names the samples.
    - Samples that the collator skips have no weight. A step whose samples are all skipped leaves the weights of the
      model as they are, except with DeepSpeed and fp16, where momentum and weight decay still move them. The log has
      the numbers of such samples and steps. If all samples of an epoch are skipped, training stops with an error.
    - The log has tokens and images per second and the peak memory of a GPU.

    Args:
        *args: See the base class; `data_collator` is an [`MGLlavaDataCollator`] with `return_sample_ids=True`.
        eval_data_collator ([`MGLlavaDataCollator`], *optional*): Collator of evaluations; by default `data_collator`.
        learning_rates (`Mapping[str, float]`, *optional*): Learning rates of modules, by their names without the
            leading `model.`; all others have `args.learning_rate`.
        **kwargs: See the base class.

    Attributes:
        skipped_samples (`int`): Samples that all processes skipped in training until the last log.
        lost_samples (`int`): Samples without labels, see `original_labels` of [`MGLlavaDataCollator`].
        empty_steps (`int`): Steps in which all samples were skipped.
    """

    # From the start of `train` or of a step.
    _counting_since: float
    _first_step: int
    _learned_samples: int
    _sample_ids: list[str]

    def __init__(
        self,
        *args: Any,
        eval_data_collator: Any = None,
        learning_rates: Mapping[str, float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._learning_rates = dict(learning_rates or {})
        if self.accelerator.is_fsdp2:
            prepare = self.accelerator.prepare
            self.accelerator.prepare = lambda *given, **options: self._prepare_sharded(prepare, *given, **options)
        self._eval_data_collator = eval_data_collator
        # Tokens, images, skipped samples and lost ones since the last log.
        self._counts = torch.zeros(4, dtype=torch.float64)
        self._device_tokens: torch.Tensor | None = None
        # Loss and number of samples of each batch of an evaluation.
        self._evaluated: list[tuple[torch.Tensor, int]] | None = None
        self.skipped_samples = self.lost_samples = 0
        self.empty_steps = 0
        self._is_empty_step = False
        self.add_callback(_Learning(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = getattr(dataset, "lengths", None)
        if self.args.train_sampling_strategy != "group_by_length" or lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ModalityLengthSampler(lengths, batch_size, seed, getattr(dataset, "modalities", None))

    def create_optimizer(self, model: Any = None, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer, with groups of parameters for `learning_rates`.

        Args:
            model: Model whose parameters the optimizer updates. The trainer's own by default.
            *args: Further arguments of [`Trainer.create_optimizer`].
            **kwargs: Further keyword arguments of [`Trainer.create_optimizer`].
        """
        is_new = self.optimizer is None
        given = () if model is None else (model, *args)
        optimizer: torch.optim.Optimizer = super().create_optimizer(*given, **kwargs)
        if not (is_new and self._learning_rates):
            return optimizer
        trained: Any = self.model if model is None else model
        names = {id(parameter): name for name, parameter in trained.named_parameters()}
        for group in list(optimizer.param_groups):
            by_pattern: dict[str | None, list[Any]] = {None: []}
            for parameter in group["params"]:
                pattern = matching_pattern(names.get(id(parameter), ""), self._learning_rates)
                by_pattern.setdefault(pattern, []).append(parameter)
            group["params"] = by_pattern.pop(None)
            for pattern, parameters in by_pattern.items():
                rate = self._learning_rates[str(pattern)]
                optimizer.add_param_group({**group, "params": parameters, "lr": rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _prepare_sharded(self, prepare: Any, *args: Any, **kwargs: Any) -> Any:
        """Hide saved buffers, such as positions, from accelerate, which takes all saved tensors for shards."""
        models = [value for value in args if isinstance(value, nn.Module)]
        buffers = [
            (module, name)
            for model in models
            for module in model.modules()
            for name, _ in module.named_buffers(recurse=False)
            if name in module.state_dict()
        ]
        for module, name in buffers:
            module.register_buffer(name, getattr(module, name), persistent=False)
        prepared = prepare(*args, **kwargs)
        for module, name in buffers:
            buffer = getattr(module, name)
            # The other processes may not have loaded its values.
            torch.distributed.broadcast(buffer, src=0)
            module.register_buffer(name, buffer)
        return prepared

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # In the order of the dataset: grouping by length is for training.
        return SequentialSampler(eval_dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self._sample_ids = inputs.get("sample_ids", [])
        inputs = {name: value for name, value in inputs.items() if name not in _NOT_INPUTS}
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        # Training does not read the KV cache.
        return {**prepared, "use_cache": False}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a batch forward and backward, see [`Trainer.training_step`].

        Raises:
            TrainingError: If the loss is NaN or infinite. The weights are not updated.
        """
        # Summed on the device, so that it is not synchronized before the next log.
        tokens = inputs["attention_mask"].sum()
        self._device_tokens = tokens if self._device_tokens is None else self._device_tokens + tokens
        self._counts[1] += self._count_images(inputs)
        self._counts[2] += inputs.get("skipped_samples", 0)
        self._counts[3] += inputs.get("lost_samples", 0)
        self._learned_samples += _number_of_samples(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not bool(torch.isfinite(loss)):
            names = ", ".join(self._sample_ids) or "unknown (the collator needs return_sample_ids=True)"
            raise TrainingError(
                f"The loss is {loss.item()} in step {self.state.global_step + 1}, with the samples {names}. Check "
                "these; if they are in order, lower `learning_rate` or use bf16 instead of fp16, and resume from the "
                "last checkpoint."
            )
        return loss

    def _count_images(self, inputs: dict[str, Any]) -> int:
        processors = (self.processing_class, getattr(self.data_collator, "processor", None))
        processor = next((one for one in processors if hasattr(one, "count_images")), None)
        return 0 if processor is None else processor.count_images(inputs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Collect the batches of a step and count their labels, see [`Trainer.get_batch_samples`].

        Returns:
            `tuple`: The batches, and the number of labels by which their losses are divided; 1 if all samples were
            skipped.
        """
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._is_empty_step = bool(batches) and count is not None and bool((torch.as_tensor(count) == 0).all())
        if self._is_empty_step:
            self.empty_steps += 1
            logger.warning(
                "All samples of step %d were skipped: nothing is learned in it.", self.state.global_step + 1
            )
            count = torch.ones_like(torch.as_tensor(count))
        return batches, count

    def check_learned(self) -> None:
        """Check that not all samples were skipped so far; all processes must call this.

        Raises:
            TrainingError: If all samples were skipped.
        """
        counts = torch.tensor([float(self._learned_samples)], device=self.args.device)
        if self.state.global_step and not bool(self.accelerator.reduce(counts, "sum").sum()):
            raise TrainingError(
                "Nothing was learned: all samples were skipped (`on_bad_sample` is skip). The warnings above give the "
                "reason for each sample."
            )

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of an evaluation, made by its own collator, see [`Trainer.get_eval_dataloader`]."""
        collator = self.data_collator
        self.data_collator = collator if self._eval_data_collator is None else self._eval_data_collator
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch, see [`Trainer.prediction_step`]."""
        learned = _number_of_samples(inputs)
        loss, *others = super().prediction_step(model, inputs, *args, **kwargs)
        if self._evaluated is not None and loss is not None:
            # If all samples were skipped, the loss is 0 / 0.
            loss = loss if learned else torch.zeros_like(loss)
            self._evaluated.append((loss, learned))
        return (loss, *others)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch, in an evaluation as the mean over this batch, see [`Trainer.compute_loss`]."""
        if not model.training:
            kwargs["num_items_in_batch"] = None
        return super().compute_loss(model, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate without the batches whose samples were all skipped, see [`Trainer.evaluation_loop`].

        Raises:
            TrainingError: If all samples were skipped.
        """
        self._evaluated = []
        try:
            output = super().evaluation_loop(*args, **kwargs)
            batches = self._evaluated
        finally:
            self._evaluated = None
        if batches:
            device = self.args.device
            total = sum(loss.to(device, torch.float32) * learned for loss, learned in batches)
            counts = (sum(learned for _, learned in batches), sum(not learned for _, learned in batches))
            sums = torch.stack(
                [torch.as_tensor(value, dtype=torch.float32, device=device) for value in (total, *counts)]
            )
            total, learned, empty = self.accelerator.reduce(sums, "sum").tolist()
            if not learned:
                raise TrainingError("All samples of the evaluation were skipped. The warnings above give the reasons.")
            if empty:
                name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
                output = output._replace(metrics={**(output.metrics or {}), name: total / learned})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values and the speed since the last log, see [`Trainer.log`]."""
        if "loss" in logs and self._device_tokens is not None:
            self._counts[0] = self._device_tokens.double().cpu()
            tokens, images = self.count_tokens_and_images()
            seconds = max(time.perf_counter() - self._counting_since, 1e-9)
            logs |= {"tokens_per_second": round(tokens / seconds, 1), "images_per_second": round(images / seconds, 2)}
            if torch.cuda.is_available():
                logs["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            if self.skipped_samples:
                logs["skipped_samples"] = self.skipped_samples
            if self.lost_samples:
                logs["lost_samples"] = self.lost_samples
            if self.empty_steps:
                logs["empty_steps"] = self.empty_steps
            self._device_tokens = None
            self._counting_since = time.perf_counter()
        super().log(logs, start_time)

    def count_tokens_and_images(self) -> tuple[float, float]:
        """Return the tokens and images of all processes since the last log, and add up the samples without labels."""
        total = self.accelerator.reduce(self._counts.to(self.args.device, torch.float32), "sum")
        tokens, images, skipped, lost = total.tolist()
        self.skipped_samples += int(skipped)
        self.lost_samples += int(lost)
        self._counts.zero_()
        return tokens, images

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, see [`Trainer.train`]; `resume_from_checkpoint=True` resumes from the last complete checkpoint.

        Raises:
            TrainingError: If there is no complete checkpoint, the loss is NaN, or all samples were skipped.
        """
        if resume_from_checkpoint is True:
            checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if checkpoint is None:
                raise TrainingError(
                    f"No checkpoint in {self.args.output_dir} is complete: there is nothing to resume."
                )
            resume_from_checkpoint = str(checkpoint)
        self._counting_since = time.perf_counter()
        self._learned_samples = 0
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.state.global_step > self._first_step:
            self.check_learned()
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial=trial)
        checkpoint = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            clear_incomplete(checkpoint)
        self.accelerator.wait_for_everyone()
        # The base class would delete old checkpoints before this one is marked as complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(checkpoint)
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


__all__ = ["MGLlavaTrainer"]
