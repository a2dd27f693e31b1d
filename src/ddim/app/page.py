"""The page's appearance: theme, styles, scripts, and pieces of HTML that several tabs share.

No font, style or script is fetched from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import gradio as gr

THEME = gr.themes.Base(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"],
)

CSS = """
.images { --size: 88px; display: grid; gap: 12px; list-style: none; margin: 0; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(var(--size), 1fr)); }
.images.fixed { grid-template-columns: repeat(var(--columns), minmax(0, var(--size))); }
.images li { margin: 0; min-width: 0; }
.images img, .images .empty, .stage img { display: block; width: 100%; image-rendering: pixelated;
  border-radius: 6px; background: var(--background-fill-secondary); margin: 0; }
.images img, .stage img { box-shadow: 0 0 0 1px var(--border-color-primary); }
.images .empty { border: 1px dashed var(--border-color-primary); box-sizing: border-box; }
.images button { display: block; width: 100%; padding: 0; border: 0; border-radius: 8px; background: none;
  cursor: pointer; outline-offset: 2px; }
.images button:hover { box-shadow: 0 0 0 2px var(--color-accent-soft), 0 0 0 4px var(--color-accent); }
.images button[aria-pressed=true] { box-shadow: 0 0 0 3px var(--color-accent); }
.images .label { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 6px; min-height: 1.5em;
  font-size: var(--text-sm); color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.images .label a { color: var(--link-text-color); text-decoration: underline; margin: 0; padding: 0; }
.status { display: grid; gap: 6px; min-height: 3.4em; align-content: start; font-variant-numeric: tabular-nums; }
.status .bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.status .bar span { display: block; height: 100%; background: var(--color-accent); }
.status p { margin: 0; }
.status.failed p { color: var(--error-text-color, #b91c1c); font-weight: 600; }
.lead { max-width: 46em; } .lead p { margin: 0 0 .5em; }
.rows { display: grid; gap: 14px; }
.rows section { display: grid; grid-template-columns: minmax(9em, 12em) 1fr; gap: 12px; align-items: center; }
.rows h3 { margin: 0; font-size: var(--text-md); } .rows small { color: var(--body-text-color-subdued); }
.stage { display: grid; gap: 12px; justify-items: start; }
.stage figure { margin: 0; width: min(100%, 280px); } .stage figcaption { font-size: var(--text-sm); }
.stage .controls { display: flex; gap: 12px; align-items: center; width: min(100%, 560px); }
.stage .controls input { flex: 1; accent-color: var(--color-accent); min-height: 44px; }
.stage .controls button, .draw button, .brush button { min-height: 44px; min-width: 5.5em; border-radius: 8px;
  cursor: pointer; border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill);
  color: var(--button-secondary-text-color); }
.draw canvas { width: min(100%, 280px); border-radius: 8px; touch-action: none; cursor: crosshair; display: block;
  margin-bottom: 8px; border: 1px solid var(--border-color-primary); box-sizing: border-box; }
.draw .tools { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; }
.draw .tools label { display: inline-flex; gap: 6px; align-items: center; }
.draw input[type=color] { width: 44px; height: 44px; padding: 2px; border-radius: 8px; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill); }
.brush { display: grid; gap: 10px; justify-items: start; }
.brush .sheet { position: relative; border-radius: 8px; overflow: hidden;
  box-shadow: 0 0 0 1px var(--border-color-primary); }
.brush .sheet > * { display: block; width: 100%; height: 100%; margin: 0; image-rendering: pixelated; }
.brush canvas { position: absolute; inset: 0; opacity: .75; touch-action: none; cursor: crosshair; }
.brush output { font-size: var(--text-sm); color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.brush .tools { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: center; }
.brush button { padding: 0 12px; font: inherit; }
.brush .tools label { display: inline-flex; gap: 6px; align-items: center; min-height: 44px; }
.brush .tools input { accent-color: var(--color-accent); }
.brush input[type=number] { width: 4em; min-height: 40px; padding: 0 6px; border-radius: 8px; font: inherit;
  color: var(--body-text-color); background: var(--input-background-fill);
  border: 1px solid var(--border-color-primary); }
.brush input[type=checkbox] { width: 20px; height: 20px; }
table.facts { border-collapse: collapse; width: 100%; max-width: 46em; font-variant-numeric: tabular-nums; }
table.facts, table.facts tr, table.facts th, table.facts td { border: 0 !important; }
table.facts th, table.facts td { text-align: start; padding: 5px 12px 5px 0 !important; vertical-align: top;
  border-bottom: 1px solid var(--border-color-primary) !important; overflow-wrap: anywhere; font-weight: inherit; }
.ways { display: grid; gap: 24px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.ways h3 { margin: 0 0 8px; } .ways .images.fixed { --size: 132px; margin-bottom: 8px; }
#seen .images.fixed { --size: 160px; }
.ends { align-items: flex-end; } .ends button { min-height: 44px; padding-inline: 10px; white-space: nowrap; }
#card table { display: block; overflow-x: auto; } #card th, #card td { overflow-wrap: normal; word-break: normal; }
table.facts th { width: 40%; color: var(--body-text-color-subdued); }
.dark input[type=range] { --neutral-200: var(--neutral-600); } /* Gradio's color of the track, which is too bright */
.dark .stage input, .dark .brush input { color-scheme: dark; }
#restored .images { --size: 120px; }
#inverted:not(:has(.ways)), #restored:not(:has(.rows)) { display: none; } /* the gap around it, too */
#header p { margin: 0 0 4px; overflow-wrap: anywhere; }
:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 2px; }
@media (max-width: 640px) {
  /* All tabs are visible; the hidden ones are those that Gradio measures. */
  .tab-container button { padding: 0 6px !important; font-size: 13px !important; }
  /* Gradio's margins take a sixth of the screen. */
  #header, .tabs { margin-inline: -20px; width: calc(100% + 40px) !important; }
  .images { --size: 68px; gap: 8px; }
  #restored .images { --size: 104px; }
  .rows section { grid-template-columns: 1fr; gap: 4px; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""

CLICKS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-value]');
  if (button) trigger('select', { value: Number(button.dataset.value) });
});
"""
"""Reports which image of `ddim.app.rendering.grid` was clicked."""


def header(model: str, images: str, names: Sequence[str] = ()) -> str:
    """Return the page's title, with the session's model, as HTML.

    Args:
        model: the model's name.
        images: what its images are.
        names: the models that the tab Model offers.

    Example:
        >>> header("mnist", "gray, 28 x 28 pixels", ["mnist", "faces"])[-100:]
        '<p>Model: <b id="model-name">mnist</b>, gray, 28 x 28 pixels; in the tab Model also <b>faces</b></p>'
    """
    others = ", ".join(f"<b>{escape(name)}</b>" for name in names if name != model)
    return (
        "<h1>ddim</h1><p>Denoising Diffusion Implicit Models</p>"
        f'<p>Model: <b id="model-name">{escape(model)}</b>, {escape(images)}'
        f"{f'; in the tab Model also {others}' if others else ''}</p>"
    )


def lead(*paragraphs: str) -> gr.HTML:
    """Return the introduction of a tab.

    Args:
        paragraphs: sentences, which may hold HTML.
    """
    return gr.HTML(f'<div class="lead">{"".join(f"<p>{text}</p>" for text in paragraphs)}</div>')


def status(text: str = "", fraction: float | None = None, details: str = "") -> str:
    """Return the state of a run as HTML.

    Args:
        text: read out by screen readers when it changes.
        fraction: of the work that is done, in [0, 1]; `None` for no bar.
        details: text that changes with each step and is not read out.

    Example:
        >>> status("Done.")
        '<div class="status"><p><span role="status">Done.</span></p></div>'
    """
    bar = ""
    if fraction is not None:
        percent = round(100 * fraction)
        bar = (
            f'<div class="bar" role="progressbar" aria-label="Progress" aria-valuenow="{percent}" aria-valuemin="0" '
            f'aria-valuemax="100"><span style="width:{percent}%"></span></div>'
        )
    more = f' <span aria-hidden="true">{escape(details)}</span>' if details else ""
    return f'<div class="status"><p><span role="status">{escape(text)}</span>{more}</p>{bar}</div>'


def failed(error: BaseException | str) -> str:
    """Return the reason of a failed run as HTML.

    Args:
        error: its message is shown as one sentence.

    Example:
        >>> failed("no image is pinned")
        '<div class="status failed"><p role="alert">No image is pinned.</p></div>'
    """
    text = " ".join(str(error).split())
    return f'<div class="status failed"><p role="alert">{escape(text[:1].upper() + text[1:])}.</p></div>'


def table(facts: Mapping[str, object]) -> str:
    """Return a table with one row per fact as HTML.

    Args:
        facts: values by their names.

    Example:
        >>> table({"PSNR": "30 dB"})
        '<table class="facts"><tbody><tr><th scope="row">PSNR</th><td>30 dB</td></tr></tbody></table>'
    """
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'
