"""Text from files of others, made safe to print. The only place that decides which characters are safe."""

import re

# Control characters steer a terminal. Marks of the writing direction show a text in another order than it has. Some
# programs end a line at U+2028 and U+2029. Surrogates cannot be encoded.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str, keep: str = "") -> str:
    r"""`text` with control characters and marks of the writing direction as visible escapes, such as \x1b and \u202e.

    Characters in `keep` stay as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else match[0].encode("unicode_escape").decode(), text)
