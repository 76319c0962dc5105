"""A JupyterLab of its own and a Chromium that may talk to nothing else."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CHROMIUM = os.environ.get("CHROMIUM", shutil.which("chromium") or "/usr/bin/chromium")
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
_SETTINGS = {
    # Its news would cover the lower right corner, and come from elsewhere.
    "apputils-extension/notification": {
        "fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True,
    },
    # Cells out of sight would not be in the page.
    "notebook-extension/tracker": {"windowingMode": "none"},
}  # fmt: skip
# An idle mark in the page is too early: without a session Run All asks for a kernel.
_CONNECTED = """async () => {
    const panel = window.jupyterapp.shell.currentWidget;
    if (!panel || !panel.sessionContext) return false;
    await panel.context.ready;
    await panel.sessionContext.ready;
    const kernel = panel.sessionContext.session && panel.sessionContext.session.kernel;
    return !!kernel && kernel.connectionStatus === 'connected' && kernel.status === 'idle';
}"""
# The command's promise may wait for ever (for a dialog), so it is not awaited.
_COMMAND = "(name) => { window.jupyterapp.commands.execute(name); return null }"


@contextmanager
def jupyterlab(root: Path) -> Iterator[str]:
    """The address of a JupyterLab in `root`; it and its kernels end with the block."""
    for name, settings in _SETTINGS.items():
        file = root / ".settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    folders = {
        "JUPYTER_CONFIG_DIR": ".config", "JUPYTER_DATA_DIR": ".data", "IPYTHONDIR": ".ipython",
        "JUPYTER_RUNTIME_DIR": ".runtime", "JUPYTERLAB_SETTINGS_DIR": ".settings",
        "JUPYTERLAB_WORKSPACES_DIR": ".workspaces",
    }  # fmt: skip
    env = os.environ | {name: str(root / folder) for name, folder in folders.items()}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", "--allow-root", "--IdentityProvider.token=",
        "--ServerApp.password=", f"--ServerApp.root_dir={root}", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly", "--expose-app-in-browser",
    ]  # fmt: skip
    log = root / "lab.log"
    with log.open("w") as out:
        # A session of its own, so that kernels end with it whatever happens.
        lab = subprocess.Popen(
            command, cwd=root, env=env, stdout=out, stderr=out, start_new_session=True
        )
        try:
            _wait_for(address, lab, log)
            yield address
        finally:
            _end(lab)


def _wait_for(address: str, lab: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and lab.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api", timeout=1).close()
            return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


def _end(lab: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(lab.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        lab.wait(8)
    with suppress(ProcessLookupError):
        os.killpg(lab.pid, signal.SIGKILL)
    lab.wait(8)


class Page:
    """A notebook in the browser, and what went wrong there: `off_host` requests, `errors`."""

    def __init__(self, browser: object, address: str, *, width: int = 1280) -> None:
        self.off_host: list[str] = []
        self.errors: list[str] = []
        self._address = address
        context = browser.new_context(viewport={"width": width, "height": 1500})  # type: ignore[attr-defined]
        context.set_default_timeout(20_000)
        context.route("**/*", self._route)
        self.page = context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _route(self, route: object) -> None:
        url = route.request.url  # type: ignore[attr-defined]
        if url.startswith((self._address, "data:", "blob:")):
            route.continue_()  # type: ignore[attr-defined]
        else:
            self.off_host.append(url)
            route.abort()  # type: ignore[attr-defined]

    def open(self, name: str) -> None:
        self.page.goto(f"{self._address}/lab/tree/{name}?reset", wait_until="domcontentloaded")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        self.page.wait_for_function(_CONNECTED, timeout=40_000)

    def command(self, name: str) -> None:
        self.page.evaluate(_COMMAND, name)

    def run_all(self, last_words: str, seconds: float = 60) -> None:
        """Until the last cell has said `last_words`."""
        self.command("notebook:run-all-cells")
        self.page.wait_for_function(
            """words => [...document.querySelectorAll('.jp-OutputArea-output')]
                .some(output => output.textContent.trim() === words)""",
            arg=last_words, timeout=1000 * seconds,
        )  # fmt: skip

    def save(self, file: Path) -> dict:
        """The notebook as it is written."""
        before = file.stat().st_mtime_ns
        self.command("docmanager:save")
        until = time.monotonic() + 15
        while file.stat().st_mtime_ns == before and time.monotonic() < until:
            self.page.wait_for_timeout(100)
        self.page.wait_for_timeout(200)
        return json.loads(file.read_text())


@contextmanager
def chromium() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=list(_FLAGS), timeout=30_000
        )
        try:
            yield browser
        finally:
            browser.close()
