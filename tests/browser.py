"""A headless Chromium, driven by its command line: a page as a reader's browser has it."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Nothing of its own goes out, and no name resolves: a page that needs a network is found out.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)


@dataclass(frozen=True)
class Visit:
    """What a browser made of a page.

    Attributes:
        dom: the document after its scripts have run, as HTML.
        console: every line that the page, or the browser on its behalf, put on the console.
    """

    dom: str
    console: list[str]


def find_browser() -> str | None:
    """The path of a Chromium or Chrome; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def visit(
    address: str,
    profile: Path,
    *,
    size: tuple[int, int] = (1200, 900),
    screenshot: Path | None = None,
    milliseconds: int = 10_000,
) -> Visit:
    """Open a page in a window of `size`, let its scripts run for `milliseconds` of its own time.

    Args:
        profile: a folder for what the browser keeps of itself.
        screenshot: a file for what the window shows.
    """
    browser = find_browser()
    assert browser is not None
    command = [
        browser,
        *FLAGS,
        f"--user-data-dir={profile}",
        f"--window-size={size[0]},{size[1]}",
        f"--virtual-time-budget={milliseconds}",
        f"--screenshot={screenshot}" if screenshot else "--dump-dom",
        address,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=True, errors="replace"
    )
    console = [line for line in done.stderr.splitlines() if re.search(r"\bCONSOLE\b", line)]
    return Visit(done.stdout, console)
