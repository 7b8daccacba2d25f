"""GPT-2s of other origins, rewritten in the Hugging Face layout with safetensors.

`apart` starts a process for it, which `__main__` runs; only that process opens a foreign file.
"""
