"Print the Chromium that the browser tests drive, and install one first if there is none"
import os, subprocess, sys
from pathlib import Path
from shutil import which

NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'

def runs(path):
    "Whether `path` starts: Ubuntu's /usr/bin/chromium-browser may be a stub that only asks for a snap"
    try: return subprocess.run([path, '--version'], capture_output=True, timeout=60).returncode==0
    except (OSError, subprocess.TimeoutExpired): return False

def find():
    "The browser to drive: $CHROMIUM, an installed one, or playwright's own; `None` if there is none"
    if wanted := os.environ.get('CHROMIUM'):
        if runs(wanted): return wanted
        sys.exit(f"CHROMIUM={wanted} does not start: set it to a Chromium or Chrome, or unset it")
    for path in map(which, NAMES):
        if path and runs(path): return path
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p: path = p.chromium.executable_path
    return path if Path(path).exists() else None

def install():
    "Chromium and a font from Debian where we may, playwright's own build elsewhere"
    if hasattr(os, 'geteuid') and os.geteuid()==0 and which('apt-get'):
        env = os.environ | dict(DEBIAN_FRONTEND='noninteractive')
        subprocess.run(['apt-get', 'update', '-qq'], env=env)
        install = ['apt-get', 'install', '-qq', '-y', '--no-install-recommends', 'chromium', 'fonts-dejavu-core']
        subprocess.run(install, env=env, stdout=sys.stderr)
    if find(): return
    subprocess.run([sys.executable, '-m', 'playwright', 'install', 'chromium'], stdout=sys.stderr)

if __name__ == '__main__':
    if not find(): install()
    print(find() or sys.exit("no browser here, and none could be installed: install Chromium, or set CHROMIUM to one"))
