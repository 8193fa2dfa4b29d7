"""A small world of pictures, and what can be said about them: data to train and test a small MG-LLaVA with."""
