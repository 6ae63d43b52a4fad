"Shared by the browser tests: headless Chromium, Voila and JupyterLab servers, pages that fail a test on console errors"
import os, re, runpy, socket, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
import pytest
from .drive import METER, SHOTS, trouble

HERE = re.compile(r'https?://(127\.0\.0\.1|localhost)[:/]|data:|blob:|about:')
HARMLESS = re.compile('/voila/api/shutdown/')   # Voila 0.5 takes leave with a request that its own server refuses

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Every test in this folder needs a browser: plain `pytest` leaves them out"
    for o in items:
        if Path(__file__).parent in o.path.parents: o.add_marker('browser')

@pytest.fixture(scope='package')
def browser():
    "Headless Chromium, until the tests of this folder end: an open one takes time; root may not use its sandbox"
    try: from playwright.sync_api import sync_playwright
    except ImportError: pytest.fail("playwright is not installed: `make browser` installs it, and a Chromium")
    found = runpy.run_path(str(SHOTS.parent/'tools/browser.py'))['find']()
    if not found: pytest.fail("no Chromium or Chrome here: `make browser` installs one, or set CHROMIUM to one")
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=found, args=['--no-sandbox', '--disable-dev-shm-usage'])
        yield b
        b.close()

@pytest.fixture(scope='session')
def kernel_env(tmp_path_factory):
    "Servers and kernels that read no settings of whoever runs the tests"
    tmp = tmp_path_factory.mktemp('jupyter')
    names = dict(JUPYTER_CONFIG_DIR='config', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='runtime',
                 IPYTHONDIR='ipython', JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='workspaces')
    news = tmp/'settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings'
    news.parent.mkdir(parents=True)
    news.write_text('{"checkForUpdates": false, "doNotDisturbMode": true, "fetchNews": "false"}')
    return os.environ | dict(MPLBACKEND='agg') | {k: str(tmp/v) for k,v in names.items()}

@contextmanager
def serve(name, args, cwd, env, seconds=60):
    "The address of `python -m name args` on a free port, once it answers; its log goes to screenshots/"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    log = SHOTS/f'{name}-{port}.log'
    SHOTS.mkdir(exist_ok=True)
    command = [sys.executable, '-m', name, f'--port={port}', *args]
    with log.open('w') as f: p = subprocess.Popen(command, stdout=f, stderr=f, cwd=cwd, env=env)
    try:
        until = time.monotonic()+seconds
        while not answers(port):
            if p.poll() is not None or time.monotonic()>until:
                pytest.fail(f"{name} did not start; {log} says:\n{log.read_text()}")
            time.sleep(0.1)
        yield f'http://127.0.0.1:{port}'
    finally:
        p.terminate()
        try: p.wait(20)
        except subprocess.TimeoutExpired: p.kill()

def answers(port):
    with socket.socket() as s: return s.connect_ex(('127.0.0.1', port))==0

@pytest.fixture(scope='package')
def voila(kernel_env, tmp_path_factory):
    "`voila(notebook)` is the address of a notebook below pytest's temporary folder; one Voila serves all of them"
    root = tmp_path_factory.getbasetemp()
    # kernels of closed pages end soon
    cull = ['--MappingKernelManager.cull_idle_timeout=15', '--MappingKernelManager.cull_interval=5']
    args = ['--no-browser', '--Voila.ip=127.0.0.1', '--show_tracebacks=True', *cull]
    with serve('voila', args, root, kernel_env) as url:
        yield lambda notebook: f'{url}/voila/render/{notebook.relative_to(root)}'

@pytest.fixture(scope='package')
def lab(kernel_env, tmp_path_factory):
    "`lab(notebook)` is a notebook's address in JupyterLab, below pytest's temporary folder; one JupyterLab has all"
    root = tmp_path_factory.getbasetemp()
    args = ['--no-browser', '--ip=127.0.0.1', '--allow-root', '--IdentityProvider.token=',
            '--LabApp.expose_app_in_browser=True', f'--ServerApp.root_dir={root}']
    with serve('jupyterlab', args, root, kernel_env) as url:
        yield lambda notebook: f'{url}/lab/tree/{notebook.relative_to(root)}'

@contextmanager
def new_page(browser, errors):
    "A page that reaches this machine only; `errors` gets what the console, scripts, callbacks and threads report"
    with browser.new_context(viewport=dict(width=1200, height=900)) as context:
        context.add_init_script(METER)
        # Voila asks a CDN for icons that it also brings itself
        context.route(lambda url: not HERE.match(url), lambda o: o.fulfill(status=200, body=''))
        page = context.new_page()
        page.set_default_timeout(30_000)
        def on_console(o):
            url = o.location['url']
            if o.type=='error' and not HARMLESS.search(url): errors.append(f'{o.text} ({url})')
        page.on('console', on_console)
        page.on('pageerror', lambda o: errors.append(f"{o.name}: {o.message}\n{o.stack}"))
        page.on('websocket', lambda ws: ws.on('framereceived', lambda o: errors.extend(failures(o))))
        yield page
        page.evaluate('() => window.jupyterapp?.serviceManager.sessions.shutdownAll()')

def none_of(errors, page):
    "Fail if a page has reported errors or shows some, each of them once"
    found = errors+trouble(page)
    errors.clear()
    if found: pytest.fail('\n'.join(found), pytrace=False)

@pytest.fixture
def errors():
    "What the pages of a test have complained about; a test that means to cause an error empties it"
    return []

@pytest.fixture
def page(browser, errors):
    "A page of its own, without errors"
    with new_page(browser, errors) as page:
        yield page
        none_of(errors, page)

def failures(frame):
    "The traceback in a message from the kernel: an error in a callback or a thread shows nowhere on a page"
    text = frame if isinstance(frame, str) else frame.decode(errors='replace')
    if re.search(r'"msg_type": ?"error"', text) or (re.search(r'"name": ?"stderr"', text) and 'Traceback' in text):
        yield re.sub(r'\\u001b\[[\d;]*m', '', text)[-2000:].replace('\\n', '\n')
