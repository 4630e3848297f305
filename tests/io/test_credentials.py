"""Keys from environment variables: read whole, refused without being shown."""

import pytest
import requests

from instruct_lm.errors import InputError
from instruct_lm.io.credentials import bearer_auth, read_secret


@pytest.mark.parametrize(("value", "secret"), [(None, ""), ("", ""), (" key-1~!\n", "key-1~!")])
def test_a_key_is_read_without_the_space_around_it(
    monkeypatch: pytest.MonkeyPatch, value: str | None, secret: str
) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    assert read_secret("A_KEY") == secret
    request = requests.Request("GET", "http://localhost/", auth=bearer_auth("A_KEY")).prepare()
    assert request.headers.get("Authorization") == (f"Bearer {secret}" if secret else None)


@pytest.mark.parametrize("value", ["hidden key", "hidden\nkey", "hidden\u00e9"])
def test_what_is_no_key_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("A_KEY", value)
    with pytest.raises(InputError, match="A_KEY") as error:
        read_secret("A_KEY")
    assert "hidden" not in str(error.value)


def test_no_variable_is_no_key() -> None:
    assert read_secret(None) == ""
