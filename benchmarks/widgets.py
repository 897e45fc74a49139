"""How long the live widgets of the book take from a move of a slider to the frame that shows it.

    python -m benchmarks.widgets [--json FILE] [--quick]

Puts every widget on a bare page in headless Chromium, moves every slider through its range, one
move after the other, and reads the page's own performance entries: *draw*, the numbers and the
marks, and *paint*, that and the browser's work on the frame that shows them. The wait for the
screen's next refresh in between is no work, and is left out. Where a picture takes several frames,
all of its work and all of those frames count. Bars: paint 8 ms in the median and 16 ms at the 99th
percentile, on an idle machine.

Beside it the browser's own figure, *interaction to next paint*: keys pressed on every slider with
the processor slowed down fourfold, from the key to the next frame, the wait included. Bar: 50 ms at
the 98th percentile. That frame shows the control, and on a processor so slow the picture comes in
the frames after it: *whole* is the time from the key to the last of them, likewise slowed down. The
processor is slow from the start, and a slider is pressed some time after it has been focused: both
the page's first picture and the driver's own script would otherwise count as a key's wait.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amortlib.observation import Select
from amortlib.problems import lorenz63
from benchmarks.report import Bar, arguments, finish, table
from tools.browser import ARGUMENTS, find_browser

KIT = Path(__file__).parent.parent / "book"
MEDIAN_MS, LAST_MS, NEXT_PAINT_MS = 8.0, 16.0, 50.0
SLOWER = 4
USUAL = {
    "energy landscape": ("break-even", 6.7),
    "ladder": ("break-even", 5.3),
    "one hole": ("break-even", 5.3),
    "gap explorer": ("break-even", 2.7),
    "faults": ("break-even", 5.0),
    "break-even": ("gap explorer", 0.38),
}
"""Median of draw over that of another widget in the same run: the simplest one, and for that one
the next. A ratio means the same on a machine that is slow or busy; paint would not show a draw ten
times as long, since most of it is the browser's own frame."""
ROOM = 5.0
"""Times the usual ratio: more than the coarse clock (0.1 ms of 0.3) and a busy machine make of it,
and less than ten."""
SETTLE_MS = 500

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A widget</title>
<link rel="stylesheet" href="live.css"><script>window.liveMeasure = true</script>
<script defer src="live.js"></script></head><body><main>{}</main></body></html>"""

MOVE = """async (moves) => {
  const inputs = [...document.querySelectorAll('.live input[type=range]')];
  const frame = () => new Promise((done) => requestAnimationFrame(() => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => { port1.close(); done(); };
    port2.postMessage(null);
  }));
  for (const input of inputs) {
    const [low, high] = [Number(input.min), Number(input.max)];
    for (let i = 0; i < moves; i++) {
      input.value = low + ((high - low) * ((i * 37) % moves)) / (moves - 1);
      input.dispatchEvent(new Event('input'));
      await frame();
      await frame();
      while (document.querySelector('.live[aria-busy]')) await frame();
    }
  }
  const of = (name) => performance.getEntriesByName(name).map((entry) => entry.duration);
  return { draw: of('live-draw'), paint: of('live-paint'), sliders: inputs.length };
}"""


WATCH = """window.interactions = new Map();
new PerformanceObserver((list) => {
  for (const { interactionId: id, duration } of list.getEntries())
    if (id) interactions.set(id, Math.max(duration, interactions.get(id) ?? 0));
}).observe({ type: 'event', durationThreshold: 16, buffered: true });"""


def next_paint(browser: Any, address: str, presses: int) -> dict[str, float]:
    """Milliseconds from a key to the next paint and to the whole picture, with a slow processor.

    The browser tells of no interaction below 16 ms: those count as 16.
    """
    tab = browser.new_page(viewport={"width": 800, "height": 900})
    tab.add_init_script(WATCH)
    # A slow machine is slow from the start: the page knows it when the first key comes.
    tab.context.new_cdp_session(tab).send("Emulation.setCPUThrottlingRate", {"rate": SLOWER})
    tab.goto(address, wait_until="load")
    tab.wait_for_selector(".live-plot")
    tab.wait_for_timeout(SETTLE_MS)
    made = 0
    for slider in tab.query_selector_all(".live input[type=range]"):
        slider.focus()
        tab.wait_for_timeout(SETTLE_MS)  # a key right after it waits for the driver's own script
        for i in range(presses):
            tab.keyboard.press("ArrowRight" if i % 7 else "ArrowLeft")
            tab.wait_for_timeout(40)
            made += 1
    tab.wait_for_timeout(500)
    slow = tab.evaluate("[...interactions.values()]")
    whole = tab.evaluate("performance.getEntriesByName('live-paint').map((e) => e.detail.whole)")
    tab.close()
    times = np.array(slow + [16.0] * max(0, made - len(slow)))
    return {
        "interactions": made,
        "median": float(np.median(times)),
        "p98": float(np.percentile(times, 98)),
        "whole_median": float(np.median(whole)),
        "whole_p98": float(np.percentile(whole, 98)),
    }


def examples() -> dict[str, Any]:
    """The widgets of the book, as the chapters make them."""
    sys.path.insert(0, str(KIT))
    from _kit.break_even import break_even
    from _kit.faults import fault_explorer
    from _kit.heads import load_ou_head
    from _kit.holes import one_hole
    from _kit.ladder import refinement_ladder
    from _kit.landscape import energy_landscape
    from _kit.widgets import gap_explorer
    from _kit.windows import FixedSteps

    window = FixedSteps.in_place(lorenz63(noise=2.0, substeps=2, operator=Select((0, 1))))
    return {
        "energy landscape": energy_landscape(window, length=8, event=1),
        "ladder": refinement_ladder(steps=2),
        "one hole": one_hole(length=1),
        "gap explorer": gap_explorer(*load_ou_head()),
        "faults": fault_explorer(width=0.7),
        "break-even": break_even(solver=4e-3, head=2e-6, training=60.0),
    }


def measure(widgets: dict[str, Any], moves: int) -> dict[str, dict[str, float]]:
    """Percentiles in milliseconds of every widget."""
    from _kit.bundle import JS, page_script
    from playwright.sync_api import sync_playwright

    found = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(ARGUMENTS))
        Path(folder, "live.js").write_text(page_script(), encoding="utf-8")
        shutil.copy2(JS / "live.css", folder)
        for name, widget in widgets.items():
            path = Path(folder, "page.html")
            path.write_text(PAGE.format(widget.to_html()), encoding="utf-8")
            tab = browser.new_page(viewport={"width": 800, "height": 900})
            tab.goto(path.as_uri(), wait_until="load")
            tab.wait_for_selector(".live-plot")
            tab.evaluate(MOVE, 10)  # the first moves compile
            tab.evaluate("performance.clearMeasures()")
            times = tab.evaluate(MOVE, moves)
            found[name] = {"moves": len(times["paint"])}
            for what in ("draw", "paint"):
                for label, q in (("median", 50), ("p99", 99)):
                    found[name][f"{what}_{label}"] = float(np.percentile(times[what], q))
            tab.close()
            for key, value in next_paint(browser, path.as_uri(), max(5, moves // 10)).items():
                found[name][f"next_paint_{key}"] = value
        browser.close()
    return found


def speeds(found: dict[str, dict[str, float]]) -> list[Bar]:
    """That no widget has become slower beside another."""
    return [
        Bar.check(
            f"{name}: draw, median over that of {other}",
            found[name]["draw_median"] / max(found[other]["draw_median"], 0.1),
            "<=",
            ROOM * usual,
        )
        for name, (other, usual) in USUAL.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and say whether the bars hold."""
    args = arguments(__doc__.splitlines()[0], argv)
    found = measure(examples(), moves=20 if args.quick else 200)
    head = [
        "widget",
        "moves",
        "draw ms",
        "p99",
        "paint ms",
        "p99",
        "a second",
        "next paint ms",
        "p98",
        "whole ms",
        "p98",
    ]
    rows = [
        [
            name,
            f"{row['moves']}",
            *(f"{row[k]:.2f}" for k in ("draw_median", "draw_p99", "paint_median", "paint_p99")),
            f"{1e3 / row['paint_median']:.0f}",
            f"{row['next_paint_median']:.0f}",
            f"{row['next_paint_p98']:.0f}",
            f"{row['next_paint_whole_median']:.0f}",
            f"{row['next_paint_whole_p98']:.0f}",
        ]
        for name, row in found.items()
    ]
    print(table(head, rows))
    bars = []
    for name, row in found.items():
        bars.append(Bar.check(f"{name}: paint, median ms", row["paint_median"], "<=", MEDIAN_MS))
        bars.append(Bar.check(f"{name}: paint, p99 ms", row["paint_p99"], "<=", LAST_MS))
        slow = f"{name}: next paint at {SLOWER} times slower, p98 ms"
        bars.append(Bar.check(slow, row["next_paint_p98"], "<=", NEXT_PAINT_MS))
    bars += speeds(found)
    return finish(args, name="widgets", results=found, bars=bars, seeds={})


if __name__ == "__main__":
    sys.exit(main())
