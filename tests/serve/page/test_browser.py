"""The page in a browser: Chromium, run by Playwright, both of this machine.

pip install playwright && apt-get install chromium && python benchmarks/long/run.py browser
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graftlm.rows import recipe_of_rows
from graftlm.testing import save_tiny_base
from tests.runs.test_compare import make
from tests.serve.page.scripted import Script, app_of, served

pytestmark = pytest.mark.long(group="browser")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

DESKTOP, PHONE = (1280, 860), (320, 640)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    home = str(tmp_path_factory.mktemp("home"))
    # No other host has an address: a request to one is seen below, and leads nowhere.
    flags = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with playwright.sync_playwright() as run:
        found = run.chromium.launch(executable_path=CHROMIUM, args=flags, env={**os.environ, "HOME": home})
        yield found
        found.close()


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make(tmp_path / "runs" / "r=4", delta_r=4, steps=40)
    make(tmp_path / "runs" / "r=16", delta_r=16, tuned=1.5, steps=40)
    return tmp_path / "runs"


@pytest.fixture
def address(script: Script, runs: Path) -> Iterator[str]:
    with served(app_of(script, runs)) as found:
        yield found


class Tab:
    """A tab on the page. Whatever it asks of another host, throws, or is forbidden by the policy fails the test."""

    def __init__(self, browser: Any, address: str, size: tuple[int, int] = DESKTOP, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        self.page = self.context.new_page()
        self.address = address
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        self.page.on("request", self._check)
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))

    def _check(self, request: Any) -> None:
        if not request.url.startswith((self.address, f"blob:{self.address}")):
            self.problems.append(request.url)

    def open(self, path: str = "/") -> "Tab":
        self.page.goto(self.address + path)
        self.page.locator(".welcome, dialog[open], #runs table").filter(visible=True).first.wait_for()
        return self

    def say(self, text: str) -> "Tab":
        """Write a message, send it, and wait for the answers."""
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")
        return self.settle()

    def settle(self) -> "Tab":
        self.page.locator(".turn").first.wait_for()
        self.page.locator("#stop").wait_for(state="hidden")
        return self

    def texts(self, turn: int = -1) -> list[str]:
        """What the answers to a turn say."""
        return self.turn(turn).locator(".answer .said").all_inner_texts()

    def turn(self, number: int = -1) -> Any:
        return self.page.locator(".turn").nth(number)

    def button(self, name: str, within: Any = None) -> Any:
        return (within or self.page).get_by_role("button", name=name)

    def width(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth")


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Tab]:
    found = Tab(browser, address)
    yield found.open()
    assert found.problems == []
    found.context.close()


def models(tab: Tab, *names: str) -> None:
    for i, name in enumerate(names):
        tab.page.locator(".columns select").nth(i).select_option(name)


# Talking -------------------------------------------------------------------------------------------------------------


def test_columns_answer_the_same_message_side_by_side(tab: Tab, script: Script) -> None:
    models(tab, "base", "parcels", "weather")
    tab.say("hello")
    assert tab.texts() == ["base heard: hello", "parcels heard: hello", "weather heard: hello"]
    lefts = [box.bounding_box()["x"] for box in tab.page.locator(".answer").all()]
    assert lefts[0] < lefts[1] < lefts[2]
    tab.say("more")
    by_model = {body["model"]: body["messages"] for body in script.asked[3:]}
    assert [m["content"] for m in by_model["weather"]] == ["hello", "weather heard: hello", "more"]


def test_a_column_that_comes_later_goes_on_from_the_first(tab: Tab, script: Script) -> None:
    models(tab, "base", "")
    tab.say("hello")
    models(tab, "base", "parcels")
    assert "goes on from the answer of base" in tab.turn().inner_text()
    tab.say("more")
    assert [m["content"] for m in script.asked[-1]["messages"]] == ["hello", "base heard: hello", "more"]


def test_settings_are_sent_and_what_is_empty_is_not(tab: Tab, script: Script) -> None:
    for name, value in [("Temperature", "0.5"), ("Top-k", "7"), ("Seed", "3"), ("Max tokens", "9"), ("Min-p", "2")]:
        tab.page.get_by_label(name).fill(value)
    tab.page.get_by_label("System prompt").fill("be brief")
    assert tab.page.get_by_label("Min-p").get_attribute("aria-invalid") is not None  # 2 is no probability
    tab.say("hello")
    body = script.asked[0]
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    given = {"temperature": 0.5, "top_k": 7, "seed": 3, "max_tokens": 9}
    assert {name: value for name, value in body.items() if name not in ("messages", "stream_options")} == {
        "model": "base",
        "stream": True,
        **given,
    }
    tab.open()
    assert tab.page.get_by_label("Top-k").input_value() == "7"


def test_stop_ends_the_stream_and_keeps_what_came(tab: Tab, script: Script) -> None:
    script.pause, script.answers["count"] = 0.05, [f"{n} " for n in range(1000)]
    tab.page.get_by_label("Message", exact=True).fill("count")
    tab.page.keyboard.press("Enter")
    tab.page.get_by_text("0 1 2").first.wait_for()
    tab.page.keyboard.press("Escape")
    tab.settle()
    assert tab.texts()[0].startswith("0 1 2")
    assert "stopped" in tab.turn().inner_text()
    for _ in range(50):
        if script.ended_early == 2:
            break
        tab.page.wait_for_timeout(100)
    assert script.ended_early == 2, "the server is told"


def test_an_edited_message_is_another_branch(tab: Tab, script: Script) -> None:
    tab.say("one").say("two")
    first = tab.turn(0)
    tab.button("Edit", first.locator(".user")).click()
    first.get_by_label("Edit the message").fill("uno")
    tab.button("Send", first).click()
    tab.settle()
    assert tab.page.locator(".turn").count() == 1
    assert tab.texts() == ["base heard: uno", "parcels heard: uno"]
    assert [m["content"] for m in script.asked[-1]["messages"]] == ["uno"]
    tab.button("previous version").click()
    assert tab.page.locator(".turn").count() == 2
    assert tab.texts(1) == ["base heard: two", "parcels heard: two"]
    tab.button("next version").click()
    assert tab.texts(0)[0] == "base heard: uno"


def test_again_asks_one_column_and_an_edited_answer_is_what_the_model_said(tab: Tab, script: Script) -> None:
    tab.say("hello")
    script.answers["hello"] = ["another"]
    answer = tab.turn().locator(".answer").first
    tab.button("Again", answer).click()
    tab.settle()
    assert tab.texts() == ["another", "parcels heard: hello"]
    other = tab.turn().locator(".answer").nth(1)  # its turn is the new one: the first answer stays what it is now
    tab.button("Edit", other).click()
    tab.page.get_by_label("Edit the message").fill("I say this")
    tab.page.get_by_role("button", name="Save", exact=True).click()
    assert tab.texts() == ["another", "I say this"]
    tab.say("more")
    by_model = {body["model"]: [m["content"] for m in body["messages"]] for body in script.asked[-2:]}
    assert by_model["base"] == ["hello", "another", "more"]
    assert by_model["parcels"] == ["hello", "I say this", "more"]


def test_thoughts_are_collapsed_and_calls_are_shown(tab: Tab, script: Script) -> None:
    call = {"tool_calls": [{"index": 0, "function": {"name": "track", "arguments": '{"parcel": 7}'}}]}
    script.answers["where"] = [{"reasoning_content": "let me see"}, "In Lyon.", call]
    tab.say("where")
    thought = tab.turn().get_by_text("let me see").first
    assert not thought.is_visible()
    tab.turn().get_by_text("Thoughts (3 words)").first.click()
    assert thought.is_visible()
    assert 'track({"parcel": 7})' in tab.texts()[0]


def test_a_failure_is_said_where_it_is_and_to_a_screen_reader(tab: Tab, script: Script) -> None:
    script.answers["fail"] = ["so far", "FAIL"]
    tab.say("fail")
    assert tab.texts()[0].split("\n")[0] == "so far"
    assert "the model failed" in tab.texts()[0]
    assert "the model failed" in tab.page.get_by_role("status").inner_text()


def test_the_end_of_an_answer_is_announced_once_and_not_its_tokens(tab: Tab, script: Script) -> None:
    models(tab, "base", "")
    script.pause, script.answers["count"] = 0.01, [f"{n} " for n in range(60)]
    tab.page.evaluate(
        "() => { window.said = []; new MutationObserver(() => window.said.push(document.querySelector('#status')"
        ".textContent)).observe(document.querySelector('#status'), {childList: true}); }"
    )
    tab.say("count")
    assert tab.page.evaluate("window.said.length") == 2
    assert tab.page.evaluate("window.said[1]").startswith("base: 0 1 2")


# What models say is text ---------------------------------------------------------------------------------------------

HOSTILE = """<script>alert('script')</script>
<img src=x onerror="alert('img')"> <svg onload=alert(1)> <iframe src="javascript:alert(1)"></iframe>

