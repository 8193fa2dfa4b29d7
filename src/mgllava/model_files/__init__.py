"""The ground floor for model files: weights, configurations and folders, read safely and written completely."""
