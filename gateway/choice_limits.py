"""How many choices a client may ask for, and what goes with a beam search. Pure."""

import math
from collections.abc import Mapping

from gateway.limits import MAX_CHOICES, MAX_LENGTH_PENALTY
from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import InvalidRequest

BEAM_VALUES: Mapping[str, tuple[float, ...]] = {
    "temperature": (1, 0),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "min_tokens": (0,),
}
"""Of fields that a beam search does not obey, the values that it need not; the first one is the neutral."""

NOT_WITH_BEAMS = (
    "stop",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "structured_output",
    "prompt_logprobs",
)


def complete_choices(asked: pb.SamplingParams, full: pb.SamplingParams) -> None:
    """Check what is asked about choices and complete `full`; InvalidRequest names the field."""
    full.n = _count(asked, "n", 1, 1)
    full.best_of = _count(asked, "best_of", full.n, full.n)
    full.length_penalty = asked.length_penalty if asked.HasField("length_penalty") else 1.0
    if full.early_stopping not in pb.EarlyStopping.values():
        raise InvalidRequest("early_stopping: unknown value", field="early_stopping")
    if full.use_beam_search:
        _complete_beams(asked, full)
    else:
        _complete_samples(full)


def _complete_samples(full: pb.SamplingParams) -> None:
    for name, neutral in (("length_penalty", 1.0), ("early_stopping", pb.EARLY_STOPPING_UNSPECIFIED)):
        if getattr(full, name) != neutral:
            raise InvalidRequest(f"{name} needs use_beam_search", field=name)
    if full.best_of > full.n and not full.HasField("logprobs"):
        full.logprobs = 0  # choices are ranked by them


def _count(asked: pb.SamplingParams, name: str, low: int, default: int) -> int:
    if not asked.HasField(name):
        return default
    value: int = getattr(asked, name)
    if not low <= value <= MAX_CHOICES:
        raise InvalidRequest(f"{name} must be in [{low}, {MAX_CHOICES}], got {value}", field=name)
    return value


def _complete_beams(asked: pb.SamplingParams, full: pb.SamplingParams) -> None:
    """Nothing but the likelihood counts: what would change it is refused, defaults are neutral."""
    given = {descriptor.name for descriptor, _ in asked.ListFields()}
    for name, values in BEAM_VALUES.items():
        if name in given and getattr(asked, name) not in values:
            raise InvalidRequest(f"{name} is not supported with use_beam_search", field=name)
        setattr(full, name, values[0])
    for name in NOT_WITH_BEAMS:
        if name in given:
            raise InvalidRequest(f"{name} is not supported with use_beam_search", field=name)
    if full.best_of < 2:
        raise InvalidRequest("use_beam_search needs at least 2 beams: best_of or n", field="best_of")
    penalty = full.length_penalty
    if not math.isfinite(penalty) or abs(penalty) > MAX_LENGTH_PENALTY:
        raise InvalidRequest(
            f"length_penalty must be in [-{MAX_LENGTH_PENALTY:g}, {MAX_LENGTH_PENALTY:g}], got {penalty:g}",
            field="length_penalty",
        )
