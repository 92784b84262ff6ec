"""What every answer and every change has in common: headers, and the same-site check."""

from urllib.parse import urlsplit

from flask import Flask, Request, Response, abort, request

HEADERS = {
    # One stylesheet of our own, no script, no frame: nothing a page could be made to load.
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # Not "no-referrer": browsers would then send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
}


def same_site(asked: Request) -> bool:
    """Tell whether a request that changes something comes from one of our own pages, or from no web page at all.

    Browsers say so themselves: in `Sec-Fetch-Site` over https, in `Origin` everywhere. A request with neither comes
    from a program, which carries no visitor's rights to abuse. The method is that of Go's
    `http.CrossOriginProtection`; it needs no token, cookie or key.
    """
    site = asked.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = asked.headers.get("Origin")
    return origin is None or urlsplit(origin).netloc.lower() == asked.host.lower()


def protect(app: Flask) -> None:
    """Add the same-site check before, and the headers after, every request of `app`."""

    @app.before_request
    def refuse_other_sites() -> None:
        if request.method not in ("GET", "HEAD", "OPTIONS") and not same_site(request):
            abort(403, "This form was sent from another site, so nothing was changed.")

    @app.after_request
    def add_headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        if request.endpoint != "static":
            response.headers["Cache-Control"] = "no-store"
        return response
