"""The search for a browser: its order, and what it says when there is none."""

import pytest

from tools.browser import SOURCES, NoBrowserError, find_browser


def test_the_order_is_system_playwright_apt() -> None:
    assert [source.__name__ for _, source in SOURCES] == [
        "from_system",
        "from_playwright",
        "from_apt",
    ]


def test_the_first_that_has_one_wins() -> None:
    def broken() -> str:
        raise OSError("disk full")

    sources = (("a", lambda: None), ("b", broken), ("c", lambda: "/x/chromium"), ("d", broken))
    assert find_browser(sources) == "/x/chromium"


def test_none_is_said_clearly() -> None:
    def broken() -> str:
        raise OSError("disk full")

    with pytest.raises(NoBrowserError) as caught:
        find_browser((("the system", lambda: None), ("apt", broken)))
    message = str(caught.value)
    assert "tried the system: none" in message
    assert "tried apt: OSError: disk full" in message
    assert "playwright install chromium" in message
