"""One Ray cluster for all tests that need it

A worker of Ray imports torch and fastai anew, some seconds each: these are slow tests.
"""
import os, sys, time
from contextlib import contextmanager
from pathlib import Path
import pytest
from tiny import network

# A machine of the cluster passes its environment on to its workers. Their niceness is 15 by default: beside other work
# they would never begin. With shorter health checks a machine that is gone is missed within seconds.
PATH = [str(Path(__file__).parent), *filter(None, sys.path)]
ENVIRONMENT = dict(PYTHONPATH=os.pathsep.join(PATH), OMP_NUM_THREADS='1', RAY_worker_niceness='0',
                   RAY_USAGE_STATS_ENABLED='0', RAY_health_check_period_ms='500')

def patient(get_node, seconds=45):
    "Ray gives a machine 30 seconds to begin, which beside other work may be too little"
    def wait(*args):
        end = time.monotonic()+seconds
        while True:
            try: return get_node(*args)
            except RuntimeError:
                if time.monotonic()>end: raise
            time.sleep(0.1)
    return wait

@contextmanager
def beginning(held):
    "Inside, machines of a cluster begin; their workers know the file `held`"
    from ray._private import services
    with pytest.MonkeyPatch.context() as patch:
        for k,v in (ENVIRONMENT | dict(FGVC_FISHER_HELD=str(held))).items(): patch.setenv(k, v)
        patch.setattr(services, 'get_node', patient(services.get_node))
        yield

class OneCluster:
    "A head with one processor, and further machines with one processor each"
    def __init__(self, folder):
        self.held = folder/'held'                     # while this file exists, trainings of `waits` stand still
        from ray.cluster_utils import Cluster
        head = dict(num_cpus=1, include_dashboard=False)
        self.cluster = self._begun(lambda: Cluster(initialize_head=True, head_node_args=head))
    def _begun(self, begin, tries=3):
        "What `begin` returns. Beside other work a machine may end itself, if its agent has no port within 15 seconds"
        for left in reversed(range(tries)):
            try:
                with beginning(self.held): return begin()
            except Exception:
                if not left: raise
    @property
    def address(self): return self.cluster.address
    def add_machine(self):
        return self._begun(lambda: self.cluster.add_node(num_cpus=1))
    def remove_machine(self, machine):
        "Without warning"
        self.cluster.remove_node(machine, allow_graceful=False)

@pytest.fixture(scope='session')
def ray_cluster(tmp_path_factory):
    pytest.importorskip('ray.tune', reason="Ray is not installed: pip install 'fgvc_fisher[cluster]'")
    there = OneCluster(tmp_path_factory.mktemp('ray'))
    yield there
    there.cluster.shutdown()

def waits(**kwargs):
    "A network that waits in its ninth training batch, which with four batches an epoch is after two checkpoints"
    model = network(**kwargs)
    model.n_batches = 0
    model.register_forward_pre_hook(_wait)
    return model

def _wait(model, args):
    model.n_batches += model.training
    held = os.environ.get('FGVC_FISHER_HELD')                          # not set outside of the cluster
    while held and model.n_batches>8 and Path(held).exists(): time.sleep(0.05)

def dies(**kwargs):
    "A network that ends the process which makes it"
    os._exit(1)
