"""report.html in a real browser, without a network: silent, drawn, and readable."""

import json
import re

import pytest

from megatron_tikmix.monitoring.report import write_report
from tests.browser import find_browser, visit
from tests.make_run import make_run, many_domains

pytestmark = pytest.mark.skipif(
    find_browser() is None,
    reason="no Chromium or Chrome: `apt-get install chromium`, or whatever the system has for it",
)

# What a reader would see is wrong. Run by the page itself, at its end.
CHECK = """
<script>
const apart = (one, other) => one.right <= other.left + 1 || other.right <= one.left + 1
  || one.bottom <= other.top + 1 || other.bottom <= one.top + 1;
function unreadable(picture) {
  const found = [], box = (element) => element.getBoundingClientRect();
  if (!picture.querySelector(".main-svg")) return [`${picture.id}: not drawn`];
  for (const kind of [".ytick text", ".y2tick text", ".xtick text", ".x2tick text",
                      ".legendtext", ".slider-label"]) {
    const texts = [...picture.querySelectorAll(kind)].filter((text) => text.textContent.trim());
    texts.forEach((text, i) => {
      if (parseFloat(getComputedStyle(text).fontSize) < 10) found.push(`${kind} too small`);
      if (i && !apart(box(texts[i - 1]), box(text)))
        found.push(`${kind}: ${texts[i - 1].textContent} on ${text.textContent}`);
      if (box(text).left < box(picture).left - 1 || box(text).right > box(picture).right + 1)
        found.push(`${kind}: ${text.textContent} is cut off`);
    });
  }
  const cells = [...picture.querySelectorAll(".heatmap-label text, text.heatmap-label")];
  const tasks = picture.data[0].type === "heatmap" ? picture.data[0].x.length : 1;
  const width = picture._fullLayout.xaxis._length / tasks;
  cells.forEach((cell) => { if (box(cell).width > width) found.push(`cell ${cell.textContent}`); });
  return found.map((words) => `${picture.id}: ${words}`);
}
window.addEventListener("load", async () => {
  const pictures = [...document.querySelectorAll(".plotly-graph-div")];
  const found = pictures.flatMap(unreadable);
  if (document.documentElement.scrollWidth > window.innerWidth) found.push("scrolls sideways");
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  const influence = document.getElementById("influence");
  for (const step of influence?.layout.sliders?.[0]?.steps ?? []) {
    await Plotly.update(influence, ...step.args);
    if (!influence.querySelector(".heatmaplayer image")) found.push(`${step.label}: no heat map`);
  }
  for (const area of document.querySelectorAll(".nsewdrag")) {
    const {left, top, width, height} = area.getBoundingClientRect();
    const place = {clientX: left + 0.4 * width, clientY: top + 0.4 * height, bubbles: true};
    area.dispatchEvent(new MouseEvent("mousemove", place));
  }
  const findings = document.createElement("pre");
  findings.id = "findings";
  findings.textContent = JSON.stringify({found, pictures: pictures.map((picture) => picture.id)});
  document.body.append(findings);
});
</script></body>
"""


def checked(path, profile, width=1200):
    """What the page finds wrong with itself, its pictures, and its console."""
    page = path.with_name("checked.html")
    page.write_text(path.read_text(encoding="utf-8").replace("</body>", CHECK), encoding="utf-8")
    seen = visit(page.as_uri(), profile, size=(width, 900))
    findings = re.search(r'<pre id="findings">(.*?)</pre>', seen.dom, re.DOTALL)
    assert findings, seen.console
    answer = json.loads(findings[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return answer["found"], answer["pictures"], seen.console


@pytest.mark.parametrize(("count", "width"), [(6, 1200), (6, 700), (200, 1200)])
def test_the_report_is_silent_drawn_and_readable(tmp_path, count, width):
    names, shares = many_domains(count)
    tasks = [f"task_{number}" for number in range(4 if count < 20 else 30)]
    run, other = tmp_path / "run", tmp_path / "other"
    for seed, folder in enumerate((run, other)):
        make_run(folder, names, tasks, 6, seed, shares, max_epochs=0.5)
    found, pictures, console = checked(write_report(run, other), tmp_path / "profile", width)
    assert (found, console) == ([], [])
    changes = ["changes"] if count == 200 else []
    assert pictures == ["weights", *changes, "influence", "losses", "baseline", "consumption"]


def test_the_report_of_a_run_that_goes_on_is_silent(tmp_path):
    """At its first boundary, and before its first logged step."""
    make_run(tmp_path, ["<b>x</b>", "a & b"], ["t", "%{y} $x$"], stages=2, seed=0)
    for kept in (1, 0):
        for name, lines in (("metrics.jsonl", 12 * kept), ("mixture.jsonl", 1 + kept)):
            rows = (tmp_path / name).read_text().splitlines(keepends=True)
            (tmp_path / name).write_text("".join(rows[:lines]))
        found, pictures, console = checked(write_report(tmp_path), tmp_path / "profile")
        assert (found, console) == ([], [])
        assert ("influence" in pictures) == bool(kept)


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        ("<script>throw new Error('broken')</script>", "broken"),
        ("<script>console.warn('odd')</script>", "odd"),
        ("<img src='nowhere.png'>", "nowhere.png"),
        ("<script src='https://cdn.plot.ly/plotly.js'></script>", "cdn.plot.ly"),
        ("<script>fetch('https://example.com/')</script>", "example.com"),
    ],
)
def test_a_page_with_a_defect_is_found_out(tmp_path, defect, words):
    """Or the tests above could not fail; the report's own policy is what refuses the last three."""
    make_run(tmp_path, ["a", "b"], ["t"], stages=1, seed=0)
    page = write_report(tmp_path)
    whole = page.read_text(encoding="utf-8")
    # Without plotly, which takes seconds to read and has no part in this.
    bare = re.sub(r"<script>.*</script>", "", whole, flags=re.DOTALL)
    page.write_text(bare.replace("</body>", f"{defect}</body>"), encoding="utf-8")
    console = visit(page.as_uri(), tmp_path / "profile", milliseconds=1000).console
    assert any(words in line for line in console), console


def test_what_cannot_be_read_is_found_out(tmp_path):
    """Names that lie on each other: thirty of them in the height of three."""
    names, _ = many_domains(30)
    make_run(tmp_path, names, ["t"], stages=2, seed=0)
    path = write_report(tmp_path)
    squeezed = re.sub(r'("height":)\d+', r"\g<1>130", path.read_text(encoding="utf-8"))
    path.write_text(squeezed, encoding="utf-8")
    found, *_ = checked(path, tmp_path / "profile")
    assert any("influence: .ytick text: " in words for words in found)
