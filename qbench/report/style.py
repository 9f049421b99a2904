"""How `report.html` looks. Contrast of every text is at least 4.5 : 1 on its ground, in light and in dark."""

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbf9; --card: #fff; --text: #1d232a; --quiet: #56616d; --line: #d9dde1;
  --ink: #2f78b3; --soft: #d3e2ef; --good: #1a6b3c; --good-ground: #e2f3e8; --bad: #a3211c;
  --bad-ground: #fbe5e3; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181c; --card: #1b2127; --text: #e6eaee; --quiet: #a3afba;
  --line: #333c45; --ink: #6db3ea; --soft: #2a4258; --good: #7fd8a2; --good-ground: #173324;
  --bad: #ff9d95; --bad-ground: #46201e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
header, main { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
.kicker { margin: 0; color: var(--quiet); font-size: .85rem; letter-spacing: .08em; text-transform: uppercase; }
h1 { margin: .1rem 0 .8rem; font-size: clamp(1.4rem, 4.5vw, 2rem); line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 .5rem; font-size: 1.2rem; }
p { max-width: 46rem; margin: 0 0 .9rem; color: var(--quiet); }
.verdict { display: inline-block; margin: 0; padding: .3rem .8rem; border-radius: .4rem; font-weight: 600; }
.good { background: var(--good-ground); color: var(--good); }
.bad { background: var(--bad-ground); color: var(--bad); }
section { margin: 1.5rem 0; padding: 1.1rem 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.frame { position: relative; overflow-x: auto; }
.frame:focus-visible, summary:focus-visible { outline: 2px solid var(--ink); outline-offset: 2px; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
caption { padding-bottom: .3rem; color: var(--quiet); text-align: left; font-size: .85rem; }
th, td { padding: .32rem .9rem .32rem 0; border-top: 1px solid var(--line); text-align: left; vertical-align: middle; }
th:last-child, td:last-child { padding-right: 0; }
thead th { border-top: 0; color: var(--quiet); font-weight: 600; font-size: .8rem; vertical-align: bottom; }
th[scope=row] { min-width: 7.5rem; font-weight: 500; overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
thead .number { white-space: normal; }
.why { display: inline-block; min-width: 14rem; max-width: 26rem; white-space: normal; color: var(--quiet); }
.plot { min-width: 6.5rem; width: 24%; }
svg { display: block; width: 100%; }
svg.flat { height: .8rem; }
svg.tall { height: 4.5rem; }
.ink { fill: var(--ink); } .soft { fill: var(--soft); } .axis { fill: var(--text); }
.multiples { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1.1rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere; }
small { color: var(--quiet); }
details { margin: .5rem 0; }
summary { cursor: pointer; padding: .2rem 0; font-weight: 500; }
ul { margin: 0 0 .9rem; padding-left: 1.1rem; color: var(--quiet); overflow-wrap: anywhere; }
@media (max-width: 42rem) { caption, tbody, tr, th[scope=row], td { display: block; }
  table { display: block; } thead { display: block; position: absolute; width: 1px; height: 1px;
  overflow: hidden; clip-path: inset(50%); }
  tr { padding: .5rem 0; border-top: 1px solid var(--line); }
  th[scope=row], td { padding: .1rem 0; border: 0; }
  th[scope=row] { font-weight: 650; }
  td { display: flex; justify-content: space-between; gap: 1rem; white-space: normal; }
  td::before { content: attr(data-label); flex: none; max-width: 55%; color: var(--quiet); text-align: left; }
  td:empty { display: none; }
  td.plot { width: 100%; align-items: center; } td.plot svg { flex: 1; min-width: 0; }
  .why { min-width: 0; text-align: right; } }
@media (max-width: 30rem) { header, main { padding-left: .75rem; padding-right: .75rem; }
  section { padding: .9rem .8rem; } }
@media print { .frame { overflow: visible; } section { break-inside: avoid; } }
"""
