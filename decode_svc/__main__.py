"""`python -m decode_svc`: one decode worker."""

from functools import partial

from worker.process import Serve, main


def load() -> Serve:
    """Import the role, and torch with it."""
    from decode_svc.role import DecodeRole
    from protos.tandem.v1.common_pb2 import WORKER_ROLE_DECODE
    from worker.main import serve

    return partial(serve, WORKER_ROLE_DECODE, DecodeRole)


if __name__ == "__main__":
    main("decode", load)
