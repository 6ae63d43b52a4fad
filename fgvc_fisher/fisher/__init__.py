"""The diagonal Fisher information of any classifier: per-image gradients, estimating, looking at it, files and the Hub

What it re-exports is listed in `__init__.pyi`, and imported when it is asked for."""
import lazy_loader

__getattr__,__dir__,__all__ = lazy_loader.attach_stub(__name__, __file__)
