"""The service: an OpenAI-compatible completion server for the GPT-2 family."""
