"""What outlives a request: files, fine-tuning jobs and batches, in a database and a directory."""
