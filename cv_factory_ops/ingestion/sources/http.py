"""An HTTP API as a source: pages of JSON whose items link to images or studies.

Names, links and values of the API may identify people: messages tell host, page and position instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from cv_factory_ops.config.sources import HttpSource
from cv_factory_ops.domain import pseudonym
from cv_factory_ops.errors import ConfigError, DataError, Rejected
from cv_factory_ops.ingestion.progress import with_progress
from cv_factory_ops.ingestion.sources.downloads import Downloads, Status, address
from cv_factory_ops.ingestion.sources.inbox import PASSING, Inbox

if TYPE_CHECKING:
    from cv_factory_ops.domain import DeidentificationConfig, Domain

MAX_PAGE = 64 << 20
"""Bytes of a page of JSON."""


def fetch_images(source: HttpSource, inbox: Inbox, domain: Domain, settings: DeidentificationConfig) -> None:
    """Bring every linked image that the inbox does not have into it, under a pseudonym of its id; studies are de-identified.

    Raises:
        ConfigError: the API denies access, or there is nothing at its address.
        DataError: a page is not what the settings say of it, or there are no items.
        Unavailable: the API does not answer; what it has given is kept.
    """
    seen: set[str] = set()
    with httpx.Client(timeout=source.timeout, follow_redirects=True) as client:
        api = _Api(Downloads(client, source), source)
        for entry in with_progress(api.entries(), None, "http"):
            name = pseudonym(entry.id, "item")
            if name in seen:
                inbox.refuse(f"{name}-{entry.place}", "duplicate_id", "has the id of an earlier item", for_now=True)
                continue
            seen.add(name)
            patient = pseudonym(entry.patient, "patient") if entry.patient else ""
            if name in inbox:
                inbox.retell(name, entry.label, patient)
                continue
            try:
                content, content_type = api.image(entry)
                inbox.receive(name, content, domain, settings, label=entry.label, patient=patient, content_type=content_type)
            except Rejected as error:
                inbox.refuse(name, error.code, str(error), for_now=isinstance(error, _NoImage) or error.code in PASSING)
    if not seen:
        raise DataError(f"{api.shown}: lists no items")


@dataclass(frozen=True)
class _Entry:
    """An item of a page."""

    place: str
    """``<page>-<item>``, both from 1."""
    id: str
    image: httpx.URL | None
    label: str
    patient: str


class _NoImage(Rejected):
    """The link leads nowhere today; the image itself was not seen, so another fetch asks again."""


class _Api:
    """The pages of an API, and the images that they link to."""

    def __init__(self, downloads: Downloads, source: HttpSource) -> None:
        self._downloads = downloads
        self._source = source
        self.shown = str(downloads.start.copy_with(userinfo=b"", query=None, fragment=None))

    def entries(self) -> Iterator[_Entry]:
        """The items of all pages, in their order."""
        url: httpx.URL | None = self._downloads.start
        read: set[str] = set()
        while url is not None:
            where = f"{self.shown}: page {len(read) + 1}"
            if str(url) in read:
                raise DataError(f"{where}: is one that was read before: the pages would never end")
            read.add(str(url))
            page = self._page(url, where)
            items = at(page, self._source.items, f"{where}: items")
            if not isinstance(items, list):
                raise DataError(f"{where}: items: {self._source.items!r} leads to {type(items).__name__}; expected is a list")
            for index, item in enumerate(items, start=1):
                yield self._entry(item, url, f"{len(read)}-{index}")
            url = self._next(page, url, where)

    def image(self, entry: _Entry) -> tuple[bytes, str | None]:
        """Bytes and content type of an item's image.

        Raises:
            Rejected: ``too_large``, ``unsupported``; or, for now, ``no_image``, ``not_found``, ``denied``.
        """
        if entry.image is None:
            raise _NoImage("no_image", "has no link to an image that could be followed")
        try:
            return self._downloads.get(entry.image, self._source.max_bytes)
        except Status as error:
            denied = error.status in {401, 403}
            if denied and self._downloads.is_api(entry.image):
                raise self._denied(error) from None
            raise _NoImage("denied" if denied else "not_found", f"{entry.image.host} {error} for its link") from None

    def _page(self, url: httpx.URL, where: str) -> Any:
        try:
            return json.loads(self._downloads.get(url, MAX_PAGE)[0])
        except (ValueError, RecursionError):
            raise DataError(f"{where}: is not JSON") from None
        except Rejected as error:
            raise DataError(f"{where}: {error}") from None
        except Status as error:
            if error.status in {401, 403}:
                raise self._denied(error) from None
            raise ConfigError(f"{where}: {error}; check data.source.url") from None

    def _denied(self, error: Status) -> ConfigError:
        name = self._source.authorization_env
        cure = f"check the value of {name}" if name else "name the variable with its Authorization header by authorization_env"
        return ConfigError(f"{self.shown}: denies access ({error.status}); {cure}")

    def _entry(self, item: Any, page: httpx.URL, place: str) -> _Entry:
        where, source = f"{self.shown}: item {place}", self._source
        patient = at(item, source.patient, f"{where}: patient") if source.patient else None
        entry = _Entry(
            place=place,
            id=_text(at(item, source.id, f"{where}: id"), f"{where}: id"),
            image=_link(page, at(item, source.image, f"{where}: image")),
            label=_text(_optional(item, source.label), f"{where}: label"),
            patient=_text(patient, f"{where}: patient"),
        )
        if not entry.id:
            raise DataError(f"{where}: id: is empty; each item needs its own")
        return entry

    def _next(self, page: Any, url: httpx.URL, where: str) -> httpx.URL | None:
        link = _optional(page, self._source.next)
        following = _link(url, link)
        if link and following is None:
            raise DataError(f"{where}: next: {self._source.next!r} leads to no http:// or https:// address")
        return following


def at(tree: Any, path: str, where: str) -> Any:
    """The value at a dotted path; a number steps into a list, an empty path stays.

    Raises:
        DataError: naming the path and the keys that are there, but for keys that are no names: they may identify people.
    """
    here = tree
    for step in path.split(".") if path else []:
        if isinstance(here, dict) and step in here:
            here = here[step]
        elif isinstance(here, list) and step.isdigit() and int(step) < len(here):
            here = here[int(step)]
        else:
            keys = [key for key in here if key.isidentifier()][:20] if isinstance(here, dict) else []
            there = f"in place of {step!r}: {', '.join(keys)}" if keys else f"there is {type(here).__name__}"
            raise DataError(f"{where}: nothing at {path!r}; {there}")
    return here


def _optional(tree: Any, path: str) -> Any:
    try:
        return at(tree, path, "")
    except DataError:
        return None


def _text(value: Any, where: str) -> str:
    """Text, or a whole number as text; null is the empty text."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(f"{where}: is {type(value).__name__}; expected is text or a whole number")
    return str(value).encode(errors="backslashreplace").decode()  # JSON may hold half a character


def _link(page: httpx.URL, link: Any) -> httpx.URL | None:
    """A link of a page, resolved (RFC 3986 section 5); None where it is no address that can be asked."""
    if not isinstance(link, str) or not link:
        return None
    try:
        return address(str(page.join(link)))
    except httpx.InvalidURL:
        return None
