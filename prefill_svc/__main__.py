"""`python -m prefill_svc`: one prefill worker."""

from functools import partial

from worker.process import Serve, main


def load() -> Serve:
    """Import the role, and torch with it."""
    from prefill_svc.role import PrefillRole
    from protos.tandem.v1.common_pb2 import WORKER_ROLE_PREFILL
    from worker.main import serve

    return partial(serve, WORKER_ROLE_PREFILL, PrefillRole)


if __name__ == "__main__":
    main("prefill", load)
