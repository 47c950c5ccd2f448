import pytest
import torch

from engine.request import Request, SamplingParams, TokenLogprob
from engine.sampler import NO_TOKEN, NOT_FINITE, Sampler
from kernels import ops
from runtime.errors import InvalidRequest

VOCAB = 40


def make_request(prompt=(1, 2), outputs=(), choice=0, **sampling):
    return Request(
        key=0,
        prompt_token_ids=list(prompt),
        output_token_ids=list(outputs),
        sampling=SamplingParams(**{"max_tokens": 99, **sampling}),
        choice=choice,
    )


def logits_of(num_rows):
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(num_rows))


def token_ids(logits, requests):
    return [sample.token_id for sample in Sampler((0,), VOCAB).sample(logits, requests)]


def test_a_greedy_tie_goes_to_the_lowest_id():
    logits = torch.zeros(2, VOCAB)
    logits[0, [7, 9, 30]] = 1.0
    assert token_ids(logits, [make_request(temperature=0)] * 2) == [7, 0]


def test_sampling_is_argmax_of_scaled_logits_plus_noise():
    logits = logits_of(1)
    request = make_request(prompt=(1, 2, 3), outputs=(4, 5), choice=2, temperature=0.7, seed=-9)
    noise = ops.gumbel_noise(torch.tensor([-9]), torch.tensor([5]), torch.tensor([2]), VOCAB)
    assert token_ids(logits, [request]) == (logits / 0.7 + noise).argmax(-1).tolist()


def test_a_row_does_not_depend_on_its_batch_mates():
    requests = [
        make_request(temperature=0),
        make_request(seed=1),
        make_request(seed=2, top_k=3, outputs=(5, 6)),
        make_request(seed=3, top_p=0.5, logprobs=2),
        make_request(temperature=0, repetition_penalty=1.4, prompt=range(20)),
        make_request(seed=4, frequency_penalty=1.0, presence_penalty=-0.5, outputs=(1, 1, 2)),
        make_request(seed=5, min_p=0.2, logit_bias={3: 4.0}, min_tokens=3),
    ]
    logits = logits_of(len(requests))
    together = Sampler((0,), VOCAB).sample(logits, requests)
    for row, request in enumerate(requests):
        assert Sampler((0,), VOCAB).sample(logits[row : row + 1], [request]) == [together[row]]


def test_presence_and_frequency_count_output_only():
    logits = torch.zeros(1, VOCAB)
    request = make_request(
        prompt=(8, 8), outputs=(3, 3, 3, 5), temperature=0, presence_penalty=0.5, frequency_penalty=0.25
    )
    want = torch.zeros(1, VOCAB)
    want[0, 3], want[0, 5] = -0.5 - 3 * 0.25, -0.5 - 0.25
    torch.testing.assert_close(Sampler((), VOCAB)._edit(logits, [request]), want)


def test_min_tokens_forbids_what_would_end_the_request():
    logits = torch.zeros(4, VOCAB)
    logits[:, 0], logits[:, 6], logits[:, 9] = 3.0, 2.0, 1.0
    requests = [
        make_request(temperature=0, min_tokens=1, stop_token_ids=(6,)),
        make_request(temperature=0, min_tokens=1, stop_token_ids=(6,), ignore_eos=True),
        make_request(temperature=0, min_tokens=1, stop_token_ids=(6,), outputs=(9,)),
        make_request(temperature=0, min_tokens=1),
    ]
    assert token_ids(logits, requests) == [9, 0, 0, 6]


def test_logprobs_are_of_the_untouched_distribution():
    logits = logits_of(3)
    requests = [
        make_request(temperature=0.1, logit_bias={4: 50.0}, logprobs=2),
        make_request(temperature=0),
        make_request(temperature=0, logprobs=0),
    ]
    first, second, third = Sampler((), VOCAB).sample(logits, requests)
    raw = logits.log_softmax(-1)
    assert first.token_id == 4
    assert first.logprob.logprob == pytest.approx(float(raw[0, 4]))
    assert [token_id for token_id, _ in first.logprob.top] == raw[0].topk(2).indices.tolist()
    assert second.logprob is None
    assert third.logprob == TokenLogprob(float(raw[2].max()), ())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"top_p": 0.5, "top_k": 3, "min_p": 0.1, "logprobs": 1}]
)
def test_a_row_that_is_not_finite_fails_alone(bad, params):
    logits = logits_of(3)
    logits[1, 7] = bad
    requests = [make_request(**params) for _ in range(3)]
    samples = Sampler((), VOCAB).sample(logits, requests)
    assert [sample.error for sample in samples] == [None, NOT_FINITE, None]
    assert samples[0] == Sampler((), VOCAB).sample(logits[:1], requests[:1])[0]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_without_any_allowed_token_fails_alone(temperature):
    logits = logits_of(3)
    params = {"temperature": temperature, "typical_p": 0.5, "logprobs": 1}
    nothing = make_request(allowed_token_ids=(4,), bad_words=((4,),), **params)
    requests = [make_request(**params), nothing, make_request(**params)]
    samples = Sampler((), VOCAB).sample(logits, requests)
    assert [sample.error for sample in samples] == [None, NO_TOKEN, None]
    assert samples[0] == Sampler((), VOCAB).sample(logits[:1], requests[:1])[0]


def test_an_end_token_is_no_bad_word():
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 2.0
    words = ((7,), (1, 2, 8), (9, 2, 3))
    edited = [
        Sampler(eos, VOCAB)._edit(logits, [make_request(prompt=(0, 1), outputs=(2,), bad_words=words)])
        for eos in ((), (7,))
    ]
    assert [(row[0] == -torch.inf).nonzero().flatten().tolist() for row in edited] == [[7, 8], [8]]


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-6])
def test_a_vanishing_temperature_is_greedy(temperature):
    logits = logits_of(1)
    assert token_ids(logits, [make_request(temperature=temperature, seed=4)]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("typical_p", 0.0),
        ("typical_p", 1.1),
        ("bad_words", ((3,), ())),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
        ("seed", 2**63),
        ("logit_bias", {3: float("nan")}),
        ("logprobs", -1),
    ],
)
def test_parameters_out_of_range_name_their_field(field, value):
    with pytest.raises(InvalidRequest) as caught:
        make_request(**{field: value})
    assert caught.value.field == field
