"""Memory between processes, tried within one: the address goes through /proc all the same."""

import fcntl
import gc
import os
import queue
import threading
from pathlib import Path

import pytest

from kvtransfer.errors import TransportBroken
from kvtransfer.transports.mapped import MappedTransport
from kvtransfer.transports.segment import ADDRESS, SEALS, Segment, SegmentRefused
from kvtransfer.transports.shm import HostSharing


def num_mapped():
    return Path("/proc/self/maps").read_text().count("memfd:tandem-kv")


def test_what_one_writes_the_other_reads_until_both_have_let_go():
    before = len(os.listdir("/proc/self/fd")), num_mapped()
    made = Segment.create(4096)
    opened = Segment.open(made.address, 4096)
    made.hide()
    assert opened.payload.sum() == 0
    made.payload[7] = 5
    assert opened.payload[7] == 5
    view = opened.payload[7:9]
    del made, opened
    gc.collect()
    assert view.tolist() == [5, 0]
    del view
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), num_mapped()) == before


def test_it_has_no_name_in_the_file_system():
    made = Segment.create(4096)
    assert not any("tandem" in path.name for path in Path("/dev/shm").iterdir())
    made.hide()


def test_addresses_that_are_none_are_refused():
    made = Segment.create(4096)
    pid, handle, nonce = ADDRESS.unpack(made.address)
    other = Segment.create(4096)
    refused = [
        b"",
        made.address + b"x",
        ADDRESS.pack(pid, 999, nonce),
        ADDRESS.pack(2**31 - 1, handle, nonce),
        ADDRESS.pack(pid, handle, bytes(16)),
        ADDRESS.pack(pid, ADDRESS.unpack(other.address)[1], nonce),
        ADDRESS.pack(pid, 1, nonce),
    ]
    for address in refused:
        with pytest.raises(SegmentRefused):
            Segment.open(address, 4096)
    with pytest.raises(SegmentRefused, match="has not 8192 bytes"):
        Segment.open(made.address, 8192)
    made.hide()
    other.hide()
    with pytest.raises(SegmentRefused):
        Segment.open(made.address, 4096)


def test_memory_that_could_shrink_under_its_reader_is_refused():
    handle = os.memfd_create("tandem-kv-open", os.MFD_ALLOW_SEALING)
    os.ftruncate(handle, 8192)
    address = ADDRESS.pack(os.getpid(), handle, bytes(16))
    with pytest.raises(SegmentRefused, match="shrink"):
        Segment.open(address, 4096)
    fcntl.fcntl(handle, fcntl.F_ADD_SEALS, SEALS)
    assert Segment.open(address, 4096).payload.numel() == 4096
    os.close(handle)


def open_both(sharings, num_slabs=(2, 2)):
    """What each rank got, or its error."""
    mail = queue.SimpleQueue(), queue.SimpleQueue()
    results = [None, None]

    def run(rank):
        def exchange(blob):
            mail[1 - rank].put(blob)
            return mail[rank].get(timeout=1)

        try:
            results[rank] = MappedTransport.open(rank, exchange, sharings[rank], num_slabs[rank], 4096)
        except TransportBroken as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_both_ends_have_the_same_slabs_in_the_same_order():
    sender, receiver = open_both((HostSharing(), HostSharing()))
    for number in range(4):
        slab = sender.slabs[number % 2]
        slab.fill_(number + 1)
        sender.start_send(slab[:64]).wait()
        view = receiver.slabs[number % 2][:64]
        receiver.recv(view)
        assert (view == number + 1).all()
    sender.close()
    with pytest.raises(TransportBroken):
        sender.start_send(sender.slabs[0])


def test_a_receiver_that_cannot_open_them_says_why_at_both_ends():
    before = len(os.listdir("/proc/self/fd"))
    reasons = [str(error) for error in open_both((HostSharing(), HostSharing()), num_slabs=(2, 3))]
    assert all("has not 12288 bytes" in reason for reason in reasons)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
