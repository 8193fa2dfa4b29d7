"""Training: both stages of the paper (arXiv 2406.17770, section 4.1), fine-tuning, and adapters."""

from .collator import MGLlavaDataCollator
from .dataset import ConversationDataset, SampleSource, open_source, stream_samples
from .errors import SampleError, TrainingError
from .lora import lora_config
from .loss_plot import plot_losses
from .recipe import Recipe, load_recipe, recipe_names
from .run import train
from .sampler import ModalityLengthSampler
from .starting_model import write_starting_model
from .trainable import check_trained, describe_trained, freeze_all_but
from .trainer import MGLlavaTrainer

__all__ = [
    "ConversationDataset",
    "MGLlavaDataCollator",
    "MGLlavaTrainer",
    "ModalityLengthSampler",
    "Recipe",
    "SampleError",
    "SampleSource",
    "TrainingError",
    "check_trained",
    "describe_trained",
    "freeze_all_but",
    "load_recipe",
    "lora_config",
    "open_source",
    "plot_losses",
    "recipe_names",
    "stream_samples",
    "train",
    "write_starting_model",
]
