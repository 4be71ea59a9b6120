"""The page and the picture of recorded runs: what they hold, and, in a headless browser, that the page plays."""

import base64
import html.parser
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from smdlm.io import animation, viewer
from smdlm.sampling.trace import Trace

WORDS = ["Return", " the", "\n    ", " sum", " of", " </script><b>", " values", ".", " ", "\u27e8end\u27e9\n"]
MASK = len(WORDS)
L, T, K = 12, 10, 3


def make_trace(*, soft=True, seed=0, length=L, steps=T, computed=None, again=True, fed=None):
    """A made-up run: two tokens given, the rest committed in a random order, one of them masked again in between."""
    rng = np.random.default_rng(seed)
    last = rng.integers(0, MASK, length)
    last[:2] = [0, 1]
    when = rng.integers(1, steps + 1, length)
    when[:2] = 0
    tokens = np.where(np.arange(steps + 1)[:, None] >= when, last, MASK)
    if again:
        tokens[2:5, 4], tokens[5, 4], tokens[6:, 4] = 5, MASK, last[4]
    masked = tokens == MASK
    predicted = masked & (np.arange(steps + 1) > 0)[:, None]
    probs = np.sort(rng.dirichlet(np.ones(K), tokens.shape) * 0.9)[..., ::-1]
    lam = np.where(predicted, rng.uniform(0.05, 0.4, tokens.shape), 0) * soft
    return Trace(
        mask_id=MASK,
        tokens=tokens.astype(np.int32),
        predicted=predicted,
        ids=rng.integers(0, MASK, (*tokens.shape, K)).astype(np.int32),
        probs=probs.astype(np.float32),
        entropy=np.where(predicted, rng.uniform(0, 4, tokens.shape), 0).astype(np.float32),
        lam=lam.astype(np.float32),
        forwards=np.arange(steps + 1),
        computed=np.tile(computed or (0, length), (steps + 1, 1)),
        fed_back=soft if fed is None else fed,
    )


def make_show(**changes):
    runs = {"soft-masked": make_trace(), "binary": make_trace(soft=False)}
    return viewer.Show(**{"runs": runs, "words": WORDS.__getitem__, "settings": "mdlm, 10 steps", **changes})


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1))


def test_the_page_holds_the_run():
    show = make_show()
    data, trace = data_of(viewer.page(show)), show.runs["soft-masked"]
    run = data["runs"][0]
    assert [run["soft"] for run in data["runs"]] == [True, False] and data["candidates"] == K
    assert [run["name"] for run in data["runs"]] == ["soft-masked", "binary"]
    words = [[WORDS.index(data["words"][n]) if n >= 0 else MASK for n in row] for row in run["tokens"]]
    np.testing.assert_array_equal(words, trace.tokens)
    np.testing.assert_array_equal(run["settled"], trace.settled)
    assert run["prompt"][:3] == [1, 1, 0] and run["again"] and run["forwards"][-1] == T
    assert run["fed"] and not data["runs"][1]["fed"] and run["computed"] == [[0, L]] * (T + 1)
    assert run["seen"][0] == [-1] * (L - 2)  # nothing is predicted before the first step
    stride, places = 2 + 2 * K, np.flatnonzero(trace.masked[3])
    numbers = np.array(run["seen"][3]).reshape(len(places), stride)
    np.testing.assert_allclose(numbers[:, 0] / 100, trace.entropy[3, places], atol=0.006)
    np.testing.assert_allclose(numbers[:, 1] / 1e4, trace.lam[3, places], atol=6e-5)
    np.testing.assert_allclose(numbers[:, 3::2] / 1e4, trace.probs[3, places], atol=6e-5)
    best = [[data["words"][n] for n in row] for row in numbers[:, 2::2]]
    assert best == [[WORDS[token] for token in trace.ids[3, place]] for place in places]


def test_the_page_is_one_file_that_loads_nothing():
    """Whatever a token or a title says, the page's own elements are all there are."""
    page = viewer.page(make_show(title="a <i>title</i> & more"))
    tags, links = [], []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)
            links.extend(value for name, value in attributes if name in ("src", "href", "srcset", "action"))

    Parser().feed(page)
    assert not links and tags.count("script") == 2 and not {"i", "b", "img", "link"} & set(tags)
    assert "default-src 'none'" in page and "a &lt;i&gt;title" in page
    assert not re.findall(r"(?:https?:)?//[a-z]+\.[a-z]", page.replace("http://www.w3.org/2000/svg", ""))


