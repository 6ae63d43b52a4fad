"""Panels of ipywidgets: the penalty, the Fisher information, the published runs, a training, a classifier

What it re-exports is listed in `__init__.pyi`, and imported when it is asked for."""
import lazy_loader

__getattr__,__dir__,__all__ = lazy_loader.attach_stub(__name__, __file__)
