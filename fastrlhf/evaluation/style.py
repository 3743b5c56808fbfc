"""Style sheet of the reports, for light and dark screens and for paper; it fetches nothing."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b2430; --soft: #5b6675; --rule: #e1e5ea;
  --accent: #2563c9; --good: #17785a; --good-back: #e3f4ec; --bad: #a63a1e; --bad-back: #fbe9e3;
  --c0: #2563c9; --c1: #d0601f; --c2: #14886a; --c3: #8a47b5; --c4: #a17a00; --c5: #7b8694; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2029; --ink: #e6eaf0; --soft: #9aa6b5;
  --rule: #2d3642;
  --accent: #7fb0ff; --good: #63d3aa; --good-back: #15332a; --bad: #ff9d7d; --bad-back: #3a2018;
  --c0: #6fa5ff; --c1: #f5935c; --c2: #46c79d; --c3: #c48bea; --c4: #d9b440; --c5: #8f9bab; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 44px 0 6px; letter-spacing: -0.005em; }
h3 { font-size: 15px; margin: 0 0 8px; }
p { margin: 6px 0 12px; max-width: 76ch; }
.lead { color: var(--soft); font-size: 17px; }
.note { color: var(--soft); font-size: 14px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin: 24px 0; }
.card, figure, .sample, details { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.card { padding: 16px 18px; }
.card .label { color: var(--soft); font-size: 13px; }
.card .value { font-size: 28px; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card .detail { color: var(--soft); font-size: 13px; }
.badge { display: inline-block; margin-top: 8px; padding: 1px 9px; border-radius: 99px; font-size: 12px;
  font-weight: 600; }
.badge.good { color: var(--good); background: var(--good-back); }
.badge.bad { color: var(--bad); background: var(--bad-back); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 14px;
  margin: 14px 0; }
figure { margin: 0; padding: 16px 18px 12px; }
figcaption { color: var(--soft); font-size: 14px; margin-top: 8px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); margin: 0 0 4px; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; }
svg .name { fill: var(--ink); font-size: 14px; }
svg .number { fill: var(--ink); font-size: 13px; font-variant-numeric: tabular-nums; }
svg .number { paint-order: stroke; stroke: var(--card); stroke-width: 5px; }
svg .grid { stroke: var(--rule); }
svg .axis { stroke: var(--soft); }
svg .reference { stroke: var(--soft); stroke-dasharray: 4 4; }
svg .line, svg .raw { fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg .line { stroke-width: 2.2; }
svg .raw { stroke-width: 1; opacity: 0.28; }
svg .whisker { fill: none; stroke: var(--ink); stroke-width: 1.5; }
svg .bar { opacity: 0.85; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 10px 0; background: var(--card);
  border: 1px solid var(--rule); }
th, td { text-align: left; padding: 7px 14px; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td.numeric { text-align: right; font-variant-numeric: tabular-nums; }
ol.stages { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; padding: 0;
  list-style: none; }
ol.stages li { border-top: 3px solid var(--accent); padding: 8px 4px 0 0; font-size: 14px; }
ol.stages b { display: block; font-size: 15px; }
.sample { padding: 14px 18px; margin: 12px 0; }
.sample .prompt { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; color: var(--soft);
  white-space: pre-wrap; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); gap: 16px;
  margin-top: 10px; }
.answers h3 { color: var(--soft); font-size: 13px; margin: 0; }
.answers p { margin: 2px 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.score { font-size: 12px; color: var(--soft); font-variant-numeric: tabular-nums; }
details { padding: 10px 18px; margin: 14px 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
@media print { body { background: #fff; } figure, .card, .sample { break-inside: avoid; } }
""" + "\n".join(
    f"svg .c{i}.line, svg .c{i}.raw {{ stroke: var(--c{i}); }} "
    f"svg .c{i}.bar, svg .c{i}.dot {{ fill: var(--c{i}); }}"
    f" .legend .c{i} {{ background: var(--c{i}); }}"
    for i in range(6)
)
