"""Training of PARADE adapters on Hugging Face models. This package does not import vLLM."""
