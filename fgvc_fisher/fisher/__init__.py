"""The diagonal Fisher information of any classifier: per-image gradients, estimating, looking at it, files and the Hub

What it re-exports is listed in `__init__.pyi` and imported on first use. `plots` is imported here because it adds the
plotting methods to `DiagFisher`."""
import lazy_loader
from . import plots  # noqa: F401

__getattr__,__dir__,__all__ = lazy_loader.attach_stub(__name__, __file__)
