"""What can go wrong with a model before it runs, or while it learns.

ModelError
├── ConfigError       config.json asks for something this server cannot do
├── WeightsError      a checkpoint file is missing, truncated, mis-shaped, non-finite or pickled
├── TokenizerError    the vocabulary files are missing or contradict the model
├── DeviceError       the device is not there, has too little memory, or cannot do the dtype
├── AdapterError      a LoRA adapter is damaged, does not fit the model, or asks for what is not served
├── ConversionError   a model of another format is damaged, hostile or not read, or the result cannot be written
├── TemplateRefused   a chat template is none, or does not take the messages
├── JobError          a training job asks for something that cannot be
├── DataError         lines of training data are bad, or there are none
├── TrainingError     the loss is no number any more
└── GrammarError      a grammar cannot be compiled (the one that is the client's mistake: whoever compiles catches it)
"""

from __future__ import annotations

from typing import NamedTuple


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


class AdapterError(ModelError):
    pass


class ConversionError(ModelError):
    pass


class TemplateRefused(ModelError):  # noqa: N818
    pass


class JobError(ModelError):
    pass


class Problem(NamedTuple):
    line: int  # of a file, from 1
    message: str


class DataError(ModelError):
    def __init__(self, message: str, problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems  # every bad line


class TrainingError(ModelError):
    pass
