"""An accelerator that is only pretended, so that device code can be tested where there is none

A tensor that is moved to `DEVICE` inside `pretend()` says that it is there and refuses to meet tensors of the CPU, as
on a GPU. Its numbers are computed by the CPU, so a result can be compared with the CPU's. `DEVICE` is PyTorch's 'meta',
which outside has shapes and no numbers.

As on a GPU, these work: `.cpu()`, `.item()`, `.tolist()`, copies between the two, an index on the CPU, and a CPU tensor
without dimensions as an operand. As there, these raise errors: `.numpy()`, stacking tensors of both.
With `float64=False` the device has no float64, as Apple's.
It says nothing about streams, pinned memory, kernels, speed or memory: for those see `test_cuda`."""
from collections.abc import Callable
from contextlib import contextmanager
from unittest.mock import patch
import torch
from fastai import torch_core  # noqa: F401, it makes `torch.as_subclass`
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device('meta')
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
BY_INDEX = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
STACKS = {aten.stack.default, aten.cat.default}

def is_there(device): return device is not None and torch.device(device).type==DEVICE.type

class Pretend(Tensor):
    "A tensor on the pretended device; `raw` has its numbers"
    @staticmethod
    def __new__(cls, raw):
        self = Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            layout=raw.layout, device=DEVICE)
        self.raw = raw
        return self
    def __repr__(self): return f'Pretend({self.raw!r})'
    is_meta = False
    def __reduce_ex__(self, protocol): return self.raw.__reduce_ex__(protocol)  # as `map_location='cpu'` reads it
    def data_ptr(self): return self.raw.data_ptr()
    def tolist(self): return self.raw.tolist()
    def numpy(self, *args, **kwargs): raise TypeError("can't convert a pretended tensor to numpy: use Tensor.cpu()")
    def set_meta(self, x, as_copy=False): "fastai would replace `raw` with all other attributes"
    def __array__(self, *args, **kwargs): return self.numpy()
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if cls is Pretend: return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs or {})
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return dispatch(func, args, kwargs or {})

SUBCLASSES = {}
def subclass(cls):
    "The pretended tensor of a class such as fastai's `TensorImage`"
    if issubclass(cls, Pretend): return cls
    if cls in (Tensor,nn.Parameter): return Pretend
    if cls not in SUBCLASSES:
        bases = [subclass(o) for o in cls.__bases__ if issubclass(o, Tensor)]
        SUBCLASSES[cls] = type(f'Pretend{cls.__name__}', (cls,*bases), {})
    return SUBCLASSES[cls]

def refuse_mixing(func, args, kwargs):
    "`RuntimeError` if a CPU tensor meets pretended ones, except for an index and for one without dimensions"
    if func in BY_INDEX: args = (args[0], *args[2:])
    for o in tree_leaves((args, kwargs)):
        if isinstance(o, Tensor) and not isinstance(o, Pretend) and (o.ndim or func in STACKS):
            raise RuntimeError(f'{func}: a CPU tensor of shape {tuple(o.shape)} meets tensors of the pretended device')

def raw(o): return o.raw if isinstance(o, Pretend) else o

def dispatch(func, args, kwargs, float64=True):
    "Call an operation with the numbers of its tensors"
    ours = [o for o in tree_leaves((args, kwargs)) if isinstance(o, Pretend)]
    device = kwargs.get('device')
    if not ours and not is_there(device): return func(*args, **kwargs)
    if ours and func not in MOVES: refuse_mixing(func, args, kwargs)
    if func is aten.copy_.default:
        raw(args[0]).copy_(raw(args[1]))
        return args[0]
    kwargs = {k: v for k,v in kwargs.items() if k!='pin_memory'}
    if is_there(device): kwargs['device'] = torch.device('cpu')
    out = func(*tree_map(raw, args), **tree_map(raw, kwargs))
    if ours and torch.Tag.inplace_view in func.tags:           # such as `squeeze_`, which changes the shape
        with no_dispatch(): func(*args, **kwargs)
    leaves = device is not None and not is_there(device)
    wrapped = {id(o.raw): o for o in ours}                     # an operation in place returns its argument
    def wrap(o):
        if not isinstance(o, Tensor): return o
        if leaves: return o.clone() if id(o) in wrapped else o
        if not float64 and o.dtype==torch.float64: raise TypeError('the pretended device has no float64')
        return wrapped[id(o)] if id(o) in wrapped else Pretend(o.resolve_conj().resolve_neg())
    return tree_map(wrap, out)

