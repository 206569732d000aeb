"""The explorer as a person uses it: JupyterLab in headless Chromium, a slider that is dragged, an answer that is read."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import papermill
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

PROJECT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are rendered too
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
FOLDERS = {
    "HFPRUNE_RESULTS": "results",
    "IPYTHONDIR": "ipython",
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
}


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a copy of the notebook, with nothing of the user's own configuration; returns the notebook's address."""
    tiny = {"model": "tiny-random-llama", "study": "browser", "device": "cpu", "chosen": ["entropy", "one_hot_ce"]}
    notebook = PROJECT / "notebooks" / "10_explore.ipynb"
    papermill.execute_notebook(notebook, tmp_path / "explore.ipynb", tiny, prepare_only=True, progress_bar=False)
    for name, content in SETTINGS.items():
        file = tmp_path / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {name: str(tmp_path / folder) for name, folder in FOLDERS.items()}
    environment |= {"HFPRUNE_HOME": str(PROJECT), "PYTHONPATH": str(PROJECT)}
    token = secrets.token_hex()
    options = {"ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.root_dir": tmp_path}
    options |= {"IdentityProvider.token": token, "ServerApp.open_browser": False, "ServerApp.allow_root": True}
    options |= {"LabApp.expose_app_in_browser": True}
    command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?token={token}"
        server.terminate()


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    driver = shutil.which("chromedriver")
    if not driver:
        pytest.skip("NO CHROMIUM WITH ITS DRIVER, the explorer was not tried: install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    for argument in ("headless=new", "no-sandbox", "disable-gpu", f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{argument}")
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        chrome.set_window_size(1400, 1500)
        yield chrome


def test_a_dragged_slider_is_answered_in_lab(lab, browser):
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    def find(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def wait(what, condition, seconds=60):
        return WebDriverWait(browser, seconds, ignored_exceptions=[WebDriverException, IndexError]).until(
            lambda _: condition(), what
        )

    def told():
        """What the panel's two last texts say: how it went, and the answer."""
        status, view = [each.text for each in browser.find_elements(By.CSS_SELECTOR, ".widget-html")][-2:]
        return view if "answered in" in status else None

    def started():
        """Run all cells unless they run: while Lab restores its layout, it may take the focus and the command away."""
        if "[*]:" in (prompts := [each.text for each in browser.find_elements(By.CSS_SELECTOR, ".jp-InputPrompt")]):
            return prompts
        find(".jp-Notebook .jp-Cell").click()
        browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        return None

    wait("the server does not listen", lambda: browser.get(lab) is None)
    wait("the kernel does not start", lambda: find(".jp-Notebook-ExecutionIndicator[data-status='idle']"))
    wait("the cells do not run", started)
    handle = wait("no slider is shown", lambda: find(".noUi-handle"), 240)  # the model is scored first
    before, ratio = wait("nothing is answered", told), handle.get_attribute("aria-valuenow")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
    ActionChains(browser).drag_and_drop_by_offset(handle, 25, 0).perform()
    wait("the drag is not answered", lambda: told() not in (None, before))
    assert float(handle.get_attribute("aria-valuenow")) > float(ratio)
    for words in ("Dense", "Entropy (HFPrune)", "One-hot CE", "perplexity of the prompt", "KL(dense, pruned)"):
        assert words in told()
    assert find("img.widget-image").size["height"] > 100
    assert not [each for each in browser.find_elements(By.CSS_SELECTOR, ".jp-OutputArea-output") if "Traceback" in each.text]
