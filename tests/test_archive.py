"Downloading and unpacking the archive, against a server that fails in the ways that servers and networks do"
import gzip, io, os, random, re, shutil, signal, subprocess, tarfile, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from threading import Thread
import pytest
from fgvc_fisher.data import archive, untar_aircraft
from fgvc_fisher.data.archive import NAME
from forks import Forked

def pack(members):
    "The bytes of a .tar.gz; members: name -> bytes, or a TarInfo"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w:gz') as tar:
        for name,data in members.items():
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(data, bytes): info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return packed.getvalue()

NAMES = ['variants.txt', *(f'images/{i:07}.jpg' for i in range(9))]
FILES = {f'{NAME}/data/{o}': random.Random(o).randbytes(20_000) for o in NAMES}
ARCHIVE = pack(FILES)

class Server(ThreadingHTTPServer):
    "Serves `data`; the attributes say what goes wrong"
    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.data = ARCHIVE
        self.ranges = True
        self.cut = None
        self.status = None
        self.tag = '"a"'
        self.hang = False
        self.pause = 0
        self.lie = 0
        self.asked = []
        self.url = f'http://127.0.0.1:{self.server_port}/{NAME}.tar.gz'
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        s,start = self.server,0
        same = s.ranges and self.headers['Range'] and self.headers['If-Range']==s.tag
        if same: start = int(self.headers['Range'][6:-1])
        s.asked.append(start)
        if s.hang: return time.sleep(2)
        if s.status: return self.send_error(s.status)
        if start and start>=len(s.data): return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(s.data)-start+s.lie))
        if s.tag: self.send_header('ETag', s.tag)
        self.end_headers()
        end = len(s.data) if s.cut is None else start+s.cut
        for i in range(start, min(end, len(s.data)), 10_000):
            self.wfile.write(s.data[i:min(i+10_000, end)])
            time.sleep(s.pause)

@pytest.fixture
def server():
    s = Server()
    yield s
    s.shutdown()

def get(dest, server, **kwargs): return untar_aircraft(dest, server.url, quiet=True, **dict(timeout=5) | kwargs)

def is_whole(dest): return all((dest/k).read_bytes()==v for k,v in FILES.items())
def is_clean(dest): return {o.name for o in dest.iterdir()} <= {f'.{NAME}.lock', NAME}

def test_downloaded_once_and_said_so(server, tmp_path, capsys):
    assert untar_aircraft(tmp_path, server.url, quiet=False)==tmp_path/NAME
    assert is_whole(tmp_path) and is_clean(tmp_path)
    assert 'non-commercial research' in capsys.readouterr().out
    assert untar_aircraft(tmp_path, server.url)==tmp_path/NAME and server.asked==[0]
    assert not capsys.readouterr().out

