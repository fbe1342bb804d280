"""Texts that run something in a page that takes them for HTML or follows every link; each says so by `window.__xss`."""

from __future__ import annotations

RUN = "window.__xss=1"
ELSEWHERE = "https://elsewhere.invalid"

HTML = [
    f"<script>{RUN}</script>",
    f"<SCRIPT SRC={ELSEWHERE}/x.js></SCRIPT>",
    f"<img src=x onerror={RUN}>",
    f'<img src="{ELSEWHERE}/pixel.png">',
    f"<svg onload={RUN}><script>{RUN}</script></svg>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={RUN}></style></mglyph></table></mtext></math>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<iframe src=javascript:parent.{RUN}></iframe>",
    f"<object data=javascript:{RUN}></object><embed src=javascript:{RUN}>",
    f"<body onload={RUN}><details open ontoggle={RUN}>x</details>",
    f"<input autofocus onfocus={RUN}><select autofocus onfocus={RUN}></select>",
    f"<video><source onerror={RUN}></video><audio src=x onerror={RUN}>",
    f"<form action={ELSEWHERE}><button formaction=javascript:{RUN}>go</button></form>",
    f"<a href=javascript:{RUN}>x</a><a href=' &#106;avascript:{RUN}'>x</a>",
    f"<base href={ELSEWHERE}/><meta http-equiv=refresh content='0;{ELSEWHERE}'>",
    f"<link rel=stylesheet href={ELSEWHERE}/x.css><link rel=prefetch href={ELSEWHERE}/y>",
    f"<style>@import '{ELSEWHERE}/x.css'; body {{ background: url({ELSEWHERE}/x.png) }}</style>",
    f"<template><script>{RUN}</script></template><noscript><p title='</noscript><img src=x onerror={RUN}>'></noscript>",
    f"</textarea></title></style></script></article></main><script>{RUN}</script>",
    f"<!--><img src=x onerror={RUN}>--><![CDATA[<img src=x onerror={RUN}>]]>",
    f"<p style='position:fixed;inset:0;background:url({ELSEWHERE}/x.png)' onclick={RUN}>x</p>",
    f"<marquee onstart={RUN}>x</marquee><x contenteditable onblur={RUN} tabindex=1 id=x>x</x>",
    f"&lt;script&gt;{RUN}&lt;/script&gt; &#60;img src=x onerror={RUN}&#62;",
    "<form id=message><input name=send><input name=log></form><a id=document name=forms></a>",
]
MARKDOWN = [
    f"[click](javascript:{RUN}) [click](JaVaScRiPt:{RUN}) [click](java\tscript:{RUN})",
    f"[click](<javascript:{RUN}>) [click](&#106;avascript:{RUN}) [click](javascript&colon;{RUN})",
    f"[click](data:text/html,<script>{RUN}</script>) [click](data:text/html;base64,PHNjcmlwdD4=)",
    f"[click](vbscript:{RUN}) [click](blob:{RUN}) [click](file:///etc/passwd) [click](\x01javascript:{RUN})",
    f"<javascript:{RUN}> <data:text/html,x>",
    f"![picture](javascript:{RUN}) ![picture]({ELSEWHERE}/picture.png)",
    f"![picture](data:image/svg+xml,<svg/onload={RUN}>)",
    f'![picture](x" onerror="{RUN}) [click](x \'y" onmouseover="{RUN}\')',
    f"[click][1]\n\n[1]: javascript:{RUN}\n",
    f'```"><img src=x onerror={RUN}>\n</code></pre><script>{RUN}</script>\n```',
    f"```html\n<script>{RUN}</script><img src=x onerror={RUN}>\n```",
    f"```__proto__\nconstructor\n```\n\n```constructor\n{RUN}\n```\n\n```toString\nx\n```",
    f"`<img src=x onerror={RUN}>` **<b onmouseover={RUN}>x</b>** _<i>x</i>_ ~~<s>x</s>~~",
    f"| <img src=x onerror={RUN}> | [a](javascript:{RUN}) |\n|---|---|\n| <svg onload={RUN}> | x |",
    f"- <img src=x onerror={RUN}>\n  1. [x](javascript:{RUN})\n> <script>{RUN}</script>",
    f"# <img src=x onerror={RUN}>\n\n${{{RUN}}} {{{{{RUN}}}}} $$\\href{{javascript:{RUN}}}{{x}}$$",
    f'//elsewhere.invalid [click](//elsewhere.invalid/x) {ELSEWHERE} [click]({ELSEWHERE} "<img onerror={RUN}>")',
]
TEXTS = [*HTML, *MARKDOWN]
LONG = {
    "brackets": "[" * 9000 + "](javascript:" * 20,
    "stars": "*" * 9000 + "_" * 9000,
    "openings": "**a " * 4000,
    "lines": "_a " * 5000,
    "quotes": "> " * 3000 + "x",
    "backticks": "`" * 2999 + "x" + "`" * 2998,
    "fences": "`" * 3000 + " " * 3000 + "`",
    "tilde fences": "~" * 100_000 + "`",
    "long fences": "`" * 100_000 + "\nx\n" + "`" * 99_999,
    "headings": "# a" + " " * 3000 + "b",
    "tables": f"| a\n{' ' * 3000}-{' ' * 3000}x",
    "lists": "".join(f"{'  ' * depth}- x\n" for depth in range(150)),
    "blanks": "- x" + "\n" * 9000 + "x",
    "tags": "<" * 9000,
    "code": "```html\n" + "a" * 40_000 + "\n```",
    "strings": "```python\n" + "'\"`" * 9000 + "\n```",
}
"""Texts that take a careless parser of Markdown minutes, or a deep stack."""
