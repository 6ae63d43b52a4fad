import sys
from fgvc_fisher import cli
f = getattr(cli, sys.argv[1])
sys.argv = ['command', *sys.argv[2:]]
getattr(f, 'main', f)()