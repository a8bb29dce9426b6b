"""Templates from anywhere: what transformers would render, and nothing else, within a second and 64 MiB."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from graftlm.data.chat.template import Ask, ChatTemplate, TemplateError

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def render(source: str, *, variables: dict[str, str] | None = None) -> str:
    return ChatTemplate(source, variables or {}).render([CHAT], [(0, 2, False)])[0]


ESCAPES = {
    "class": "{{ ''.__class__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "code of a function": "{{ strftime_now.__code__ }}",
    "through attr": "{{ ''|attr('__class__') }}",
    "through attr of a format": "{{ (''|attr('format'))('{0.__class__}', '') }}{{ '{0.__class__}'.format('') }}",
    "through map": "{{ ['']|map(attribute='__class__')|list }}",
    "through a namespace": "{% set n = namespace() %}{{ n.__init__.__globals__ }}",
    "into a namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n.__class__ }}",
    "through cycler": "{{ cycler.__init__.__globals__.os }}",
    "through joiner": "{{ joiner.__init__.__globals__ }}",
    "through lipsum": "{{ lipsum.__globals__['os'] }}",
    "through self": "{{ self.__init__.__globals__ }}",
    "through a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "by changing a message": "{% set _ = messages.append(1) %}",
    "by changing fields": "{% set _ = messages[0].update({'role': 'x'}) %}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "an include": "{% include '/etc/passwd' %}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "a generator's frame": "{{ (messages|map('upper')).gi_frame }}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_cannot_get_out(name: str) -> None:
    try:
        text = render(ESCAPES[name])
    except TemplateError:
        return
    assert not any(sign in text for sign in ("<class", "<function", "<module", "root:", "<built-in", "<frame")), text


BOMBS = {
    "endless in effect": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a recursion that doubles": "{% macro m(n) %}{% if n %}{{ m(n-1) ~ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a long string": "{{ 'a' * 10**10 }}",
    "a wide column": "{{ 'a'|center(10**10) }}",
    "a wide format": "{{ '%10000000000d' % 1 }}",
    "a wide format by method": "{{ '{:>10000000000}'.format(1) }}",
    "a batch": "{{ [1]|batch(10**9, 0)|list }}",
    "a deep indent": "{{ ('a\n' * 50000)|indent(100000) }}",
    "doubling": "{% set n = namespace(a='aaaaaaaa') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "doubling of a list": "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "a power": "{{ 7 ** (10 ** 9) }}",
    "a power of a power": "{{ 7 ** (10 ** 7) % 3 ** (10 ** 7) }}",
    "much output": "{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_does_not_end_or_needs_much_is_stopped_and_the_next_row_is_rendered(name: str) -> None:
    template = ChatTemplate("{% if messages[0].content == 'bomb' %}" + BOMBS[name] + "{% endif %}fine", {})
    assert template.render([CHAT], [(0, 2, False)]) == ["fine"]
    bomb = [{"role": "user", "content": "bomb"}]
    with pytest.raises(TemplateError, match=r"was stopped|calls itself|too (big|long|wide)|Range|sandbox|digits"):
        template.render([bomb], [(0, 1, False)])
    assert template.render([CHAT], [(0, 2, False)]) == ["fine"]


@pytest.mark.versions
def test_what_is_no_template_is_said() -> None:
    with pytest.raises(TemplateError, match="not a template.*endfor"):
        render("{% for m in messages %}")


@pytest.mark.versions
def test_what_a_template_refuses_is_passed_on_and_unknown_names_are_empty() -> None:
    with pytest.raises(TemplateError, match="^no tools here$"):
        render("{{ raise_exception('no tools here') }}")
    assert render("{{ bos_token }}{{ nothing }}{{ messages|length }}", variables={"bos_token": "<s>"}) == "<s>2"


@pytest.mark.versions
def test_answers_may_stand_in_generation_tags_and_dates_may_be_asked_for() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert render(source) == "a"
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


@pytest.mark.versions
def test_beginnings_of_several_chats_in_one_call() -> None:
    template = ChatTemplate("{{ messages|map(attribute='content')|join }}{{ '?' if add_generation_prompt }}", {})
    other = [{"role": "user", "content": "\u00e9\U0001f600"}]
    assert template.render([CHAT, other], [(0, 2, False), (0, 1, True), (1, 1, False)]) == [
        "ab",
        "a?",
        "\u00e9\U0001f600",
    ]


def test_marks_stand_around_a_part_of_a_message_in_one_more_chat() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}:{{ m['content'] }};{% endfor %}", {})
    chat = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "bc"}]
    marks = [(0, 1, 2, "<", ">"), (1, 0, 2, "[", "]")]
    ask = Ask([chat], [(0, 2, False), (1, 2, False), (1, 1, False)], marks=marks)
    assert template.render_all([ask]) == [["user: a ;assistant:bc;", "user: <a> ;assistant:[bc];", "user: <a> ;"]]


@pytest.mark.versions
def test_what_a_loop_knows_of_itself() -> None:
    """Asked for without the sandbox's long look: the same as jinja2 says, and nothing of what is inside."""
    names = ("first", "last", "index", "index0", "revindex", "revindex0", "length", "depth", "depth0")
    template = "{% for m in messages %}" + ",".join(f"{{{{ loop.{name} }}}}" for name in names) + ";{% endfor %}"
    assert render(template) == "True,False,1,0,2,1,2,1,0;False,True,2,1,1,0,2,1,0;"
    assert render("{% for m in messages %}{{ loop.changed(m.role) }};{% endfor %}") == "True;True;"
    for name in ("__class__", "_iterator", "__init__"):
        assert render(f"{{% for m in messages %}}[{{{{ loop.{name} }}}}]{{% endfor %}}") == "[][]"