def test_quiet_in_ci(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv('CI', 'true')
    untar_aircraft(tmp_path, server.url)
    assert capfd.readouterr()==('','')

def test_goes_on_where_it_broke_off(server, tmp_path):
    "With the last byte that came"
    server.cut = 70_000
    get(tmp_path, server)
    assert server.asked==[*range(0, len(ARCHIVE), 69_999)] and is_whole(tmp_path) and is_clean(tmp_path)

def test_goes_on_in_the_next_call(server, tmp_path):
    server.cut = 0
    part = tmp_path/f'{NAME}.tar.gz.part'
    part.write_bytes(ARCHIVE[:50_000])
    part.with_name(part.name+'.tag').write_text('"a"')
    with pytest.raises(ConnectionError, match='50,000'): get(tmp_path, server)
    assert part.stat().st_size==50_000 and not (tmp_path/NAME).exists()
    server.cut = None
    get(tmp_path, server)
    assert server.asked[-1]==49_999 and is_whole(tmp_path) and is_clean(tmp_path)

@pytest.mark.parametrize('n', [1, 2, 50_000, len(ARCHIVE)-1, len(ARCHIVE)])
def test_ended_after_any_byte(server, tmp_path, n):
    "The last one, too: the file only has not got its name yet"
    part = tmp_path/f'{NAME}.tar.gz.part'
    part.write_bytes(ARCHIVE[:n])
    part.with_name(part.name+'.tag').write_text('"a"')
    get(tmp_path, server)
    assert server.asked==[n-1] and is_whole(tmp_path) and is_clean(tmp_path)

@pytest.mark.parametrize('ranges,tag', [(False,'"a"'), (True,None)])
def test_starts_again_where_the_server_cannot_go_on(server, tmp_path, ranges, tag):
    "No ranges, or nothing to tell one file from another by"
    server.ranges,server.tag,server.cut = ranges,tag,70_000
    with pytest.raises(ConnectionError, match='70,000'): get(tmp_path, server)
    server.cut = None
    get(tmp_path, server)
    assert set(server.asked)=={0} and is_whole(tmp_path) and is_clean(tmp_path)

def test_two_files_are_never_joined(server, tmp_path):
    "The file changed between two attempts: all of the new one is sent"
    part = tmp_path/f'{NAME}.tar.gz.part'
    part.write_bytes(b'x'*50_000)
    part.with_name(part.name+'.tag').write_text('"old"')
    get(tmp_path, server)
    assert server.asked==[0] and is_whole(tmp_path)

def test_a_weak_tag_cannot_tell_files_apart(server, tmp_path):
    server.tag,server.cut = 'W/"a"',70_000
    with pytest.raises(ConnectionError): get(tmp_path, server)
    assert set(server.asked)=={0} and not (tmp_path/f'{NAME}.tar.gz.part.tag').read_text()

def test_a_part_that_is_too_long(server, tmp_path):
    part = tmp_path/f'{NAME}.tar.gz.part'
    part.write_bytes(ARCHIVE+b'more')
    part.with_name(part.name+'.tag').write_text('"a"')
    get(tmp_path, server)
    assert is_whole(tmp_path) and is_clean(tmp_path)

def test_a_server_with_another_file_takes_nothing_away(server, tmp_path):
    "What has arrived of the archive is there for the next call"
    part = tmp_path/f'{NAME}.tar.gz.part'
    part.write_bytes(before := ARCHIVE[:50_000])
    part.with_name(part.name+'.tag').write_text('"a"')
    server.ranges,server.data = False,b'a page that says no'
    with pytest.raises(ValueError, match='19 bytes instead of'): get(tmp_path, server, size=len(ARCHIVE))
    assert part.read_bytes()==before
    server.ranges,server.data = True,ARCHIVE
    get(tmp_path, server, size=len(ARCHIVE))
    assert server.asked[-1]==49_999

def test_wrong_length(server, tmp_path):
    with pytest.raises(ValueError, match=f'{len(ARCHIVE):,}.*12,345'): get(tmp_path, server, size=12_345)
    assert not (tmp_path/NAME).exists()

def test_a_server_that_promises_more_than_it_has(server, tmp_path):
    server.lie = 10
    with pytest.raises(ConnectionError, match=NAME): get(tmp_path, server)
    assert not (tmp_path/NAME).exists()

def flipped(at): return ARCHIVE[:at] + bytes([ARCHIVE[at]^0xff]) + ARCHIVE[at+1:]
DAMAGED = {
    'a byte short': ARCHIVE[:-1], 'cut': ARCHIVE[:100_000],
    'header': flipped(1), 'middle': flipped(100_000), 'checksum': flipped(len(ARCHIVE)-6),
    'empty': b'', 'page': b'<html>no</html>', 'no tar': gzip.compress(b'no tar at all'),
}
@pytest.mark.parametrize('data', DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_archives(server, tmp_path, data):
    server.data = data
    with pytest.raises(ValueError, match=f'{NAME}.tar.gz'): get(tmp_path, server)
    assert {o.name for o in tmp_path.iterdir()}=={f'.{NAME}.lock'}
    server.data = ARCHIVE
    get(tmp_path, server)
    assert is_whole(tmp_path)

def test_another_archive(server, tmp_path):
    server.data = pack({'other/file': b'x'})
    with pytest.raises(ValueError, match=f'{NAME}/data/images'): get(tmp_path, server)
    assert not (tmp_path/NAME).exists()

def link(kind, to):
    info = tarfile.TarInfo(f'{NAME}/data/link')
    info.type,info.linkname = kind,to
    return info
@pytest.mark.parametrize('name,data', [
    (f'{NAME}/../../outside', b'x'), ('ABSOLUTE', b'x'), ('link', link(tarfile.SYMTYPE, '/etc')),
    ('link', link(tarfile.SYMTYPE, 'images')), ('link', link(tarfile.SYMTYPE, '../../../..')),
    ('link', link(tarfile.LNKTYPE, '/etc/passwd')), ('link', link(tarfile.LNKTYPE, f'{NAME}/data/variants.txt')),
    ('device', link(tarfile.CHRTYPE, ''))])
def test_hostile_archives(server, tmp_path, name, data):
    if name=='ABSOLUTE': name = str(tmp_path/'outside')
    server.data = pack(FILES | {name: data})
    with pytest.raises(ValueError, match=re.escape(getattr(data, 'name', name))): get(tmp_path/'dest', server)
    assert [o.name for o in tmp_path.iterdir()]==['dest']
    assert {o.name for o in (tmp_path/'dest').iterdir()}=={f'.{NAME}.lock'}

@pytest.mark.parametrize('status,error', [(404, FileNotFoundError), (403, FileNotFoundError), (503, ConnectionError)])
def test_refusals(server, tmp_path, status, error):
    server.status = status
    with pytest.raises(error, match=f'{NAME}.tar.gz.*{status}'): get(tmp_path, server)
    assert len(server.asked)==(1 if status<500 else 3)

def test_silence_and_nobody_there(server, tmp_path):
    server.hang = True
    with pytest.raises(ConnectionError, match=NAME): get(tmp_path, server, timeout=0.2)
    nobody = 'http://127.0.0.1:9/x.tar.gz'
    with pytest.raises(ConnectionError, match=nobody): untar_aircraft(tmp_path, nobody, quiet=True)

def test_a_tilde_is_the_home_folder(tilde, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = re.escape(str(tmp_path/'archive'))
    with pytest.raises(FileNotFoundError, match=named): untar_aircraft('~/data', '~/archive')
    assert (tmp_path/'data').is_dir() and not (tmp_path/'~').exists()

def test_an_archive_on_disk_stays(tmp_path):
    file = tmp_path/'mine.tar.gz'
    file.write_bytes(ARCHIVE)
    untar_aircraft(tmp_path/'dest', file, quiet=True)
    assert is_whole(tmp_path/'dest') and file.read_bytes()==ARCHIVE

@pytest.mark.parametrize('size', [None, len(ARCHIVE)])
def test_kept_in_a_folder_that_lasts(server, tmp_path, size):
    "Downloaded once; the local disk of the next session is empty. A copy of another length is not used"
    drive = tmp_path/'drive'
    drive.mkdir()
    for session in 'abc':
        tree = untar_aircraft(tmp_path/session, server.url, size=size, quiet=True, keep=drive)
        assert {f'{NAME}/data/{o}': (tree/'data'/o).read_bytes() for o in NAMES}==FILES
        assert [o.name for o in drive.iterdir()]==[f'{NAME}.tar.gz'] and server.asked==[0]
    (drive/f'{NAME}.tar.gz').write_bytes(ARCHIVE[:-9])
    if size is None:
        with pytest.raises(ValueError, match='drive.*damaged.*delete it there'):
            untar_aircraft(tmp_path/'d', server.url, keep=str(drive))
    else:
        untar_aircraft(tmp_path/'d', server.url, size=size, quiet=True, keep=str(drive))
        assert (drive/f'{NAME}.tar.gz').read_bytes()==ARCHIVE

def test_a_folder_that_cannot_keep_it(server, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='nowhere'):
        untar_aircraft(tmp_path/'a', server.url, keep=tmp_path/'nowhere')
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match='and 1 are free'):
        untar_aircraft(tmp_path/'a', server.url, size=len(ARCHIVE), keep=tmp_path)
    assert not server.asked

@pytest.mark.parametrize('kb,named', [(100, r'tar\.gz\.part'), (250, r'tar\.gz\b')])
def test_a_full_disk(server, tmp_path, kb, named):
    "In the download, and while unpacking; with room again it goes on"
    disk = tmp_path/'disk'
    disk.mkdir()
    mount = ['mount','-t','tmpfs','-o',f'size={kb}k','tmpfs',disk]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode: pytest.skip('no tmpfs can be mounted here')
    try:
        with pytest.raises(OSError, match=named): get(disk, server)
        assert not (disk/NAME).exists() and not (disk/f'.{NAME}.unpacking').exists()
        subprocess.run(['mount','-o','remount,size=2m',disk], check=True)
        get(disk, server)
        assert is_whole(disk) and is_clean(disk)
        assert (server.asked[-1]>0) if kb==100 else len(server.asked)==1
    finally: subprocess.run(['umount',disk], check=True)

def unpack(dest, url): untar_aircraft(dest, url, quiet=True)

def test_two_processes_at_once(server, tmp_path):
    server.pause = 0.02
    both = [Forked(unpack, tmp_path, server.url) for _ in range(2)]
    assert [o.wait() for o in both]==[0,0] and server.asked==[0] and is_whole(tmp_path) and is_clean(tmp_path)

@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_stopped_at_any_time(server, tmp_path, how):
    "Again and again; a tree is there whole or not at all, and what came is not asked for again"
    server.pause,n = 0.05,0
    while not (tmp_path/NAME).exists() and n<40:
        n,p,before = n+1,Forked(unpack, tmp_path, server.url),len(server.asked)
        while len(server.asked)==before and p.poll() is None: time.sleep(0.01)
        time.sleep(random.uniform(0.05, 0.3))
        p.signal(how)
        p.wait()
        assert not (tmp_path/NAME).exists() or is_whole(tmp_path)
    get(tmp_path, server)
    assert is_whole(tmp_path) and is_clean(tmp_path) and 1<n<40 and server.asked==sorted(server.asked)

def unpack_until(n, dest, url, keep):
    "Be killed after the nth file got another name or was deleted"
    left = count(n-1, -1)
    def counted(f):
        def change(*args, **kwargs):
            f(*args, **kwargs)
            if next(left)==0: os.kill(os.getpid(), signal.SIGKILL)
        return change
    for o in ('replace','unlink'): setattr(os, o, counted(getattr(os, o)))
    untar_aircraft(dest, url, quiet=True, keep=keep)

@pytest.mark.parametrize('keeps', [False,True])
def test_killed_after_any_step(server, tmp_path, keeps):
    "The next call tidies up, does not download again what is there, and makes the copy that was asked for"
    for n in count(1):
        dest,keep = [tmp_path/f'{n}'/o for o in ('dest','keep')]
        for o in (dest, keep): o.mkdir(parents=True)
        server.asked.clear()
        ended = Forked(unpack_until, n, dest, server.url, keep if keeps else None).wait()
        get(dest, server, keep=keep if keeps else None)
        assert is_whole(dest) and is_clean(dest) and server.asked==[0]
        kept = {o.name: o.read_bytes() for o in keep.iterdir()}
        assert kept==({f'{NAME}.tar.gz': ARCHIVE} if keeps else {})
        if not ended: break
    assert n>(4 if keeps else 3)

def test_a_copy_that_is_interrupted_is_made_by_the_next_call(server, tmp_path, monkeypatch):
    def interrupted(*args): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(archive, 'copy_file', interrupted)
        with pytest.raises(KeyboardInterrupt): get(tmp_path/'dest', server, keep=tmp_path)
    get(tmp_path/'dest', server, keep=tmp_path)
    assert (tmp_path/f'{NAME}.tar.gz').read_bytes()==ARCHIVE and server.asked==[0] and is_clean(tmp_path/'dest')

def test_the_users_own_archive_stays(server, tmp_path):
    "Also where a download had begun"
    server.status = 404
    (tmp_path/f'{NAME}.tar.gz.part.tag').write_text('"a"')
    file = tmp_path/f'{NAME}.tar.gz'
    file.write_bytes(ARCHIVE)
    untar_aircraft(tmp_path, file, quiet=True)
    assert is_whole(tmp_path) and file.read_bytes()==ARCHIVE
    untar_aircraft(tmp_path, server.url, quiet=True)
    assert file.exists()
