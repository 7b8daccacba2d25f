"""Training of GPT-2 models: text to packed tokens, tokens to weights in the Hugging Face layout."""
