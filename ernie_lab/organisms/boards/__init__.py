"""Glyph boards: the pictures, clips, facts and questions of `tiny-vl`, and how it is trained."""
