"What the browser tests share: a headless Chromium, Voila and JupyterLab servers, and pages that fail a test on an error in the console"
import os, re, runpy, socket, subprocess, sys, time
from contextlib import ExitStack, contextmanager
from functools import cache
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

@pytest.fixture(scope='session')
def browser():
    "Headless Chromium; root may not use its sandbox"
    from playwright.sync_api import sync_playwright
    path = runpy.run_path(str(SHOTS.parent/'tools/browser.py'))['find']() or pytest.fail("no Chromium or Chrome here: `make test-browser` gets one")
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=['--no-sandbox', '--disable-dev-shm-usage'])
        yield b
        b.close()

@pytest.fixture(scope='session')
def kernel_env(tmp_path_factory):
    "Servers and kernels that read no settings of whoever runs the tests"
    tmp = tmp_path_factory.mktemp('jupyter')
    names = dict(JUPYTER_CONFIG_DIR='config', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='runtime', IPYTHONDIR='ipython',
                 JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='workspaces')
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
    with log.open('w') as f: p = subprocess.Popen([sys.executable, '-m', name, f'--port={port}', *args], stdout=f, stderr=f, cwd=cwd, env=env)
    try:
        until = time.monotonic()+seconds
        while not answers(port):
            if p.poll() is not None or time.monotonic()>until: pytest.fail(f"{name} did not start; {log} says:\n{log.read_text()}")
            time.sleep(0.1)
        yield f'http://127.0.0.1:{port}'
    finally:
        p.terminate()
        try: p.wait(20)
        except subprocess.TimeoutExpired: p.kill()

def answers(port):
    with socket.socket() as s: return s.connect_ex(('127.0.0.1', port))==0

@pytest.fixture(scope='session')
def voila(kernel_env):
    "`voila(notebook)` is the address of a Voila server for that notebook; it runs until the session ends"
    with ExitStack() as stack:
        @cache
        def start(notebook):
            args = [notebook.name, '--no-browser', '--Voila.ip=127.0.0.1', '--show_tracebacks=True',
                    '--MappingKernelManager.cull_idle_timeout=15', '--MappingKernelManager.cull_interval=5']   # kernels of pages that are gone
            return stack.enter_context(serve('voila', args, notebook.parent, kernel_env))
        yield start

@pytest.fixture(scope='session')
def lab(kernel_env):
    "`lab(folder)` is the address of a JupyterLab in that folder; it runs until the session ends"
    with ExitStack() as stack:
        @cache
        def start(folder):
            args = ['--no-browser', '--ip=127.0.0.1', '--allow-root', '--IdentityProvider.token=', '--LabApp.expose_app_in_browser=True',
                    f'--ServerApp.root_dir={folder}']
            return stack.enter_context(serve('jupyterlab', args, folder, kernel_env))
        yield start

@pytest.fixture
def errors():
    "What the pages of a test have complained about; a test that means to cause an error empties it"
    return []

@pytest.fixture
def page(browser, errors):
    "A page that reaches this machine only; the test fails if the console, a script, a cell, a callback or a thread reports an error"
    with browser.new_context(viewport=dict(width=1200, height=900)) as context:
        context.add_init_script(METER)
        context.route(lambda url: not HERE.match(url), lambda o: o.fulfill(status=200, body=''))   # Voila asks a CDN for icons it also brings itself
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on('console', lambda o: o.type=='error' and not HARMLESS.search(o.location['url']) and errors.append(f"{o.text} ({o.location['url']})"))
        page.on('pageerror', lambda o: errors.append(f"{o.name}: {o.message}\n{o.stack}"))
        page.on('websocket', lambda ws: ws.on('framereceived', lambda o: errors.extend(failures(o))))
        yield page
        errors += trouble(page)
        page.evaluate('() => window.jupyterapp?.serviceManager.sessions.shutdownAll()')
    if errors: pytest.fail('\n'.join(errors), pytrace=False)

def failures(frame):
    "The traceback in a message from the kernel: an error in a callback or a thread shows nowhere on a page"
    text = frame if isinstance(frame, str) else frame.decode(errors='replace')
    if re.search(r'"msg_type": ?"error"', text) or (re.search(r'"name": ?"stderr"', text) and 'Traceback' in text):
        yield re.sub(r'\\u001b\[[\d;]*m', '', text)[-2000:].replace('\\n', '\n')
