"""Opens every page of the built site in Chromium, as a reader would: ``python docs/browse.py
build/site``.

It finds links and anchors that lead nowhere, mathematics or markup that is shown as it was typed,
pictures and scripts that fail, and any request that leaves the machine. It talks to the browser
through two pipes, in the DevTools protocol: one message of JSON, then a null byte.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--mute-audio", "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip

#: what a page shows: its text without code and formulas, its links, names and broken pictures
READ = """(() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const text = [];
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (parent && !parent.closest("pre, code, math, script, style, .sig, noscript"))
      text.push(walker.currentNode.data);
  }
  const all = (selector, get) => Array.from(document.querySelectorAll(selector), get);
  return JSON.stringify({
    text: text.join(""),
    formulas: all("math", (m) => m.textContent),
    links: all("a[href], area[href]", (a) => a.href),
    names: all("[id], a[name]", (e) => e.id || e.name),
    pictures: all("img", (i) => i).filter((i) => i.complete && !i.naturalWidth).map((i) => i.src),
  });
})()"""

#: what a reader must not see outside of code
RAW = re.compile(
    r"\\\\?[a-zA-Z]{2,}|\\[(\[]|\$[^$\s][^$\n]*\$|[_^]\{|^```.*|^:::.*|\]\([\w./#]|\{(?:math|eval-rst)\}"
    r"|:(?:math|func|class|mod|ref|doc):`[^`]*`?",
    re.MULTILINE,
)


class Browser:
    """A page of Chromium."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out = into, out
        self._number, self._buffer, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []

    def open(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command. Events that come before it are collected."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next()
            if got.get("id") == self._number:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']['message']}")
                result: dict[str, Any] = got["result"]
                return result
            self.events.append(got)

    def wait_for(self, event: str) -> None:
        while not any(e.get("method") == event for e in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = os.read(self._out, 1 << 20)
            if not more:
                raise RuntimeError("the browser has gone")
            self._buffer += more
        message, self._buffer = self._buffer.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found

    def value(self, expression: str) -> Any:
        """What a script gives, after the promises in it."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        return result["result"].get("value")


@contextmanager
def browser() -> Iterator[Browser]:
    """A running browser.

    Raises:
        FileNotFoundError: there is none on this machine.
    """
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} is installed")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()

    def connect() -> None:  # the protocol's two ends
        os.dup2(theirs_in, 13)
        os.dup2(theirs_out, 14)
        os.dup2(13, 3)
        os.dup2(14, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *OPTIONS, f"--user-data-dir={profile}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=connect,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        page = Browser(ours_out, ours_in)
        try:
            page.open()
            yield page
            page.call("Page.close")
        finally:
            process.terminate()
            process.wait()
            os.close(ours_out)
            os.close(ours_in)


@dataclass
class Site:
    """What was found."""

    folder: Path
    faults: list[str] = field(default_factory=list)
    names: dict[Path, set[str]] = field(default_factory=dict)
    links: dict[Path, set[str]] = field(default_factory=dict)

    def read(self, page: Browser, file: Path) -> None:
        """Opens one page and notes what is wrong with it."""
        page.events.clear()
        page.call("Page.navigate", url=file.as_uri())
        page.wait_for("Page.loadEventFired")
        shown = json.loads(page.value(READ))
        name = file.relative_to(self.folder)
        self.faults += [f"{name}: {fault}" for fault in _faults(page.events)]
        self.faults += [f"{name}: shown as typed: {m[0]!r}" for m in RAW.finditer(shown["text"])]
        self.faults += [f"{name}: in a formula: {f!r}" for f in shown["formulas"] if "\\" in f]
        self.faults += [f"{name}: no picture {picture}" for picture in shown["pictures"]]
        self.names[file], self.links[file] = set(shown["names"]), set(shown["links"])

    def follow(self) -> None:
        """Notes the links that lead nowhere."""
        for file, links in self.links.items():
            for link in sorted(links):
                if fault := self._broken(link):
                    self.faults.append(f"{file.relative_to(self.folder)}: {fault}")

    def _broken(self, link: str) -> str:
        if link.startswith(("http:", "https:", "mailto:")):
            return ""
        address, anchor = urldefrag(link)
        to = Path(unquote(urlsplit(address).path))
        if not address.startswith("file:") or not to.is_file():
            return f"no page {link}"
        if not to.is_relative_to(self.folder):
            return f"outside of the site: {link}"
        if anchor and to in self.names and unquote(anchor) not in self.names[to]:
            return f"no place {link}"
        return ""


def _faults(events: list[dict[str, Any]]) -> Iterator[str]:
    """What scripts and requests did wrong."""
    for event in events:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            what = details.get("exception", {}).get("description", details["text"])
            yield f"a script failed: {what.splitlines()[0]}"
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            yield f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}".strip()
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert"):
            yield f"a script complains: {[a.get('value') for a in parameters['args']]}"
        elif method == "Network.requestWillBeSent":
            address = parameters["request"]["url"]
            if not address.startswith(("file:", "data:", "blob:", "about:")):
                yield f"a request leaves the machine: {address}"


def search(page: Browser, site: Site, word: str) -> None:
    """Notes it if the site's own search does not find a word."""
    page.events.clear()
    page.call("Page.navigate", url=f"{(site.folder / 'search.html').as_uri()}?q={word}")
    page.wait_for("Page.loadEventFired")
    found = page.value(
        "new Promise((done) => { let left = 100; const look = () => {"
        " const n = document.querySelectorAll('#search-results li').length;"
        " n || !left-- ? done(n) : setTimeout(look, 50); }; look(); })"
    )
    if not found:
        site.faults.append(f"search.html: {word!r} is not found")


def browse(folder: Path, word: str | None = None) -> Site:
    """Opens every page below a folder, and with ``word`` searches for it."""
    site = Site(folder.resolve())
    with browser() as page:
        for file in sorted(site.folder.rglob("*.html")):
            site.read(page, file)
        if word:
            search(page, site, word)
    site.follow()
    return site


def main() -> int:
    parser = argparse.ArgumentParser(prog="python docs/browse.py", description=__doc__)
    parser.add_argument("site", type=Path, help="the folder that sphinx-build has written")
    parser.add_argument("--search", metavar="WORD", help="also search for it")
    args = parser.parse_args()
    site = browse(args.site, args.search)
    print("\n".join(site.faults) or "no fault")
    count = sum(map(len, site.links.values()))
    print(f"{len(site.names)} pages, {count} links, {len(site.faults)} faults", file=sys.stderr)
    return int(bool(site.faults) or not site.names)


if __name__ == "__main__":
    sys.exit(main())