class Operations(TorchDispatchMode):
    "Operations that make tensors on the device, and those of its tensors"
    def __init__(self, float64):
        super().__init__()
        self.float64 = float64
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {}, self.float64)

def as_subclass(t, cls, original=torch.as_subclass):
    "`torch.as_subclass`, which refuses tensors that are of a subclass already"
    if not isinstance(t, Pretend): return original(t, cls.__bases__[0] if issubclass(cls, Pretend) else cls)
    out = aten.alias(t)
    out.__class__ = subclass(cls)
    return out

TO_TENSOR = torch.as_tensor
_device_constructors()                                         # remembers PyTorch's functions, before they are replaced
def moving(make):
    "A function that makes a tensor from numbers, and moves it to the device afterwards"
    def made(o, device=None, **kwargs):
        if device is None: device = o.device if isinstance(o, Tensor) and make is TO_TENSOR else make([]).device
        return make(o, device='cpu', **kwargs).to(device) if is_there(device) else make(o, device=device, **kwargs)
    return made

def load(file, map_location=None, original=torch.load, **kwargs):
    "`torch.load`, which takes the device for one without numbers"
    if isinstance(map_location, (dict,Callable)) or not is_there(map_location):
        return original(file, map_location=map_location, **kwargs)
    return tree_map(lambda o: o.to(DEVICE) if isinstance(o, Tensor) else o, original(file, 'cpu', **kwargs))

IN_HALF = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, torch.matmul,
    torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, F.scaled_dot_product_attention}
IN_FLOAT = {
    F.layer_norm, F.group_norm, F.softmax, F.log_softmax, Tensor.softmax, Tensor.log_softmax, torch.softmax,
    torch.log_softmax, F.cross_entropy, F.nll_loss, Tensor.sum, torch.sum, Tensor.norm, Tensor.pow, Tensor.exp}

class Casts(TorchFunctionMode):
    "Autocast on the device, for the functions in `IN_HALF` and `IN_FLOAT`; None: it is disabled"
    stack = []
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
    def __enter__(self):
        Casts.stack.append(self)
        return super().__enter__()
    def __exit__(self, *args):
        Casts.stack.pop()
        return super().__exit__(*args)
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        dtype = self.dtype if func in IN_HALF else torch.float32 if func in IN_FLOAT else None
        if dtype is None or self.dtype is None or self is not Casts.stack[-1]: return func(*args, **kwargs)
        def cast(o):
            is_cast = isinstance(o, Pretend) and o.is_floating_point() and o.dtype!=torch.float64
            return o.to(dtype) if is_cast else o
        return func(*tree_map(cast, args), **tree_map(cast, kwargs))

def autocast(device_type, dtype=None, enabled=True, original=torch.autocast, **kwargs):
    "`torch.autocast`, which does not know the device"
    if device_type==DEVICE.type: return Casts((dtype or torch.float16) if enabled else None)
    return original(device_type, dtype, enabled, **kwargs)

@contextmanager
def pretend(
    float64:bool=True, # Does the device have float64?
):
    "Inside, `DEVICE` computes, and modules keep their parameters' identity when they are moved to it"
    threads,swaps = torch.autograd.is_multithreading_enabled(),torch.__future__.get_swap_module_params_on_conversion()
    torch.autograd.set_multithreading_enabled(False)           # another thread would not be inside
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with (patch.multiple(torch, autocast=autocast, as_subclass=as_subclass, load=load, tensor=moving(torch.tensor),
                             as_tensor=moving(torch.as_tensor)), Operations(float64)): yield DEVICE
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        torch.autograd.set_multithreading_enabled(threads)
