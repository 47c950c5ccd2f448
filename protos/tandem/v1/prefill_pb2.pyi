from protos.tandem.v1 import common_pb2 as _common_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillServiceAttachRequest(_message.Message):
    __slots__ = ("command",)
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    command: _common_pb2.AttachCommand
    def __init__(self, command: _Optional[_Union[_common_pb2.AttachCommand, _Mapping]] = ...) -> None: ...

class PrefillServiceAttachResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: _common_pb2.AttachEvent
    def __init__(self, event: _Optional[_Union[_common_pb2.AttachEvent, _Mapping]] = ...) -> None: ...