def test_a_page_of_256_positions_and_64_steps_is_below_two_megabytes():
    runs = {name: make_trace(length=256, steps=64, soft=name == "a", seed=1) for name in "ab"}
    assert 50_000 < len(viewer.page(make_show(runs=runs)).encode()) < 2_000_000


def test_runs_remembering_a_different_number_of_candidates():
    """Those that both have are shown."""
    one = make_trace()
    fewer = Trace(**{**one.__dict__, "ids": one.ids[..., :2], "probs": one.probs[..., :2]})
    data = data_of(viewer.page(make_show(runs={"a": one, "b": fewer})))
    assert data["candidates"] == 2
    assert data["runs"][0]["seen"] == data["runs"][1]["seen"]


def test_what_is_fed_back_but_not_as_a_soft_mask():
    """Neither a soft mask nor thrown away: an operator may feed predictions back in another way."""
    data = data_of(viewer.page(make_show(runs={"doubt": make_trace(soft=False, fed=True)})))
    assert data["runs"][0]["fed"] and not data["runs"][0]["soft"]
    assert 'run.fed ? "predicted, fed back but not as a soft mask" : "predicted, thrown away"' in viewer._part(
        "page.js"
    )


def test_a_notebook_shows_the_page_in_a_frame():
    shown = viewer.Page('<p title="x">&')._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;p title=&quot;x&quot;&gt;&amp;"')


def test_what_cannot_be_shown_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"viewer: got runs of \[12, 13\] positions, wanted at least one"):
        make_show(runs={"a": make_trace(), "b": make_trace(length=13)})
    with pytest.raises(ValueError, match="sampling.viewer: got 'out.gif', wanted a file that ends in .html or .svg"):
        viewer.check_path("sampling.viewer", "out.gif")
    viewer.write(tmp_path / "new" / "out.html", make_show())
    assert (tmp_path / "new" / "out.html").read_text("utf-8") == viewer.page(make_show())


def test_every_token_has_a_text():
    class Tokenizer:
        pieces, eos_id, bos_id = (b"a", b"", b" \xc3", b""), 1, 1

    words = [viewer.words_of(Tokenizer)(token) for token in range(5)]
    assert words == ["a", "\u27e8end\u27e9\n", " \ufffd", "\u27e83\u27e9", "\u27e84\u27e9"]


# --------------------------------------------------------------------------------------------------------- the picture


def test_the_picture_ends_in_the_text_and_moves_as_the_run_did():
    show = make_show()
    text = viewer.picture(show)
    root = ElementTree.fromstring(text)
    assert "<script" not in text and "b>" not in text.replace("/b&gt;", "") and "prefers-reduced-motion" in text
    space = "{http://www.w3.org/2000/svg}"
    still = [node for node in root.iter(f"{space}text") if node.get("opacity", "1") == "1" and node.get("textLength")]
    ink = [node for node in still if "ink" in node.get("class")]
    wanted = [animation.split(WORDS[t])[1] for trace in show.runs.values() for t in trace.tokens[-1]]
    assert [node.text for node in ink] == [word for word in wanted if word.strip("\u2423")]
    assert any("guess" in node.get("class") for node in root.iter(f"{space}text"))
    assert float(root.get("width")) > 2 * animation.COLUMNS * animation.CHAR
    # The track of a position's box is whether it was masked.
    trace = show.runs["soft-masked"]
    boxes = [node for node in root.iter(f"{space}rect") if node.get("class").startswith("mask")]
    assert len(boxes) == 2 * (L - 2)
    name = boxes[[place for place in range(2, L)].index(4)].get("class").split()[1]
    frames = re.search(rf"@keyframes {name}{{(.*?)}}}}", text).group(1)
    changes = np.flatnonzero(np.diff(trace.masked[:, 4].astype(int), prepend=-1))
    assert [float(v) for v in re.findall(r"opacity:([\d.]+)", frames + "}")] == trace.masked[changes, 4].tolist()


def test_lines_of_the_picture_break_between_words():
    texts = ["Re", "turn", " the", " x" * 20, " wo", "rd", "\n\n", "end"]
    spots = animation._laid_out(texts)
    rows = {}
    for spot in spots:
        rows.setdefault(spot.line, []).append(spot)
        assert spot.column + len(spot.text) <= animation.COLUMNS
    assert spots[4].line == spots[5].line and spots[5].column == spots[4].column + 2
    assert spots[7].line == spots[6].line + 2 and spots[7].column == 0
    for row in rows.values():  # nothing overlaps
        assert all(a.column + len(a.text) <= b.column for a, b in zip(row[:-1], row[1:], strict=True))


