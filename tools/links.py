"""Make the documentation's pages as `nbdev-docs` does, up to where Quarto renders them, and check every link.

    python tools/links.py

Checked are links to the site and to files of this repository, in pages, in README.md and its like and in docstrings;
modules named in backticks; and the sidebar. Links to other sites are not followed. Needs no Quarto, and does not
install it.
"""
import json, posixpath, re, sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs
from pages import rooms

PAGES = '.ipynb', '.qmd', '.md'
SUFFIXES = {'csv', 'html', 'json', 'safetensors', 'toml', 'txt'}  # `fisher.safetensors` is a file, not a module

class Page(NamedTuple):
    texts:list # Its Markdown and HTML, without fenced code
    anchors:set # What a link may name after `#`
    links:list # Addresses

def plain(text):
    "Markdown without fenced code and comments"
    return re.sub(r'^(```|~~~).*?^\1|<!--.*?-->', '', text, flags=re.M|re.S)

def slug(heading):
    "The anchor that Pandoc gives a heading"
    if found := re.search(r'\{[^}]*#([\w.-]+)[^}]*\}\s*$', heading): return found[1]
    heading = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', heading)
    kept = re.sub(r'[^\w\s.-]', '', heading).strip().lower()
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', kept)) or 'section'

def links_in(text):
    "Addresses of links and pictures, in Markdown or HTML"
    text = re.sub(r'`[^`\n]*`', 'code', text)
    inline = re.findall(r'\]\(\s*<?([^\s)>]+)', text)
    references = re.findall(r'^\s*\[[^\]]+\]:\s*(\S+)', text, flags=re.M)
    return inline + references + re.findall(r'<[^>]*\b(?:href|src)="([^"]+)"', text)

def read_page(texts):
    "A `Page` from pieces of Markdown or HTML"
    texts = [plain(o) for o in texts]
    anchors,seen = set(),{}
    for heading in re.findall(r'^#{1,6}\s+(.+?)\s*#*$', '\n'.join(texts), flags=re.M):
        anchor = slug(heading)
        n = seen[anchor] = seen.get(anchor, -1)+1
        anchors.add(f'{anchor}-{n}' if n else anchor)
    for o in texts: anchors |= set(re.findall(r'\bid="([^"]+)"', o)) | set(re.findall(r'\{#([\w.-]+)', o))
    return Page(texts, anchors, [link for o in texts for link in links_in(o)])

