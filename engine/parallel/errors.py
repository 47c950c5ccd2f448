"""What goes wrong between ranks."""


class RankLost(Exception):
    """Another rank has ended, hangs or broke the protocol: this engine cannot go on."""
