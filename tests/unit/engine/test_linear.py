import pytest
import torch
import torch.nn.functional as F

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.models import linear as module
from engine.models.linear import PackedLinear, PlainLinear, linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture
def packs_all(monkeypatch, tiny_model):
    if not module.packed_rows_are_independent(torch.float32):
        pytest.skip("this oneDNN's packed products depend on the batch")
    monkeypatch.setattr(module, "MIN_PACKED_ELEMENTS", 0)


def test_small_weights_stay_as_they_are():
    assert isinstance(linear(torch.randn(8, 8)), PlainLinear)
    assert isinstance(linear(torch.randn(8, 8).half()), PlainLinear)


def test_an_op_whose_rows_depend_on_one_another_is_not_used(packs_all, monkeypatch):
    monkeypatch.setattr(module.PackedLinear, "apply", lambda self, x: x + len(x))
    module.packed_rows_are_independent.cache_clear()
    assert isinstance(linear(torch.randn(8, 8)), PlainLinear)
    module.packed_rows_are_independent.cache_clear()


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 96)])
def test_packed_is_the_same_product(packs_all, bias):
    weight, x = torch.randn(96, 64), torch.randn(37, 64)
    packed = linear(weight, bias)
    assert isinstance(packed, PackedLinear)
    torch.testing.assert_close(packed.apply(x), F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)


def test_a_row_has_the_same_bits_among_any_others(packs_all):
    packed, x = linear(torch.randn(320, 160)), torch.randn(130, 160)
    together = packed.apply(x)
    for first, num_rows in ((0, 4), (3, 4), (9, 5), (1, 16), (20, 33), (60, 64), (2, 128)):
        assert torch.equal(packed.apply(x[first : first + num_rows]), together[first : first + num_rows])


def test_packing_changes_no_token(packs_all, checkpoint, make_engine, make_request):
    packed = Engine(EngineConfig(num_blocks=64, block_size=4), load_model(checkpoint, EngineConfig()))
    requests = [make_request(n) for n in (1, 9, 30)]
    for request in requests:
        packed.submit(request)
    while packed.has_work():
        packed.step()
    plain = make_engine().run(*[make_request(n) for n in (1, 9, 30)])
    assert [request.output_token_ids for request in requests] == plain
