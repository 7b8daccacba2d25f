"""The engine: every live request, what it has been sent, and the workers that compute it. Knows nothing of HTTP."""