@pytest.mark.slow
def test_many_rows_at_once_are_the_same_and_one_that_is_stopped_costs_itself() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    large = "{{ ('a' * 99999999)[:1] }}"
    template = ChatTemplate(
        f"{{% if messages[0].content == 'loop' %}}{loop}{{% elif messages[0].content == 'large' %}}{large}"
        "{% elif messages[0].content == 'no' %}{{ raise_exception('I do not') }}"
        "{% else %}{{ messages[0].content * 2 }}{% endif %}",
        {},
    )
    contents = [f"text {i}" for i in range(300)]
    contents[20], contents[150], contents[299] = "loop", "no", "large"
    asks = [Ask([[{"role": "user", "content": text}]], [(0, 1, False), (0, 1, True)]) for text in contents]
    found = template.render_all(asks)
    assert len(found) == 300
    for text, texts in zip(contents, found, strict=True):
        if text.startswith("text"):
            assert texts == [text * 2, text * 2]
    for place, why in ((20, "ran for more"), (150, "I do not"), (299, "needs more")):
        assert isinstance(found[place], TemplateError)
        assert why in str(found[place])


def test_the_first_row_has_its_own_limit_not_that_of_the_template() -> None:
    long = [{"role": "user", "content": "a" * 24_000_000}]
    (text,) = ChatTemplate("{{ messages[0].content }}", {}).render([long], [(0, 1, False)])
    assert len(text) == 24_000_000


def test_copies_and_forks_have_processes_of_their_own() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    request = ([CHAT], [(0, 2, False)])
    assert template.render(*request) == ["a"]
    assert pickle.loads(pickle.dumps(template)).render(*request) == ["a"]
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, template.render(*request)[0].encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 9) == b"a"
    assert template.render(*request) == ["a"], "the child's end did not take the parent's process along"
    os.close(read)
    os.close(write)


def test_an_answer_that_was_not_waited_for_is_not_taken_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    template.render([CHAT], [(0, 1, False)])
    child = template._child
    assert child is not None

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graftlm.data.chat.template.json.loads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        template.render([CHAT], [(0, 1, False)])
    monkeypatch.undo()
    assert template.render([CHAT[1:]], [(0, 1, False)]) == ["b"]


def test_something_else_may_be_done_while_rows_are_rendered() -> None:
    template = ChatTemplate("{{ messages[0].content * 2 }}", {})
    asks = [Ask([[{"role": "user", "content": f"{i} " * 1000}]], [(0, 1, False)]) for i in range(300)]
    with template.rendering(asks) as answers:
        time.sleep(0.2)  # by then the child waits in its turn, with more than a pipe holds
        assert answers() == [[f"{i} " * 2000] for i in range(300)]
    with template.rendering([]) as answers:
        assert answers() == []


def test_rows_that_were_not_waited_for_are_not_taken_for_the_next() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})

    def broken_off() -> None:
        with template.rendering([Ask([CHAT], [(0, 1, False)])]):
            raise RuntimeError("something else went wrong")

    with pytest.raises(RuntimeError, match="something else"):
        broken_off()
    assert template.render([CHAT[1:]], [(0, 1, False)]) == ["b"]


def test_a_program_that_is_stopped_for_a_while_goes_on_where_it_was() -> None:
    """Ctrl-Z, and later `fg`: the clock has gone on, and no row has taken too long for that."""
    program = """
import os, signal, time
from graftlm.data.chat import template
template.CLOCK_SECONDS, template.MORE_SECONDS, template.PATIENCE_SECONDS = 0.05, 9.0, 1.0
asked = template.ChatTemplate("{{ messages[0].content * 9 }}", {})
with asked.rendering([template.Ask([[{"content": "a" * 100_000}]], [(0, 1, False)])]) as answers:
    print("begun", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.2)
    print(answers() == [["a" * 900_000]])
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "True\n"


def test_the_process_ends_with_its_template() -> None:
    template = ChatTemplate("x", {})
    before = set(threading.enumerate())
    template.render([CHAT], [(0, 1, False)])
    (watcher,) = set(threading.enumerate()) - before
    assert template._child is not None
    process = template._child.process
    del template
    assert process.wait(timeout=10) is not None
    assert not Path(f"/proc/{process.pid}").exists()
    watcher.join(10)
    assert not watcher.is_alive()


def test_a_template_that_renders_nothing_wakes_nobody() -> None:
    template, before = ChatTemplate("x", {}), set(threading.enumerate())
    template.render([CHAT], [(0, 1, False)])
    (watcher,) = set(threading.enumerate()) - before
    time.sleep(0.1)  # it may be in its last turn

    def woken() -> int:
        lines = Path(f"/proc/self/task/{watcher.native_id}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

    count = woken()
    time.sleep(0.5)
    assert woken() == count
    assert template.render([CHAT], [(0, 1, False)]) == ["x"]
