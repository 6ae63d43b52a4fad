"A training's process for the tests of panels, forked so that it begins at once; `test_live` starts real ones, too"
import multiprocessing, os, subprocess, sys, torch
from multiprocessing.connection import Connection, wait
from threading import Lock
from types import SimpleNamespace
from forks import CONTEXT, PRELOAD

def _piped(code, ends, env):
    "What a new process does in place of `python -c`, in a session of its own"
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get('OMP_NUM_THREADS', torch.get_num_threads())))
    for fd,end in enumerate(ends): os.dup2(end.fileno(), fd)
    for o in ends: o.close()
    sys.stdin = open(0, closefd=False)                     # multiprocessing has closed it
    multiprocessing.set_start_method(None, force=True)     # what this process starts is started as usual
    exec(code, {})

class Piped:
    "What is used of `subprocess.Popen([python, '-c', code])` with a pipe and files; forked, so it begins at once"
    def __init__(self, args, stdout, stderr, env, encoding, **_):
        stdin = CONTEXT.Pipe(duplex=False)
        ends = stdin[0],*[Connection(os.dup(o.fileno()), readable=False) for o in (stdout, stderr)]
        CONTEXT.set_forkserver_preload(PRELOAD)
        self.process = CONTEXT.Process(target=_piped, args=(args[-1], ends, dict(env)))
        self.process.start()
        self.pid,self.lock = self.process.pid,Lock()
        for o in ends: o.close()
        self.stdin = open(os.dup(stdin[1].fileno()), 'w', encoding=encoding)
        stdin[1].close()
    @property
    def returncode(self): return self.poll()
    def poll(self):
        with self.lock: return self.process.exitcode       # its pipe has the exit code once only
    def wait(self, timeout=None):
        if not wait([self.process.sentinel], timeout): raise subprocess.TimeoutExpired('a forked process', timeout)
        return self.poll()

SUBPROCESS = SimpleNamespace(**{**vars(subprocess), 'Popen': Piped}) if os.name=='posix' else subprocess
