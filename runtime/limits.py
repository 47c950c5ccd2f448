"""Times that all processes share, in seconds."""

HEARTBEAT_INTERVAL_S = 0.25
"""A worker tells each gateway that it lives, and attach and link streams speak, this often."""

HANG_S = 1.9
"""A peer silent for this long, and a step that takes this long against its prediction, hangs.

A hang is to be found in 2 s and a stall of 1.5 s is to abort nothing: the last word before either is up to
one interval old, so 1.5 + HEARTBEAT_INTERVAL_S < HANG_S < 2, and what is left is for busy machines.
"""

ATTACH_SILENCE_S = 5.0
"""A worker whose gateway is silent for this long ends that gateway's attempts."""

LINK_TIMEOUT_S = 3.0
"""A KV frame, a rendezvous or a handshake that takes longer retires the link's epoch."""

RESERVE_TIMEOUT_S = 2.0
"""How long a decode worker holds an Offer whose Submit has not come."""

COMMIT_TIMEOUT_S = 2.0
"""A Commit without acknowledgement for this long ends the attempt."""

DRAIN_TIMEOUT_S = 25.0
"""After SIGTERM, running requests have this long to finish."""

RANK_TIMEOUT_S = 5.0
"""A rank of a tensor-parallel worker that another one waits for longer is taken for hung."""
