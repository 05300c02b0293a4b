"""Read texts of HTTP: Retry-After, names of statuses, faults of connections."""

import email.utils
import http
import os
import time


def retry_after(text: str) -> float:
    """Seconds that the header Retry-After asks for; 0 if it says nothing that can be read."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError, IndexError):
        return 0.0


def phrase(status: int) -> str:
    """The name of a status."""
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "a status that no standard knows"


def system_fault(error: Exception) -> str:
    """The operating system's text for a failed connection."""
    cause = getattr(error, "os_error", error)
    number = getattr(cause, "errno", None)
    # Numbers below 0 are those of getaddrinfo.
    return os.strerror(number) if number and number > 0 else type(cause).__name__


def certificate_fault(error: Exception) -> str:
    """The fault of a certificate, without the URL."""
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", error)
    return getattr(cause, "verify_message", None) or getattr(cause, "reason", None) or "no TLS connection"
