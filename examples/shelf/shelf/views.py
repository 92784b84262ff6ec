"""The page with its three forms."""

import os
import unicodedata
from dataclasses import dataclass, field
from datetime import UTC, datetime

from flask import Blueprint, current_app, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from sqlalchemy import Engine, Update, func, select, update
from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError
from sqlalchemy.orm import Session
from werkzeug.exceptions import HTTPException, NotFound

from shelf import db
from shelf.models import LONGEST, Book
from shelf.probes import worker_id

PAGE_LENGTH = 20

# Shown after a redirect. The URL carries the key and never a text, so nobody can put words on the page by a link.
NOTICES = {
    "added": "Thank you. The book is on the shelf.",
    "lent": "Lent out. Enjoy the read!",
    "returned": "Welcome back. The book is on the shelf again.",
}


@dataclass
class Form:
    """What somebody entered, and what is wrong with it, by field name."""

    book_id: int | None = None
    values: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def read(self, name: str, missing: str) -> str:
        """Take one text field from the request and note what is wrong with it.

        Args:
            name: the field, named like the column that will hold it.
            missing: what to say when it is empty.

        Returns:
            The text with runs of blanks made one.
        """
        text = " ".join(request.form.get(name, "").split())
        longest = LONGEST[name]
        self.values[name] = text
        if not text:
            self.errors[name] = missing
        elif len(text) > longest:
            self.errors[name] = f"That is {len(text)} characters long; {longest} is the most we can keep."
        elif any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
            # PostgreSQL cannot store a NUL, and no other control character belongs into a name.
            self.errors[name] = "There is a character in it that cannot be printed. Please type it anew."
        return text


def blueprint(engine: Engine, release: str) -> Blueprint:
    """Return the page and its forms over one database.

    Args:
        engine: the database.
        release: release id that the page shows.
    """
    views = Blueprint("shelf", __name__)

    @views.app_context_processor
    def about() -> dict[str, object]:
        return {"release": release, "database": engine.dialect.name, "worker": worker_id(), "pid": os.getpid()}

    def page(form: Form | None = None, alert: str = "", status: int = 200) -> ResponseReturnValue:
        number = max(1, request.values.get("page", 1, type=int))
        with Session(engine) as session:
            total, lent = session.execute(select(func.count(Book.id), func.count(Book.lent_at))).one()
            last = max(1, -(-total // PAGE_LENGTH))
            number = min(number, last)
            newest_first = select(Book).order_by(Book.id.desc())
            books = session.scalars(newest_first.offset((number - 1) * PAGE_LENGTH).limit(PAGE_LENGTH)).all()
            notice = NOTICES.get(request.args.get("done", ""), "") if request.method == "GET" else ""
            html = render_template(
                "shelf.html",
                books=books, total=total, lent=lent, number=number, last=last,
                form=form or Form(), alert=alert, notice=notice, longest=LONGEST,
            )  # fmt: skip
        return html, status

    def back(done: str, book_id: int) -> ResponseReturnValue:
        number = request.form.get("page", 1, type=int)
        place = url_for(".index", done=done, page=number if number > 1 else None, _anchor=f"book-{book_id}")
        return redirect(place, 303)

    @views.get("/")
    def index() -> ResponseReturnValue:
        return page()

    @views.post("/books")
    def add() -> ResponseReturnValue:
        form = Form()
        title = form.read("title", "Every book has a title. What is it?")
        author = form.read("author", "Who wrote it?")
        if form.errors:
            return page(form, status=422)
        with Session(engine) as session, session.begin():
            book = Book(title=title, author=author)
            session.add(book)
            session.flush()
            book_id = book.id
        return back("added", book_id)

    @views.post("/books/<int(max=2147483647):book_id>/lend")
    def lend(book_id: int) -> ResponseReturnValue:
        form = Form(book_id)
        borrower = form.read("borrower", "Who takes it? A first name will do.")
        if form.errors:
            return page(form, status=422)
        # One statement decides, so of two people who want the same book at once one gets it and one is told.
        free = update(Book).where(Book.id == book_id, Book.lent_at.is_(None))
        if change(book_id, free.values(borrower=borrower, lent_at=datetime.now(UTC))):
            return back("lent", book_id)
        return page(alert="Somebody was faster: that book is lent out already.", status=409)

    @views.post("/books/<int(max=2147483647):book_id>/return")
    def give_back(book_id: int) -> ResponseReturnValue:
        away = update(Book).where(Book.id == book_id, Book.lent_at.is_not(None))
        if change(book_id, away.values(borrower=None, lent_at=None)):
            return back("returned", book_id)
        return page(alert="That book is on the shelf already.", status=409)

    def change(book_id: int, statement: Update) -> bool:
        with Session(engine) as session, session.begin():
            done = session.connection().execute(statement).rowcount == 1
            if not done and session.get(Book, book_id) is None:
                raise NotFound("There is no such book on this shelf.")
        return done

    @views.app_errorhandler(HTTPException)
    def explain(error: HTTPException) -> ResponseReturnValue:
        return render_template("error.html", title=error.name, text=error.description), error.code or 500

    @views.app_errorhandler(OperationalError)
    @views.app_errorhandler(InterfaceError)
    @views.app_errorhandler(TimeoutError)
    def no_database(error: Exception) -> ResponseReturnValue:
        current_app.logger.error("%s: %s: %s", request.path, type(error).__name__, db.short_reason(error, engine.url))
        text = "The shelf cannot reach its books just now. Please try again in a moment."
        return render_template("error.html", title="Out of reach", text=text), 503

    return views
