"""The command line as a newcomer meets it, on the toy papers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corollary.claims.store import Store

pytestmark = pytest.mark.usefixtures("toys")


def _run(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from corollary.cli import main; main()", *words]
    environment = {**os.environ, "COLUMNS": "200", **env}
    result = subprocess.run(command, cwd=cwd, text=True, capture_output=True, env=environment, timeout=120)
    assert "Traceback" not in result.stderr + result.stdout
    return result


def test_listings_do_not_import_torch_and_answer_fast(tmp_path: Path) -> None:
    probe = (
        "import sys\nfrom corollary.cli.main import app\n"
        "try:\n    app({words})\nexcept SystemExit:\n    pass\n"
        "assert not {{'torch', 'scipy', 'sklearn', 'matplotlib'}} & set(sys.modules), sorted(sys.modules)\n"
    )
    for words in (["--help"], ["papers"], ["show", "steady"]):
        taken = []
        for _ in range(3):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", probe.format(words=words)], cwd=tmp_path, check=True, capture_output=True)
            taken.append(time.perf_counter() - begin)
        print(words, min(taken))


def test_papers_and_show(tmp_path: Path) -> None:
    listed = _run("papers", cwd=tmp_path)
    assert listed.returncode == 0
    assert all(slug in listed.stdout for slug in ("steady", "slow", "troubled"))
    assert "slow" not in _run("papers", "keeps promises", cwd=tmp_path).stdout
    assert "no paper matches 'zzz'" in _run("papers", "zzz", cwd=tmp_path).stdout
    data = json.loads(_run("papers", "--package", "toy", "--json", "-", cwd=tmp_path).stdout)
    assert [paper["slug"] for paper in data] == ["slow", "steady", "troubled"]
    shown = _run("show", "steady", cwd=tmp_path)
    assert "not yet measured" in shown.stdout
    assert "corollary verify steady --controls" in shown.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "stedy"), "no paper 'stedy'; nearest: steady"),
        (("verify", "stedy"), "no paper 'stedy'; nearest: steady"),
        (("verify", "steady:bettr"), "steady has no claim 'bettr'"),
        (("verify",), "name at least one paper, or take --all"),
        (("verify", "steady", "--all"), "--all takes no papers"),
        (("verify", "--package", "optimm"), "no package 'optimm'; there are: toy"),
        (("papers", "--package", "optimm"), "no package 'optimm'; there are: toy"),
        (("verify", "steady", "--scale", "desktop"), "scale is 'desktop'; allowed: smoke, laptop, full"),
        (("verify", "steady", "--backend", "threads"), "backend is 'threads'"),
        (("verify", "steady", "--pairs", "many"), "valid integer"),
        (("verify", "steady", "--seed", "-1"), "--seed"),
        (("verify", "steady", "--scale", "smoke", "--publish"), "gives no verdict to publish"),
        (("verify", "steady", "--store", "/proc/none"), "cannot write to store '/proc/none'"),
        (("frobnicate",), "No such command"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_bad_usage_is_one_clear_line_and_status_2(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = _run(*words, cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_verify_prints_verdicts_and_writes_json(tmp_path: Path) -> None:
    result = _run("verify", "steady", "--controls", "--json", "out.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "failed, as it must" in result.stdout
    assert "5 of 5 claims hold at laptop scale" in result.stdout
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["claim"] for row in rows] == ["better", "identity", "linear", "cheaper", "tuned"]
    shown = _run("show", "steady", cwd=tmp_path).stdout
    assert "supported at this scale" in shown
    assert "stale" not in shown
    assert "✔ 5" in _run("papers", "steady", cwd=tmp_path).stdout


def test_status_1_where_an_exact_check_fails_or_something_could_not_run(tmp_path: Path) -> None:
    assert _run("verify", "troubled:worse", cwd=tmp_path).returncode == 0
    assert _run("verify", "troubled:exact_nan", cwd=tmp_path).returncode == 1
    result = _run("verify", "troubled:raises", cwd=tmp_path)
    assert result.returncode == 1
    assert "RuntimeError: the component broke (trial 0" in result.stdout
    defect = _run("verify", "troubled:control_passes", "--controls", cwd=tmp_path)
    assert "1 claim(s) have a control that passes or could not run" in defect.stdout


def test_publish_appends_and_stale_selects(tmp_path: Path) -> None:
    results = tmp_path / "results"
    env = {"COROLLARY_RESULTS": str(results)}
    assert _run("verify", "steady:better", "--publish", cwd=tmp_path, **env).returncode == 0
    rows = Store(results).rows("steady")
    assert len(rows) == 1
    assert rows[0]["control_verdict"] is not None, "a published verdict comes with its control"
    assert "traceback" not in rows[0]
    again = _run("verify", "steady", "--stale", "--json", "-", cwd=tmp_path, **env)
    assert [row["claim"] for row in json.loads(again.stdout)] == ["identity", "linear", "cheaper", "tuned"]
    unwritable = _run("verify", "steady:better", "--publish", cwd=tmp_path, COROLLARY_RESULTS="/proc/none")
    assert unwritable.returncode == 2
    assert "cannot write" in unwritable.stderr


def test_missing_backend_package_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('ray')\n")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    result = _run("verify", "steady:better", "--backend", "ray", "--jobs", "2", cwd=tmp_path, PYTHONPATH=path)
    assert result.returncode == 2
    assert "backend 'ray' needs the extra 'ray': pip install 'corollary[ray]'" in result.stderr


def test_unwritable_json_leaves_nothing_behind(tmp_path: Path) -> None:
    result = _run("verify", "steady:identity", "--json", "none/out.json", cwd=tmp_path)
    assert result.returncode == 2
    assert "cannot write 'none/out.json'" in result.stderr
