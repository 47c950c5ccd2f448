"""Both ways of a benchmark's requests, against a server's bytes."""

import json

import httpx
import pytest

from runtime.errors import Internal, Overloaded, Unavailable
from tandem.bench import Workload
from tandem.bench_backends import HttpBackend, vocab_size
from tandem.bench_command import Options, run
from tandem.messages import Model


def server(status=200, events=(), seen=None):
    def handle(request):
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "root": "/m", "max_model_len": 9}]})
        if seen is not None:
            seen.append(json.loads(request.content))
        if status != 200:
            return httpx.Response(status, json={"error": {"message": "no room"}})
        body = ": comment\n\n" + "".join(f"data: {event}\n\n" for event in events)
        return httpx.Response(200, text=body, headers={"content-type": "text/event-stream"})

    return HttpBackend(httpx.AsyncClient(base_url="http://test", transport=httpx.MockTransport(handle)))


def chunk(*token_ids):
    return json.dumps({"choices": [{"index": 0, "text": "x", "token_ids": list(token_ids)}]})


async def counted(backend):
    return [count async for count in backend.stream([1, 2], Workload(output_len=3))]


async def test_tokens_are_counted_by_id():
    seen = []
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": 3}})
    assert await counted(server(events=[chunk(4), chunk(5, 6), usage, "[DONE]"], seen=seen)) == [1, 2, 0]
    wanted = {"model": "m", "prompt": [1, 2], "max_tokens": 3, "ignore_eos": True, "stream": True}
    assert wanted.items() <= seen[0].items()


async def test_refusal():
    with pytest.raises(Overloaded, match="HTTP 429: no room"):
        await counted(server(status=429))


async def test_error_within_the_stream():
    with pytest.raises(Internal, match="lost"):
        await counted(server(events=[chunk(1), json.dumps({"error": {"message": "lost"}})]))


async def test_nobody_there():
    def handle(request):
        raise httpx.ConnectError("refused")

    backend = HttpBackend(httpx.AsyncClient(base_url="http://test", transport=httpx.MockTransport(handle)))
    with pytest.raises(Unavailable, match="refused"):
        await backend.model()


def test_vocabulary_of_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 77}')
    assert vocab_size(Model(id="m", root=str(tmp_path), max_model_len=1)) == 77
    assert vocab_size(Model(id="m", root="", max_model_len=1)) is None
    assert vocab_size(Model(id="m", root="/no/such/place", max_model_len=1)) is None


def test_report_file(tmp_path, monkeypatch, capsys):
    events = [chunk(1), chunk(2), chunk(3), "[DONE]"]
    monkeypatch.setattr("tandem.bench_command.HttpBackend", lambda http: server(events=events))
    file = tmp_path / "report.json"
    options = Options(backend="http", address="http://test", vocab_size=10, json_file=str(file))
    workload = Workload(num_prompts=2, input_len=4, output_len=3)
    assert run(workload, options, ["ttft:1e6 tpot:1e6"]) == 0
    report = json.loads(file.read_text())
    assert (report["completed"], report["total_output_tokens"], report["total_input_tokens"]) == (2, 6, 8)
    assert report["request_goodput"] == report["request_throughput"]
    assert report["request_rate"] == "inf"
    assert report["model_id"] == "m"
    assert "2 completed, 0 failed" in capsys.readouterr().out
