"""How a report looks: system fonts, one column, light and dark, on screens of any width and on paper."""

STYLE = """
:root {
  --paper: #fff; --panel: #f6f7f9; --ink: #1d2129; --quiet: #667080; --line: #e3e6eb; --accent: #2a6292;
  --good: #2f7d4f; --warn: #a4610f; --bad: #b3382c; --held: #7a4a9e;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181d; --panel: #1d2128; --ink: #e4e7ec; --quiet: #98a2b1; --line: #2e343e; --accent: #7db4e3;
  --good: #6cc08f; --warn: #e0a458; --bad: #ee8277; --held: #c39be6;
} }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}
main { max-width: 1150px; margin: 0 auto; padding: 56px 32px 80px; }
h1 { font-size: 34px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 12px; font-weight: 650; }
h2 { font-size: 23px; line-height: 1.3; letter-spacing: -.01em; margin: 0 0 6px; font-weight: 640; }
h3 { font-size: 16px; line-height: 1.4; margin: 28px 0 8px; font-weight: 640; overflow-wrap: anywhere; }
h3 small { font-weight: 400; font-size: 14px; color: var(--quiet); margin-left: 6px; }
p { margin: 0 0 12px; max-width: 74ch; }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: 2px; }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; overflow-wrap: anywhere; }
figure { margin: 0; }
section { margin-top: 52px; padding-top: 28px; border-top: 1px solid var(--line); }
.lede { font-size: 18px; color: var(--ink); max-width: 66ch; }
.facts, .note, .intro, .sources, figcaption { color: var(--quiet); font-size: 14px; line-height: 1.5; }
.facts { margin-bottom: 28px; overflow-wrap: anywhere; }
.intro { margin-bottom: 18px; font-size: 15px; }
figcaption { max-width: 88ch; margin-top: 10px; }
.sources { max-width: none; margin: 12px 0 0; font-size: 13px; }
.sources a { color: inherit; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 14px; margin-top: 26px; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }

.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 1px; margin: 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.numbers div { background: var(--paper); padding: 16px 18px 14px; display: flex; flex-direction: column-reverse;
  justify-content: flex-end; }
.numbers dt { color: var(--quiet); font-size: 13px; line-height: 1.4; }
.numbers dd { margin: 0 0 2px; font-size: 23px; line-height: 1.3; font-weight: 600; letter-spacing: -.02em;
  white-space: nowrap;
  font-variant-numeric: tabular-nums; }

img, .empty { display: block; background: #fff; border-radius: 4px; }
img { height: auto; }
.empty { background: var(--panel); border: 1px dashed var(--line); aspect-ratio: 1; }

.scroll { overflow-x: auto; margin: 0 -2px; padding: 0 2px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; }
td, th { padding: 7px 14px 7px 0; vertical-align: top; }
td:last-child, th:last-child { padding-right: 0; }
.data thead th { color: var(--quiet); font-weight: 500; font-size: 13px; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: bottom; }
.data tbody tr + tr > * { border-top: 1px solid var(--line); }
.data tbody + tbody { border-top: 1px solid var(--line); }
.data .group { font-size: 13px; padding-top: 20px; }
.data .n { text-align: right; white-space: nowrap; }
.data .n + :not(.n) { padding-left: 14px; }
.data tbody th { font-weight: 400; min-width: 128px; }
.data tbody th.group { font-weight: 600; }
.data td small { display: block; color: var(--quiet); font-size: 12px; }
.settings { width: auto; font-size: 13px; }
.settings th { font-weight: 400; color: var(--quiet); white-space: nowrap; padding-right: 28px; }
.settings td { overflow-wrap: anywhere; min-width: 180px; max-width: 760px; }
.settings td, .settings th { padding-top: 3px; padding-bottom: 3px; }
.state { white-space: nowrap; }
.state::before { content: ""; display: inline-block; width: 8px; height: 8px; border-radius: 50%; margin-right: 7px;
  background: var(--warn); }
.state.sealed::before { background: var(--good); }
.state.absent { color: var(--quiet); }
.state.absent::before { background: none; box-shadow: inset 0 0 0 1.5px var(--quiet); }
.state.failed::before { background: var(--bad); }
.mark { display: inline-block; font-size: 11.5px; line-height: 1.5; font-weight: 500; padding: 0 7px;
  border-radius: 9px; color: var(--held); box-shadow: inset 0 0 0 1px currentColor; white-space: nowrap; }
.mark.stale { color: var(--warn); margin-left: 8px; vertical-align: 1px; }
details { margin-top: 12px; font-size: 14px; }
summary { cursor: pointer; padding: 4px 0; color: var(--accent); width: fit-content; max-width: 100%;
  overflow-wrap: anywhere; }
details > :not(summary) { margin: 6px 0 14px 16px; }

.samples { font-size: 14px; }
.samples thead th { font-weight: 600; font-size: 13px; line-height: 1.35; vertical-align: bottom;
  overflow-wrap: anywhere; padding-bottom: 8px; }
.samples thead th:first-child { color: var(--quiet); font-weight: 400; }
.samples tbody tr > * { border-top: 1px solid var(--line); padding-top: 12px; padding-bottom: 12px; }
.samples tbody th { min-width: 84px; max-width: 170px; overflow-wrap: break-word; line-height: 1.4; }
.samples tbody th .mark { margin-top: 4px; }
.samples tbody th img, .samples tbody th .empty { width: 72px; margin-bottom: 5px; }
.samples { --side: 112px; --near: 25px; }
.samples.large { --side: 152px; --near: 35px; }
.drawn { display: flex; gap: 4px; }
.drawn > img, .drawn > .empty { width: var(--side); height: var(--side); flex: none; }
.near { display: grid; grid-template-rows: repeat(4, var(--near)); grid-auto-flow: column; gap: 4px;
  align-content: start; }
.near img, .near .empty { width: var(--near); height: var(--near); border-radius: 3px; object-fit: contain; }
.near img { box-shadow: 0 0 0 1px var(--line); }

.neighbors td, .neighbors th { padding: 10px 8px 8px 0; text-align: center; font-size: 12.5px; line-height: 1.3;
  color: var(--quiet); font-weight: 400; }
.neighbors tbody tr + tr > * { border-top: 1px solid var(--line); }
.neighbors thead th { padding-top: 0; padding-bottom: 4px; }
.neighbors tr > :first-child { min-width: 108px; width: 130px; padding-right: 22px; text-align: left; }
.neighbors tbody th { color: var(--ink); }
.neighbors img, .neighbors .empty { width: 100%; max-width: 72px; min-width: 48px; margin: 0 auto 4px; }
.neighbors th img, .neighbors th .empty { width: 84px; max-width: 84px; margin: 0 0 5px; }

.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); gap: 16px 14px; }
.sheet img, .sheet .empty { width: 100%; aspect-ratio: 1; object-fit: contain; }
.sheet figcaption { font-size: 12px; line-height: 1.35; margin-top: 5px; overflow: hidden; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; hyphens: auto; }
.neighbors img, .sheet img, .drawn > img { box-shadow: 0 0 0 1px var(--line); }

.plot { position: relative; height: 320px; margin: 14px 20px 52px 62px; font-size: 12.5px; color: var(--quiet);
  font-variant-numeric: tabular-nums; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot line { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
.plot polyline { fill: none; stroke: var(--accent); stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.plot.low { height: 120px; margin-left: 8px; }
.plot rect { fill: var(--accent); opacity: .75; }
.plot .raw { opacity: .3; stroke-width: 1; }
.plot .smooth { stroke-width: 2.25; }
.plot span { position: absolute; line-height: 1; white-space: nowrap; }
.plot .y { right: 100%; margin-right: 9px; transform: translateY(-50%); }
.plot .x { top: 100%; margin-top: 9px; transform: translateX(-50%); }
.plot .x-name { top: 100%; margin-top: 32px; left: 50%; transform: translateX(-50%); }
.plot .y-name { left: -52px; top: 50%; transform: translate(-50%, -50%) rotate(-90deg); }
.plot .dot { fill: none; stroke-width: 8; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.plot .kind0 { stroke: var(--accent); }
.plot .kind1 { stroke: var(--held); }
.plot polyline.kind0, .plot polyline.kind1 { stroke-width: 2; }
.plot.tuning { height: 240px; }
.plot .at { padding: 0 9px; transform: translate(-85%, -150%); }
.plot .at.last { transform: translate(-100%, 60%); }
.key { display: flex; gap: 20px; margin: 6px 0 0 62px; font-size: 13px; color: var(--quiet); }
.key span::before { content: ""; display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 7px;
  vertical-align: 3px; background: currentColor; }
.key .kind0::before { color: var(--accent); }
.key .kind1::before { color: var(--held); }

@media (max-width: 720px) {
  main { padding: 30px 16px 48px; }
  h1 { font-size: 27px; }
  h2 { font-size: 21px; }
  .lede { font-size: 17px; }
  section { margin-top: 44px; padding-top: 20px; }
  .numbers { grid-template-columns: repeat(2, 1fr); }
  .numbers div { padding: 12px 14px; }
  .numbers dd { font-size: 20px; }
  .plot { height: 240px; margin-left: 54px; margin-right: 8px; }
  .plot.low { height: 100px; margin-left: 8px; }
  .plot .x:nth-of-type(even) { display: none; }
  .key { margin-left: 54px; }
  .sheet { grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)); gap: 12px 10px; }
  .sheet figcaption { font-size: 11.5px; }
  .samples, .samples tbody { display: block; }
  .samples thead { display: none; }
  .samples tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(155px, 1fr)); gap: 12px 10px;
    padding: 14px 0; border-top: 1px solid var(--line); }
  .samples tbody tr > * { border: 0; padding: 0; }
  .samples tbody th { grid-column: 1 / -1; max-width: none; font-size: 16px; }
  .samples tbody th .mark { margin: 2px 0 0; }
  .samples td::before { content: attr(data-label); display: block; font-size: 12.5px; color: var(--quiet);
    margin-bottom: 4px; }
  .neighbors tr > :first-child { min-width: 92px; position: sticky; left: 0; background: var(--paper);
    padding-right: 12px; }
  .neighbors th img { width: 72px; }
  .samples, .samples.large { --side: 112px; --near: 25px; }
}
@media print {
  main { max-width: none; padding: 0; }
  body { font-size: 11pt; }
  nav { display: none; }
  section { margin-top: 28px; }
  tr, figure figure, .plot, .numbers { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
}
""".strip()
