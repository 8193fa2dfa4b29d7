"""MG-LLaVA for transformers."""
