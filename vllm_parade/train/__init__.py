"""Training PARADE adapters on Hugging Face models. Nothing in here imports vLLM."""
