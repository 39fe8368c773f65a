"""Broker URLs: read in one place, and never shown with a password in them."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from outbox.errors import ConfigurationError

_BETWEEN_URLS: Final = re.compile(r";\s*(?=[A-Za-z][A-Za-z0-9+.-]*://)")
_SECRET_IN_QUERY: Final = re.compile(r"(?i)([?&][^=&]*(?:pass|secret|token)[^=&]*=)[^&]*")
_VERIFICATION: Final = {
    "required": ssl.CERT_REQUIRED,
    "optional": ssl.CERT_OPTIONAL,
    "none": ssl.CERT_NONE,
}
_TRUTH: Final = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class BrokerURL:
    """A broker's URL in parts, percent-decoded."""

    scheme: str
    host: str
    port: int | None
    user: str | None
    password: str | None = field(repr=False)
    path: str
    """Without the leading slash: a virtual host, or the number of a database."""
    query: Mapping[str, str] = field(repr=False)

    @property
    def place(self) -> str:
        """Host and port, for people."""
        return self.host if self.port is None else f"{self.host}:{self.port}"


def read_url(url: str) -> BrokerURL:
    """*url* in parts. Raises `ConfigurationError`, without the password, for what cannot be one."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise _unreadable(url) from None  # its text quotes what may be a piece of the password
    if "@" in parts.path + parts.query + parts.fragment:
        raise _unreadable(url)
    return BrokerURL(
        scheme=parts.scheme.lower(),
        host=unquote(host or "localhost"),
        port=port,
        user=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
        path=unquote(parts.path.removeprefix("/")),
        query=dict(parse_qsl(parts.query)),
    )


def split_urls(urls: str) -> list[str]:
    """The URLs in a list that is separated by `;`, as kombu writes alternatives."""
    return [one.strip() for one in _BETWEEN_URLS.split(urls.strip().rstrip(";")) if one.strip()]


def masked(urls: str) -> str:
    """*urls* without their passwords, for logs and errors. Never raises."""
    return ";".join(map(_masked_one, split_urls(urls)))


def tls_context(url: BrokerURL) -> ssl.SSLContext:
    """TLS as the URL's `ssl_...` parameters ask for it, in kombu's words; by default the server is verified.

    Known are `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`, `ssl_cert_reqs` and `ssl_check_hostname`. Raises
    `ConfigurationError` for a file that cannot be read and for a value that is not known.
    """
    given = url.query
    try:
        context = ssl.create_default_context(cafile=given.get("ssl_ca_certs"))
        if "ssl_certfile" in given:
            context.load_cert_chain(given["ssl_certfile"], given.get("ssl_keyfile"))
        verify = given.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
        by_name = given.get("ssl_check_hostname", "true").lower()
        context.check_hostname = _TRUTH[by_name] and verify == "required"
        context.verify_mode = _VERIFICATION[verify]
    except KeyError as error:
        raise ConfigurationError(
            f"the URL of {url.place} asks for TLS with {error}; ssl_cert_reqs is one of "
            "required, optional, none, and ssl_check_hostname true or false"
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"a TLS file named in the URL of {url.place} cannot be used: {error}"
        ) from error
    return context


def _unreadable(url: str) -> ConfigurationError:
    return ConfigurationError(
        f"the broker URL {masked(url)!r} cannot be read; percent-encode what is special in user and password"
    )


def _masked_one(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    credentials, at, place = rest.rpartition("@")
    if at and ":" in credentials:
        credentials = credentials.partition(":")[0] + ":***"
    return scheme + separator + _SECRET_IN_QUERY.sub(r"\1***", f"{credentials}{at}{place}")
