"""The documentation builds without a warning."""

import os
import subprocess
import sys


def test_the_site_builds_without_warnings(root, tmp_path):
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    assert "GrassLinear" in (tmp_path / "site" / "api" / "index.html").read_text()
