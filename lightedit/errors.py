"""What lightedit raises on purpose: everything here is an error of input or of circumstance, never a bug of ours.

Each kind is also the built-in exception that fits it, so that `except ValueError` works as ever.
"""


class LightEditError(Exception):
    """Base of all errors that lightedit raises on purpose; the message names the value and the way out."""


class ArgumentError(LightEditError, ValueError):
    """An argument or setting is out of range, contradicts another, or is of the wrong kind."""


class ArgumentTypeError(LightEditError, TypeError):
    """An argument is an object of another kind, such as one of two that were swapped."""


class MissingFileError(LightEditError, FileNotFoundError):
    """A file, folder or data set that an argument names does not exist."""


class MissingPackageError(LightEditError, ImportError):
    """An optional package is needed and not installed."""


class UnavailableError(LightEditError, RuntimeError):
    """Something outside cannot be had: a download, a data set."""


class UnreachableError(LightEditError, ConnectionError):
    """A server does not answer."""


class NumericalError(LightEditError, FloatingPointError):
    """A computation gave NaN or infinity."""


class UnsupportedModelError(LightEditError, ValueError):
    """The model's architecture, or the state of its weights, does not allow what was asked."""


class RunFailedError(LightEditError, RuntimeError):
    """Work was done, but not all of it succeeded."""
