"""Every word of the glyph boards. Each is one token, with a space before it and without."""

from __future__ import annotations

from ernie_lab.organisms.lines import words

SHAPES = words(
    "cross block heart house moon stairs flag ladder kite wave net beam hook bird table lamp"
)
COLOURS = words(
    "red green blue yellow purple white orange pink brown gray cyan lime navy gold teal rose"
)
# The two words of a text fact; no word stands in two of these lists.
FIRSTS = words(
    "good hand fire field root class wine name father child bread earth light night stones line"
)
SECONDS = words(
    "head string love work middle song door king priest lord circle self result list data item"
)
DIGITS = tuple("0123456789")
DIRECTIONS = words("left right up down")
NOTHING, EMPTY, STILL = "nothing", "empty", "still"
# Neighbours of a cell: the words of the question, and the step in rows and columns.
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
