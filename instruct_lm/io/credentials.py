"""Keys and tokens from environment variables, sent as bearer tokens and never printed."""

import os
import re
from collections.abc import Callable

import requests

from instruct_lm.errors import InputError

Auth = Callable[[requests.PreparedRequest], requests.PreparedRequest]


def read_secret(variable: str | None) -> str:
    """The key in an environment variable; "" if it is not set, or `variable` is None.

    Raises:
        InputError: It contains a character that no key has; the message does not show it, as http.client's would.
    """
    secret = os.environ.get(variable, "").strip() if variable else ""
    if not re.fullmatch("[!-~]*", secret):
        raise InputError(f"environment variable {variable} has a character that no key has: set it to the key alone")
    return secret


def bearer_auth(variable: str | None) -> Auth:
    """For requests' `auth`: sends the key in a variable, if it is set, and never a password of ~/.netrc.

    requests drops the header when a redirect leaves the host.
    """

    def add_header(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if secret := read_secret(variable):
            request.headers["Authorization"] = f"Bearer {secret}"
        return request

    return add_header
