"""Chat templates in a process of their own, under limits.

A template comes with a model from anywhere and is a program. jinja2's sandbox keeps it from the interpreter; it does
not keep it from running for ever or from filling the memory. So it runs in a child process with a second of processor
time and 64 MiB for each row, which holds nothing and can be thrown away. Rows travel as lines of JSON, many at a time.
"""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

SECONDS = 0.8
"""Limit of processor time for the renders of one row: loops are interrupted then."""

CLOCK_SECONDS = 0.5
MORE_SECONDS = 0.4
PATIENCE_SECONDS = 30.0
"""What cannot be interrupted is killed when, from half a second on, it has used so much more of the processor; on a
machine too busy to give it that, when the patience is over."""

AT_ONCE_SECONDS = 0.05
"""Processor time after which the child sends the answers that it has, so that the clock is that of few rows."""

TICK_SECONDS = 0.02

START_SECONDS = 10.0
"""For python to start, and to read the template."""

MEMORY_MIB = 64
"""Memory that the renders of one row may need beside the row itself."""


TOO_LONG = f"it ran for more than {SECONDS:g} s and was stopped"
TOO_LARGE = f"it needs more than {MEMORY_MIB} MiB and was stopped"


class TemplateError(Exception):
    """What a template said when it refused, or why it was stopped."""


class Ask(NamedTuple):
    """What a row wants to have rendered: texts of chats, and the tools that all of them may call."""

    chats: Sequence[Sequence[Mapping[str, Any]]]
    beginnings: Sequence[tuple[int, int, bool]]
    """For each text: the number of its chat, how many of its messages, whether an answer is to follow."""
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = {}
    """Variables of the template that this row sets, beside those of `ChatTemplate`."""
    marks: Sequence[tuple[int, int, int, str, str]] = ()
    """Where there are any, one more chat is rendered with: the first one, and in the content of some messages a text
    before and a text after a part of it; (message, where the part begins, where it ends, before, after) of each. The
    content is a text, or a list of one part with a text."""


@dataclass
class _TemplateProcess:
    process: "subprocess.Popen[bytes]"
    owner: int
    deadline: float | None = None
    late: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    watched: threading.Event = field(default_factory=threading.Event)
    """Set while there is a deadline, and when the process has been killed: else the thread that watches sleeps."""

    def expect(self, seconds: float | None) -> None:
        """An answer within so many seconds from now; None: no answer is wanted."""
        self.deadline = None if seconds is None else time.monotonic() + seconds
        if seconds is None:
            self.watched.clear()
        else:
            self.watched.set()


