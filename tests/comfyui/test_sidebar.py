"""The TACO-DiT tab in ComfyUI's own page, in a real browser, with a real daemon."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from comfyui_graphs import FLUX, Pair
from comfyui_server import PATH, PYTHON, ComfyUI
from helpers import Daemon, eventually

TAB = ".taco-dit-sidebar"
WORDS = {
    name: json.loads((Path(__file__).parents[2] / "comfy_nodes/web/sidebar" / f"{name}.json").read_text())
    for name in ("en", "zh")
}


@pytest.fixture(scope="module")
def daemon(endpoints: Callable[[int], Daemon]) -> Daemon:
    return endpoints(2)


@pytest.fixture(scope="module")
def paged(daemon: Daemon, comfyui_models: Path) -> Iterator[ComfyUI]:
    """A ComfyUI with its page; nothing listens at its default endpoint."""
    if CHROMIUM is None:
        pytest.skip("the page needs Chromium: install it, or name it in CHROMIUM")
    comfyui = ComfyUI(PATH, PYTHON, f"ipc://{daemon.folder}/nobody.sock", comfyui_models)
    comfyui.has_page = True
    with comfyui:
        comfyui.post("/settings", {"Comfy.TutorialCompleted": True})
        yield comfyui


@pytest.fixture(scope="module")
def browser(paged: ComfyUI) -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(paged: ComfyUI, browser: Browser) -> Iterator[Callable[..., Browser]]:
    """Opens ComfyUI's page with settings, and the tab in it; nothing of ours may have failed in the end."""

    def opened(vue: bool = False, locale: str = "en", theme: str = "dark") -> Browser:
        settings = {"Comfy.VueNodes.Enabled": vue, "Comfy.Locale": locale, "Comfy.ColorPalette": theme}
        paged.post("/settings", settings)
        browser.open(f"http://127.0.0.1:{paged.port}/")
        toggle(browser)
        browser.until(f"!!document.querySelector('{TAB} header strong')", "the tab shows a state")
        return browser

    browser.events.clear()
    yield opened
    thrown = [each for each in browser.events if each["method"] == "Runtime.exceptionThrown"]
    assert [each for each in thrown if "taco_dit" in json.dumps(each)] == []


def toggle(browser: Browser) -> None:
    """A click on the tab's icon."""
    browser.until("!!document.querySelector('.taco-dit-tab-button')", "the sidebar has the tab", 120)
    browser.run("document.querySelector('.taco-dit-tab-button').click()")


def text(browser: Browser) -> str:
    shown: str = browser.run(f"document.querySelector('{TAB}')?.innerText ?? ''")
    return shown


def says(browser: Browser, words: str) -> None:
    """The tab says this, now or soon."""
    eventually(lambda: words in text(browser), 60, f"the tab says {words!r}, not {text(browser)!r}", every_s=0.1)


def choose(browser: Browser, endpoint: str) -> None:
    """Pick a daemon."""
    options = f"[...document.querySelectorAll('{TAB} option')].map((each) => each.value)"
    eventually(lambda: endpoint in browser.run(options), 60, "the daemon can be chosen", every_s=0.1)
    change = f"each.value = {json.dumps(endpoint)}; each.dispatchEvent(new Event('change'))"
    browser.run(f"((each) => {{ {change} }})(document.querySelector('{TAB} select'))")
    browser.until(f"document.querySelectorAll('{TAB} section').length >= 5", "the daemon is shown")


def use(comfyui: ComfyUI, daemon: Daemon, steps: int = 2) -> None:
    """Run a workflow in the daemon."""
    run = Pair(FLUX)
    run.load(endpoint=daemon.endpoint)
    # ComfyUI keeps what it has computed; another seed is computed.
    run.sample(steps=steps, seed=run.run)
    outcome = comfyui.run(run.alone("taco"))
    assert outcome.kind == "success", outcome.error


