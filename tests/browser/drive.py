"What a hand does to a panel, and what an eye or a stopwatch sees: helpers over a playwright page"
import re
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

SHOTS = Path(__file__).parents[2]/'screenshots'   # and the servers' logs; git ignores it

# In every page: when keys and pointer moved a control, and when a picture had been loaded and decoded
METER = '''
window.meter = {moves: [], loads: [], last: 0}
const moved = e => meter.moves.push(performance.now())
document.addEventListener('keydown', moved, true)
document.addEventListener('pointermove', e => e.buttons && moved(e), true)
document.addEventListener('load', e => {
    if (e.target.tagName!='IMG') return
    const img = e.target
    img.decode().catch(() => 0).then(() => {meter.last = performance.now(); meter.loads.push([img, meter.last])})
}, true)
'''

# Where JupyterLab and Voila show a cell's error; a warning on stderr is none
TROUBLE = ':is([data-mime-type$="jupyter.error"], [data-mime-type$="jupyter.stderr"]:has-text("Traceback")):visible'

# What is on the screen, not the file: two PNGs with the same pixels are the same picture
PIXELS = '''async img => {
    for (let tries = 50; ; tries--)   // decoding fails while a newer picture replaces this one: then try the newer one
        try { await img.decode(); break } catch (e) { if (!tries) throw e; await new Promise(f => setTimeout(f, 50)) }
    const c = document.createElement('canvas')
    c.width = img.naturalWidth; c.height = img.naturalHeight
    const ctx = c.getContext('2d')
    ctx.drawImage(img, 0, 0)
    const sum = await crypto.subtle.digest('SHA-1', ctx.getImageData(0, 0, c.width, c.height).data)
    return c.width+'x'+c.height+' '+Array.from(new Uint8Array(sum), b => b.toString(16).padStart(2, '0')).join('')
}'''

TOO_WIDE = '''() => {
    const found = [], w = innerWidth, root = document.documentElement
    const name = e => (e.className.baseVal ?? e.className)+' "'+(e.innerText || e.alt || '').trim().slice(0, 40)+'"'
    if (root.scrollWidth > w) found.push('the page is '+root.scrollWidth+' px wide')
    const scrolled = e => {   // inside a box that scrolls by itself, which is reported in its stead
        for (let p = e.parentElement; p && p!=root && p!=document.body; p = p.parentElement)
            if (getComputedStyle(p).overflowX!='visible' && p.scrollWidth > p.clientWidth+1) return true
        return false
    }
    for (const e of document.querySelectorAll('.jupyter-widgets, .widget-inline-hbox, .jp-OutputArea-output')) {
        const r = e.getBoundingClientRect(), style = getComputedStyle(e)
        if (!r.width || !r.height || style.visibility=='hidden' || !e.checkVisibility()) continue
        if (!scrolled(e) && (r.right > w+1 || r.left < -1))
            found.push(name(e)+' from '+Math.round(r.left)+' to '+Math.round(r.right)+' px')
        if (['auto', 'scroll'].includes(style.overflowX) && e.scrollWidth > e.clientWidth+1)
            found.push(name(e)+' holds '+e.scrollWidth+' px in '+e.clientWidth)
    }
    return found
}'''

def steady(page, f, quiet=0.5, ok=lambda o: True, seconds=60):
    "The value of `f` once it is `ok` and has stayed the same for `quiet` seconds"
    end,since,last = monotonic()+seconds,monotonic(),f()
    while monotonic()<end:
        page.wait_for_timeout(50)
        if (new := f())!=last: since,last = monotonic(),new
        elif ok(new) and monotonic()-since>=quiet: return new
    raise AssertionError(f"not what was waited for after {seconds} s: {last}")

def open_panel(page, url):
    "Open a Voila page and wait for its widgets; Voila runs the notebook before it answers"
    page.goto(url, timeout=240_000)
    return rendered(page)

def rendered(page, quiet=0.5):
    "Wait until there are widgets, their pictures are loaded, and nothing has been added for `quiet` seconds"
    page.wait_for_selector(f'.jupyter-widgets:visible, {TROUBLE}', timeout=60_000)
    steady(page, lambda: page.evaluate('''() => [document.querySelectorAll('.jupyter-widgets').length,
        [...document.querySelectorAll('img.widget-image')].every(i => i.complete)]'''), quiet, ok=lambda o: o[1])
    if found := trouble(page): raise AssertionError('\n'.join(found))
    return page

def trouble(page):
    "The tracebacks on the page"
    return page.locator(TROUBLE).all_inner_texts()

