"""How the HTML report looks: its palette in light and dark, and its style sheet. Fonts are the system's own."""

from __future__ import annotations

# Name: light, dark. Text (ink, muted) has a contrast of at least 4.5:1 on bg, panel and half a cell; marks have 3:1.
# The seven hues follow Okabe and Ito (2008), darkened on white and lightened on black until they reach that.
PALETTE: dict[str, tuple[str, str]] = {
    "bg": ("#ffffff", "#14171b"),
    "panel": ("#f5f7f9", "#1c2127"),
    "ink": ("#1b1f24", "#e6e9ed"),
    "muted": ("#57606a", "#a3acb7"),
    "line": ("#d4dae1", "#363e48"),
    "grid": ("#e9edf1", "#272d35"),
    "before": ("#ccd4dd", "#3d4752"),
    "kept": ("#7d8894", "#828d99"),
    "blue": ("#0072b2", "#5db3ee"),
    "vermillion": ("#c95500", "#f08a4b"),
    "green": ("#008560", "#35c298"),
    "purple": ("#a8558a", "#e09bc2"),
    "orange": ("#b27600", "#efb73e"),
    "sky": ("#2f8cc4", "#9fd6f7"),
    "plum": ("#6a51a3", "#b3a4e6"),
}


def _variables(mode: int) -> str:
    return ";".join(f"--{name}:{colours[mode]}" for name, colours in PALETTE.items())


STYLE = f"""
:root{{color-scheme:light dark;{_variables(0)};
  --font:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans",Arial,sans-serif}}
@media screen and (prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%}}
body{{margin:0;background:var(--bg);color:var(--ink);
  font:16px/1.55 var(--font);
  font-variant-numeric:tabular-nums lining-nums}}
main{{max-width:70rem;margin:0 auto;padding:clamp(1.5rem,5vw,4rem) clamp(1rem,4vw,2.5rem)}}
header p.file{{margin:0;color:var(--muted);overflow-wrap:anywhere}}
h1{{margin:.4rem 0 1.2rem;font-size:clamp(1.5rem,1.1rem + 2vw,2.3rem);line-height:1.2;font-weight:650;
  letter-spacing:-.015em;overflow-wrap:anywhere;text-wrap:balance}}
h2{{margin:0 0 .6rem;font-size:1.3rem;line-height:1.3;font-weight:650;letter-spacing:-.005em}}
h3{{margin:0 0 .3rem;font-size:1rem;font-weight:600;overflow-wrap:anywhere}}
section{{margin-top:3.5rem;padding-top:1.6rem;border-top:1px solid var(--line)}}
section.first{{margin-top:2rem;padding-top:0;border-top:0}}
p{{margin:.4rem 0 .8rem;max-width:46rem;overflow-wrap:anywhere}}
p.note,figcaption,.legend{{color:var(--muted);font-size:.9rem}}
code,pre{{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.88em}}
pre{{margin:.4rem 0 1.2rem;padding:.8rem 1rem;background:var(--panel);border-radius:6px;
  white-space:pre-wrap;overflow-wrap:anywhere}}
dl.words{{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1rem;margin:0;max-width:52rem}}
dl.words dt{{color:var(--muted)}}
dl.words dd{{margin:0;overflow-wrap:anywhere}}
ul{{margin:.4rem 0 .8rem;padding-left:1.2rem;overflow-wrap:anywhere}}
.warnings{{margin:1.4rem 0 0;padding:.8rem 1.1rem;background:var(--panel);border-left:4px solid var(--vermillion);
  border-radius:0 6px 6px 0;max-width:52rem}}
.warnings p{{margin:.2rem 0}}
/* A shade at the side where more is to be seen; it is covered at the end of the way. */
.scroll{{overflow-x:auto;margin:.8rem 0 1.4rem;background:
  linear-gradient(to right,var(--bg) 40%,transparent) left/2rem 100% no-repeat local,
  linear-gradient(to left,var(--bg) 40%,transparent) right/2rem 100% no-repeat local,
  linear-gradient(to right,var(--line),transparent) left/.6rem 100% no-repeat scroll,
  linear-gradient(to left,var(--line),transparent) right/.6rem 100% no-repeat scroll}}
table{{border-collapse:collapse;font-size:.92rem;line-height:1.4}}
.wide table{{width:100%}}
th,td{{padding:.42rem .9rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}}
th{{color:var(--muted);font-weight:500;white-space:nowrap;border-bottom-color:var(--line)}}
th:first-child,td:first-child{{padding-left:0}}
th:last-child,td:last-child{{padding-right:0}}
.n{{text-align:right;white-space:nowrap}}
td.name{{min-width:9rem;max-width:24rem;overflow-wrap:anywhere}}
td.short{{white-space:nowrap}}
tr.strong td{{font-weight:650}}
tr.total td{{font-weight:650;border-top:1px solid var(--line);border-bottom:0}}
details{{margin:.8rem 0}}
summary{{cursor:pointer;color:var(--muted);font-size:.95rem;padding:.2rem 0}}
summary:hover{{color:var(--ink)}}
figure{{margin:.8rem 0 1.2rem;min-width:0}}
svg{{display:block;width:100%;height:auto}}
svg *{{stroke-linejoin:round;stroke-linecap:butt}}
.pair,.many,.beside{{display:grid;align-items:start}}
.pair{{grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem 2.5rem}}
.many{{grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:1.6rem 2.5rem;
  margin-top:1rem}}
.many>div{{max-width:27rem;min-width:0}}
.beside{{grid-template-columns:minmax(0,1fr);gap:0 2.5rem}}
@media (min-width:60rem){{.beside{{grid-template-columns:minmax(0,39rem) minmax(0,1fr)}}
  .beside>.legend{{margin-top:1.4rem}}}}
.legend{{list-style:none;padding:0;margin:.4rem 0 1rem}}
.legend li{{display:flex;gap:.6rem;align-items:baseline;margin:.3rem 0;overflow-wrap:anywhere}}
.legend.row{{display:flex;flex-wrap:wrap;gap:.1rem 1.6rem}}
.key{{flex:none;width:1.1em;text-align:center}}
.swatch{{flex:none;width:1.1em;height:.8em;border-radius:2px;align-self:center}}
.meter{{display:block;height:.55rem;border-radius:2px;background:var(--kept);min-width:1px}}
td.bar{{width:40%;vertical-align:middle}}
footer{{margin-top:3.5rem;padding-top:1rem;border-top:1px solid var(--line);color:var(--muted);font-size:.85rem;
  overflow-wrap:anywhere}}
@media (max-width:40rem){{table{{font-size:.84rem}}th,td{{padding:.4rem .55rem}}section{{margin-top:2.6rem}}}}
@media print{{main{{max-width:none;padding:0}}body{{font-size:11pt}}section{{margin-top:1.6rem}}
  figure,tr,.warnings{{break-inside:avoid}}h2,h3{{break-after:avoid}}.scroll{{overflow:visible}}
  details::details-content{{content-visibility:visible;block-size:auto}}}}
""".strip()
