"""`kakeya inspect`: what a recipe costs byte by byte, and what a calibration artefact holds.

Everything is asked of the library: page layouts, widths and sizes are those that an engine would
use, not a second computation of them.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from kakeya_vllm import config, lib

_BAR = 48  # characters of a whole page in the drawing
# Statistics of an artefact: name -> what it is of.
STATISTICS = {
    "k_mean": "keys before RoPE, mean",
    "k_var": "keys before RoPE, variance",
    "q_sq": "queries before RoPE, mean square",
    "q_mean": "queries before RoPE, mean",
    "v_mean": "values, mean",
    "v_var": "values, variance",
}


class InspectError(ValueError):
    """What was named is neither a recipe nor an artefact; says why and what is valid."""


def inspect(what: str, recipe: str | None = None, head_dim: int = 128) -> dict[str, Any]:
    """Everything that is printed, as data. ``what``: a recipe (preset, JSON or file) or the path
    of an artefact; ``recipe``: of an artefact, whose bits are shown (default: the default recipe);
    ``head_dim``: of a recipe, whose page is drawn."""
    if Path(what).suffix == ".safetensors" or _is_artefact(what):
        return _artefact(what, recipe or config.DEFAULT_RECIPE)
    if recipe is not None:
        raise InspectError(f"{what} is a recipe itself; --recipe is for artefacts")
    try:
        text = config.read_recipe(what, "inspect")
        return _recipe(text, head_dim)
    except (config.ConfigError, lib.KakeyaError) as error:
        raise InspectError(getattr(error, "text", None) or str(error)) from error


def _is_artefact(what: str) -> bool:
    """Whether a file of another name begins as safetensors do: eight bytes of length, then JSON."""
    path = Path(what)
    if "{" in what or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{"


# ---- recipes --------------------------------------------------------------------------------


def _recipe(text: str, head_dim: int) -> dict[str, Any]:
    library = lib.load()
    described = library.recipe_describe(text)
    sizes = []
    for d in lib.HEAD_DIMS:
        page = library.recipe_page_bytes(text, d)
        raw = 4 * d * lib.BLOCK_TOKENS
        bits = 8 * page / (2 * d * lib.BLOCK_TOKENS)
        sizes.append({"head_dim": d, "page_bytes": page, "ratio": raw / page, "bits": bits})
    codec = library.codec(text, _shape(1, 1, head_dim), _neutral(1, 1, head_dim, described))
    return {
        "kind": "recipe",
        "recipe": described,
        "sizes": sizes,
        "head_dim": head_dim,
        "page": _page(codec.page_layout(0), head_dim),
    }


def _page(layout: Any, head_dim: int) -> list[dict[str, Any]]:
    """Fields of a page in the order of their bytes; together they are all of it."""
    slots = layout.num_slots * layout.slot_bytes
    codes = layout.k_codes_and_v_codes_bytes
    fields = [
        ("header", layout.header_offset, layout.header_bytes, "magic, block index, slots' tokens"),
        ("codes", layout.k_codes_offset, codes, f"K, then V: {8 * codes // 128} bits a token"),
        ("statistics", layout.side_offset, layout.side_bytes, "scales and means of channels"),
        ("exact slots", layout.slots_offset, slots, f"{layout.num_slots} tokens in 8 bits"),
    ]
    end = layout.slots_offset + slots
    fields.append(("padding", end, layout.page_bytes - end, "zeros to the end"))
    return [
        {"field": name, "offset": at, "bytes": size, "is": text}
        for name, at, size, text in fields
        if size
    ]


def _shape(layers: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "num_kv_heads": kv_heads,
        "num_q_heads": kv_heads,
        "head_dim": head_dim,
        "max_position": 4096,
        "rope": None,
    }


def _neutral(layers: int, heads: int, head_dim: int, recipe: dict[str, Any]) -> bytes | None:
    """An artefact of equal channels, for recipes that want one: the layout depends on none."""
    if not recipe["needs_calibration"]:
        return None
    import numpy as np
    from safetensors.numpy import save

    zeros, ones = (np.full((layers, heads, head_dim), x, np.float32) for x in (0.0, 1.0))
    tensors = {name: zeros if "mean" in name else ones for name in STATISTICS}
    return save(tensors, metadata={"format": config.ARTEFACT_FORMAT})


# ---- artefacts ------------------------------------------------------------------------------


def _artefact(path: str, recipe: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        metadata = config.read_metadata(path)
        data = config.read_artefact(path)
        tensors = load(data)
    except (config.ConfigError, SafetensorError, OSError) as error:
        raise InspectError(str(error)) from error
    if metadata.get("format") != config.ARTEFACT_FORMAT:
        raise InspectError(
            f"{path} has the format {metadata.get('format')}; valid: {config.ARTEFACT_FORMAT}"
        )
    missing = sorted(set(STATISTICS) - set(tensors))
    if missing:
        raise InspectError(f"{path} has no {', '.join(missing)}")
    layers, heads, head_dim = tensors["k_mean"].shape
    try:
        text = config.read_recipe(recipe, "--recipe")
        codec = lib.load().codec(text, _shape(layers, heads, head_dim), data)
    except (config.ConfigError, lib.KakeyaError) as error:
        raise InspectError(getattr(error, "text", None) or str(error)) from error
    described = codec.describe()
    statistics = {
        name: {
            "is": STATISTICS[name],
            "least": float(tensors[name].min()),
            "mean": float(tensors[name].mean()),
            "most": float(tensors[name].max()),
        }
        for name in STATISTICS
    }
    bits = [
        {
            "layer": i,
            "slots": layer["slots"],
            "k": [_mean(head["k_widths"]) for head in layer["widths"]],
            "v": [_mean(head["v_widths"]) for head in layer["widths"]],
        }
        for i, layer in enumerate(described["layers"])
    ]
    return {
        "kind": "artefact",
        "path": str(path),
        "bytes": len(data),
        "metadata": metadata,
        "shape": {"layers": layers, "kv_heads": heads, "head_dim": head_dim},
        "statistics": statistics,
        "recipe": {"name": described["name"], "page_bytes": described["page_bytes"]},
        "fingerprint": described["fingerprint"],
        "bits": bits,
    }


def _mean(widths: list[int]) -> float:
    """Mean bits a value: units are of equal size."""
    return sum(widths) / len(widths)


# ---- output ---------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> str:
    return _recipe_report(found) if found["kind"] == "recipe" else _artefact_report(found)


def _recipe_report(found: dict[str, Any]) -> str:
    fields = ", ".join(f"{k} {v}" for k, v in found["recipe"].items() if k != "name")
    lines = [f"recipe {found['recipe']['name']}: {fields}", ""]
    lines.append("head_dim  bytes of a page  ratio to bf16  bits a value, all counted")
    for size in found["sizes"]:
        lines.append(
            f"{size['head_dim']:>8}  {size['page_bytes']:>15,}  {size['ratio']:>12.3f}x  "
            f"{size['bits']:>25.3f}"
        )
    total = sum(field["bytes"] for field in found["page"])
    lines += ["", f"A page at head_dim {found['head_dim']} (128 tokens of one KV head, K and V):"]
    for field in found["page"]:
        share = field["bytes"] / total
        bar = "#" * max(1, round(_BAR * share))
        lines.append(
            f"  {field['offset']:>6}  {field['field']:<12} {field['bytes']:>7,} B {share:>6.1%}  "
            f"{bar:<{_BAR}}  {field['is']}"
        )
    return "\n".join(lines)


def _artefact_report(found: dict[str, Any]) -> str:
    shape = found["shape"]
    lines = [
        f"{found['path']}: {found['bytes']:,} bytes, {shape['layers']} layers, "
        f"{shape['kv_heads']} KV heads, head_dim {shape['head_dim']}",
    ]
    for name, value in sorted(found["metadata"].items()):
        lines.append(f"  {name:<20} {value if len(value) <= 100 else value[:97] + '...'}")
    lines += ["", "statistic      least         mean          most          of"]
    for name, row in found["statistics"].items():
        lines.append(
            f"{name:<10} {row['least']:>12.4g}  {row['mean']:>12.4g}  {row['most']:>12.4g}    "
            f"{row['is']}"
        )
    lines += [
        "",
        f"Bits a value with {found['recipe']['name']} ({found['recipe']['page_bytes']:,} B a page, "
        f"tables {found['fingerprint'][:16]}); a digit is a KV head's mean, rounded",
        "layer  K           V           slots",
    ]
    for row in found["bits"]:
        keys, values = ("".join(str(round(x)) for x in row[stream]) for stream in "kv")
        lines.append(f"{row['layer']:>5}  {keys:<10}  {values:<10}  {row['slots']:>5}")
    return "\n".join(lines)


def picture(found: dict[str, Any]) -> str:
    """Bits by layer and head of an artefact as a page of HTML with one SVG; no script, no fonts,
    nothing from elsewhere."""
    rows, heads = found["bits"], found["shape"]["kv_heads"]
    cell, left, top = 26, 60, 40
    gap = left + heads * cell + 30
    width, height = gap + heads * cell + 40, top + len(rows) * cell + 20
    parts = []
    for title, x0, stream in (("K", left, "k"), ("V", gap, "v")):
        parts.append(f'<text x="{x0}" y="{top - 12}">{title}, bits a value by KV head</text>')
        for row in rows:
            for head, bits in enumerate(row[stream]):
                # Widths go from 0 to 6.
                shade = round(255 - 200 * bits / 6)
                x, y = x0 + head * cell, top + row["layer"] * cell
                ink = "#fff" if shade < 130 else "#000"
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                    f'fill="rgb({shade},{shade},255)"><title>layer {row["layer"]}, head {head}, '
                    f"{title}: {bits:.2f} bits</title></rect>"
                    f'<text x="{x + cell / 2 - 0.5}" y="{y + 17}" text-anchor="middle" '
                    f'fill="{ink}">{bits:.1f}</text>'
                )
    for row in rows:
        y = top + row["layer"] * cell + 17
        parts.append(f'<text x="{left - 8}" y="{y}" text-anchor="end">{row["layer"]}</text>')
    title = html.escape(f"{found['recipe']['name']}, {Path(found['path']).name}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font:14px sans-serif}text{font:11px sans-serif}</style>"
        f'<h1>{title}</h1><svg width="{width}" height="{height}" role="img" '
        f'aria-label="bits by layer and head">{"".join(parts)}</svg>'
        f"<pre>{html.escape(report(found))}</pre></html>\n"
    )


def inspect_command(args: Any) -> None:
    """`kakeya inspect`: prints, and writes what --json and --html name."""
    from kakeya_vllm.evaluation.command import write_json
    from kakeya_vllm.progress import write_atomically

    try:
        found = inspect(args.what, args.recipe, args.head_dim)
    except InspectError as error:
        raise SystemExit(f"kakeya: {error}") from None
    if args.html and found["kind"] != "artefact":
        raise SystemExit("kakeya: --html draws bits by layer and head, which an artefact decides")
    print(report(found))
    if args.json:
        write_json(args.json, found)
    if args.html:
        write_atomically(Path(args.html), picture(found).encode("utf-8"))
