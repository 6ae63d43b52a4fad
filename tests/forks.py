"""Processes for the tests, forked from one that has imported torch, fastai and this package: each begins at once.

A forked process is as good as a fresh one for being killed, for sharing a folder and for being one of several ranks.
A test of what only a fresh interpreter shows (what a command imports, how a script ends) starts one by `subprocess`.
"""
import multiprocessing, os, runpy, signal, shutil, socket, sys, time, weakref
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

BIN = Path(sys.executable).parent
METHODS = multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context('forkserver' if 'forkserver' in METHODS else 'spawn')
PRELOAD = ['pytest', 'accelerate', 'fastai.vision.all', 'timm', 'fgvc_fisher.cli', 'fgvc_fisher.experiment.demo',
           'fgvc_fisher.fisher.shards', 'fgvc_fisher.explore.classifier', 'fgvc_fisher.explore.training']

def _begin(target, args, env, cwd, threads, printed):
    "What a new process does first: the environment, the folder and the output that it was given"
    import torch
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs ignore it
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for fd,name in ((1,'out'), (2,'err')): os.dup2(os.open(printed/name, os.O_WRONLY|os.O_CREAT|os.O_APPEND), fd)
    for o in (sys.stdout, sys.stderr): o.reconfigure(line_buffering=True)
    torch.set_num_threads(threads)
    multiprocessing.set_start_method(None, force=True)     # what this process starts is started as usual
    target(*args)

def context():
    "How processes are started: its server has imported `PRELOAD`, where there is one"
    CONTEXT.set_forkserver_preload(PRELOAD)
    return CONTEXT

class Forked:
    "A process that calls `target(*args)`; a function of a module, which the process imports"
    def __init__(self, target, *args, env=None, cwd=None, threads=None):
        import torch
        self.printed = Path(mkdtemp(prefix='forked-'))
        weakref.finalize(self, shutil.rmtree, self.printed, ignore_errors=True)
        where = str(cwd or os.getcwd())
        threads = threads or torch.get_num_threads()
        begin = target, args, os.environ|(env or {}), where, threads, self.printed
        self.process = context().Process(target=_begin, args=begin)
        self.process.start()
    @property
    def pid(self): return self.process.pid
    @property
    def out(self): return self._read('out')
    @property
    def err(self): return self._read('err')
    def _read(self, name): return (self.printed/name).read_text() if (self.printed/name).exists() else ''
    def poll(self):
        "Its exit code, None while it runs"
        return self.process.exitcode
    def wait(self, timeout=120):
        "Its exit code, negative for a signal. One that does not end is killed, and `TimeoutError` has what it printed"
        self.process.join(timeout)
        if self.poll() is not None: return self.poll()
        self.kill()
        raise TimeoutError(f'still running after {timeout} s\n{self.out[-2000:]}\n{self.err[-2000:]}')
    def kill(self):
        "End it by SIGKILL, and wait until it has"
        self.process.kill()
        self.process.join()
    def signal(self, number):
        "Send a signal, if it still runs"
        with suppress(ProcessLookupError): os.kill(self.pid, number)

def ranks(target, *args, n=2, **kwargs):
    "`n` processes that know each other, as `torchrun` would have started them"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    common = dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
                  ACCELERATE_USE_CPU='true')
    own = [dict(RANK=str(i), LOCAL_RANK=str(i)) for i in range(n)]
    return [Forked(target, *args, env=common|o, threads=1, **kwargs) for o in own]

def succeed(processes, timeout=120):
    "Wait for processes that work together. When one fails the others are ended, and `AssertionError` says why"
    end = time.monotonic()+timeout
    while any(o.poll() is None for o in processes) and not any(o.poll() for o in processes):
        if time.monotonic()>end: break
        time.sleep(0.02)
    bad = [o for o in processes if o.poll()!=0]
    for o in bad: o.kill()
    assert not bad, '\n'.join(f'exit code {o.poll()}\n{o.out[-1000:]}\n{o.err[-3000:]}' for o in bad)

class Said(NamedTuple):
    "What a command came to"
    code:int
    out:str
    err:str

def _command(name, args):
    "A console script, as the shell runs it"
    sys.argv = [str(BIN/name), *args]
    runpy.run_path(str(BIN/name), run_name='__main__')

def shell(name, *args, timeout=120, **kwargs):
    "Run a command of this package, and wait for it"
    process = Forked(_command, name, [str(o) for o in args], **kwargs)
    code = process.wait(timeout)
    return Said(code, process.out, process.err)

def shells(name, *args, n=2, timeout=120, **kwargs):
    "Run a command of this package in `n` processes, as `torchrun --no-python` would, and wait for them"
    processes = ranks(_command, name, [str(o) for o in args], n=n, **kwargs)
    return [Said(o.wait(timeout), o.out, o.err) for o in processes]
