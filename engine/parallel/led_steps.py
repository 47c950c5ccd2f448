"""Steps over fixed buffers on several ranks: every rank has its own, rank 0 says when to run which.

1. RECORD_STEPS: all ranks make the same buffers and record the same shapes at the same time. Recording runs
   the steps, and so their collective operations, over padding.
2. CHANGE_TABLES, rarely: what has changed in the block tables and has no room in a step.
3. STEP, once a step and follower: the shape, and the bytes that rank 0 has just sent to its device. A
   follower sends the same bytes to its own device and runs its own recording; there is nothing to encode and
   nothing to answer, so rank 0 may start the next step while this one runs.
4. A step that draws ends with a broadcast of the tokens, so that the next one finds them on every rank.

A follower may run ahead of its device. It still never overwrites bytes on their way there: rank 0 sends a
step only when the one `NUM_STAGES` before it has landed, which took the follower's part of the logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.models.decoder import Decoder
from engine.parallel.groups import Group
from engine.parallel.led_pool import Commander
from engine.parallel.wire import Message, Op
from engine.step.decode_step import DecodeStep, FollowingStep
from engine.step.graphs import StepGraphs, recorder_for
from engine.step.shapes import StepShape
from engine.step.spec import StepSpec


class LedSteps:
    """See engine.step.step_ranks.StepRanks."""

    def __init__(self, leader: Commander, module: Decoder, group: Group, spec: StepSpec) -> None:
        self.module = module
        self._leader = leader
        self._group = group
        self._spec = spec

    @contextmanager
    def recording(self) -> Iterator[None]:
        """See StepRanks."""
        self._leader.tell(Op.RECORD_STEPS, *self._spec.arrays())
        with self._leader.leading():
            yield

    def change(self, changes: Tensor) -> None:
        """See StepRanks."""
        self._leader.tell(Op.CHANGE_TABLES, payload=changes)

    @contextmanager
    def running(self, shape: StepShape, filled: Tensor) -> Iterator[None]:
        """See StepRanks."""
        self._leader.tell(Op.STEP, [shape.num_seqs, shape.width], payload=filled)
        with self._leader.leading(), self._group.replaying():
            yield

    def share(self, token_ids: Tensor) -> None:
        """See StepRanks."""
        self._group.broadcast(token_ids)


class FollowedSteps:
    """A follower's steps."""

    def __init__(self, spec: StepSpec, module: Decoder, kv_group: Tensor, group: Group) -> None:
        """Record every shape, while all ranks do."""
        self._group = group
        inputs, max_num_rows = spec.inputs(kv_group.device), spec.shapes.max_num_rows
        step: DecodeStep
        if spec.draws:
            step = FollowingStep(module, kv_group, inputs, max_num_rows=max_num_rows, share=group.broadcast)
        else:
            step = DecodeStep(module, kv_group, inputs)
        self._inputs = inputs
        recorder = recorder_for(kv_group.device, captured=spec.captured)
        self._graphs = StepGraphs(step, spec.shapes, recorder)
        self._graphs.capture()

    def change(self, message: Message) -> None:
        """Carry out CHANGE_TABLES."""
        self._inputs.take_changes(_bytes(message))

    def run(self, message: Message) -> None:
        """Start the step of STEP."""
        [(num_seqs, width)] = message.lists
        with self._group.replaying():
            self._graphs.repeat(StepShape(num_seqs, width), _bytes(message))


def _bytes(message: Message) -> Tensor:
    return torch.frombuffer(message.payload, dtype=torch.uint8)