[run](javascript:alert(1)) [data](data:text/html,<script>alert(1)</script>) ![picture](https://evil.example/p.png)

<javascript:alert(1)> <https://evil.example/a> `<b>code</b>`

```html
</code></pre><script>alert('fence')</script>
```

| <script>alert('cell')</script> | b |
|-|-|
| <img src=x onerror=alert(2)> | [x](vbscript:alert) |
"""


def test_hostile_answers_are_inert(tab: Tab, script: Script) -> None:
    pieces = [HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7)]
    script.answers["attack"] = [{"reasoning_content": HOSTILE}, *pieces]
    tab.say("attack")
    tab.say(HOSTILE)  # and as the message of the user
    turns = tab.page.locator("#turns")
    for tag in ("script", "img", "iframe", "svg", "style", "object", "form"):
        assert turns.locator(tag).count() == 0, tag
    links = [link.get_attribute("href") for link in turns.locator("a").all()]
    assert links
    assert all(link.startswith("https://evil.example/") for link in links)
    assert {link.get_attribute("rel") for link in turns.locator("a").all()} == {"noopener noreferrer nofollow"}
    assert "alert('script')" in tab.texts(0)[0]
    handlers = (
        "[...document.querySelectorAll('#turns *')].some(e => [...e.attributes].some(a => /^on|^style$/.test(a.name)))"
    )
    assert not tab.page.evaluate(handlers)


def test_the_policy_forbids_what_the_code_does_not_do(browser: Any, address: str) -> None:
    found = Tab(browser, address).open()
    for attack in (
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(1)>')",
        "document.body.innerHTML = '<b>x</b>'",
        "fetch('https://evil.example/')",
    ):
        failed = found.page.evaluate(
            f"async () => {{ try {{ await ({attack}); return false; }} catch (e) {{ return true; }} }}"
        )
        assert failed, attack
    found.context.close()


# Tokens --------------------------------------------------------------------------------------------------------------


def test_tokens_are_compared_by_keyboard(tab: Tab, script: Script) -> None:
    script.answers["say"] = ["abe\n"]
    tab.say("say")
    tab.button("Tokens vs parcels").focus()
    tab.page.keyboard.press("Enter")
    tokens = tab.page.get_by_role("listbox", name="Tokens of base compared with parcels").get_by_role("option")
    tokens.first.wait_for()
    assert tokens.count() == 4
    assert [token.get_attribute("class") for token in tokens.all()] == ["more", "less", "more", "less"]
    strengths = [token.evaluate("e => e.style.getPropertyValue('--strength')") for token in tokens.all()]
    assert [float(strength) for strength in strengths] == pytest.approx([0, 2.5 / 3, 0, 2.5 / 3], abs=1e-3)
    tip = tab.page.get_by_role("tooltip")
    assert tip.is_visible(), "the first token has the focus"
    tab.page.keyboard.press("ArrowRight")
    assert "\u22122.50 nats" in tip.inner_text()
    assert "4.98 %" in tip.inner_text()  # exp(-3)
    assert "60.7 %" in tip.inner_text()  # exp(-0.5)
    tab.page.keyboard.press("Escape")
    assert not tip.is_visible()
    tab.page.keyboard.press("End")
    assert tab.page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("\u23ce, ")
    assert "\u22125.00 over the 4 tokens" in tab.page.locator(".legend").inner_text()
    tab.button("Show text").click()
    assert tab.texts()[0].strip() == "abe"


def test_what_cannot_be_scored_says_why(tab: Tab, script: Script) -> None:
    script.answers["say"] = [{"reasoning_content": "hm"}, "abc"]
    tab.say("say")
    tab.button("Tokens vs parcels").click()
    assert "without thoughts" in tab.turn().inner_text()


# Out of the page -----------------------------------------------------------------------------------------------------


def test_a_conversation_is_saved_and_a_request_is_shown_as_a_program(tab: Tab, script: Script) -> None:
    tab.say("it's 7")
    with tab.page.expect_download() as waiting:
        tab.button("Save JSON").click()
    saved = json.loads(Path(waiting.value.path()).read_text())
    assert saved["turns"][0]["user"] == "it's 7"
    assert [answer["adapter"] for answer in saved["turns"][0]["answers"]] == ["base@sha256:0", "parcels@sha256:0"]
    with tab.page.expect_download() as waiting:
        tab.button("Save Markdown").click()
    assert "## parcels\n\nparcels heard: it's 7" in Path(waiting.value.path()).read_text()
    tab.button("As Python").click()
    code = tab.page.get_by_role("dialog").get_by_role("textbox").input_value()
    calls: list[dict[str, Any]] = []
    run_with_client(code, calls)
    assert [call["model"] for call in calls] == ["base", "parcels"]
    assert calls[0]["messages"] == [{"role": "user", "content": "it's 7"}]
    tab.page.keyboard.press("Escape")
    tab.button("As curl").click()
    assert "it'\\''s 7" in tab.page.get_by_role("dialog").get_by_role("textbox").input_value()
    assert "GRAFT_API_KEY" in code


def run_with_client(code: str, calls: list[dict[str, Any]]) -> None:
    """Run a program for the client of OpenAI with one that notes what it is asked."""
    import sys
    from types import ModuleType, SimpleNamespace
    from unittest.mock import patch

    def create(**body: Any) -> Any:
        calls.append(body)
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=""))])

    fake = ModuleType("openai")
    fake.OpenAI = lambda **_: SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    with patch.dict(sys.modules, {"openai": fake}):
        exec(code, {})


# Keys ----------------------------------------------------------------------------------------------------------------


def test_the_key_is_asked_for_kept_in_the_tab_and_sent(browser: Any, runs: Path) -> None:
    script = Script(key="s3cret")
    with served(app_of(script, runs)) as address:
        tab = Tab(browser, address).open()
        dialog = tab.page.get_by_role("dialog", name="API key")
        dialog.wait_for()
        assert "no valid API key" in tab.page.get_by_role("alert").inner_text()
        dialog.get_by_label("Key").fill("s3cret")
        tab.page.keyboard.press("Enter")
        tab.page.locator(".welcome").wait_for()
        tab.say("hello")
        assert tab.texts()[0] == "base heard: hello"
        assert tab.page.evaluate("JSON.stringify(localStorage)").find("s3cret") < 0
        assert "s3cret" not in tab.page.url
        other = Tab(browser, address).open()  # another tab does not have it
        other.page.get_by_role("dialog", name="API key").wait_for()
        tab.context.close()
        other.context.close()


# Runs ----------------------------------------------------------------------------------------------------------------


def test_runs_are_listed_and_two_are_compared(tab: Tab) -> None:
    tab.page.get_by_role("link", name="Runs").click()
    tab.button("r=4").click()
    tab.page.get_by_role("img", name=re.compile("r=4: loss 4 at first")).wait_for()
    assert "delta.r" in tab.page.locator("#run").inner_text()
    tab.page.get_by_label("Compared with").and_(tab.page.locator("#run select")).select_option("r=16")
    tab.page.get_by_role("heading", name="What differs in the recipes").wait_for()
    rows = tab.page.locator("#run table").last.locator("tbody tr").all_inner_texts()
    assert [row.split() for row in rows] == [["delta.r", "4", "16"]]
    assert tab.page.locator("polyline").count() == 4


def test_without_a_folder_of_runs_there_is_no_such_view(browser: Any, script: Script) -> None:
    with served(app_of(script)) as address:
        tab = Tab(browser, address).open("/#runs")
        assert not tab.page.get_by_role("link", name="Runs").is_visible()
        tab.context.close()


# Data ----------------------------------------------------------------------------------------------------------------


def test_rows_are_leafed_through_token_by_token(browser: Any, script: Script, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of_rows(str(file), [f"base={save_tiny_base(tmp_path / 'base')}", "data.held_out=0"])
    with served(app_of(script, data=recipe)) as address:
        tab = Tab(browser, address).open()
        tab.page.get_by_role("link", name="Data").click()
        tab.page.get_by_role("heading", name="Rows, token by token").wait_for()
        assert "It is 0." in tab.page.locator("#data-row .supervised").inner_text()
        assert tab.button("Previous row").is_disabled()
        tab.button("Next row").press("Enter")
        tab.button("Next row").press("Enter")
        assert "It is 2." in tab.page.locator("#data-row .supervised").inner_text()
        assert tab.button("Next row").is_disabled()
        assert not tab.page.get_by_role("link", name="Runs").is_visible()
        tab.context.close()


# For everybody -------------------------------------------------------------------------------------------------------

RICH = "# Title\n\n| a | b |\n|---|---|\n| " + "long " * 40 + "| x |\n\n```\n" + "code " * 60 + "\n```\n" + "w" * 200


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_in_one_direction_alone(browser: Any, address: str, script: Script, scheme: str) -> None:
    script.answers["rich"] = [{"reasoning_content": "x" * 300}, RICH]
    tab = Tab(browser, address, PHONE, color_scheme=scheme).open()
    tab.say("rich")
    tab.say("v" * 300)
    tab.page.get_by_text("Thoughts").first.click()
    tab.button("Edit", tab.turn(1).locator(".user")).click()
    assert tab.width() <= PHONE[0]
    tab.page.keyboard.press("Escape")
    tab.button("Tokens vs parcels", tab.turn(1)).click()
    tab.page.get_by_role("tooltip").wait_for()
    assert tab.width() <= PHONE[0]
    tab.page.locator("#settings > summary").click()
    assert tab.width() <= PHONE[0]
    tab.page.get_by_role("link", name="Runs").click()
    tab.button("r=16").click()
    tab.page.get_by_role("img").last.wait_for()
    assert tab.width() <= PHONE[0]
    assert tab.problems == []
    tab.context.close()


def test_dark_follows_the_system_and_the_choice_is_kept(browser: Any, address: str) -> None:
    tab = Tab(browser, address, color_scheme="dark").open()
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = tab.page.evaluate(ground)
    tab.page.get_by_label("Colors").select_option("light")
    light = tab.page.evaluate(ground)
    assert sum(map(int, re.findall(r"\d+", dark))) < 200 < 600 < sum(map(int, re.findall(r"\d+", light)))
    tab.open()
    assert tab.page.evaluate(ground) == light
    tab.context.close()


def test_nothing_moves_where_motion_is_not_wanted(browser: Any, address: str, script: Script) -> None:
    script.pause = 0.5
    tab = Tab(browser, address, reduced_motion="reduce").open()
    tab.page.get_by_label("Message", exact=True).fill("x")
    tab.page.keyboard.press("Enter")
    tab.page.locator(".waiting").first.wait_for()
    assert tab.page.evaluate("getComputedStyle(document.querySelector('.waiting')).animationName") == "none"
    tab.context.close()


def test_everything_is_reached_by_tab_and_the_focus_is_seen(tab: Tab) -> None:
    tab.say("hello")
    tab.page.evaluate("document.querySelector('.skip').focus()")
    reached = []
    for _ in range(60):
        tab.page.keyboard.press("Tab")
        element = tab.page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e), box = e.closest('.box');"
            " return [e.textContent.trim() || e.id || e.name, s.outlineStyle !== 'none' ||"
            " (box && getComputedStyle(box).outlineStyle !== 'none')]; }"
        )
        if element[0] == "Skip to content":
            break
        reached.append(element)
    names = [name for name, _ in reached]
    for name in (
        "Chat",
        "Runs",
        "Key",
        "Edit",
        "Copy",
        "Again",
        "Tokens vs parcels",
        "say",
        "Send",
        "Settings",
        "system",
    ):
        assert name in names, name
    for name in ("temperature", "seed", "Save JSON", "As Python"):
        assert name in names, name
    assert all(seen for name, seen in reached if name in names[: names.index("As curl")])


def test_the_focus_stays_where_the_page_is_drawn_anew(tab: Tab) -> None:
    tab.say("one")
    tab.button("Again", tab.turn().locator(".answer").nth(1)).focus()
    tab.page.keyboard.press("Enter")
    tab.settle()
    tab.button("previous version").focus()
    tab.page.keyboard.press("Enter")
    assert tab.page.evaluate("document.activeElement.tagName") == "BUTTON"
    tab.say("two")
    assert tab.page.evaluate("document.activeElement.id") == "say"


NAMELESS = """() => [...document.querySelectorAll('button, a, input, select, textarea, summary, [role], [tabindex]')]
  .filter((e) => e.checkVisibility() && !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length
     || e.getAttribute('aria-labelledby') || e.getAttribute('role') === 'status'))
  .map((e) => e.outerHTML)"""


def test_controls_have_names_headings_an_order_and_ids_are_unique(tab: Tab, script: Script) -> None:
    script.answers["rich"] = [RICH]
    tab.say("rich")
    for view in ("Chat", "Runs"):
        tab.page.get_by_role("link", name=view).click()
        if view == "Runs":
            tab.button("r=4").click()
            tab.page.get_by_role("img").last.wait_for()
        assert tab.page.evaluate(NAMELESS) == []
        levels = tab.page.evaluate(
            "[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].filter(e => e.checkVisibility())"
            ".map(e => +e.tagName[1])"
        )
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False)), levels
    assert (
        tab.page.evaluate("(a => a.length - new Set(a).size)([...document.querySelectorAll('[id]')].map(e => e.id))")
        == 0
    )
    assert tab.page.evaluate("document.documentElement.lang") == "en"
    assert tab.page.locator("main").count() == 1


# With the real server ------------------------------------------------------------------------------------------------


def test_a_tiny_model_and_its_adapter_answer(browser: Any, served_base: Path, library: Path) -> None:
    from tests.serve.conftest import serve

    real = serve(served_base, library)
    with served(real.app) as address:
        tab = Tab(browser, address).open()
        models(tab, "tiny", "plain")
        tab.page.get_by_label("Max tokens").fill("6")
        tab.page.get_by_label("Temperature").fill("0")
        tab.say("hello")
        for column, model in enumerate(("tiny", "plain")):
            answer = tab.turn().locator(".answer").nth(column)
            expected = real.chat(model, "hello", max_tokens=6).json()["choices"][0]["message"]["content"]
            assert answer.locator(".said").inner_text().split() == expected.split()
            assert answer.locator(".model").get_attribute("title").startswith(f"{model}@")
        tab.button("Tokens vs plain").click()
        tab.page.get_by_role("listbox", name="Tokens of tiny").get_by_role("option").first.wait_for()
        assert tab.problems == []
        tab.context.close()
    real.service.close()
