"""A stream whose other end stands still, is full or is gone."""

import os
import re
import threading

import pytest

from runtime.patient_stream import PatientStream

LINES = [f"line {number} {'x' * 100}\n" for number in range(2000)]


@pytest.fixture
def pipe():
    reads, writes = os.pipe()
    with open(reads, "rb") as source, open(writes, "wb", buffering=0) as target:
        yield source, target


def read_until(source, end):
    text = b""
    while end not in text:
        text += source.read1()
    return text.decode()


def test_everything_arrives_in_order(pipe):
    source, target = pipe
    stream = PatientStream(target.fileno())
    for line in LINES[:100]:
        assert stream.write(line) == len(line)
    assert stream.drain(5.0)
    assert read_until(source, LINES[99].encode()) == "".join(LINES[:100])
    assert stream.num_dropped == 0


def test_nobody_reads_and_nobody_waits(pipe):
    """Into a pipe of 64 KiB through a queue of 10 kB: whole lines arrive, and what is missing is told."""
    source, target = pipe
    stream = PatientStream(target.fileno(), max_waiting_bytes=10_000)
    num_lines = 0
    while stream.drain(0.01):  # until the pipe is full
        for line in LINES:
            stream.write(line)
        num_lines += len(LINES)
    for line in LINES:
        stream.write(line)
    num_lines += len(LINES)
    num_dropped = stream.num_dropped
    assert num_dropped >= len(LINES) - 100
    text = []
    reader = threading.Thread(target=lambda: text.append(read_until(source, b"the end\n")))
    reader.start()
    assert stream.drain(5.0)
    stream.write("the end\n")
    reader.join(5)
    told = re.findall(r"^(\d+) log lines were dropped$", text[0], re.MULTILINE)
    known = set(LINES)
    num_whole = sum(line in known for line in text[0].splitlines(keepends=True))
    assert sum(map(int, told)) == num_dropped == num_lines - num_whole


def test_a_full_disk_and_a_closed_pipe_are_counted(pipe):
    source, target = pipe
    source.close()
    with open("/dev/full", "wb", buffering=0) as disk:
        for file in (disk, target):
            stream = PatientStream(file.fileno())
            for line in LINES[:10]:
                stream.write(line)
            assert stream.drain(5.0)
            assert stream.num_dropped == 10


def test_what_is_no_text_is_shown_as_it_can_be(pipe):
    source, target = pipe
    stream = PatientStream(target.fileno())
    stream.write("\ud800 é\n")
    assert stream.drain(5.0)
    assert source.read1() == "\\ud800 é\n".encode()
    assert (stream.isatty(), stream.writable(), stream.encoding) == (False, True, "utf-8")
