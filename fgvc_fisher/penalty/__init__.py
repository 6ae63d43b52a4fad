"""The penalty of equation (1) on plain PyTorch, and models between the source and the fine-tuned one

What it re-exports is listed in `__init__.pyi`, and imported when it is asked for."""
import lazy_loader

__getattr__,__dir__,__all__ = lazy_loader.attach_stub(__name__, __file__)
