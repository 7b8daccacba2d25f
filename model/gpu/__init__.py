"""Steps that a GPU runs without waiting for the CPU. Only cuda.py calls torch.cuda."""
