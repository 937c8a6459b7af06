"""The page in a real browser: what people see, and what they can do with it. `make browser` installs one."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, async_playwright, expect
from playwright.async_api import Page as Tab

from coxswain.control.web import page as pages
from tests.support.frames import frame, request, row
from tests.support.web import Served, browser_path

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOSTILE = "<script>document.title='pwned'</script>"
TURNED = "a\u202egpj.exe"
ROWS = (
    row("acme", class_="chat", queued=3, running=1, oldest_queued_s=75.0, weight=2.0),
    row("globex", class_="batch", queued=12, held=2, oldest_queued_s=4.2),
    row(HOSTILE, class_="chat", running=2),
    row(TURNED, class_="chat"),
)
REQUESTS = (
    request("r-acme-1", "acme", output_tokens=41),
    request("r-acme-2", "acme", state="queued", position=0),
    request("r-globex", "globex", state="held", kv="kept", held_by=("operator",)),
    request("r-hostile", HOSTILE),
)

Open = Callable[..., Awaitable[Tab]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture five times a second."""
    monkeypatch.setattr(pages, "EVERY_S", 0.2)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """One browser for all tests here: starting it takes longer than most of them."""
    path = browser_path()
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=path)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def opened(browser: Browser) -> AsyncIterator[Open]:
    """Opens the page in a tab of its own; in the end no tab had an error, nor anything that its policy forbids."""
    wrong: list[str] = []
    contexts: list[BrowserContext] = []

    def note(message: Any) -> None:
        if message.type in {"error", "warning"} and "ERR_" not in message.text:  # a break is no fault
            wrong.append(message.text)

    async def open_(served: Served, width: int = 1280, scheme: Any = "dark") -> Tab:
        context = await browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        tab = await context.new_page()
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", note)
        await tab.goto(served.url)
        await expect(tab.locator("#clock")).to_have_text(re.compile(r"\d:\d\d:\d\d"), timeout=30_000)
        return tab

    yield open_
    for context in contexts:
        await context.close()
    assert wrong == []


async def tell(served: Served, tab: Tab) -> None:
    """A worker with four tenants is heard and shown."""
    for seq, name in enumerate(("w1", "w2"), 1):
        served.hear(
            frame(name, "01A", seq, *ROWS, queued=15, running=3, held=2, requests=REQUESTS, step_s=0.02)
        )
    await expect(tab.locator("#tenants tbody tr")).to_have_count(4)


@pytest.mark.parametrize("width", [1280, 390])
async def test_a_figure_and_its_curve_do_not_cover_each_other(opened: Open, width: int) -> None:
    """However long the number is, it is whole, and beside its curve."""
    async with Served().up() as served:
        tab = await opened(served, width)
        await tell(served, tab)
        slow = row("acme", class_="chat", queued=3, oldest_queued_s=36_754.0)
        served.hear(frame("w1", "01A", 2, slow, queued=3, requests=REQUESTS, step_s=0.02))
        await expect(tab.locator("#figure-wait")).to_contain_text("h")
        for box in await tab.locator(".figure").all():
            number, curve, whole = [await box.locator(each).bounding_box() for each in ("b", "svg", ":scope")]
            assert number
            assert curve
            assert whole
            assert number["x"] + number["width"] <= curve["x"]
            assert curve["x"] + curve["width"] <= whole["x"] + whole["width"]
            assert curve["width"] > 10


async def column(tab: Tab, table: str, title: str) -> list[str]:
    """A column's cells from top to bottom."""
    heads = await tab.locator(f"#{table} th").all_inner_texts()
    place = next(place for place, head in enumerate(heads, 1) if head.strip(" ↑↓") == title)
    return [text.strip() for text in await tab.locator(f"#{table} td:nth-child({place})").all_inner_texts()]


