"""Log-probabilities of the prompt over the whole path."""

import grpc
import pytest

from protos.tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.e2e.harness import Up

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PROMPT = list(range(40, 700, 3))


def of_http(up: Up, prompt: list[int]) -> list[dict[str, dict[str, float]] | None]:
    return up.complete(prompt, max_tokens=2, temperature=0, prompt_logprobs=3)["choices"][0][
        "prompt_logprobs"
    ]


@pytest.mark.parametrize("length", [1, 2, 17, len(PROMPT)])
def test_split_equals_colocated_and_the_second_time_equals_the_first(
    split: Up, colocated: Up, length: int
) -> None:
    prompt = PROMPT[:length]
    first, *others = [of_http(up, prompt) for up in (split, split, colocated)]
    assert others == [first, first]
    assert first[0] is None
    assert len(first) == length
    for token_id, entry in zip(prompt[1:], first[1:], strict=True):
        assert entry is not None
        assert str(token_id) in entry
        assert len(entry) in (3, 4)
        assert {each["rank"] for each in entry.values()} >= {1, 2, 3}


def test_grpc_and_http_agree(split: Up) -> None:
    sampling = common_pb2.SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=3)
    prompt = inference_pb2.TokenIds(ids=PROMPT)
    with grpc.insecure_channel(split.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(token_ids=prompt, sampling=sampling)
        messages = list(stub.Generate(request))
        whole = stub.Complete(inference_pb2.CompleteRequest(token_ids=prompt, sampling=sampling))
    assert messages[0].prompt_logprobs == whole.prompt_logprobs
    assert not any(message.prompt_logprobs for message in messages[1:])
    over_http = of_http(split, PROMPT)[1:]
    for token_id, entry, logprob in zip(PROMPT[1:], over_http, whole.prompt_logprobs, strict=True):
        assert entry is not None
        assert entry[str(token_id)]["logprob"] == pytest.approx(logprob.logprob, abs=1e-6)


def test_chat_and_what_is_refused(split: Up) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "prompt_logprobs": 0}
    answer = split.client.post("/v1/chat/completions", json=body).json()
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    for fields in ({"prompt_logprobs": 21}, {"prompt_logprobs": 1, "stream": True}, {"prompt_logprobs": -1}):
        refused = split.client.post("/v1/completions", json={"prompt": "x"} | fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")
