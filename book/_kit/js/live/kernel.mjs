/** What a kernel answers with beside the page's own, under a name of its own in the legend. */

/**
 * Put up the legend, with the answer's name where there is one. Returns what reads the answer, `{}`
 * without a kernel. `entries` as of `Stage.legend`; `mark` is the answer's colour and shape.
 */
export function kernelLegend(stage, entries, mark) {
  const answer = () => stage.get("overlay") ?? {};
  stage.follow("overlay", () => stage.legend(answer().label ? [...entries, [answer().label, ...mark]] : entries));
  return answer;
}
