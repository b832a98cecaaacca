"""The page's style sheet: system fonts, two palettes, one column that also fits a phone.

The arms' colours are Okabe and Ito's, which stay apart in the common forms of colour blindness;
in the dark they are lightened. An arm keeps its colour and its marker through the whole page.
"""

CSS = """\
:root {
  color-scheme: light dark;
  --paper: #ffffff; --raised: #f6f7f8; --ink: #1b1f24; --muted: #5d6672; --rule: #dde1e6;
  --good: #00795a; --bad: #b3400a; --none: #5d6672; --warn: #fdf3dc; --warn-edge: #d99a00;
  --arm-baseline: #4a525c; --arm-sbp: #0072b2; --arm-unconditional: #d98200;
  --arm-random-pairs: #b8578f; --arm-oracle: #009e73; --arm-baseline-all-in: #8b94a0;
  --arm-other0: #6f4bb2; --arm-other1: #b3400a; --arm-other2: #3f8fa8;
  --part-seed: #aab2bd; --part-embedding: #cc79a7; --part-tuning: #0072b2;
  --part-sampling: #56b4e9; --part-arm: #3d444d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --raised: #1d2126; --ink: #e6e9ec; --muted: #9aa4b0; --rule: #333a42;
    --good: #3ecfa3; --bad: #f08a5d; --none: #9aa4b0; --warn: #2b2515; --warn-edge: #b98a1e;
    --arm-baseline: #c3cad3; --arm-sbp: #56b4e9; --arm-unconditional: #f0a93c;
    --arm-random-pairs: #e08fc0; --arm-oracle: #2cc79c; --arm-baseline-all-in: #7f8995;
    --arm-other0: #ab90e8; --arm-other1: #f08a5d; --arm-other2: #7cc7dd;
    --part-seed: #69727d; --part-embedding: #cc79a7; --part-tuning: #3a8fd0;
    --part-sampling: #8fd0f5; --part-arm: #c3cad3;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main, header, footer { max-width: 68rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 3.5rem; }
footer { padding-top: 2rem; padding-bottom: 4rem; color: var(--muted); font-size: .85rem; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0; }
h2 {
  font-size: 1.25rem; font-weight: 650; letter-spacing: -.005em; margin: 0 0 .35rem;
  padding-top: 2.2rem;
}
h3 { font-size: .95rem; font-weight: 650; margin: 1.8rem 0 .5rem; }
section + section { margin-top: 1.2rem; }
p { max-width: 44rem; margin: .4rem 0 .9rem; }
.eyebrow { color: var(--muted); font-size: .85rem; margin: 0 0 .5rem; }
.lead { font-size: 1.15rem; line-height: 1.5; margin: 1.1rem 0 1.6rem; }
.note, figcaption, .caveats { color: var(--muted); font-size: .87rem; }
.caveats { max-width: 44rem; padding-left: 1.1rem; margin: 1.2rem 0 0; }
.caveats li { margin: .25rem 0; }
code, .mono { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.command {
  display: block; background: var(--raised); border-radius: 6px; padding: .7rem .9rem;
  overflow-wrap: anywhere;
}
.claims { list-style: none; margin: 0; padding: 0; border-top: 1px solid var(--rule); }
.claims li {
  display: grid; grid-template-columns: 15rem 1fr; gap: 1rem; padding: .7rem 0;
  border-bottom: 1px solid var(--rule);
}
.mark { font-weight: 600; font-size: .95rem; line-height: 1.6; }
.mark b { display: inline-block; width: 1.5em; }
.claim::first-letter { text-transform: uppercase; }
.claim { display: inline-block; }
.mark.yes { color: var(--good); } .mark.no { color: var(--bad); } .mark.open { color: var(--none); }
.warning {
  background: var(--warn); border-left: 3px solid var(--warn-edge); border-radius: 0 6px 6px 0;
  padding: .7rem .9rem; max-width: 44rem; margin: .8rem 0 1.2rem;
}
.scroll { overflow-x: auto; margin: .6rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; }
th {
  text-align: left; font-weight: 500; color: var(--muted); font-size: .8rem; line-height: 1.3;
  vertical-align: bottom; border-bottom: 1px solid var(--ink); padding: .4rem .9rem .4rem 0;
}
td {
  padding: .45rem .9rem .45rem 0; border-bottom: 1px solid var(--rule); vertical-align: baseline;
}
th.n, td.n { text-align: right; }
td.n, td.arm { white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
td small, dd small { color: var(--muted); font-size: .82em; }
tr.total td { border-bottom: 0; font-weight: 600; }
.barred td:nth-child(2) { width: 45%; }
.hidden { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
.key { display: inline-block; width: 1.15em; font-size: .95em; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; margin: 1rem 0 0; }
.swatch {
  display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .45em;
}
.grid {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
  gap: 1rem 3rem; align-items: start;
}
.grid > * { min-width: 0; }
.grid h3:first-child { margin-top: .6rem; }
figure { margin: .9rem 0 .6rem; }
figcaption { margin-top: .3rem; line-height: 1.45; }
svg.plot { display: block; width: 100%; height: auto; overflow: visible; max-width: 34rem; }
dl {
  display: grid; grid-template-columns: max-content 1fr; margin: .6rem 0 1rem;
  font-size: .9rem;
}
dt, dd { padding: .32rem 0; border-bottom: 1px solid var(--rule); margin: 0; }
dt { color: var(--muted); padding-right: 1.4rem; } dd { text-align: right; }
dl:not(.verbatim) dt::first-letter, th::first-letter { text-transform: uppercase; }
.verbatim dt { font: .92em/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.bar { display: block; height: .5rem; border-radius: 2px; background: var(--arm-sbp); }
.texts {
  display: grid; grid-template-columns: 1fr 1fr; border: 1px solid var(--rule);
  border-radius: 8px; margin: .8rem 0 1.1rem; overflow: hidden;
}
.texts > div { padding: .8rem 1rem 1rem; min-width: 0; }
.texts > div + div { border-left: 1px solid var(--rule); background: var(--raised); }
.texts h4 { font-size: .8rem; font-weight: 500; color: var(--muted); margin: 0 0 .5rem; }
.texts h4 b { color: var(--ink); font-weight: 600; }
.text {
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; line-height: 1.5;
  font-family: Charter, "Bitstream Charter", Georgia, Cambria, serif;
}
details { border-bottom: 1px solid var(--rule); }
summary { cursor: pointer; padding: .6rem 0; font-size: .92rem; }
details td:first-child { color: var(--muted); }
details td { overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main, header, footer { padding-left: 1rem; padding-right: 1rem; }
  header { padding-top: 2rem; }
  h1 { font-size: 1.5rem; }
  .lead { font-size: 1.05rem; }
  .claims li { grid-template-columns: 1fr; gap: .1rem; }
  .texts { grid-template-columns: 1fr; }
  .texts > div + div { border-left: 0; border-top: 1px solid var(--rule); }
  .pinned td:first-child, .pinned th:first-child {
    position: sticky; left: 0; background: var(--paper);
  }
}
@media print { body { font-size: 12px; } section { break-inside: avoid; } }
"""
