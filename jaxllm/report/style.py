"""The page's style sheet: one column on a phone, two plots side by side on a desk, light or dark as the reader's system is."""

CSS = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1c2024; --muted: #697079; --grid: #e4e6e9; --alarm: #d02f2f; --tint: #fff4d6;
  --run-0: #2f62d9; --run-1: #d9730d; --run-2: #0f8a5f; --run-3: #9a3fc4; --run-4: #0b8aa8; --run-5: #c2346f; }
@media (prefers-color-scheme: dark) { :root {
  --page: #131518; --card: #1b1e22; --ink: #e6e8ea; --muted: #9299a2; --grid: #30353b; --alarm: #ff7b72; --tint: #3d3413;
  --run-0: #7ea6ff; --run-1: #ffab5e; --run-2: #4fd1a0; --run-3: #cf95f0; --run-4: #5fcbe6; --run-5: #f586b3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 2px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 38px 0 12px; letter-spacing: -0.005em; }
h3 { font-size: 14px; margin: 22px 0 8px; }
p { margin: 0 0 10px; }
.quiet { color: var(--muted); }
.small { font-size: 13px; }
.alarm { color: var(--alarm); }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(158px, 1fr)); gap: 10px; margin-top: 20px; }
.facts .card { padding: 11px 14px 10px; }
.facts b { display: block; font-size: 21px; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts span { display: block; font-size: 12.5px; color: var(--muted); line-height: 1.4; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; }
figure { margin: 0; padding: 12px 12px 6px; }
figcaption { font-size: 14px; font-weight: 600; padding-left: 4px; }
figcaption span { font-weight: 400; color: var(--muted); font-size: 12.5px; margin-left: 4px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 12px; font-size: 14px; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; background: currentColor; }
.dash { display: inline-block; width: 22px; margin: 0 7px 4px 0; border-top: 2.5px dashed currentColor; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 7px 14px 7px 0; border-top: 1px solid var(--grid); }
tr:first-child > * { border-top: 0; }
th { font-weight: 600; }
td:last-child, th:last-child { padding-right: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.key { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; white-space: nowrap; }
td.differs { background: var(--tint); }
.pad { padding: 6px 16px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: Charter, Georgia, "Times New Roman", serif;
  font-size: 15.5px; line-height: 1.55; padding: 10px 0; border-top: 1px solid var(--grid); }
.text:first-of-type { border-top: 0; }
.text i { font-style: normal; color: var(--muted); }
details { margin-top: 8px; }
details > summary { cursor: pointer; padding: 9px 16px; font-size: 14px; }
details > .pad { border-top: 1px solid var(--grid); }
pre { margin: 0; padding: 12px 0; font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-x: auto; }
footer { margin-top: 44px; font-size: 12.5px; color: var(--muted); }
@media (max-width: 720px) {
  main { padding: 18px 12px 40px; }
  .plots { grid-template-columns: minmax(0, 1fr); }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  figure { padding: 10px 6px 4px; }
  svg text { font-size: 12.5px !important; }
  h1 { font-size: 21px; } }
@media print { .card { break-inside: avoid; } main { max-width: none; } }
"""
