"""The C kernels: built by `pip install` where there is a compiler, loaded through ctypes, and done without elsewhere.

library.py loads them, layers.py has layers of them, forward.py a whole network in one call, ops.py `model.ops.Ops`.
"""
