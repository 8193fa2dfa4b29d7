"""Safe reading and atomic writing of weights, configurations and model folders."""
