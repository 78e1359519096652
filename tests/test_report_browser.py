"""The report page in headless Chromium: screens, clicks, keys, sorting, paper, and an empty console."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from reported_plans import OPTIONS, WICKED, cost_table, solved, verification

from mpq.budgets import format_quantity
from mpq.report_exchange import exchanges
from mpq.report_subject import Subject
from mpq.reporting import report_html

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


@pytest.fixture(scope="module")
def table():
    return cost_table()


@pytest.fixture(scope="module")
def plan(table):
    return solved(table)


@pytest.fixture(scope="module")
def page(plan, table):
    return report_html(plan, table, verification(plan, table), data="held-out", model="demo")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'mpq-search[test]'")
    options = webdriver.ChromeOptions()
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page, tmp_path):
    """A function that opens the page at a width and in a colour scheme."""
    file = tmp_path / "page.html"
    file.write_text(page, "utf-8")

    def open_at(width=1400, scheme="light"):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(file.as_uri())
        return browser

    yield open_at
    assert browser.get_log("browser") == []  # no error, no warning, whatever was done


ONE = "return document.querySelector(arguments[0])"
COUNT = "return document.querySelectorAll(arguments[0]).length"


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_the_screen(opened, width, scheme):
    browser = opened(width, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
    assert (brightness > 200) == (scheme == "light")
    shown = "return [...document.querySelectorAll('.area use')].filter(u => u.getBoundingClientRect().width > 3).length"
    assert browser.execute_script(shown) > 20
    assert browser.execute_script(COUNT, "b[onclick]") == 0


def choose(browser, kind, place):
    """Click a point of the first picture; the text of its mark."""
    mark = browser.execute_script(
        "const m = document.querySelectorAll('#panel-1 use.' + arguments[0])[arguments[1]];"
        "m.scrollIntoView({block: 'center', behavior: 'instant'}); return m", kind, place)  # fmt: skip
    corners = browser.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.x, b.y]", mark)
    sides = browser.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.width, b.height]", mark)
    box = [corner + side / 2 for corner, side in zip(corners, sides, strict=True)]
    for event in ("mousePressed", "mouseReleased"):
        where = {"type": event, "x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", where)
    return mark.get_attribute("aria-label")


def test_a_click_shows_that_plan_and_its_difference(opened, plan, table):
    browser = opened()
    picture = exchanges(Subject(plan=plan, table=table, verification=verification(plan, table)))[0]
    point = picture.of("best")[0]
    label = choose(browser, "best", 0)
    assert format_quantity(point.cost, "B") in label
    assert browser.execute_script(COUNT, "[aria-selected='true'].m") == 1
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#detail tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    mine = [OPTIONS.index(label) for label in plan.options.values()]
    different = {
        str(table.units[unit]): f"{OPTIONS[mine[unit]]} → {OPTIONS[code]}"
        for unit, code in enumerate(point.choices.tolist()) if code != mine[unit]
    }  # fmt: skip
    assert different
    assert {row[0]: row[1] for row in rows} == different
    text = browser.execute_script(ONE, "#detail").text
    assert f"{len(different)} of 4 layers differ" in text
    assert format_quantity(point.cost, "B") in text
    change = sum(table.quantity("size")[range(4), point.choices]) - sum(table.quantity("size")[range(4), mine])
    shown = float(re.search(r"size [−+]([\d.]+) kB", text)[1])
    assert shown == pytest.approx(abs(change) / 1000, rel=0.01)


def test_keys_choose_a_plan(opened):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser = opened()
    stop = "#panel-1 .area [tabindex='0']"
    assert browser.execute_script(COUNT, stop) == 1  # one stop of the tab key for all points
    browser.execute_script("document.querySelector(arguments[0]).focus()", stop)
    before = browser.execute_script("return document.activeElement.getAttribute('aria-label')")
    ActionChains(browser).send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ENTER).perform()
    after = browser.execute_script("return document.activeElement.getAttribute('aria-label')")
    assert before != after
    assert browser.execute_script("return document.activeElement.getAttribute('aria-selected')") == "true"
    assert browser.execute_script(COUNT, "#panel-1 .halo.on") == 1
    assert "differ" in browser.execute_script(ONE, "#detail").text
    assert browser.execute_script(COUNT, stop) == 1


def test_layers_answer_to_pointer_and_keys(opened, plan):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser = opened()
    bars = "svg.bars rect[data-layer]"
    ActionChains(browser).move_to_element(browser.execute_script(ONE, bars)).perform()
    readout = browser.execute_script(ONE, "#layer-readout")
    assert readout.text.startswith("stem: linear")
    assert str(plan.entries[0].choice) in readout.text
    browser.execute_script("document.querySelector(arguments[0]).focus()", bars)
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert readout.text.startswith(WICKED)
    assert browser.execute_script("return document.activeElement.getAttribute('aria-label')") == readout.text


def test_table_sorts_and_finds(opened, plan):
    browser = opened()
    heads = "return [...document.querySelectorAll('#layer-table thead th')]"
    rows = "return [...document.querySelectorAll('#layer-table tbody tr')]"
    names = f"{rows}.filter(r => !r.hidden).map(r => r.cells[1].textContent)"
    sorted_by = f"{heads}.map(h => h.getAttribute('aria-sort')).filter(s => s !== 'none')"
    button = browser.execute_script(f"{heads}.find(h => h.textContent === 'size').firstChild")
    by_size = [e.layer.name for e in sorted(plan.entries, key=lambda e: e.storage_bits)]
    browser.execute_script("arguments[0].click()", button)
    assert browser.execute_script(names) == by_size[::-1]
    assert browser.execute_script(sorted_by) == ["descending"]
    browser.execute_script("arguments[0].click()", button)
    assert browser.execute_script(names) == by_size
    assert browser.execute_script("return arguments[0].parentNode.getAttribute('aria-sort')", button) == "ascending"
    browser.execute_script(ONE, "#find").send_keys("CONV")
    assert browser.execute_script(names) == ["body.conv"]
    assert browser.execute_script(ONE, "#found").text == "1 of 4 layers"


def test_tabs_change_the_quantity(opened):
    browser = opened()
    visible = "return [...document.querySelectorAll('.panel')].filter(p => p.offsetParent).map(p => p.id)"
    assert browser.execute_script(visible) == ["panel-1"]
    browser.execute_script("document.querySelector('#tab-2').click()")
    assert browser.execute_script(visible) == ["panel-2"]
    assert browser.execute_script("return document.querySelector('#tab-2').getAttribute('aria-selected')") == "true"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script(visible) == ["panel-1", "panel-2"]  # paper shows all
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