def polls(browser: Browser) -> int:
    """How often the page has asked so far."""
    browser.run("1")  # brings what was told in the meantime
    asked = [each for each in browser.events if each["method"] == "Network.requestWillBeSent"]
    return sum("/taco_dit/status" in each["params"]["request"]["url"] for each in asked)


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_without_a_daemon_it_helps_and_with_one_it_shows_it(
    vue: bool, paged: ComfyUI, daemon: Daemon, page: Callable[..., Browser]
) -> None:
    browser = page(vue=vue)
    says(browser, WORDS["en"]["state.unreachable"])
    for key in ("help.start", "help.doctor", "help.demo", "help.elsewhere"):
        says(browser, WORDS["en"][key])
    assert "nobody.sock" in text(browser)
    use(paged, daemon)
    choose(browser, daemon.endpoint)
    says(browser, "Ready")
    for told in ("Rank 0 on cpu:0", "Rank 1 on cpu:1", "flux.safetensors", "0 running, 0 waiting", "Plan: batch 2"):
        says(browser, told)
    assert re.search(r"\d+ forwards in [\d.]+ m?s, \d+ of them on several ranks", text(browser))
    split = browser.run(f"document.querySelector('{TAB} [role=img]').getAttribute('aria-label')")
    assert re.fullmatch(r"queue [\d.]+ m?s \(\d+ %\), wire .+, compute .+, collective .+", split)
    widths = f"[...document.querySelectorAll('{TAB} [role=img] div')].map((each) => parseFloat(each.style.width))"
    assert sum(browser.run(widths)) == pytest.approx(100, abs=0.1)
    meters = browser.run(
        f"[...document.querySelectorAll('{TAB} [role=meter]')].map((each) => each.getAttribute('aria-label'))"
    )
    assert "Rank 1 on cpu:1: Memory" in meters


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_chinese_in_both_themes(theme: str, paged: ComfyUI, daemon: Daemon, page: Callable[..., Browser]) -> None:
    use(paged, daemon)
    browser = page(locale="zh", theme=theme)
    says(browser, WORDS["zh"]["state.unreachable"])
    says(browser, WORDS["zh"]["help.doctor"])
    choose(browser, daemon.endpoint)
    says(browser, WORDS["zh"]["state.ready"])
    assert browser.run(f"document.querySelector('{TAB}').lang") == "zh"
    background, shown = (
        [int(each) for each in re.findall(r"\d+", browser.run(code))[:3]]
        for code in (
            "getComputedStyle(document.querySelector('.side-bar-panel') ?? document.body).backgroundColor",
            f"getComputedStyle(document.querySelector('{TAB}')).color",
        )
    )
    assert (sum(background) > sum(shown)) == (theme == "light")
    assert abs(sum(background) - sum(shown)) > 255, "it can be read"


def test_unload_by_keyboard(paged: ComfyUI, daemon: Daemon, page: Callable[..., Browser]) -> None:
    use(paged, daemon)
    browser = page()
    choose(browser, daemon.endpoint)
    button = f"document.querySelector('{TAB} [aria-label=\"Unload flux.safetensors\"]')"
    browser.until(f"!!{button}", "the model is there")
    browser.run(f"{button}.focus()")
    before = polls(browser)
    eventually(lambda: polls(browser) >= before + 2, 60, "it is asked again", every_s=0.1)
    assert browser.run(f"document.activeElement === {button}"), "a new answer leaves the focus where it is"

    browser.press("Enter", 13, "\r")
    browser.until(dialog(WORDS["en"]["unload.title"]), "the question is asked")
    browser.press("Escape", 27)
    browser.until(f"!({dialog(WORDS['en']['unload.title'])})", "the question is gone")
    with daemon.client() as client:
        assert [each["name"] for each in client.models()].count("flux.safetensors") == 1
        browser.run(f"{button}.focus()")
        browser.press("Enter", 13, "\r")
        browser.until(dialog(WORDS["en"]["unload.title"]), "the question is asked")
        confirm = (
            "[...document.querySelectorAll('[role=dialog] button')].find((each) => /confirm/i.test(each.innerText))"
        )
        browser.until(f"!!{confirm}", "it can be confirmed")
        browser.run(f"{confirm}.click()")
        eventually(lambda: not client.models(), 60, "the model is unloaded")
    says(browser, WORDS["en"]["models.none"])
    use(paged, daemon)
    browser.until(f"!!{button}", "the model is loaded again by the workflow")


def dialog(title: str) -> str:
    return (
        f"[...document.querySelectorAll('[role=dialog]')].some((each) => each.innerText.includes({json.dumps(title)}))"
    )


