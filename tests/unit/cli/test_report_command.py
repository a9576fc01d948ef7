"""``tikmix report`` as a user starts it; what the page holds is tests/unit/monitoring's."""

from tests.make_run import make_run


def test_the_report_is_written_and_its_path_printed(tmp_path, run_command):
    for name in ("run", "baseline"):
        make_run(tmp_path / name, ["a", "b"], ["t"], stages=2, seed=0)
    path = tmp_path / "run" / "report.html"
    for more in ([], ["--baseline", tmp_path / "baseline"]):
        done = run_command("report", tmp_path / "run", *more)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")
        assert ("Against the baseline" in path.read_text()) == bool(more)
        path.unlink()


def test_a_baseline_that_is_not_there(tmp_path, run_command):
    make_run(tmp_path, ["a", "b"], ["t"], stages=2, seed=0)
    done = run_command("report", tmp_path, "--baseline", tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "nowhere" in done.stderr
    assert done.stderr.count("\n") == 1
