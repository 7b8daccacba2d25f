"""The worker process: scheduler, KV-cache books and the loop that drives the network. Knows nothing of HTTP."""