# --------------------------------------------------------------------------------------------------------- the browser


class Browser:
    """A headless Chromium, spoken to over its debugging port with the standard library alone."""

    def __init__(self, program, folder):
        flags = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage"
        flags += f" --remote-debugging-port=0 --user-data-dir={folder} --window-size=1280,1000"
        self.process = subprocess.Popen(
            [program, *flags.split(), "about:blank"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        port_file, deadline = folder / "DevToolsActivePort", time.time() + 60
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert time.time() < deadline and self.process.poll() is None, "the browser did not start"
            time.sleep(0.05)
        port = int(port_file.read_text().split()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
            target = next(one for one in json.load(answer) if one["type"] == "page")
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        path, key = target["webSocketDebuggerUrl"].split(str(port), 1)[1], base64.b64encode(os.urandom(16)).decode()
        lines = (f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Upgrade: websocket", "Connection: Upgrade")
        lines += (f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", "")
        self.socket.sendall("\r\n".join(lines).encode())
        self.file, self.count, self.events = self.socket.makefile("rb"), 0, []
        while self.file.readline() != b"\r\n":
            pass
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        self.count += 1
        text = json.dumps({"id": self.count, "method": method, "params": params}).encode()
        size = bytes([0x80 | len(text)]) if len(text) < 126 else bytes([0x80 | 126]) + struct.pack(">H", len(text))
        self.socket.sendall(b"\x81" + size + bytes(4) + text)  # masked, as clients must, with a mask of zeros
        while (message := self.receive()).get("id") != self.count:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def receive(self):
        """One message, which may come in several frames."""
        text, last = b"", False
        while not last:
            head = self.file.read(2)
            last, size = bool(head[0] & 0x80), head[1] & 0x7F
            if size >= 126:
                size = int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
            text += self.file.read(size)
        return json.loads(text)

    def open(self, path, anchor="", dark=False, calm=False, size=(1280, 1000)):
        values = {"prefers-color-scheme": ["light", "dark"][dark], "prefers-reduced-motion": "reduce" if calm else ""}
        media = [{"name": name, "value": value} for name, value in values.items()]
        self.send("Emulation.setEmulatedMedia", features=media)
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=f"{path.as_uri()}#{anchor}")
        self.wait("location.protocol === 'file:' && document.readyState === 'complete'")

    def __call__(self, script):
        """The value of an expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition):
        deadline = time.time() + 60
        while not self(condition):
            assert time.time() < deadline, f"never: {condition}"
            time.sleep(0.02)

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key)

    def click(self, selector):
        self(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
        box = self(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def complaints(self):
        """What the page said on its console or threw, and what it asked of a network."""
        self("1")  # whatever is under way has come before the answer
        bad = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.requestWillBeSent"}
        seen = [event for event in self.events if event.get("method") in bad]
        self.events.clear()
        return [event for event in seen if not _request(event).startswith(("file:", "about:"))]


def _request(event):
    return event["params"].get("request", {}).get("url", "")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    made = Browser(program, tmp_path_factory.mktemp("browser"))
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "out.html"
    runs = {"soft-masked": make_trace(computed=(3, 9)), "binary": make_trace(soft=False)}
    viewer.write(path, make_show(runs=runs))
    return path


STEP = "+document.documentElement.dataset.step"


def test_it_plays_to_the_end_without_a_word_on_the_console(browser, file):
    browser.open(file)
    assert browser("document.getElementById('play').textContent") == "Pause"  # it begins by itself
    browser("document.getElementById('speed').value = 32")
    browser.key("+")
    assert browser("document.getElementById('speed').value") == "64"
    browser.wait(f"{STEP} === {T}")
    assert browser("document.getElementById('play').textContent") == "Play"
    written = "".join(WORDS[token] for token in make_trace().tokens[-1])
    for text in browser("[...document.querySelectorAll('.canvas')].map(canvas => canvas.innerText)"):
        assert re.sub(r"[\s\u21b5]", "", text) == re.sub(r"\s", "", written)
    browser.click("#play")  # again from the start
    browser.wait(f"{STEP} < {T}")
    assert browser.complaints() == []


def test_keys_and_slider(browser, file):
    browser.open(file, calm=True)
    assert browser(STEP) == 0 and browser("document.getElementById('play').textContent") == "Play"  # reduced motion
    assert browser("getComputedStyle(document.querySelector('.cell')).transitionProperty") in ("none", "all")
    assert browser("getComputedStyle(document.querySelector('.cell')).transitionDuration") == "0s"
    for key, step in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", T),
        ("ArrowRight", T),
        ("Home", 0),
    ):
        browser.key(key)
        assert browser(STEP) == step, key
    browser("const s = document.getElementById('step'); s.value = 7; s.dispatchEvent(new Event('input'))")
    assert browser(STEP) == 7 and browser("document.getElementById('where').textContent") == f"step 7 of {T}"
    browser.key(" ")
    browser.wait(f"{STEP} > 7")
    browser.key(".")
    assert browser("document.getElementById('place-name').textContent") == f"Position 1 of {L}"
    browser.key("Escape")
    assert not browser("document.querySelector('.picked') !== null")
    browser.key("s")
    assert browser("document.getElementById('shade').checked")
    browser.key("End")
    assert browser("document.querySelectorAll('.canvas .heat').length") == 2 * (L - 2)
    assert browser.complaints() == []


def test_what_a_step_shows(browser, file):
    trace = make_trace()
    for frame in (0, 3, 5, T):
        browser.open(file, f"step={frame}")
        classes = browser("[...document.querySelectorAll('.run.soft .canvas .cell')].map(c => [...c.classList])")
        for place, names in enumerate(classes):
            assert ("mask" in names) == trace.masked[frame, place]
            assert ("given" in names) == (place < 2) and ("edge" in names) == (place == 2)
            assert ("resumed" in names) == (place == 9)
            before = trace.masked[max(frame - 1, 0), place]
            assert ("fresh" in names) == (not trace.masked[frame, place] and before)
            assert ("again" in names) == (trace.masked[frame, place] and not before)
        status = browser("document.querySelector('.run.soft .status').textContent")
        assert status.startswith(f"{trace.masked[frame].sum()} of {L} masked") and status.endswith(
            "4\u20139 computed, the rest cached"
        )
    # The ink of candidates is in proportion to their weights, and a binary run shows none.
    browser.open(file, "step=3")
    ink = (
        "[...document.querySelectorAll('.run.%s .cell')].map(c => [...c.lastChild.children].map(s => +s.style.opacity))"
    )
    soft, plain = np.array(browser(ink % "soft")), np.array(browser(ink % "plain"))
    where = trace.predicted[3]
    weights = trace.probs[3] / trace.probs[3].sum(-1, keepdims=True)
    strength = np.sqrt(trace.lam[3] / trace.lam.max())[:, None]
    np.testing.assert_allclose(soft[where], (strength * weights)[where], atol=0.01)
    assert not soft[~where & (trace.tokens[3] == trace.tokens[-1])].any() and not plain[where].any()


def test_two_soft_runs_have_two_colours(browser, tmp_path):
    viewer.write(tmp_path / "out.html", make_show(runs={"dual cache": make_trace(), "no cache": make_trace(seed=1)}))
    browser.open(tmp_path / "out.html", "step=3&at=5")
    kinds = browser("[...document.querySelectorAll('.run')].map(r => getComputedStyle(r).getPropertyValue('--of'))")
    assert len(kinds) == len(set(kinds)) == 2
    heads = browser("[...document.querySelectorAll('.card th:first-child')].map(th => th.textContent)")
    assert heads == ["the next step sees"] * 2 and browser.complaints() == []


def test_numbers_of_a_position(browser, file):
    browser.open(file, "step=3")
    trace, place = make_trace(), int(np.flatnonzero(make_trace().predicted[3])[0])
    browser.click(f'.run.soft .cell[data-at="{place}"]')
    assert browser("document.getElementById('place-name').textContent") == f"Position {place + 1} of {L}"
    rows = browser("[...document.querySelectorAll('.card.soft tr')].map(r => [...r.cells].map(c => c.textContent))")[1:]
    lam, probs = trace.lam[3, place], trace.probs[3, place]
    wanted = [1 - lam, *(lam * probs / probs.sum())]
    np.testing.assert_allclose([float(row[2]) for row in rows], wanted, atol=6e-4)
    np.testing.assert_allclose([float(row[3]) for row in rows[1:]], probs, atol=6e-4)
    said = browser("document.querySelector('.card.soft').innerText")
    assert f"settled at step {trace.settled[place]}" in said and f"entropy {trace.entropy[3, place]:.2f}" in said
    assert "thrown away" in browser("document.querySelector('.card.plain').innerText")
    browser.click(f'.run.soft .cell[data-at="{place}"]')  # lets go
    assert browser("document.getElementById('cards').children.length") == 0
    assert browser.complaints() == []


def test_the_picture_moves_unless_the_reader_wants_none(browser, tmp_path):
    viewer.write(tmp_path / "out.svg", make_show())
    browser.open(tmp_path / "out.svg")
    assert browser("document.getAnimations().length") > L
    # Put to the end of the run it is what it is without animations.
    opacities = "[...document.querySelectorAll('rect, text')].map(node => +getComputedStyle(node).opacity)"
    end = int(1000 * (animation.PLAYED + animation.HELD / 2))
    browser(f"document.getAnimations().forEach(one => {{ one.pause(); one.currentTime = {end}; }})")
    moved = browser(opacities)
    browser.open(tmp_path / "out.svg", calm=True)
    assert browser("document.getAnimations().length") == 0 and browser(opacities) == moved
    assert 0 in moved and 1 in moved and browser.complaints() == []


# Texts whose colour stands out too little from what lies behind them: [ratio, text]. A candidate that fades in is no
# text to be read; its numbers are below.
CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((x) => x / 255);
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce(
    (sum, w, i) => sum + w * (c[i] <= 0.04045 ? c[i] / 12.92 : ((c[i] + 0.055) / 1.055) ** 2.4), 0);
  const own = (node) => rgba(getComputedStyle(node).backgroundColor);
  const behind = (node) => node ? over(own(node), behind(node.parentElement)) : [1, 1, 1];
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement, style = getComputedStyle(node);
    if (!walk.currentNode.data.trim() || !node.getClientRects().length) continue;
    if (node.closest("script, style, .over, .unseen")) continue;
    if (style.visibility === "hidden") continue;
    seen += 1;
    const back = behind(node), ink = over(rgba(node.closest("svg") ? style.fill : style.color), back);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push([(a + 0.05) / (b + 0.05), walk.currentNode.data]);
  }
  return {seen, found};
})()"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [(1280, 1000), (390, 844)])
def test_contrast_names_and_width(browser, file, dark, size):
    browser.open(file, f"step={T}&at=6&shade", dark=dark, size=size, calm=True)
    assert browser("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    texts = browser(CONTRAST)
    assert texts["seen"] > 40 and texts["found"] == []
    assert browser("document.documentElement.scrollWidth") <= size[0]
    tree = browser.send("Accessibility.getFullAXTree")["nodes"]
    of = lambda node, field: node.get(field, {}).get("value")
    controls = {"button", "slider", "combobox", "checkbox", "heading", "region", "image"}
    nameless = [of(node, "role") for node in tree if of(node, "role") in controls and not of(node, "name")]
    assert nameless == []
    names = {of(node, "name") for node in tree}
    assert {"Play", "Step", "Steps per second", "Position 6 of 12", "soft-masked", "binary"} <= names
    browser.click("#theme")
    assert browser("document.documentElement.dataset.theme") == ("light" if dark else "dark")
    assert browser.complaints() == []


def test_the_contrast_test_can_fail(browser, file):
    browser.open(file, "step=3")
    browser("document.querySelector('h1').style.color = '#bbb'")
    assert [text for _, text in browser(CONTRAST)["found"]] == ["Masks becoming text"]


@pytest.mark.parametrize("size", [(1280, 1000), (390, 844)])
def test_no_sign_of_the_legend_runs_into_its_text(browser, tmp_path, size):
    """The longest is that of a run with a cache: what it computes between two lines."""
    viewer.write(tmp_path / "run.html", make_show(runs={"dual cache": make_trace(computed=(2, 8))}))
    browser.open(tmp_path / "run.html", "step=3", size=size)
    signs = "[...document.querySelectorAll('#legend li')]"
    assert "computed" in browser(f"{signs}.map(li => li.textContent).join()")
    gaps = browser(f"{signs}.map(li => li.children[0].clientWidth - li.children[0].scrollWidth)")
    assert len(gaps) > 4 and min(gaps) >= 0
    assert browser("document.documentElement.scrollWidth") <= size[0]


def test_on_a_phone_the_numbers_lie_at_the_foot(browser, file):
    browser.open(file, "step=3", size=(390, 844))
    assert browser("getComputedStyle(document.getElementById('place')).display") == "none"
    browser.click('.run.soft .cell[data-at="5"]')
    box = browser("document.getElementById('place').getBoundingClientRect().toJSON()")
    assert box["bottom"] == 844 and 0 < box["height"] < 844 / 2
    room = "parseFloat(getComputedStyle(document.querySelector('main')).paddingBottom)"
    assert browser(room) > 300  # so that the foot of the page can be read above them
    browser.click("#close")
    assert browser(room) < 100
    assert browser("getComputedStyle(document.getElementById('place')).display") == "none"
