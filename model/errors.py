"""What can go wrong with a model before it runs.

ModelError
├── ConfigError       config.json asks for something this server cannot do
├── WeightsError      a checkpoint file is missing, truncated, mis-shaped, non-finite or pickled
├── TokenizerError    the vocabulary files are missing or contradict the model
├── DeviceError       the device is not there, has too little memory, or cannot do the dtype
└── GrammarError      a grammar cannot be compiled (the one that is the client's mistake: whoever compiles catches it)
"""

from __future__ import annotations


class ModelError(Exception):
    """One clear line for the operator; never shown to a client."""


class ConfigError(ModelError):
    pass


class WeightsError(ModelError):
    pass


class TokenizerError(ModelError):
    pass


class DeviceError(ModelError):
    pass


class GrammarError(ModelError):
    pass
