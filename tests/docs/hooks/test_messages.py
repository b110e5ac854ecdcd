from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

from paths import ROOT

import zeroopt

SOURCE = """
def check(name, got):
    if not name:
        raise ConfigError(f"expected a name, got {got!r} (<none>)" + ("; give one" if got else ""))
    error = errors.StateError("it is too late")
    raise StateError(lost(name))
"""


def page_of(root: Path, markdown: str) -> str:
    spec = importlib.util.spec_from_file_location("messages", ROOT / "docs" / "hooks" / "messages.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return str(hook.on_page_markdown(markdown, None, SimpleNamespace(config_file_path=str(root / "mkdocs.yml")), None))


def test_messages_are_listed_by_class_and_module(tmp_path: Path) -> None:
    package = tmp_path / "zeroopt" / "plan"
    package.mkdir(parents=True)
    (tmp_path / "zeroopt" / "errors.py").write_text(
        "class ConfigError(Exception): ...\nclass StateError(Exception): ...\n"
    )
    (package / "__init__.py").write_text(SOURCE)
    assert page_of(tmp_path, "# All\n\n<!-- messages -->\n") == (
        "# All\n\n"
        "## ConfigError\n\n`zeroopt.plan`\n\n- expected a name, got … (&lt;none&gt;) …\n\n"
        "## StateError\n\n`zeroopt.plan`\n\n- it is too late\n\n"
    )


def test_a_page_without_the_mark_stays_as_it_is(tmp_path: Path) -> None:
    assert page_of(tmp_path, "# Another\n") == "# Another\n"


def test_the_page_has_all_classes_that_are_raised() -> None:
    page = page_of(ROOT, (ROOT / "docs" / "messages.md").read_text())
    for name, error in vars(zeroopt.errors).items():
        if isinstance(error, type) and error is not zeroopt.ZeroOptError:
            assert f"## {name}\n" in page
    assert "expected one prepared model, whose optimizers it covers" in page
