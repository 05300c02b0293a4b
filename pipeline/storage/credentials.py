"""Take credentials out of URLs before they are stored or shown.

Three kinds of parameters:

* Harmless ones (sizes, formats, numbers of images) stay.
* Those that only give access become `***`. The same image has the same stored URL after it was signed again.
* All others become REDACTED and a hash. Two URLs that differ only there stay apart, for one may be `photo=1` and the
  other `photo=2`. The hash has no secret key: readers of a database could read that too. So it hides what cannot be
  guessed, as keys and tokens, and not a short number. That is why what is known to be a password has no hash.

A URL that is redacted once more stays as it is.
"""

import re
from functools import lru_cache
from typing import Literal
from urllib.parse import unquote_plus

from pipeline.storage.addresses import short_hash

_KNOWN = re.compile(r"([?&](?:x-amz-[a-z-]+|awsaccesskeyid|signature|sig|token|access_token|auth|api_?key|password|"
                    r"secret|policy|key-pair-id)=)[^&#\s]+", re.IGNORECASE)
_NOTHING_TO_REDACT = re.compile(r"[^?#@;]*")
_KNOWN_USER = re.compile(r"(?<=\w://)[^/?#\s]*@")
_AUTHORITY = re.compile(r"\s*(?:https?:[/\\]*|[a-z0-9+.-]+:[/\\]{2}|[/\\]{2})", re.IGNORECASE)
_USER = re.compile(r"[^/\\?#]*@")
# From the last letter of the scheme on: to look for its first one takes quadratic time.
_URL_IN_TEXT = re.compile(r"(?:https?:[/\\]|[a-z0-9+.-]:[/\\]{2})[^\s<>\"]+", re.IGNORECASE)
_BARE_USER = re.compile(r"(?<![^\s\"'(=,])[\w.+%-]{1,256}:[^\s/@\"'<>*]{1,256}@(?=[\w\[])")
_BARE_URL = re.compile(r"^\s*[\w.+%-]{1,256}:[^\s/@*]{1,256}@(?=[\w.-]+(?::\d+)?/)")
_AFTER_URL = ")]}'.,:;"
_PATH_PARAMETER = re.compile(r";([^;/\\]*)")
_BETWEEN = re.compile("([&;])")
_DONE = re.compile(r"\*\*\*|REDACTED-[0-9a-f]{12}")
_NAME = re.compile(r"[\w.\[\]:-]{1,40}")
_SIMPLE = re.compile(r"[\w.,:/ ()@*|!~+-]{0,100}")
_TOKEN = re.compile(r"(?=[A-Za-z_]*[0-9])(?=[0-9_]*[A-Za-z])\w{20,}")  # letters and digits as they come

# Names in lower case without signs between words.
_HARMLESS = frozenset({
    "w", "h", "width", "height", "maxwidth", "maxheight", "maxw", "maxh", "wid", "hei", "s", "sz", "size",
    "sizes", "dpr", "dpi", "resize", "scale", "zoom", "fit", "crop", "rect", "gravity", "q", "quality", "qlt",
    "fm", "fmt", "format", "f", "ext", "type", "mode", "auto", "optimize", "compress", "strip", "bg",
    "background", "color", "colour", "blur", "sharp", "rotate", "flip", "orientation", "v", "ver", "version",
    "rev", "revision", "r", "page", "p", "n", "no", "nr", "num", "number", "i", "idx", "index", "frame", "id",
    "ids", "pid", "fid", "mid", "uid", "imageid", "imgid", "photoid", "pictureid", "fileid", "mediaid",
    "assetid", "itemid", "productid", "img", "image", "photo", "pic", "picture", "file", "filename", "name",
    "title", "src", "path", "lang", "locale", "hl", "country", "cb", "t", "ts", "time", "date", "updated",
    "modified", "lastmod", "year", "month", "day", "download", "dl", "raw", "preview", "thumb", "thumbnail",
    "original", "action", "cmd", "view", "ixlib", "ixid", "usp"})
_ACCESS = frozenset({
    "sig", "sign", "signature", "signed", "hmac", "mac", "token", "accesstoken", "authtoken", "idtoken",
    "refreshtoken", "sessiontoken", "securitytoken", "csrftoken", "bearertoken", "auth", "authorization",
    "authkey", "bearer", "jwt", "apikey", "appkey", "accesskey", "accesskeyid", "awsaccesskeyid",
    "googleaccessid", "ossaccesskeyid", "secretkey", "privatekey", "subscriptionkey", "secret", "clientsecret",
    "password", "passwd", "passphrase", "pass", "pwd", "pw", "pin", "policy", "keypairid", "credential",
    "credentials", "session", "sessionid", "sessid", "jsessionid", "phpsessid", "sid", "otp"})