def test_what_fails_is_said(paged: ComfyUI, daemon: Daemon, page: Callable[..., Browser]) -> None:
    use(paged, daemon)
    browser = page()
    choose(browser, daemon.endpoint)
    button = f"document.querySelector('{TAB} [aria-label=\"Unload flux.safetensors\"]')"
    browser.until(f"!!{button}", "the model is there")
    # Somebody else is quicker: the question is answered when the model is gone.
    browser.run("window.app.extensionManager.dialog.confirm = () => new Promise((done) => { window.yes = done; })")
    browser.run(f"{button}.click()")
    browser.until("!!window.yes", "the question is asked")
    with daemon.client() as client:
        for model in client.models():
            client.unload(model["id"])
        browser.run("window.yes(true)")
        browser.until(f"!!document.querySelector('{TAB} [role=alert]')", "the failure is told")
        assert "flux.safetensors was not unloaded: " in text(browser)
        browser.run(f"document.querySelector('{TAB} [role=alert] button').click()")
        browser.until(f"!document.querySelector('{TAB} [role=alert]')", "it can be dismissed")


def test_it_asks_only_while_it_is_looked_at(page: Callable[..., Browser]) -> None:
    browser = page()
    eventually(lambda: polls(browser) >= 2, 60, "it asks again and again", every_s=0.1)
    toggle(browser)
    browser.until(f"!document.querySelector('{TAB}')", "the tab is closed")
    asked = polls(browser)
    # Longer than two periods, within the page.
    browser.run("new Promise((done) => setTimeout(done, 4500))")
    assert polls(browser) == asked
    toggle(browser)
    eventually(lambda: polls(browser) > asked, 60, "it asks again", every_s=0.1)
    # A window behind others; Chromium tells the page so by this event.
    hide = "Object.defineProperty(document, 'visibilityState', { value: %r, configurable: true });"
    browser.run(hide % "hidden" + "document.dispatchEvent(new Event('visibilitychange'))")
    asked = polls(browser)
    browser.run("new Promise((done) => setTimeout(done, 4500))")
    assert polls(browser) == asked
    browser.run(hide % "visible" + "document.dispatchEvent(new Event('visibilitychange'))")
    eventually(lambda: polls(browser) > asked, 60, "it asks again", every_s=0.1)


def test_nothing_that_is_told_becomes_html(page: Callable[..., Browser]) -> None:
    browser = page()
    evil = "<img src=x onerror=\"window.harmed = true\"><b id='evil'>"
    names = ("state", "version", "device", "name", "family", "dtype", "plan", "path", "verb", "client", "model")
    code = """
    (async () => {
      const { view } = await import("/extensions/taco_dit/sidebar/view.js");
      const { patch } = await import("/extensions/taco_dit/sidebar/dom.js");
      const { texts } = await import("/extensions/taco_dit/sidebar/texts.js");
      const evil = EVIL;
      const of = (names) => Object.fromEntries(names.map((each) => [each, evil]));
      const rank = { ...of(NAMES), rank: 0, device_name: evil, memory_used_bytes: 1, memory_total_bytes: 2,
                     device_memory_used_bytes: 1, utilization: 0.5 };
      const group = { ...of(NAMES), world_size: 1, restarts: 1, ranks: [rank], queue: { running: 1, queued: 2 } };
      const spread = { ...group, name: "b", restarts: 2, world_size: 2,
                       ranks: [{ ...rank, host: "one", device: "0" }, { ...rank, rank: 1, host: evil }] };
      const model = { ...of(NAMES), id: evil, parameters: 1e9, weight_bytes: 1, patches: 1, network: evil,
                      quantization: { [evil]: 1 }, streamed_bytes: [1], groups: [evil, "b"] };
      const told = {
        endpoint: evil, endpoints: [evil, "b"], error: null,
        status: { ...of(NAMES), uptime_s: 1, groups: [group, spread], group, models: [model],
                  queue: { running: 1, queued: 2 } },
        stats: { step_s: { count: 1, mean: 1, p95: 1 }, queue_s: 0.1, wire_s: 0.2, compute_s: 0.3, collective_s: 0.4 },
        jobs: [{ ...of(NAMES), job: evil, model: evil, group: "b", step: 1, total: 2, block: 1, blocks: 2, age_s: 1 }],
        last_run: { ...of(NAMES), forwards: 2, parallel_forwards: 1, forward_s: 1, retries: 1, single_rank_s: 2 },
      };
      const root = document.createElement("div");
      document.body.append(root);
      const t = await texts("en");
      const actions = { choose() {}, unload() {}, dismiss() {} };
      for (const error of [null, { code: evil, message: evil }]) {
        const unloads = () => !error;
        const shown = { told: { ...told, error }, problem: error && evil, failed: evil, unloads, actions };
        patch(root, view(t, shown).filter(Boolean));
      }
      await new Promise((done) => setTimeout(done, 300));
      const text = root.textContent;
      const found = root.querySelectorAll("img, #evil").length;
      root.remove();
      return { text, found, harmed: window.harmed === true };
    })()
    """
    told = browser.run(code.replace("EVIL", json.dumps(evil)).replace("NAMES", json.dumps(names)))
    assert told["found"] == 0
    assert not told["harmed"]
    assert told["text"].count(evil) > 15
    assert told["text"].count(f"Group {evil}") == 2, "a heading, and the model's"
    assert told["text"].count("Group b") == 3, "and the job's"
    assert f"Rank 0 on {evil}" in told["text"], "on one host: without it"
    assert "Rank 0 on one, 0" in told["text"]
    assert f"Rank 1 on {evil}, {evil}" in told["text"]
    assert told["text"].count("restarted once") == told["text"].count("restarted 2 times") == 1
    assert "1 running, 2 waiting" in told["text"]
    assert f"{evil}Unload" in told["text"], "the second time it can be unloaded"
    assert "2.00 times as fast as one rank" in told["text"]


