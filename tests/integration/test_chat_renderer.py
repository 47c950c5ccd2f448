"""A hostile chat template harms nobody but those who chat."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

import psutil
import pytest

from gateway.chat_renderer import ChatRenderer
from gateway.chat_template import ChatTemplate, TemplateSource
from runtime.errors import CheckpointError, InvalidRequest

GOOD = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{{ bos_token }}"
CHAT = [{"role": "user", "content": 'a "b" \n é \U0001f600 \x00'}]

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
ENDLESS += "{% endfor %}" * 3
WHEN_ASKED = "{% if messages[0].content == 'kill' %}" + ENDLESS + "{% endif %}" + GOOD

LARGE = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
DEEP = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
DEEP += "{{ f(messages|length + 60) }}"


def made(source: str) -> ChatRenderer:
    return ChatRenderer(TemplateSource(source=source, special_tokens={"bos_token": "B"}, origin="the file"))


@pytest.fixture
async def renderer() -> AsyncIterator[Callable[[str], ChatRenderer]]:
    all_of_them: list[ChatRenderer] = []

    def make(source: str) -> ChatRenderer:
        all_of_them.append(made(source))
        return all_of_them[-1]

    yield make
    for each in all_of_them:
        await each.close()


async def test_it_writes_what_the_template_writes(renderer: Any) -> None:
    expected = ChatTemplate(GOOD, {"bos_token": "B"}, origin="").render(CHAT)
    here = renderer(GOOD)
    await here.start()
    assert await asyncio.gather(*(here.render(CHAT) for _ in range(20))) == [expected] * 20
    with pytest.raises(InvalidRequest, match="refuses these messages: no") as raised:
        await renderer("{{ raise_exception('no') }}").render(CHAT)
    assert raised.value.field == "messages"


@pytest.mark.parametrize(
    "hostile",
    [
        ENDLESS,
        DEEP,
        LARGE,
        "{{ 10 ** (10 ** (messages|length + 8)) }}",
        "{{ messages[0].role * 10 ** 11 }}",
        "{{ messages[0].role.ljust(10 ** 11) }}",
        "{{ '%s' % messages[0].role|center(10 ** 10) }}",
        "{% for i in range(99999) %}{{ messages[0].role * 99999 }}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.environ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
    ],
)
async def test_what_a_hostile_template_gets_is_an_error(renderer: Any, hostile: str) -> None:
    loop = asyncio.get_running_loop()
    beats: list[float] = []

    async def beat() -> None:
        while True:
            beats.append(loop.time())
            await asyncio.sleep(0.01)

    heart = asyncio.ensure_future(beat())
    try:
        with pytest.raises(InvalidRequest) as raised:
            await renderer(hostile).render(CHAT)
    finally:
        heart.cancel()
    assert raised.value.field == "messages"
    assert "root:" not in raised.value.message
    # The event loop has served others all the time.
    assert max(after - before for before, after in itertools.pairwise(beats)) < 0.5


async def test_the_next_chat_has_a_new_process(renderer: Any) -> None:
    here = renderer(WHEN_ASKED)
    fine = await here.render(CHAT)
    killed, *others = await asyncio.gather(
        here.render([{"role": "user", "content": "kill"}]),
        *(here.render(CHAT) for _ in range(3)),
        return_exceptions=True,
    )
    assert isinstance(killed, InvalidRequest)
    assert "too long" in killed.message
    assert others == [fine] * 3


async def test_one_that_somebody_else_kills_is_nobodys_error(renderer: Any) -> None:
    here = renderer(GOOD)
    fine = await here.render(CHAT)
    for settled in (True, False):
        (child,) = [p for p in psutil.Process().children() if "gateway.template_helper" in p.cmdline()]
        child.kill()
        async with asyncio.timeout(5):
            while settled and psutil.pid_exists(child.pid):  # the event loop reaps it, nobody else may
                await asyncio.sleep(0.005)
        assert await here.render(CHAT) == fine


async def test_it_has_no_secrets_and_no_room(renderer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_INTERNAL_SECRET", "hush")
    monkeypatch.setenv("HF_TOKEN", "hush")
    here = renderer(GOOD)
    await here.start()
    (child,) = [p for p in psutil.Process().children() if "gateway.template_helper" in p.cmdline()]
    assert "hush" not in child.environ().values()
    assert child.rlimit(psutil.RLIMIT_AS)[0] < 1 << 31
    assert child.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    await here.close()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


async def test_a_template_that_cannot_be_compiled_is_the_checkpoints_fault(renderer: Any) -> None:
    with pytest.raises(CheckpointError, match=r"the file: chat_template: .*nothing"):
        await renderer("{{ messages | nothing }}").start()
