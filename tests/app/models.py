"""The clinic's application before the migration: its SQLAlchemy models, and what it does, old or new."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable
from typing import Any

from sqlalchemy import DateTime, ForeignKey, String, create_engine, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship


class Base(DeclarativeBase):
    pass


class Doctors(Base):
    __tablename__ = "doctors"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, server_default=text("gen_random_uuid()"))
    name: Mapped[str] = mapped_column(String(255))


class Users(Base):
    __tablename__ = "users"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, server_default=text("gen_random_uuid()"))
    email: Mapped[str] = mapped_column(String(255), unique=True)
    password: Mapped[str] = mapped_column(String(255))
    first_name: Mapped[str] = mapped_column(String(100))
    last_name: Mapped[str] = mapped_column(String(100))
    phone: Mapped[str | None] = mapped_column(String(20))
    role: Mapped[str | None] = mapped_column(String(50), server_default=text("'user'"))
    appointments: Mapped[list[Appointments]] = relationship(back_populates="user", passive_deletes=True)


class Appointments(Base):
    __tablename__ = "appointments"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, server_default=text("gen_random_uuid()"))
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    doc_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("doctors.id"))
    status: Mapped[str] = mapped_column(String(20), server_default=text("'scheduled'"))
    scheduled_at: Mapped[datetime.datetime] = mapped_column(DateTime(True))
    user: Mapped[Users] = relationship(back_populates="appointments")


def work(url: str, models: Any, *, knows_role: bool) -> dict[str, str]:
    """Create, read, update and delete with these models; what became of each, by name."""
    report: dict[str, str] = {}
    engine = create_engine(url)
    with Session(engine, expire_on_commit=False) as session:

        def step(name: str, action: Callable[[], Any]) -> Any:
            try:
                found = action()
                session.commit()
                report[name] = "ok"
                return found
            except DBAPIError as error:
                session.rollback()
                diag = error.orig.diag  # type: ignore[union-attr]
                report[name] = f"{diag.sqlstate} {diag.constraint_name or ''}".strip()
                return None

        doc = session.scalars(select(models.Doctors).limit(1)).one()
        for name, role in (("patient", "user"), ("doctor", "doctor")):
            user = models.Users(email=f"{name}@orm.example", password="hash", first_name="A", last_name="Writer", role=role)
            step(f"create {name}", lambda user=user: session.add(user))
            identity = (user.id, user.role) if knows_role else user.id
            session.expunge_all()
            user = step(f"read {name}", lambda identity=identity: session.get_one(models.Users, identity))
            step(f"update {name}", lambda user=user: setattr(user, "phone", "+1-555-0100"))
            now = datetime.datetime.now(datetime.UTC)
            named = {"user_id": user.id, "doc_id": doc.id, "scheduled_at": now} | ({"user_role": user.role} if knows_role else {})
            step(f"book for {name}", lambda named=named: session.add(models.Appointments(**named)))
            step(f"book for {name} by the relationship", lambda user=user, now=now: session.add(
                models.Appointments(user=user, doc_id=doc.id, scheduled_at=now)))  # fmt: skip
            session.expunge_all()
            user = session.get_one(models.Users, identity)
            report[f"list for {name}"] = f"{len(user.appointments)} of {name}"
            step(f"delete {name}", lambda identity=identity: session.execute(
                text("DELETE FROM users WHERE email = :email"), {"email": session.get_one(models.Users, identity).email}))  # fmt: skip
    engine.dispose()
    return report
