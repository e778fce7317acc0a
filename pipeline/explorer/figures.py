"""The table and the map, by Bokeh: their model as JSON, and the scripts that draw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mervcache.errors import UserError

PALETTE = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626", "#4b5563")
# The path is the clip's id without its dataset, which has a column: the end of a name tells clips apart.
WIDTHS = {"path": 300, "dataset": 80, "kind": 55, "caption": 280, "tokens": 80, "questions": 75, "wrong": 50}
MISSING = "the explorer draws with Bokeh, which is not installed: pip install 'merv-pipeline[view]'"


def bokeh_scripts() -> dict[str, bytes]:
    """Bokeh's own scripts, by file name, from the installed package: the page loads nothing from elsewhere."""
    try:
        from bokeh.resources import Resources
    except ModuleNotFoundError as error:
        raise UserError(MISSING) from error
    resources = Resources(mode="absolute", components=["bokeh", "bokeh-tables"], minified=True)
    return {Path(path).name: Path(path).read_bytes() for path in resources.js_files}


def table_and_map(columns: Mapping[str, Sequence[Any]], *, with_answers: bool) -> Any:
    """JSON of one document: a data table and a scatter plot that share their rows, selection and filter.

    The page fills in the coordinates of the encoder that is chosen, and the filter.
    """
    try:
        from bokeh.embed import json_item
    except ModuleNotFoundError as error:
        raise UserError(MISSING) from error
    from bokeh.layouts import column
    from bokeh.models import (
        BooleanFilter,
        CategoricalColorMapper,
        CDSView,
        ColumnDataSource,
        DataTable,
        TableColumn,
        Title,
    )
    from bokeh.plotting import figure

    count = len(columns["clip"])
    source = ColumnDataSource({**columns, "x": [0.0] * count, "y": [0.0] * count}, name="clips")
    view = CDSView(filter=BooleanFilter(booleans=[True] * count))
    shown = [name for name in WIDTHS if with_answers or name not in ("questions", "wrong")]
    table = DataTable(
        source=source,
        view=view,
        name="table",
        columns=[
            TableColumn(field=name, title="clip" if name == "path" else name, width=WIDTHS[name]) for name in shown
        ],
        height=340,
        sizing_mode="stretch_width",
        index_position=None,
        autosize_mode="none",
        reorderable=False,
    )
    plot = figure(
        name="map",
        title=Title(text_font_style="normal", text_color="#6b7280"),  # its text is of the encoder that is chosen
        title_location="below",
        height=340,
        sizing_mode="stretch_width",
        tools="pan,wheel_zoom,box_zoom,tap,hover,reset",
        tooltips=[("", "@clip"), ("", "@caption")],
        active_scroll="wheel_zoom",
        output_backend="canvas",
    )
    datasets = sorted(set(columns["dataset"]))
    colours = [PALETTE[place % len(PALETTE)] for place in range(len(datasets))]
    plot.scatter(
        "x",
        "y",
        source=source,
        view=view,
        size=8,
        alpha=0.75,
        line_color=None,
        nonselection_alpha=0.25,
        color={"field": "dataset", "transform": CategoricalColorMapper(factors=datasets, palette=colours)},
        legend_field="dataset",
    )
    plot.axis.visible = plot.grid.visible = False
    plot.legend.orientation, plot.legend.ncols = "horizontal", 3
    plot.add_layout(plot.legend[0], "above")  # within the plot it would cover points
    plot.legend.visible = len(datasets) > 1
    plot.toolbar.logo = None
    return json_item(column(plot, table, sizing_mode="stretch_width", name="both"))