def test_elements_are_changed_in_place(paged: ComfyUI, browser: Browser) -> None:
    """The part of the tab that puts descriptions into the page."""
    code = """
    (async () => {
      const { h, patch } = await import("/extensions/taco_dit/sidebar/dom.js");
      const root = document.createElement("div");
      const list = (keys) => [h("ul", {}, ...keys.map((key) => h("li", { key, title: `t${key}` }, key)))];
      patch(root, list(["a", "b", "c"]));
      const [a, b, c] = root.querySelectorAll("li");
      patch(root, list(["c", "a", "d"]));
      const after = [...root.querySelectorAll("li")];
      const kept = after[0] === c && after[1] === a && !root.contains(b);
      patch(root, [h("p", { hidden: true }, "x", null, h("b", {}, 1)), "tail"]);
      const first = root.innerHTML;
      patch(root, [h("p", { title: "n" }, "y"), "tail"]);
      return { kept, order: after.map((each) => each.textContent + each.title), first, second: root.innerHTML };
    })()
    """
    browser.open(f"http://127.0.0.1:{paged.port}/system_stats")
    browser.until(
        "location.pathname === '/system_stats' && document.readyState === 'complete'", "a page without anything"
    )
    told = browser.run(code)
    assert told["kept"]
    assert told["order"] == ["ctc", "ata", "dtd"]
    assert told["first"] == '<p hidden="">x<b>1</b></p>tail'
    assert told["second"] == '<p title="n">y</p>tail'


def test_another_sites_page_cannot_unload(paged: ComfyUI, daemon: Daemon) -> None:
    use(paged, daemon)
    with daemon.client() as client:
        (model,) = [each["id"] for each in client.models() if each["name"] == "flux.safetensors"]
        body = json.dumps({"endpoint": daemon.endpoint, "model": model}).encode()
        json_type = {"Content-Type": "application/json"}
        for code, headers in (
            (403, {**json_type, "Origin": "http://evil.example"}),
            (403, {**json_type, "Sec-Fetch-Site": "cross-site"}),
            (415, {"Content-Type": "text/plain"}),
        ):
            asked = urllib.request.Request(f"http://127.0.0.1:{paged.port}/taco_dit/unload", body, headers)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(asked, timeout=60)
            assert refused.value.code == code
            refused.value.close()
        assert model in [each["id"] for each in client.models()]
        assert paged.post("/taco_dit/unload", {"endpoint": daemon.endpoint, "model": model}) == {"model": model}
        assert model not in [each["id"] for each in client.models()]
