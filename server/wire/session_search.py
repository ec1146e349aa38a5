"""The body of a search for sessions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt

from .requests import Body, Id


class SearchOwner(Body):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] = Field(default=[], max_length=10)


class Status(Body):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[Literal["success", "errored", "interrupted"]] | None = None

    def states(self) -> list[str]:
        """`active` and finish reasons. Here nobody cancels or fails a session but its client."""
        if self.type == "client_finished":
            return list(self.reasons or ("success", "errored", "interrupted"))
        return ["active"] if self.type == "active" else []


class SearchCursor(Body):
    last_created_at: str
    last_session_id: Id


class SearchSessions(Body):
    session_id: Id | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = Field(default={})
    display_name: Annotated[str, Field(min_length=1)] | None = None
    owner: SearchOwner = SearchOwner()
    statuses: list[Status] | None = None
    limit: Annotated[StrictInt, Field(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None
