"""Keys: who is let in, and where none is needed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.access import Keys, bearer, call_metadata, is_loopback, require_internal_secret, split_keys
from runtime.errors import StartupError

KEY = st.text(st.characters(codec="ascii", categories=("L", "N", "P"), exclude_characters=","), min_size=1)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(KEY, min_size=1, max_size=4), KEY)
def test_a_key_is_admitted_exactly_if_it_is_one_of_them(known: list[str], tried: str) -> None:
    keys = Keys.parse(" \n".join(known))
    assert all(keys.admit([bearer(key)]) for key in known)
    assert keys.admit([bearer(tried)]) == (tried in known)
    assert Keys.parse(",".join(known)).admit([f"bEARER  {known[0]} "])


@pytest.mark.parametrize(
    "authorization",
    [
        *([], [""], ["k"], ["Bearer"], ["Bearer "], ["Basic k"], ["Bearer k,k"], ["Bearer K"]),
        *(["Bearer\tk"], ["Bearer k", "Bearer k"], ["Bearer \ud800"], ["Bearer é"], ["Bearer k\x00"]),
    ],
)
def test_nothing_else_is_admitted(authorization: list[str]) -> None:
    assert not Keys(["k"]).admit(authorization)
    assert not Keys().admit(authorization)


def test_without_keys_there_is_nothing_to_show() -> None:
    for text in (None, "", " \n", ","):
        assert split_keys(text) == []
        assert not Keys.parse(text)
        assert call_metadata(text) == ()
    assert call_metadata("new,old") == (("authorization", "Bearer new"),)
    assert "secret" not in repr(vars(Keys(["secret"])))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback_needs_no_secret(host: str) -> None:
    assert is_loopback(host)
    require_internal_secret(host, None)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "127.0.0.1.evil.org", "", "localhost.evil.org", "::ffff:10.0.0.1"]
)
def test_elsewhere_a_secret_is_needed_and_the_setting_is_named(host: str) -> None:
    assert not is_loopback(host)
    require_internal_secret(host, "s")
    for nothing in (None, "", " "):
        with pytest.raises(StartupError, match=r"--internal-secret.*TANDEM_INTERNAL_SECRET_FILE"):
            require_internal_secret(host, nothing)
