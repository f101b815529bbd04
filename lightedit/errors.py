"""The errors that lightedit raises on purpose. Each reports invalid input or a failed resource, not a bug of lightedit.

Each class is also a subclass of the matching built-in exception, so `except ValueError` catches an `ArgumentError`.
"""


class LightEditError(Exception):
    """Base of all errors that lightedit raises on purpose. The message names the value and the way out."""


class ArgumentError(LightEditError, ValueError):
    """An argument or setting is out of range, invalid, or contradicts another."""


class ArgumentTypeError(LightEditError, TypeError):
    """An argument has the wrong type, for example because two arguments were swapped."""


class MissingFileError(LightEditError, FileNotFoundError):
    """A file, folder or data set that an argument names does not exist."""


class MissingPackageError(LightEditError, ImportError):
    """An optional package is needed and not installed."""


class UnavailableError(LightEditError, RuntimeError):
    """An external resource, such as a download or a data set, is not available."""


class UnreachableError(LightEditError, ConnectionError):
    """A server does not answer."""


class NumericalError(LightEditError, FloatingPointError):
    """A computation gave NaN or infinity."""


class UnsupportedModelError(LightEditError, ValueError):
    """The model's architecture, or the state of its weights, does not support the request."""


class RunFailedError(LightEditError, RuntimeError):
    """Some of the requested work failed; the rest is done."""
