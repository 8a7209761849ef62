"""The typed errors of minillm.

Every error a user can cause is a `MiniLLMError`. Its message names the value that was given, the limit it broke
and what to change. Each is raised before anything is allocated or computed.
"""


class MiniLLMError(ValueError):
    """Base of all errors that are the caller's to fix."""


class ConfigError(MiniLLMError):
    """A configuration value is impossible, or two of them contradict each other."""


class SamplingParamsError(MiniLLMError):
    """A field of `SamplingParams` is outside its range."""


class PromptError(MiniLLMError):
    """A prompt is empty, too long, not encodable, or holds a token id the model does not know."""


class ModelNotFoundError(MiniLLMError):
    """No model of that name, folder or hub id could be found."""


class UnsupportedModelError(MiniLLMError):
    """The checkpoint is of an architecture, or has an option, that minillm does not implement."""


class CheckpointError(MiniLLMError):
    """The checkpoint's files do not match its own configuration, or are of a format we refuse to read."""


class CacheFullError(MiniLLMError):
    """More tokens were appended to a key-value cache than it has room for."""


class OutOfMemoryError(MiniLLMError):
    """Weights, activations and a usable cache do not fit in the memory there is."""


class WorkerDiedError(RuntimeError):
    """The process that computes has ended; every request of its engine has failed."""


class MaskError(MiniLLMError):
    """The lengths, window or padding asked of a mask are impossible."""


class KernelError(MiniLLMError):
    """A kernel does not take tensors of this dtype, shape or device, or cannot run here."""
