"""HTTP: one resource, one file. Knows requests, answers and status codes; nothing of how tokens are computed."""