async def test_a_person_reads_sorts_filters_and_looks_into_a_tenant(opened: Open) -> None:
    """Figures, tables, order, filter, and the requests behind a row; nothing of a name is ever markup."""
    async with Served().up() as served:
        tab = await opened(served)
        await tell(served, tab)
        await expect(tab.locator("#figure-queued")).to_have_text("30")
        await expect(tab.locator("#leader")).to_have_text("no leader")
        await expect(tab.locator("#controller")).to_contain_text("ctl-1 leads")
        names = await column(tab, "tenants", "Tenant")
        assert set(names) == {"acme", "globex", HOSTILE, r"a\u{202e}gpj.exe"}
        assert await tab.title() == "main – Coxswain"

        await tab.get_by_role("button", name="Queued").first.click()
        assert (await column(tab, "tenants", "Queued"))[:2] == ["24", "6"]
        await expect(tab.locator("#tenants th[aria-sort=descending]")).to_have_text("Queued")
        await tab.get_by_role("button", name="Tenant").first.click()
        assert (await column(tab, "tenants", "Tenant"))[-1] == "globex"

        await tab.keyboard.press("Escape")
        await tab.locator("h1").click()
        await tab.keyboard.press("/")
        await tab.keyboard.type("GLOB batch")
        await expect(tab.locator("#tenants tbody tr")).to_have_count(1)
        await expect(tab.locator("#tenants h2")).to_contain_text("1 of 4")
        await tab.keyboard.press("Escape")
        await expect(tab.locator("#tenants tbody tr")).to_have_count(4)

        await tab.get_by_role("button", name="acme").click()
        await expect(tab.locator("#drawer-name")).to_have_text("acme")
        await expect(tab.locator("#requests tbody tr")).to_have_count(4)
        assert sorted(await column(tab, "requests", "State")) == [
            "queued #0",
            "queued #0",
            "running",
            "running",
        ]
        assert "1m15s" in await tab.locator("#facts").inner_text()
        await tab.keyboard.press("Escape")
        await expect(tab.locator("#drawer")).to_be_hidden()
        await tab.locator("#tenants tbody tr", has_text="script").click()
        await expect(tab.locator("#drawer-name")).to_have_text(HOSTILE)
        await expect(tab.locator("#requests tbody tr")).to_have_count(2)


async def test_a_break_is_told_and_mended(opened: Open) -> None:
    """Without the controller the page says since when it is stale; when it is back, the page is too."""
    async with Served().up() as served:
        tab = await opened(served)
        await tell(served, tab)
        served.reaches_nats = False
        await expect(tab.locator("#trouble")).to_contain_text("has lost NATS")
        served.reaches_nats = True
        await expect(tab.locator("#trouble")).to_be_hidden()
    await expect(tab.locator("#trouble")).to_contain_text("Stale since", timeout=20_000)
    await expect(tab.locator("#tenants tbody tr")).to_have_count(4)
    again = Served(port=served.port)
    async with again.up():
        await expect(tab.locator("#trouble")).to_be_hidden(timeout=20_000)
        again.hear(frame("w9", "01A", 1, row("initech")))
        await expect(tab.locator("#workers tbody")).to_contain_text("w9")


async def test_a_paused_picture_stands_still(opened: Open) -> None:
    """Space stops it to be read, and lets it go on."""
    async with Served().up() as served:
        tab = await opened(served)
        await tell(served, tab)
        await tab.locator("h1").click()
        await tab.keyboard.press("Space")
        before = served.page._latest
        served.hear(frame("w1", "01A", 999, row("late", queued=1)))
        await expect(tab.locator("#pause")).to_have_text("Paused")
        while served.page._latest is before:
            await tab.wait_for_timeout(50)
        await tab.wait_for_timeout(500)
        assert "late" not in await column(tab, "tenants", "Tenant")
        await tab.keyboard.press("Space")
        await expect(tab.locator("#tenants tbody")).to_contain_text("late")


async def test_it_fits_a_phone_and_a_wall_in_dark_and_light(opened: Open) -> None:
    """At no width does anything stick out; text is well above its ground in both palettes."""
    async with Served().up() as served:
        for width, scheme in ((390, "dark"), (390, "light"), (1920, "dark"), (1920, "light")):
            tab = await opened(served, width, scheme)
            await tell(served, tab)
            assert await tab.evaluate("document.documentElement.scrollWidth") == width
            out = await tab.evaluate(
                "[...document.querySelectorAll('main td, main th')].filter(cell => cell.checkVisibility() &&"
                " cell.getBoundingClientRect().right > innerWidth).length"
            )
            assert out == 0
            text, ground = await tab.evaluate(
                "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
            )
            assert contrast(text, ground) > 7
            assert luminance(ground) < 0.05 if scheme == "dark" else luminance(ground) > 0.8


def luminance(color: str) -> float:
    """Of `rgb(…)`, as WCAG 2 has it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """Of two colours, 1 to 21, as WCAG 2 has it."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
