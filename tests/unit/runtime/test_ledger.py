"""What a process says of itself."""

from runtime.ledger import Account, describe, process_counts


def test_an_account_is_balanced_when_all_is_given_back() -> None:
    account = Account(taken=3, returned=1)
    assert account.held == 2
    assert describe(blocks=account) == {"blocks": {"taken": 3, "returned": 1}}


async def test_a_process_counts_what_it_can_leak() -> None:
    counts = process_counts()
    assert counts["tasks"] == 1
    assert counts["threads"] >= 1
    with open("/dev/null"):
        assert process_counts()["fds"] == counts["fds"] + 1
