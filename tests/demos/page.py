"""The page in a browser, as a test drives it."""

import time
from pathlib import Path
from typing import Any

from tests.demos.browser import resize, until

TABS = {
    "ask": "Ask a picture",
    "search": "Search an image",
    "moment": "Find the moment",
    "painting": "Speculative painting",
    "robot": "Robot",
}


class Page:
    """One browser on one page."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        self.load(address)

    def load(self, address: str) -> None:
        """Opens the page anew, and waits until it knows what it offers."""
        self.browser.get(address)
        until(lambda: self.all("#ask-run"), "page")
        until(lambda: "hired" in self.values(), "list of methods")

    def all(self, selector: str) -> list[Any]:
        """What a CSS selector finds."""
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        """The first element that a CSS selector finds, when it is there."""
        return until(lambda: self.all(selector), selector)[0]

    def values(self) -> list[str]:
        """What the fields say."""
        said = "return [...document.querySelectorAll('input, textarea')].map(field => field.value)"
        return list(self.browser.execute_script(said))

    def tab(self, name: str) -> None:
        """Chooses a tab."""
        button = self.tab_button(name)
        if button is None:  # behind the menu of a narrow page
            self.one(".overflow-menu > button").click()
            button = until(
                lambda: [one for one in self.all(".overflow-dropdown button") if one.text == TABS[name]], name
            )[0]
        button.click()
        until(lambda: self.one(f"#{name}-run").is_displayed(), f"tab {name}")

    def press(self, selector: str) -> None:
        """Clicks a button, wherever it stands on the page."""
        element = self.one(selector)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def write(self, selector: str, text: str) -> None:
        """Puts a text in the place of a field's."""
        from selenium.webdriver.common.keys import Keys

        field = self.one(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def upload(self, selector: str, file: Path) -> None:
        """Gives a file to a field that holds none."""
        if clear := self.all(f"{selector} button[aria-label^=Remove], {selector} button[aria-label=Clear]"):
            self.browser.execute_script("arguments[0].click()", clear[0])
        self.one(f"{selector} input[type=file]").send_keys(str(file))

    def reach(self, wanted: Any) -> Any:
        """The element, once the Tab key has brought the focus there."""
        from selenium.webdriver import ActionChains

        self.browser.execute_script("document.activeElement.blur()")
        for _ in range(60):
            ActionChains(self.browser).send_keys("\ue004").perform()
            if self.browser.switch_to.active_element == wanted:
                return wanted
        raise AssertionError(f"60 times Tab did not reach {wanted.get_attribute('outerHTML')[:200]}")

    def tab_button(self, name: str) -> Any:
        """The button of a tab, if the page is wide enough to show it."""
        shown = [one for one in self.all("button[role=tab]") if one.text == TABS[name] and one.is_displayed()]
        return shown[0] if shown else None

    def shade(self, name: str) -> None:
        """Light or dark, as the system would say."""
        self.browser.execute_script(f"document.body.classList.toggle('dark', {str(name == 'dark').lower()})")
        time.sleep(0.3)  # colours fade

    def text(self, selector: str) -> str:
        """What an element shows; a field, what it holds."""
        said = "return [...document.querySelectorAll(arguments[0])].map(one => one.value || one.innerText).join(' ')"
        return " ".join(self.browser.execute_script(said, selector).split())

    def messages(self) -> str:
        """The messages that stand on the page."""
        return self.text(".toast-body")

    def said(self, text: str) -> str:
        """Waits for a message that holds this text, and closes all."""
        found = until(lambda: text in self.messages() and self.messages(), f"message {text!r}")
        self.browser.execute_script("document.querySelectorAll('.toast-close').forEach(one => one.click())")
        return found

    def picture(self, selector: str) -> str:
        """The address of a picture, when it is there."""
        said = "return document.querySelector(arguments[0])?.src"
        return str(until(lambda: self.browser.execute_script(said, f"{selector} img"), selector))

    def errors(self) -> list[str]:
        """What the browser's console complains of."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]

    def shoot(self, file: Path, width: int) -> int:
        """A picture of the whole page at this width; returns how wide the content is."""
        import base64

        resize(self.browser, width, 1000)
        wide, high = self.browser.execute_script(
            "const page = document.documentElement; return [page.scrollWidth, page.scrollHeight]"
        )
        resize(self.browser, width, min(high, 4000))
        shot = self.browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        file.write_bytes(base64.b64decode(shot["data"]))
        resize(self.browser, 1280, 1000)
        return int(wide)
