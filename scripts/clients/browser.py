"""Usage: python browser.py PAGES URL [CLIENT...]; scripts/try_clients runs it, if there is a Chromium.

Opens browser.html in it, and tells what came of its trials as trials.py does.
"""

import json
import shutil
import sys

from playwright.sync_api import sync_playwright

SECONDS = 240
NAMES = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    pages, url, *only = sys.argv[1:]
    if only and not {"openai", "npm", "browser"} & set(only):
        return
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        print("amulet: without Chromium, the library for browsers is left out", file=sys.stderr)
        return
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("pageerror", lambda error: print(error, file=sys.stderr))
        page.goto(f"{pages}/browser.html#{url}")
        page.wait_for_function("window.results", timeout=SECONDS * 1000)
        for each in page.evaluate("window.results"):
            print(json.dumps(each), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
