"""Conversations, and the table of `tandem status`, without a server."""

import io

import pytest

from runtime.errors import InvalidRequest, Overloaded
from tandem import inspection, terminal
from tandem.messages import ServerInfo, Worker
from tandem.terminal import Conversation


class FakeModel:
    """Stands for terminal.complete: says `answers` one by one; one that is an exception is raised."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.prompts = []

    def __call__(self, prompt, address, sampling):
        self.prompts.append(prompt)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def test_a_conversation_remembers(monkeypatch):
    model = FakeModel("one", "two")
    monkeypatch.setattr(terminal, "complete", model)
    conversation = Conversation("a", {}, "be short")
    conversation.turn("first")
    conversation.turn("second")
    said = [(message["role"], message["content"]) for message in model.prompts[1]]
    assert said == [("system", "be short"), ("user", "first"), ("assistant", "one"), ("user", "second")]


def test_repl_outlives_errors_and_interruptions(monkeypatch, capsys):
    lines = iter(["a", "", "b", "c"])

    def read(_):
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr(terminal, "complete", FakeModel(Overloaded("full"), KeyboardInterrupt(), "fine"))
    monkeypatch.setattr("builtins.input", read)
    conversation = Conversation("a", {})
    conversation.repl()
    assert capsys.readouterr().err == "error: full\n"
    assert [message["content"] for message in conversation.messages] == ["c", "fine"]


def test_any_sampling_field_by_name():
    options = ["n=2", 'stop=["a", "b"]', "early_stopping=never", 'bad_words=["x"]']
    assert terminal.sampling(None, None, None, None, None, options) == {
        "n": 2,
        "stop": ["a", "b"],
        "early_stopping": "never",
        "bad_words": ["x"],
    }
    for wrong in ("n", "beams=2", "n=abc", "early_stopping=maybe"):
        with pytest.raises(InvalidRequest, match=r"^--option"):
            terminal.sampling(None, None, None, None, None, [wrong])


def test_only_what_was_given_is_sent():
    assert terminal.sampling(None, None, None, None, None) == {}
    assert terminal.sampling(1, 0.0, 0.5, 0, ["x"]) == {
        "max_tokens": 1,
        "temperature": 0.0,
        "top_p": 0.5,
        "seed": 0,
        "stop": ["x"],
    }


def test_status_table():
    from rich.console import Console

    worker = Worker(
        id="decode-0",
        role="decode",
        state="ready",
        address="127.0.0.1:9",
        requests_running=3,
        requests_waiting=0,
        queued_prefill_tokens=0,
        blocks_used=5,
        blocks_cached=6,
        blocks_total=70,
        transfers=1,
    )
    info = ServerInfo(version="1", model="m", max_model_len=8, requests=3, workers=(worker,))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(inspection.table(info, {"workers": [{"id": "decode-0", "pid": 77, "restarts": 8}]}))
    text = console.export_text()
    for cell in ("decode-0", "ready", "127.0.0.1:9", "77  8", "5+6/70"):
        assert cell in text