_ACCESS_PREFIXES = ("x-amz-", "x-goog-", "x-oss-", "x-cos-", "x-obs-", "x-ms-", "q-sign-", "q-key-", "q-ak",
                    "q-header-", "q-url-param-")
# Parameters that a signature covers, such as its end and its owner. They are secrets only beside a signature.
_SIGNED = frozenset({
    "expires", "expire", "expiry", "exp", "e", "se", "st", "sp", "sv", "sr", "spr", "sip", "sdd", "ss", "srt",
    "skoid", "sktid", "skt", "ske", "sks", "skv", "sce", "saoid", "suoid", "scid", "nonce", "timestamp", "ts"})


def redact_url(url: str) -> str:
    """The form of `url` to store: without credentials, and another one for each image."""
    if _NOTHING_TO_REDACT.fullmatch(url):
        return url
    url = redact_known_credentials(url)
    start = _AUTHORITY.match(url)
    if not start:
        return _BARE_URL.sub("***@", url)  # the name of a file, in which ? and # have no meaning
    head, rest = url[:start.end()], url[start.end():]
    if user := _USER.match(rest):
        head, rest = head + "***@", rest[user.end():]
    rest, hash_mark, fragment = rest.partition("#")
    path, question_mark, query = rest.partition("?")
    path = _PATH_PARAMETER.sub(lambda match: f";{_redact_parameters(match[1])}", path)
    return "".join([head, path, question_mark, _redact_parameters(query), hash_mark, _redact_parameters(fragment)])


def redact_credentials(text: str) -> str:
    """A message without the credentials of its URLs, also as `user:password@host`, as libraries shorten them."""
    return _BARE_USER.sub("***@", redact_urls(text))


def redact_urls(text: str) -> str:
    """`text` with the credentials of its URLs taken out. Texts of others may have 12:30@place, which is no password."""
    return _URL_IN_TEXT.sub(_redact_match, redact_known_credentials(text))


def redact_known_credentials(text: str) -> str:
    """`text` without the credentials that versions up to 0.1 took out: rows that they stored are compared so."""
    return _KNOWN.sub(r"\1***", _KNOWN_USER.sub("***@", text))


def _redact_match(match: re.Match[str]) -> str:
    url = match[0].rstrip(_AFTER_URL)
    return redact_url(url) + match[0][len(url):]


def _redact_parameters(query: str) -> str:
    parts = _BETWEEN.split(query)
    is_signed = any(_kind(part.partition("=")[0]) == "access" for part in parts[::2])
    parts[::2] = [_redact_parameter(part, is_signed) for part in parts[::2]]
    return "".join(parts)


def _redact_parameter(part: str, is_signed: bool) -> str:
    name, equals, value = part.partition("=")
    if not equals:
        return part if _is_simple(part) or _DONE.fullmatch(part) else _hash(part)
    if not value or _DONE.fullmatch(value):
        return part if _is_simple(name) else _hash(part)
    kind = _kind(name)
    if kind == "access" or (is_signed and _plain(name) in _SIGNED):
        return f"{name}=***"
    if kind == "harmless" and _is_simple(value):
        return part
    return f"{name}={_hash(part)}" if _NAME.fullmatch(unquote_plus(name)) and _is_simple(name) else _hash(part)


@lru_cache(4096)
def _kind(name: str) -> Literal["access", "harmless", ""]:
    """The purpose of a parameter with this name. Empty: unknown."""
    if _plain(name) in _ACCESS or unquote_plus(name).casefold().startswith(_ACCESS_PREFIXES):
        return "access"
    return "harmless" if _plain(name) in _HARMLESS else ""


def _plain(name: str) -> str:
    return re.sub(r"[-_.\s]", "", unquote_plus(name)).casefold()


def _is_simple(value: str) -> bool:
    """Whether a value is short words and numbers, which tell nothing that gives access."""
    plain = unquote_plus(value)
    return bool(_SIMPLE.fullmatch(plain)) and not _TOKEN.search(plain) and "://" not in plain


def _hash(part: str) -> str:
    return f"REDACTED-{short_hash(part.encode('utf-8', 'backslashreplace').decode())}"