def open_notebook(page, url):
    "Open a notebook in JupyterLab; `url` is what the fixture `lab` gave"
    page.goto(f'{url}?reset', timeout=120_000)
    page.wait_for_function('() => window.jupyterapp?.shell.currentWidget?.context?.isReady', timeout=60_000)
    return page

def run_cells(page):
    "Run all cells of the notebook that JupyterLab shows, and wait for the last of them"
    page.evaluate('''async () => {
        await jupyterapp.shell.currentWidget.sessionContext.ready
        await jupyterapp.commands.execute('notebook:run-all-cells')
    }''')
    return rendered(page)

def control(page, label):
    "The widget with the description `label`"   # a SelectionSlider lacks the class jupyter-widgets, so by its label
    text = re.compile(rf'^\s*{re.escape(label)}\s*$')
    return page.locator('.widget-label:visible', has_text=text).first.locator('..')

def slide(page, label, keys=1, pause=0.):
    "Move a slider by `keys` arrow keys, `pause` seconds apart, to the left if negative"
    handle = control(page, label).locator('.noUi-handle')
    handle.focus()
    for _ in range(abs(keys)):
        page.keyboard.press('ArrowRight' if keys>0 else 'ArrowLeft')
        if pause: page.wait_for_timeout(1000*pause)

def drag(page, label, to, steps=10):
    "Drag a slider's handle to the share `to` of its way, 0 to 1, in `steps` moves of the mouse"
    c = control(page, label)
    c.scroll_into_view_if_needed()
    h,t = c.locator('.noUi-handle').bounding_box(),c.locator('.noUi-base').bounding_box()
    page.mouse.move(h['x']+h['width']/2, h['y']+h['height']/2)
    page.mouse.down()
    page.mouse.move(t['x']+to*t['width'], t['y']+t['height']/2, steps=steps)
    page.mouse.up()

def readout(page, label): return control(page, label).locator('.widget-readout').text_content().strip()

def upload(page, label, path):
    "Give the file at `path` to the FileUpload with the text `label`"
    with page.expect_file_chooser() as chosen: page.locator('button.widget-upload', has_text=label).click()
    chosen.value.set_files(path)

def image(page, i=0): return page.locator('img.widget-image').nth(i)

def picture(page, i=0):
    "Size and a hash of the pixels of the page's `i`th widgets.Image"
    return image(page, i).evaluate(PIXELS)

def settled(page, i=0, quiet=0.5):
    "Wait until the page's `i`th picture has not been loaded anew for `quiet` seconds; then as `picture`"
    steady(page, lambda: image(page, i).evaluate('img => meter.loads.filter(o => o[0]==img).length'), quiet)
    return picture(page, i)

@contextmanager
def new_picture(page, i=0, seconds=30):
    "What is done in this block has to change the `i`th picture"
    old = settled(page, i)
    yield
    end = monotonic()+seconds
    while settled(page, i)==old: assert monotonic()<end, f'still the same picture after {seconds} s'

def since_move(page, i=0):
    "Milliseconds from the last move to the first and the last picture loaded after it, and their number, or `None`"
    return image(page, i).evaluate('''img => {
        const t0 = meter.moves.at(-1), t = meter.loads.filter(o => o[0]==img && o[1]>t0).map(o => o[1]-t0)
        return t.length ? {first: t[0], last: t.at(-1), n: t.length} : null
    }''')

def burst(page, label, n=40, i=0, quiet=1.5, pause=0.):
    "`n` quick moves: seconds they took, milliseconds from the last one to the last picture, and the number of pictures"
    settled(page, i)
    page.evaluate('() => {meter.moves.length = 0; meter.loads.length = 0}')
    slide(page, label, n, pause)
    settled(page, i, quiet)
    took,total = page.evaluate('() => [meter.moves.at(-1)-meter.moves[0], meter.loads.length]')
    return dict(moves=took/1000, after=(since_move(page, i) or dict(last=0))['last'], pictures=total)

def shot(page, name):
    "Keep what the page looks like as screenshots/name.png"
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS/f'{name}.png', full_page=True)

def shot_of(page, panel, name):
    "Keep what a panel looks like, however long, as screenshots/name.png"
    SHOTS.mkdir(exist_ok=True)
    page.locator(f'.fgvc-{panel}').screenshot(path=SHOTS/f'{name}.png')

def too_wide(page, width):
    "What does not fit a screen of `width` pixels: the page, widgets beyond its edges, boxes that scroll sideways"
    page.set_viewport_size(dict(width=width, height=page.viewport_size['height']))
    page.wait_for_timeout(500)
    return page.evaluate(TOO_WIDE)

def fits(page, width):
    "Whether everything is inside a screen of `width` pixels; an error names what is not"
    if found := too_wide(page, width): raise AssertionError(f"at {width} px: "+'; '.join(found))
    return True