def notebook_texts(file):
    "Markdown of a notebook's cells, and of the outputs that show Markdown or HTML"
    join = ''.join
    for cell in json.loads(file.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type']!='code': yield join(cell['source'])
        for output in cell.get('outputs', []):
            for kind in ('text/markdown', 'text/html'): yield join(output.get('data', {}).get(kind, ''))

def read_site(folder):
    "The pages of a folder of processed notebooks, by their path as a web page"
    site = {}
    for file in sorted(folder.rglob('*')):
        parts = file.relative_to(folder).parts
        if file.suffix not in PAGES or any(o[0] in '._' for o in parts): continue
        texts = notebook_texts(file) if file.suffix=='.ipynb' else [file.read_text(encoding='utf-8')]
        site['/'.join(parts)[:-len(file.suffix)]+'.html'] = read_page(texts)
    return site

class Checker:
    "Says what is wrong with a link: `''` if nothing is"
    def __init__(self, site, root, doc_url, git_url, branch='main'):
        self.site,self.root,self.doc_url = site,Path(root),doc_url.rstrip('/')+'/'
        repo = git_url.rstrip('/').removeprefix('https://github.com/')
        github,colab = f'https://github.com/{repo}',f'https://colab.research.google.com/github/{repo}'
        self.in_repository = [f'{start}/{branch}/' for start in (f'{github}/blob', f'{github}/tree', f'{github}/raw',
                              f'https://raw.githubusercontent.com/{repo}', f'{colab}/blob')]
        self.workflows = f'{github}/actions/workflows/'

    def on_site(self, path, anchor):
        "Of a path below the site's address"
        path = path.removesuffix('.md') if path.endswith('.html.md') else path
        if not path or path.endswith('/'): path += 'index.html'
        path = re.sub(r'\.(ipynb|qmd|md)$', '.html', path)
        if path not in self.site:
            is_copied = not path.endswith('.html') and (self.root/'nbs'/path).is_file()
            return '' if is_copied else f'there will be no page {path}'
        return '' if not anchor or anchor in self.site[path].anchors else f'{path} has no heading #{anchor}'

    def in_root(self, path):
        "Of a file or folder of the repository"
        inside = (self.root/path).resolve().is_relative_to(self.root.resolve())
        return '' if inside and (self.root/path).exists() else f'this repository has no {path}'

    def __call__(self, link, page=None):
        "`page`: the page of the site that has the link; None: README.md or another file at the top of the repository"
        parts = urlsplit(link)
        path,anchor = unquote(parts.path),unquote(parts.fragment)
        for start in self.in_repository:
            if link.startswith(start): return self.in_root(unquote(urlsplit(link[len(start):]).path))
        if link.startswith(self.workflows):
            name = link[len(self.workflows):].removesuffix('/badge.svg')
            return self.in_root(f'.github/workflows/{name}')
        if f'{link}/'.startswith(self.doc_url): return self.on_site(path[len(urlsplit(self.doc_url).path):], anchor)
        if parts.scheme or parts.netloc: return ''
        if page is None: return self.in_root(path)
        folder = posixpath.dirname(page)
        target = posixpath.normpath(posixpath.join(folder, path)) + '/'*path.endswith('/') if path else page
        return 'it leads out of the site' if target.startswith('..') else self.on_site(target, anchor)

def attributes(package):
    "Names of attributes and methods of the package's classes, such as the `error` in `fisher.error`"
    for file in package.rglob('*.py'):
        yield from re.findall(r'\bself\.(\w+)|def (\w+)\(self', file.read_text(encoding='utf-8'))

def unknown_modules(page, modules, known):
    "Names in backticks that begin with a room and name none of its modules; `known`: what a dot may else precede"
    rooms_with_modules = {o.partition('.')[0] for o in modules if '.' in o}
    for text in page.texts:
        for room,name in re.findall(r'`(?:fgvc_fisher\.)?(\w+)\.(\w+)`', text):
            full = f'{room}.{name}'
            if room in rooms_with_modules and full not in modules and name not in known: yield full

def strangers(name, page):
    "Links that nbdev made of a name in backticks, to another page, although this page documents a method of that name"
    methods = {o.rpartition('.')[2] for o in page.anchors if '.' in o}
    for text in page.texts:
        for shown,link in re.findall(r'\[`([a-z_]\w*)(?:\(\))?`\]\((\S+?)\)', text):
            if shown in methods and not urlsplit(link).path.endswith(name): yield shown,link

def docs_links(package):
    "The file and the address of each module's docstring that names its page"
    for file in sorted(package.rglob('*.py')):
        for link in re.findall(r'^Docs: (https?://[^\s"]+)', file.read_text(encoding='utf-8'), flags=re.M):
            yield file,link

def sidebar_files(entries):
    "The files that a sidebar lists, in its order"
    for o in entries:
        if isinstance(o, str): yield o
        else:
            if 'href' in o: yield o['href']
            yield from sidebar_files(o.get('contents', []))

def wrong_sidebar(site, sidebar):
    "Sentences about pages that the sidebar lacks, has twice, or names though they do not exist"
    entries = yaml.safe_load(sidebar)['website']['sidebar']['contents']
    listed = [Path(o).with_suffix('.html').as_posix() for o in sidebar_files(entries)]
    for o in sorted(set(listed)-set(site)): yield f'sidebar.yml: {o}: there will be no such page'
    for o in sorted(set(site)-set(listed)): yield f'sidebar.yml: {o} is missing'
    for o in sorted({o for o in listed if listed.count(o)>1}): yield f'sidebar.yml: {o} is there twice'

def check(site, checker, package, modules):
    "Sentences about everything that is wrong but the sidebar"
    known = {name for o in attributes(package) for name in o} | SUFFIXES
    for name,page in site.items():
        for link in page.links:
            if wrong := checker(link, name): yield f'{name}: {link}: {wrong}'
        for o in unknown_modules(page, modules, known): yield f'{name}: `{o}`: there is no such module'
        for o,link in strangers(name, page): yield f'{name}: `{o}` links to {link}: write `Class.{o}` for the method'
    for file in sorted(checker.root.glob('*.md')):
        for link in read_page([file.read_text(encoding='utf-8')]).links:
            if wrong := checker(link): yield f'{file.name}: {link}: {wrong}'
    for file,link in docs_links(package):
        if wrong := checker(link): yield f'{file.relative_to(checker.root)}: {link}: {wrong}'

def main():
    cfg = get_config()
    site = read_site(proc_nbs(n_workers=2, force=True))
    modules = {f'{room}.{o}' if o else room for room,names in rooms().items() for o in names or ['']}
    checker = Checker(site, cfg.config_path, cfg.doc_url, cfg.git_url, cfg.branch)
    sidebar = (cfg.nbs_path/'sidebar.yml').read_text(encoding='utf-8')
    wrong = [*check(site, checker, cfg.lib_path, modules), *wrong_sidebar(site, sidebar)]
    if wrong: sys.exit('\n'.join(wrong))
    n_links = sum(len(o.links) for o in site.values())
    print(f'{len(site)} pages, {n_links} links: all that lead to the site or to this repository are right.')

if __name__=='__main__': main()