class ChatTemplate:
    """A chat template with the variables that its tokenizer gives it (`bos_token` ...), and the day that it takes for
    today (None: the day on which this is made). Safe to fork and to copy."""

    def __init__(self, source: str, variables: Mapping[str, str], today: datetime.date | None = None) -> None:
        self.source = source
        self.variables = dict(variables)
        self.today = today or datetime.date.today()
        self._child: _TemplateProcess | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None}

    def __deepcopy__(self, memo: Any) -> "ChatTemplate":
        return ChatTemplate(self.source, self.variables, self.today)

    def render(
        self,
        chats: Sequence[Sequence[Mapping[str, Any]]],
        beginnings: Sequence[tuple[int, int, bool]],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[str]:
        """The texts of `beginnings`: (which of `chats`, how many of its messages, whether an answer is to follow).

        Raises TemplateError with what the template says, or with the limit that stopped it.
        """
        (found,) = self.render_all([Ask(chats, beginnings, tools)])
        if isinstance(found, TemplateError):
            raise found
        return found

    def render_all(self, asks: Sequence[Ask]) -> list[list[str] | TemplateError]:
        """What `render` returns or raises for each of many rows; the limits are of each."""
        with self.rendering(asks) as answers:
            return answers()

    @contextlib.contextmanager
    def rendering(self, asks: Sequence[Ask]) -> Iterator[Callable[[], list[list[str] | TemplateError]]]:
        """While the child renders these, the caller may do something else. The function that it gets, to be called
        once, waits for the result of `render_all`."""
        requests = [
            {
                "chats": ask.chats,
                "wanted": ask.beginnings,
                "tools": list(ask.tools) or None,
                "variables": dict(ask.variables),
                "marks": ask.marks,
            }
            for ask in asks
        ]
        with contextlib.ExitStack() as first:
            first_replies = first.enter_context(self._send(requests)) if requests else list

            def answers() -> list[list[str] | TemplateError]:
                replies, most = first_replies(), len(requests)
                first.close()
                found = list(map(_read, replies))
                while len(found) < len(requests):
                    most = most if replies else 1  # one of them does not let the child answer: which?
                    with self._send(requests[len(found) : len(found) + most]) as more:
                        replies = more()
                    found += map(_read, replies)
                return found

            yield answers

    @contextlib.contextmanager
    def _send(self, requests: Sequence[Mapping[str, Any]]) -> Iterator[Callable[[], list[dict[str, Any]]]]:
        """Send requests to the child. The function that the caller gets waits for the answers to the first of them: to
        one at least, or to none where the child was stopped at one of several."""
        child = self._running()
        pipes, replies = child.process, None
        assert pipes.stdin is not None
        assert pipes.stdout is not None

        def answers() -> list[dict[str, Any]]:
            nonlocal replies
            assert pipes.stdout is not None
            line = pipes.stdout.readline()
            replies = json.loads(line) if line.endswith(b"\n") else None  # a part of one: it was stopped
            child.expect(None)
            if replies is None:
                return [{"stopped": TOO_LONG if child.late else TOO_LARGE}] if len(requests) == 1 else []
            return list(replies)

        with child.lock:
            try:
                child.expect(CLOCK_SECONDS)
                with contextlib.suppress(BrokenPipeError):
                    pipes.stdin.write(json.dumps(requests).encode() + b"\n")
                    pipes.stdin.flush()
                yield answers
            finally:
                # An answer that was not waited for (Ctrl-C) must not be taken for the next one, and a process that was
                # stopped may hold much: both are not asked again.
                if replies is None or "stopped" in replies[-1]:
                    self._child = None
                    _end(child)

    def _running(self) -> _TemplateProcess:
        """The child process, started where this process (after a fork: this one) has none yet."""
        if self._child is None or self._child.owner != os.getpid() or self._child.process.poll() is not None:
            command = [sys.executable, "-I", str(Path(__file__))]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 (ourselves)
            self._child = child = _TemplateProcess(process, os.getpid())
            weakref.finalize(self, _end, child)
            assert process.stdin is not None
            assert process.stdout is not None
            child.expect(START_SECONDS)
            threading.Thread(target=_watch, args=(child,), name="template", daemon=True).start()
            first = {"template": self.source, "variables": self.variables, "today": self.today.isoformat()}
            process.stdin.write(json.dumps(first).encode() + b"\n")
            process.stdin.flush()
            ready = json.loads(process.stdout.readline() or b'{"error": "reading it was stopped"}')
            child.expect(None)
            if "error" in ready:
                self._child = None
                _end(child)
                raise TemplateError(ready["error"])
        return self._child


def _read(answer: Mapping[str, Any]) -> list[str] | TemplateError:
    """The texts of a row; a number stands for so many characters of the first."""
    if "texts" not in answer:
        return TemplateError(answer.get("error") or answer["stopped"])
    whole, *others = answer["texts"]
    return [whole, *(whole[:other] if isinstance(other, int) else other for other in others)]


def _end(child: _TemplateProcess) -> None:
    """Kill the process, unless it is that of another one that this was forked from."""
    if child.owner == os.getpid():
        child.process.kill()
        for pipe in (child.process.stdin, child.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        child.process.wait()
        child.watched.set()


def _watch(child: _TemplateProcess) -> None:
    """Kill a child whose answer is late: a single long operation cannot be interrupted from inside."""
    late_since, used_by_then, waited = 0.0, 0.0, 0.0
    while child.watched.wait() and child.process.poll() is None:
        if (deadline := child.deadline) is not None and time.monotonic() > deadline:
            used = _processor_seconds(child.process.pid)
            if deadline != late_since:
                late_since, used_by_then, waited = deadline, used or 0.0, 0.0
            used = waited if used is None else used - used_by_then
            if used > MORE_SECONDS or waited > PATIENCE_SECONDS:
                child.late = True
                child.process.kill()
            waited += TICK_SECONDS  # not what the clock says: all of us may have been stopped (Ctrl-Z) and gone on
        time.sleep(TICK_SECONDS)


def _processor_seconds(pid: int) -> float | None:
    """Processor seconds of a process; None where the system does not report them."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# In the child: nothing below is called elsewhere, and nothing but jinja2 is imported -------------------------------


def _environment(today: datetime.date) -> Any:
    """What transformers offers to templates, in jinja2's sandbox. The time is the beginning of this day: rows must not
    depend on when they are rendered."""
    from jinja2 import TemplateError as JinjaError
    from jinja2 import nodes, pass_context
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.runtime import LoopContext
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` around answers: we find them otherwise, so it is what it holds."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class PlainNamespace(Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"namespace attribute {name!r}")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> NoReturn:
        raise JinjaError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    numbers = {"first", "last", "index", "index0", "revindex", "revindex0", "length", "depth", "depth0"}

    class Environment(ImmutableSandboxedEnvironment):
        def getattr(self, obj: Any, attribute: str) -> Any:
            # What most templates ask most often, and what the sandbox allows after long looking: numbers and flags.
            if type(obj) is LoopContext and attribute in numbers:
                return getattr(obj, attribute)
            return super().getattr(obj, attribute)

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        # Nothing is computed before a row is there and its clock runs: no constant is folded, in output neither.
        optimized=False,
        finalize=pass_context(lambda context, value: value),
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=datetime.datetime.combine(today, datetime.time()).strftime,
        namespace=PlainNamespace,
        dict=lambda *pairs, **fields: dict(*pairs, **fields),
    )
    return environment


class _Stopped(BaseException):
    """Raised by the clock; nothing in a template can catch it."""


def _stop(number: int, frame: object) -> NoReturn:
    raise _Stopped


def _limit_memory(mib: int | None, beside: int = 0) -> None:
    """Let this process have so much more than it has now; None lifts the limit."""
    try:
        import resource

        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError):  # no such limits here: the clock's is left
        return
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most if mib is None else now + beside + mib * 2**20, most))


def _texts(template: Any, variables: Mapping[str, str], request: Mapping[str, Any]) -> list[str | int]:
    """The texts; of one that begins the first only its length, as most do."""
    chats = request["chats"]
    if request["marks"]:
        chats = [*chats, _marked(chats[0], request["marks"])]
    whole, *others = [
        template.render(
            **{**variables, **request["variables"]},
            messages=chats[which][:count],
            tools=request["tools"],
            documents=None,
            add_generation_prompt=answer_next,
        )
        for which, count, answer_next in request["wanted"]
    ]
    return [whole, *(len(other) if whole.startswith(other) else other for other in others)]


def _marked(chat: Sequence[dict[str, Any]], marks: Sequence[Any]) -> list[dict[str, Any]]:
    found = list(chat)
    for index, start, end, before, after in marks:
        content = chat[index]["content"]
        text = content if isinstance(content, str) else content[0]["text"]
        text = f"{text[:start]}{before}{text[start:end]}{after}{text[end:]}"
        marked = text if isinstance(content, str) else [{**content[0], "text": text}]
        found[index] = {**chat[index], "content": marked}
    return found


def _answers(template: Any, variables: Mapping[str, str], line: bytes) -> bytes:
    requests, answers = json.loads(line), list[dict[str, Any]]()
    until = time.process_time() + AT_ONCE_SECONDS
    _limit_memory(MEMORY_MIB, beside=4 * len(line))
    for request in requests:
        answer = _answer(template, variables, request)
        if answers and answer == {"stopped": TOO_LARGE}:
            break  # perhaps for what those before it hold: it is asked again, as the first
        answers.append(answer)
        if "stopped" in answer or time.process_time() > until:
            break
    _limit_memory(None)
    return json.dumps(answers).encode()


def _answer(template: Any, variables: Mapping[str, str], request: Mapping[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any]
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        answer = {"texts": _texts(template, variables, request)}
    except _Stopped:
        answer = {"stopped": TOO_LONG}
    except MemoryError:
        answer = {"stopped": TOO_LARGE}
    except RecursionError:
        answer = {"error": "it calls itself without end"}
    except Exception as error:
        answer = {"error": f"{error}" or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return answer


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    first = json.loads(requests.readline())
    signal.signal(signal.SIGVTALRM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks; it closes our input when it ends
    try:
        environment = _environment(datetime.date.fromisoformat(first["today"]))
        _limit_memory(MEMORY_MIB, beside=4 * len(first["template"]))
        template = environment.from_string(first["template"])
        template.globals = dict(template.globals)  # which is slow to go through, and goes into every render
        reply = b"{}"
    except Exception as error:
        reply = json.dumps({"error": f"it is not a template: {error}"}).encode()
    finally:
        _limit_memory(None)  # the next request is read before its own limit is known
    answers.write(reply + b"\n")
    answers.flush()
    for line in requests:
        answers.write(_answers(template, first["variables"], line) + b"\n")
        answers.flush()


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
