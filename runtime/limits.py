"""Times that all processes share, in seconds."""

HEARTBEAT_INTERVAL_S = 0.5
"""A worker tells each gateway that it lives, and each attach stream speaks, this often."""

HEARTBEAT_MISSES = 4
"""A peer silent for this many intervals is taken for hung."""

ATTACH_SILENCE_S = 5.0
"""An attach stream silent for this long ends its attempts at both ends."""

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
