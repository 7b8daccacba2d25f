"""The network: GPT-2 on a CPU or a CUDA device. Knows nothing of HTTP, requests or clients."""
